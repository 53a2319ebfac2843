//! `status`: what the controller of a run sees.

use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueHint;
use comfy_table::{Table, presets};
use cosmos_control::{ControlError, Target, fetch_status};
use serde_json::{Value, json};

use crate::commands::TableOrJson;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// How long the controller may take to answer.
const ANSWER_MS_MAX: u64 = 10_000;

/// Bytes of a file of a run folder that is read.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of the run
    #[arg(value_hint = ValueHint::DirPath)]
    run: PathBuf,
    /// How to print it
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: TableOrJson,
}

/// Runs it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    if !args.run.is_dir() {
        return Err(Failure::usage(format!("there is no run folder {}", args.run.display()))
            .with_hint("name the folder of a run, as `--run` or `train.output_dir` of its processes does"));
    }
    let status = match fetch_status(&Target::Run(args.run.clone()), ANSWER_MS_MAX) {
        Ok(status) => status,
        Err(ControlError::Io { .. }) => ended(&args.run).ok_or_else(|| no_run(&args.run))?,
        Err(error) => return Err(unreached(&args.run, error)),
    };
    match args.format {
        TableOrJson::Json => out.json(&status)?,
        TableOrJson::Table => out.text(text(&status))?,
    }
    Ok(Exit::Done)
}

fn unreached(run: &Path, error: ControlError) -> Failure {
    match error {
        ControlError::Unreachable { url, .. } => {
            Failure::failed(format!("the controller of {} does not answer at {url}", run.display()))
                .with_hint("it has ended, or is being restarted: its log says more; `launch local --resume` or `controller --resume` goes on with the run")
        }
        error => error.into(),
    }
}

/// How a run ended that no controller is at work on; none for a folder that is no run's.
fn ended(run: &Path) -> Option<Value> {
    let read = |name: &str| -> Option<Value> {
        let path = run.join(name);
        let fits = fs::metadata(&path).is_ok_and(|m| m.len() <= FILE_BYTES_MAX);
        serde_json::from_slice(&fs::read(path).ok().filter(|_| fits)?).ok()
    };
    let (summary, books) = (read("summary.json"), read("books.json"));
    let step = books.as_ref().and_then(|books| books["step"].as_u64());
    match summary {
        // A run that went on since has made more steps than its summary tells.
        Some(summary) if summary["steps"].as_u64() >= step => {
            Some(json!({"state": "done", "step": summary["steps"], "summary": summary}))
        }
        _ if run.join("ledger.log").exists() => {
            Some(json!({"state": "stopped", "step": step.unwrap_or(0), "checkpoint": newest(&run.join("checkpoints"))}))
        }
        _ => None,
    }
}

/// The last folder by name.
fn newest(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).max()
}

fn no_run(folder: &Path) -> Failure {
    let is_run = |path: &PathBuf| path.join("config.toml").exists();
    let inside = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).filter(is_run).max();
    let failure = Failure::failed(format!("{} is not the folder of a run", folder.display()));
    failure.with_hint(match inside {
        Some(run) => format!("the newest run in it is {}", run.display()),
        None => "name the folder that the run printed as its `run folder`".into(),
    })
}

fn ended_text(status: &Value) -> Option<String> {
    let step = &status["step"];
    match status["state"].as_str()? {
        "done" => {
            let summary = &status["summary"];
            let seconds = summary["seconds"].as_f64().unwrap_or(0.0);
            let mut text = format!("done: {step} steps, {} samples in {seconds:.1} s\n", summary["samples"]);
            if let Some(checkpoint) = summary["checkpoint"].as_str() {
                text.push_str(&format!("checkpoint {checkpoint}\n"));
            }
            Some(text)
        }
        "stopped" => {
            let from =
                status["checkpoint"].as_str().map_or(String::new(), |path| format!("newest checkpoint {path}\n"));
            Some(format!("stopped after step {step}: `--resume` goes on with it\n{from}"))
        }
        _ => None,
    }
}

fn text(status: &Value) -> String {
    if let Some(text) = ended_text(status).filter(|_| status["replicas"].is_null()) {
        return text;
    }
    let word = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut text = format!("{}, up {}\n", word(&status["state"]), seconds(&status["up_ms"]));
    if let Some(reason) = status["reason"].as_str() {
        text.push_str(&format!("{reason}\n"));
    }
    if let Some(run) = status["run"].as_object() {
        let numbers = run.iter().filter(|(_, value)| !value.is_null() && value.as_str() != Some(""));
        let numbers: Vec<String> = numbers.map(|(key, value)| format!("{key} {}", word(value))).collect();
        text.push_str(&format!("{}\n", numbers.join(", ")));
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["replica", "role", "state", "does", "for", "seen", "progress"]);
    for replica in status["replicas"].as_array().into_iter().flatten() {
        let does = [word(&replica["doing"]), word(&replica["details"])].join(" ");
        table.add_row([
            word(&replica["name"]),
            word(&replica["role"]),
            word(&replica["state"]),
            does.trim().to_owned(),
            seconds(&replica["for_ms"]),
            format!("{} ago", seconds(&replica["seen_ms_ago"])),
            word(&replica["progress"]),
        ]);
    }
    let lines = table.to_string();
    lines.lines().for_each(|line| text.push_str(&format!("{}\n", line.trim_end())));
    text
}

fn seconds(ms: &Value) -> String {
    match ms.as_u64() {
        None => String::new(),
        Some(ms) if ms < 120_000 => format!("{:.1} s", ms as f64 / 1e3),
        Some(ms) => format!("{} min", ms / 60_000),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn it_says_how_a_run_ended() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path();
        assert!(super::ended(run).is_none());
        std::fs::write(run.join("ledger.log"), "").unwrap();
        std::fs::write(run.join("books.json"), r#"{"step": 3}"#).unwrap();
        std::fs::create_dir_all(run.join("checkpoints/step_00000002")).unwrap();
        let text = super::text(&super::ended(run).unwrap());
        assert!(text.starts_with("stopped after step 3: ") && text.contains("step_00000002"), "{text}");
        std::fs::write(run.join("summary.json"), r#"{"steps": 2, "samples": 8, "seconds": 1.5}"#).unwrap();
        assert!(super::text(&super::ended(run).unwrap()).starts_with("stopped after step 3: "));
        std::fs::write(run.join("summary.json"), r#"{"steps": 3, "samples": 12, "seconds": 1.5}"#).unwrap();
        assert_eq!(super::text(&super::ended(run).unwrap()), "done: 3 steps, 12 samples in 1.5 s\n");
    }

    #[test]
    fn the_table_names_everybody() {
        let status = json!({
            "state": "running", "reason": null, "up_ms": 1500, "run": {"step": 3, "waits_for": ""},
            "replicas": [
                {"name": "rollout-0", "role": "rollout", "state": "busy", "doing": "generate",
                 "details": "8 prompts, weights 3", "for_ms": 2000, "seen_ms_ago": 100, "progress": "3 of 8"},
                {"name": "teacher-0", "role": "teacher", "state": "lost", "doing": "", "details": "", "for_ms": null,
                 "seen_ms_ago": 600_000, "progress": ""},
            ],
        });
        let text = super::text(&status);
        assert!(text.starts_with("running, up 1.5 s\nstep 3\n"), "{text}");
        for part in ["generate 8 prompts, weights 3", "3 of 8", "10 min ago", "lost"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
