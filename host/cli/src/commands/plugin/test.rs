//! `plugin test`.

use clap::ValueEnum;
use cosmos_author::cases::{self, Case, Difference, Judged, Verdict};
use cosmos_plugin::Limits;
use serde_json::Value;
use similar::{ChangeTag, TextDiff};

use super::workbench::Trial;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Cases that are shown in full; the others are counted.
const SHOWN_MAX: usize = 20;
/// Longer values get lines of their own.
const INLINE_CHARS_MAX: usize = 60;
/// Lines of one difference.
const DIFF_LINES_MAX: usize = 40;
/// Characters of a line.
const LINE_CHARS_MAX: usize = 160;

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "A case is a line of JSON:
  {\"id\": …, \"completion\": \"…\", \"reference\": …, \"score\": 1.0}            asks a reward
  {\"index\": 0, \"dataset\": \"train\", \"expect\": {\"prompt\": \"…\"}}         asks a dataset
  {\"completions\": [\"…\"], \"prompt\": \"…\", \"expect\": {\"turns\": […]}}     asks an environment
A reward's case may also give `prompt` or `messages`, `metadata`, `tolerance`, and expect `metrics` or an `error`.
Only what is expected is compared. A line such as {\"reward\": \"train\", \"settings\": {…}} holds for those after it.")]
pub struct Args {
    #[command(flatten)]
    trial: Trial,
    /// Reward of the cases that name none, by name or role: train, validation or filter [default: the only one]
    #[arg(long, value_name = "NAME")]
    reward: Option<String>,
    /// Write what came of the cases into them, as what is expected from now on
    #[arg(long)]
    update: bool,
    /// What differs to read, or one JSON object a case
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: CaseFormat,
}

/// Forms of the verdicts.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum CaseFormat {
    Table,
    Jsonl,
}

/// Runs it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let trial = &args.trial;
    let loadable = trial.prepare()?;
    let Some(mut cases) = trial.cases(&loadable.target)? else {
        return Err(Failure::usage("a component alone has no cases").with_hint(
            "name a file or a folder with `--cases`, or give the project's folder instead of the component",
        ));
    };
    if let Some(reward) = &args.reward {
        for case in cases.iter_mut().filter(|case| case.subject.kind == cases::Kind::Reward) {
            case.subject.name.get_or_insert_with(|| reward.clone());
        }
    }
    let chat = loadable.capabilities.chat.clone();
    let component = &loadable.target.component;
    let plugin = super::host()?.load(component, &loadable.grants, Limits::default(), loadable.capabilities)?;
    let verdicts = cases::judge(&plugin, &cases, &trial.settings, chat.as_deref())?;
    match args.format {
        CaseFormat::Jsonl => verdicts.iter().try_for_each(|v| out.json_line(v))?,
        CaseFormat::Table => show(&cases, &verdicts, out)?,
    }
    let wrong = verdicts.iter().filter(|v| !v.agrees()).count();
    if args.update {
        return updated(&cases, &verdicts, out);
    }
    if wrong == 0 {
        return Ok(Exit::Done);
    }
    let differ = if wrong == 1 { "differs" } else { "differ" };
    Err(Failure::failed(format!("{wrong} of {} cases {differ}", verdicts.len()))
        .with_hint("when the new answers are right, `--update` writes them into the cases"))
}

fn updated(cases: &[Case], verdicts: &[Verdict], out: &mut Output) -> Result<Exit, Failure> {
    let changed = cases::update(cases, verdicts)?;
    out.line(format!("{changed} of {} cases updated", cases.len()))?;
    let left = verdicts.iter().filter(|v| !v.agrees() && !v.opened).count();
    if left == 0 {
        return Ok(Exit::Done);
    }
    Err(Failure::failed(format!("{left} cases are left as they were: what they ask could not be set up"))
        .with_hint("mend the settings or the plugin's `init`, then update again"))
}

fn show(cases: &[Case], verdicts: &[Verdict], out: &mut Output) -> Result<(), Failure> {
    let differing: Vec<_> = cases.iter().zip(verdicts).filter(|(_, verdict)| !verdict.agrees()).collect();
    for (case, verdict) in differing.iter().take(SHOWN_MAX) {
        let id = match &verdict.id {
            Value::Null => String::new(),
            _ => format!("{}  ", case.name()),
        };
        out.line(format!("differs  {id}({}, {} `{}`)", case.place, verdict.kind.name(), verdict.name))?;
        for difference in &verdict.differences {
            explain(difference, out)?;
        }
        match verdict.asked.as_str() {
            "" => out.line("  asked: nothing, the text is empty\n")?,
            asked => out.line(format!("  asked: {}\n", inline(asked)))?,
        }
    }
    if differing.len() > SHOWN_MAX {
        out.line(format!("and {} more; `--format jsonl` has them all\n", differing.len() - SHOWN_MAX))?;
    }
    for file in files(verdicts) {
        let count = |judged: Judged| verdicts.iter().filter(|v| v.file == *file && v.judged == judged).count();
        let (agree, differ, open) = (count(Judged::Agrees), count(Judged::Differs), count(Judged::ExpectsNothing));
        let mut line = format!("{file}: {agree} of {} as expected", agree + differ + open);
        if open > 0 {
            line += &format!(", {open} expect nothing (`--update` writes what came)");
        }
        out.line(line)?;
    }
    Ok(())
}

/// Each once, in their order.
fn files(verdicts: &[Verdict]) -> Vec<&String> {
    let mut files: Vec<&String> = verdicts.iter().map(|verdict| &verdict.file).collect();
    files.dedup();
    files
}

fn explain(difference: &Difference, out: &mut Output) -> Result<(), Failure> {
    let Difference { what, expected, got } = difference;
    let (old, new) = (told(expected, "nothing"), told(got, "nothing"));
    if what.ends_with("error") {
        return match (expected, got) {
            (Value::Null, _) => out.line(format!("  {what}: {}", inline(&new))),
            (_, Value::Null) => out.line(format!("  {what}: expected {old:?}, but it worked")),
            _ => out.line(format!("  {what}: expected a text with {old:?}, got {new:?}")),
        };
    }
    let short = |text: &str| text.chars().count() <= INLINE_CHARS_MAX && !text.contains('\n');
    if short(&old) && short(&new) {
        return out.line(format!("  {what}: expected {}, got {}", quoted(expected, &old), quoted(got, &new)));
    }
    out.line(format!("  {what}: - expected, + got"))?;
    let diff = TextDiff::from_lines(&old, &new);
    let mut lines = 0;
    for (group_index, group) in diff.grouped_ops(2).iter().enumerate() {
        if group_index > 0 {
            out.line("    …")?;
        }
        for change in group.iter().flat_map(|op| diff.iter_changes(op)) {
            lines += 1;
            if lines > DIFF_LINES_MAX {
                return out.line("    … (`--format jsonl` has the whole)");
            }
            let sign = match change.tag() {
                ChangeTag::Delete => '-',
                ChangeTag::Insert => '+',
                ChangeTag::Equal => ' ',
            };
            out.line(format!("    {sign} {}", cut(&printable(change.value().trim_end_matches(['\n', '\r'])))))?;
        }
    }
    Ok(())
}

/// Texts as they are, everything else as JSON.
fn told(value: &Value, null: &str) -> String {
    match value {
        Value::Null => null.to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(list) if conversation(list).is_some() => conversation(list).unwrap_or_default(),
        Value::Array(_) | Value::Object(_) => serde_json::to_string_pretty(value).unwrap_or_else(|_| value.to_string()),
        other => other.to_string(),
    }
}

/// A list of messages as people read it.
fn conversation(list: &[Value]) -> Option<String> {
    let turn = |message: &Value| Some(format!("{}:\n{}\n", message["role"].as_str()?, message["content"].as_str()?));
    list.iter().map(turn).collect()
}

fn quoted(value: &Value, told: &str) -> String {
    if value.is_string() { format!("{told:?}") } else { told.to_owned() }
}

fn inline(text: &str) -> String {
    cut(&text.escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'"))
}

/// A model's text must not move the cursor.
fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_debug().collect() } else { vec![c] }).collect()
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(LINE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
