//! The parts of `benchmarks/comparison.sh` that are no command of the host.
//!
//! `comparison keep EVAL.json OUT.jsonl`: prompts and answers of an `eval --format json`, those that are right.
//! `comparison watch RUN COMMAND…`: runs the command, which writes the run folder RUN, and writes beside every line of its
//! metrics how many seconds of processor time it had used by then, to `RUN.processor`. Unlike those of the clock they do not
//! depend on what else the machine does. Linux only.
//! `comparison draw RUNS OUT NOTE`: the run folders `RUNS/distillation`, `sft` and `grpo` as a table, as `OUT.json` and as
//! the pictures `OUT-light.svg` and `OUT-dark.svg`; NOTE is the second line of the picture.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cosmos_report::{ComparedRun, Comparison, Summary, Theme, format_percent, replace_file};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const USAGE: &str =
    "usage: comparison keep EVAL.json OUT.jsonl | comparison watch RUN COMMAND... | comparison draw RUNS OUT NOTE";
/// Ticks of a processor's clock a second, as Linux counts them for programs.
const TICKS: f64 = 100.0;
/// How often a run is looked at: a tenth of a step of the slowest.
const LOOK: Duration = Duration::from_millis(50);
/// Shares of the teacher's accuracy that the table has columns for.
const SHARES: [f64; 4] = [0.5, 0.8, 0.9, 0.98];

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["keep", report, out] => keep(Path::new(report), Path::new(out)),
        ["watch", run, program, rest @ ..] => watch(run, Command::new(program).args(rest)),
        ["draw", runs, out, note] => draw(Path::new(runs), out, note),
        _ => Err(USAGE.into()),
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).map_err(|e| format!("cannot read `{}`: {e}", path.display()))?;
    Ok(serde_json::from_str(&text).map_err(|e| format!("`{}`: {e}", path.display()))?)
}

fn keep(report: &Path, out: &Path) -> Result<()> {
    let value = read_json(report)?;
    let samples = value["samples"].as_array().ok_or("the report has no `samples`")?;
    let right: Vec<String> = samples
        .iter()
        .filter(|sample| sample["reward"].as_f64() == Some(1.0))
        .map(|sample| format!("{}\n", json!({ "prompt": sample["prompt"], "response": sample["completion"] })))
        .collect();
    replace_file(out, right.concat().as_bytes())?;
    println!("kept {} right answers of {}", right.len(), samples.len());
    Ok(())
}

fn watch(run: &str, command: &mut Command) -> Result<()> {
    let mut child = command.spawn().map_err(|e| format!("cannot start {command:?}: {e}"))?;
    let (stat, metrics) = (format!("/proc/{}/stat", child.id()), format!("{run}/metrics.jsonl"));
    let (mut seconds, mut text) = (0.0, String::new());
    let mut ended = None;
    while ended.is_none() {
        std::thread::sleep(LOOK);
        // Until it is waited for, an ended process still tells what it used.
        seconds = processor_seconds(&stat).unwrap_or(seconds);
        ended = child.try_wait()?;
        let lines = fs::read_to_string(&metrics).unwrap_or_default().matches('\n').count();
        let noted = text.matches('\n').count();
        text.extend(std::iter::repeat_n(format!("{seconds}\n"), lines.saturating_sub(noted)));
    }
    replace_file(Path::new(&format!("{run}.processor")), text.as_bytes())?;
    match ended {
        Some(status) if status.success() => Ok(()),
        _ => Err(format!("{command:?} failed").into()),
    }
}

/// User and system time in `/proc/PID/stat`: the 12th and 13th numbers behind the program's name, which may hold blanks.
fn processor_seconds(stat: &str) -> Option<f64> {
    let text = fs::read_to_string(stat).ok()?;
    let (_, numbers) = text.rsplit_once(')')?;
    let ticks: Vec<f64> = numbers.split_whitespace().skip(11).take(2).filter_map(|n| n.parse().ok()).collect();
    (ticks.len() == 2).then(|| ticks.iter().sum::<f64>() / TICKS)
}

fn draw(runs: &Path, out: &str, note: &str) -> Result<()> {
    let distilled = run(&runs.join("distillation"), "on-policy distillation", 0.0)?;
    // Its data had to be written first.
    let sampling = fs::read_to_string(runs.join("sampling.processor"))?;
    let sampling: f64 = sampling.split_whitespace().map(str::parse::<f64>).sum::<std::result::Result<_, _>>()?;
    let imitated = run(&runs.join("sft"), "SFT on teacher samples", sampling)?;
    let rewarded = run(&runs.join("grpo"), "GRPO", 0.0)?;
    let summary: Summary = serde_json::from_value(read_json(&runs.join("distillation/summary.json"))?)?;
    let teacher = summary.teacher.ok_or("the distillation did not validate its teacher")?;
    let batch = &read_json(&runs.join("distillation/config.json"))?["train"]["train_batch_per_replica"];
    let comparison = Comparison {
        title: "To the teacher's level: countdown, held-out problems".into(),
        subtitle: note.into(),
        level: ("teacher".into(), teacher),
        steps_name: format!("steps of {batch} completions"),
        seconds_name: "seconds of processor time".into(),
        runs: vec![distilled, imitated, rewarded],
    };
    comparison.write(Path::new(&format!("{out}-light.svg")), Theme::Light)?;
    comparison.write(Path::new(&format!("{out}-dark.svg")), Theme::Dark)?;
    let file = json!({
        "note": note,
        "teacher": teacher,
        "completions_a_step": batch,
        "sampling_processor_seconds": sampling,
        "columns": ["steps", "processor seconds", "accuracy"],
        "runs": comparison.runs,
        "reached": comparison.runs.iter().map(|run| reached(run, teacher)).collect::<Vec<_>>(),
    });
    replace_file(Path::new(&format!("{out}.json")), format!("{file:#}\n").as_bytes())?;
    table(&comparison);
    Ok(())
}

/// The validations of a run folder with the processor time of the steps before them: loading and validating do not count.
fn run(folder: &Path, name: &str, seconds_before: f64) -> Result<ComparedRun> {
    let read = |path: &Path| fs::read_to_string(path).map_err(|e| format!("cannot read `{}`: {e}", path.display()));
    let (metrics, used) = (read(&folder.join("metrics.jsonl"))?, read(&folder.with_extension("processor"))?);
    if metrics.lines().count() != used.lines().count() {
        return Err(format!("`{}` and what was noted of it differ in their lines", folder.display()).into());
    }
    let mut run = ComparedRun { name: name.into(), points: Vec::new() };
    let (mut seconds, mut used_before) = (seconds_before, None);
    for (line, used) in metrics.lines().zip(used.lines()) {
        let (line, used): (Value, f64) = (serde_json::from_str(line)?, used.parse()?);
        let step = line["step"].as_u64().ok_or("a line of the metrics has no `step`")?;
        if line["train/loss_avg"].is_number() {
            seconds += used - used_before.ok_or("the run has no validation before its first step")?;
        }
        if let Some(accuracy) = line["val/reward_avg"].as_f64() {
            if run.points.is_empty() && seconds_before > 0.0 {
                run.points.push((step, 0.0, accuracy));
            }
            run.points.push((step, seconds, accuracy));
        }
        used_before = Some(used);
    }
    if run.points.len() < 2 {
        return Err(format!("`{}` holds fewer than two validations", folder.display()).into());
    }
    Ok(run)
}

fn reached(run: &ComparedRun, teacher: f64) -> Value {
    let marks: Vec<Value> = SHARES
        .iter()
        .map(|share| match run.reaches(share * teacher) {
            Some((steps, seconds)) => json!({ "share": share, "steps": steps, "processor_seconds": seconds }),
            None => json!({ "share": share, "steps": null, "processor_seconds": null }),
        })
        .collect();
    json!({ "name": run.name, "marks": marks })
}

fn table(comparison: &Comparison) {
    let teacher = comparison.level.1;
    let columns: Vec<String> = SHARES.iter().map(|share| format!("{:.0} % of the teacher", share * 100.0)).collect();
    println!("| | {} | at the end |\n|---|{}--:|", columns.join(" | "), "--:|".repeat(columns.len()));
    for run in &comparison.runs {
        let cells: Vec<String> = SHARES
            .iter()
            .map(|share| match run.reaches(share * teacher) {
                Some((steps, seconds)) => format!("{steps} steps, {seconds:.0} s"),
                None => "–".into(),
            })
            .collect();
        let last = run.points.last().copied().unwrap_or_default();
        println!(
            "| {} | {} | {} after {} steps, {:.0} s |",
            run.name,
            cells.join(" | "),
            format_percent(last.2),
            last.0,
            last.1
        );
    }
    println!("teacher: {}", format_percent(teacher));
}
