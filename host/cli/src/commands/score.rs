//! `score`: log-probabilities of given text, JSONL in and out.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use clap::ValueHint;
use cosmos_run::score::{TextScorer, TextScores};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::ModelArgs;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// No text that a model could read is longer.
const LINE_BYTES_MAX: u64 = 64 << 20;

/// Arguments of `score`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A line of input is {\"prompt\": \"…\", \"completion\": \"…\"}, {\"text\": \"…\"} or {\"ids\": […], \"first\": 1}, \
                        optionally with \"id\". A line of output has `ids`, `first` (the index of the first scored token), `logprobs`, \
                        `entropy` and `total`."
)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Texts (JSONL); `-` reads standard input
    #[arg(long, short, value_name = "FILE", default_value = "-", value_hint = ValueHint::FilePath)]
    input: PathBuf,
}

/// One line of input.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    #[serde(default)]
    id: Option<Value>,
    #[serde(default)]
    prompt: Option<String>,
    #[serde(default)]
    completion: Option<String>,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    ids: Option<Vec<u32>>,
    #[serde(default)]
    first: Option<usize>,
}

/// One line of output.
#[derive(Debug, Serialize)]
struct Answer {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Value>,
    #[serde(flatten)]
    scores: TextScores,
}

/// Runs it, a line at a time.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let name =
        if args.input == Path::new("-") { "standard input".to_owned() } else { args.input.display().to_string() };
    let mut input: Box<dyn BufRead> = if args.input == Path::new("-") {
        Box::new(BufReader::new(std::io::stdin()))
    } else {
        let file = File::open(&args.input).map_err(|e| {
            Failure::usage(format!("cannot read `{name}`: {e}")).with_hint("check the path after `--input`")
        })?;
        Box::new(BufReader::new(file))
    };
    let mut scorer = TextScorer::load(&args.model.model, &args.model.device)?;
    for number in 1.. {
        let mut line = String::new();
        let read = input.by_ref().take(LINE_BYTES_MAX + 1).read_line(&mut line);
        let bytes = read.map_err(|e| Failure::usage(format!("{name}:{number}: cannot be read: {e}")))?;
        if bytes == 0 {
            break;
        }
        if bytes as u64 > LINE_BYTES_MAX {
            return Err(Failure::usage(format!("{name}:{number}: a line of more than {LINE_BYTES_MAX} bytes")));
        }
        if !line.trim().is_empty() {
            out.json_line(&answer(&mut scorer, &line).map_err(|failure| failure.at(&format!("{name}:{number}")))?)?;
        }
    }
    Ok(Exit::Done)
}

fn answer(scorer: &mut TextScorer, line: &str) -> Result<Answer, Failure> {
    let hint = "a line holds `prompt` and `completion`, or `text`, or `ids`";
    let request: Request =
        serde_json::from_str(line).map_err(|e| Failure::usage(format!("not a text: {e}")).with_hint(hint))?;
    let scores = match (request.prompt, request.completion, request.text, request.ids) {
        (prompt, Some(completion), None, None) => scorer.score(prompt.as_deref().unwrap_or_default(), &completion)?,
        (None, None, Some(text), None) => scorer.score("", &text)?,
        (None, None, None, Some(ids)) => scorer.score_ids(ids, request.first.unwrap_or(1))?,
        _ => return Err(Failure::usage("not one text").with_hint(hint)),
    };
    Ok(Answer { id: request.id, scores })
}
