//! `sample`: talk to a checkpoint.

use std::io::{BufRead, IsTerminal, Write};

use cosmos_run::sample::Chat;

use crate::args::{ModelArgs, SamplingArgs};
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Arguments of `sample`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Answer this and end; without it, every line of standard input is a turn
    #[arg(long, short, value_name = "TEXT")]
    prompt: Option<String>,
    /// What the system turn says, for models with a chat template
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Continue the text as it stands, without the chat template
    #[arg(long, conflicts_with = "system")]
    raw: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let mut chat = Chat::load(&args.model.model, &args.model.device)?;
    let raw = args.raw || !chat.has_template();
    if raw && args.system.is_some() {
        return Err(Failure::usage(format!(
            "`{}` has no chat template, so there is no system turn",
            args.model.model.display()
        ))
        .with_hint("put the text into the prompt"));
    }
    let opening: Vec<(String, String)> = args.system.iter().map(|text| ("system".to_owned(), text.clone())).collect();
    let mut turns = opening.clone();
    let mut respond = |line: &str, turns: &mut Vec<(String, String)>, out: &mut Output| -> Result<(), Failure> {
        let prompt = if raw {
            line.to_owned()
        } else {
            turns.push(("user".to_owned(), line.to_owned()));
            chat.prompt(turns)?
        };
        let mut written = Ok(());
        let answer = chat.complete(&prompt, &args.sampling.params(), args.sampling.max_tokens, &mut |piece| {
            if written.is_ok() && !piece.is_empty() {
                written = out.text(piece).and_then(|()| out.flush());
            }
        })?;
        written?;
        out.line("")?;
        out.flush()?;
        turns.push(("assistant".to_owned(), answer));
        Ok(())
    };
    if let Some(prompt) = &args.prompt {
        respond(prompt, &mut turns, out)?;
        return Ok(Exit::Done);
    }
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        say("A line is a turn; an empty line starts over; Ctrl-D ends.\n");
    }
    let mut input = std::io::stdin().lock();
    loop {
        if interactive {
            say("> ");
        }
        let mut line = String::new();
        let bytes =
            input.read_line(&mut line).map_err(|e| Failure::usage(format!("cannot read standard input: {e}")))?;
        match line.trim_end_matches(['\n', '\r']) {
            _ if bytes == 0 => return Ok(Exit::Done),
            "" => turns = opening.clone(),
            line => respond(line, &mut turns, out)?,
        }
    }
}

/// To the person at the terminal, beside the output.
fn say(text: &str) {
    // A terminal that is gone needs no greeting.
    let _ = std::io::stderr().write_all(text.as_bytes());
}
