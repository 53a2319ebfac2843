//! The same work by another program, in turns with the plugin, so that both meet the same machine.

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cosmos_plugin::{Reward, RewardSample};
use serde::Serialize;
use serde_json::{Value, json};

use super::machine::computed_s;
use super::{SAMPLES_PER_CALL, median};
use crate::error::{AuthorError, Result};

/// Scores of the two sides may differ by this.
const TOLERANCE: f64 = 1e-6;
/// One line of the program's output.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Text sent to the program in one round.
const INPUT_BYTES_MAX: usize = 256 << 20;
/// How long the program may take for one round.
const PATIENCE: Duration = Duration::from_secs(120);

/// Both sides over the same samples.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// The program.
    pub command: String,
    /// The plugin's scores a second on one core: median of the rounds.
    pub plugin_scores_per_second: f64,
    /// The program's.
    pub program_scores_per_second: f64,
    /// Plugin by program: median of the rounds' ratios.
    pub ratio: f64,
    /// The smallest.
    pub ratio_min: f64,
    /// The largest.
    pub ratio_max: f64,
    /// The same by processor time, which other work on the machine does not change: median of the rounds. None when the
    /// program does not tell its own.
    pub computed_ratio: Option<f64>,
    /// How often each side ran.
    pub rounds: usize,
    /// The program timed its scoring itself; otherwise reading the cases and writing the scores count too.
    pub own_clock: bool,
    /// Samples of which both gave the same score.
    pub samples: usize,
}

/// One run of the program.
struct Run {
    scores: Vec<Option<f64>>,
    seconds: f64,
    own_seconds: Option<f64>,
    computed_s: Option<f64>,
}

pub(super) fn compare(
    command: &str,
    reward: &mut Reward,
    samples: &[RewardSample],
    scores: &[f64],
    rounds: usize,
    round_s: f64,
) -> Result<Comparison> {
    let lines: Vec<String> = samples.iter().map(line).collect();
    // Full batches, as in the other measurements.
    let repeated: Vec<RewardSample> =
        samples.iter().cycle().take(SAMPLES_PER_CALL.max(samples.len())).cloned().collect();
    let first = run(command, &lines, lines.len())?;
    agree(command, samples, scores, &first.scores)?;
    let own_clock = first.own_seconds.is_some();
    // A program without its own clock is charged for all but its start.
    let start_s = if own_clock { 0.0 } else { run(command, &lines, 1)?.seconds.min(run(command, &lines, 1)?.seconds) };
    let took = first.own_seconds.unwrap_or(first.seconds - start_s).max(1e-6);
    let wanted = (lines.len() as f64 * round_s / took) as usize;
    let bytes = lines.iter().map(String::len).sum::<usize>() / lines.len() + 1;
    let items = wanted.clamp(lines.len(), (INPUT_BYTES_MAX / bytes).max(lines.len()));

    let (mut ours, mut theirs, mut ratios, mut computed_ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (our, our_computed) = plugin_rate(reward, &repeated, round_s)?;
        let run = run(command, &lines, items)?;
        let seconds = run.own_seconds.unwrap_or(run.seconds - start_s);
        if seconds <= 0.0 {
            return Err(AuthorError::project(
                format!("`{command}` took no longer for {items} cases than for one"),
                "let it print its own time as the last line: {\"seconds\": 1.25}",
            ));
        }
        let their = items as f64 / seconds;
        ours.push(our);
        theirs.push(their);
        ratios.push(our / their);
        if let (Some(our), Some(their)) = (our_computed, run.computed_s) {
            computed_ratios.push(their / items as f64 / our);
        }
    }
    let ratio = median(&mut ratios);
    Ok(Comparison {
        command: command.to_owned(),
        plugin_scores_per_second: median(&mut ours),
        program_scores_per_second: median(&mut theirs),
        ratio,
        ratio_min: ratios.first().copied().unwrap_or(ratio),
        ratio_max: ratios.last().copied().unwrap_or(ratio),
        computed_ratio: (!computed_ratios.is_empty()).then(|| median(&mut computed_ratios)),
        rounds,
        own_clock,
        samples: samples.len(),
    })
}

/// Scores a second, and processor seconds of a score.
fn plugin_rate(reward: &mut Reward, samples: &[RewardSample], round_s: f64) -> Result<(f64, Option<f64>)> {
    let computed = computed_s();
    let start = Instant::now();
    let mut scored = 0;
    loop {
        for call in samples.chunks(SAMPLES_PER_CALL) {
            scored += reward.score(call)?.len();
        }
        let seconds = start.elapsed().as_secs_f64();
        if seconds >= round_s {
            let computed = computed.and_then(|before| Some((computed_s()? - before) / scored as f64));
            return Ok((scored as f64 / seconds, computed.filter(|seconds| *seconds > 0.0)));
        }
    }
}

/// A sample as the program reads it: a line of a cases file.
fn line(sample: &RewardSample) -> String {
    let reference: Value =
        sample.reference.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let metadata: serde_json::Map<String, Value> =
        sample.metadata.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
    json!({"prompt": sample.prompt, "completion": sample.completion, "reference": reference, "metadata": metadata})
        .to_string()
}

/// A ratio of speeds means nothing when the work is not the same.
fn agree(command: &str, samples: &[RewardSample], ours: &[f64], theirs: &[Option<f64>]) -> Result<()> {
    let differs =
        |(ours, theirs): &(&f64, &Option<f64>)| theirs.is_none_or(|theirs| (*ours - theirs).abs() > TOLERANCE);
    let wrong: Vec<usize> = (0..samples.len()).filter(|i| differs(&(&ours[*i], &theirs[*i]))).collect();
    let Some(first) = wrong.first().copied() else { return Ok(()) };
    let told = theirs[first].map_or_else(|| "no score".to_owned(), |score| score.to_string());
    let completion: String = samples[first].completion.chars().take(80).collect();
    Err(AuthorError::project(
        format!(
            "`{command}` scores {} of {} samples otherwise, so their speeds cannot be compared: {told} instead of {} for {completion:?}",
            wrong.len(),
            samples.len(),
            ours[first]
        ),
        "compare two programs that do the same",
    ))
}

/// Ends the program when nobody waits for it any more.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Gives the program `items` lines and takes as many scores.
fn run(command: &str, lines: &[String], items: usize) -> Result<Run> {
    let start = Instant::now();
    let child = Command::new("sh").args(["-c", command]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut program = Program(child.map_err(AuthorError::io("cannot start a shell for", command.as_ref()))?);
    let (Some(input), Some(output)) = (program.0.stdin.take(), program.0.stdout.take()) else {
        return Err(AuthorError::project(format!("`{command}` has no standard input or output"), ""));
    };
    let (answer, answers) = mpsc::channel();
    std::thread::spawn(move || {
        // The receiver is gone when the time was up.
        let _ = answer.send(read(output, items));
    });
    std::thread::scope(|scope| {
        // Both directions at once: a program may answer line by line or at the end.
        let writer = scope.spawn(move || {
            let mut input = BufWriter::with_capacity(1 << 16, input);
            // A program that stops reading shows in what it wrote.
            lines.iter().cycle().take(items).all(|line| writeln!(input, "{line}").is_ok()) && input.flush().is_ok()
        });
        let result = answers.recv_timeout(PATIENCE.saturating_sub(start.elapsed()));
        let seconds = start.elapsed().as_secs_f64();
        if result.is_err() {
            let _ = program.0.kill();
        }
        let wrote = writer.join().unwrap_or(false);
        let Told { scores, own_seconds, computed_s } = match result {
            Ok(Ok(read)) => read,
            Ok(Err(message)) => return Err(wrong(command, &message, program.0.try_wait().ok().flatten(), wrote)),
            Err(_) => {
                return Err(AuthorError::project(
                    format!("`{command}` gave no {items} scores within {} s", PATIENCE.as_secs()),
                    "it must read its standard input to the end and write one score a line",
                ));
            }
        };
        Ok(Run { scores, seconds, own_seconds, computed_s })
    })
}

fn wrong(command: &str, message: &str, ended: Option<std::process::ExitStatus>, wrote: bool) -> AuthorError {
    let ended = match ended {
        Some(status) if !status.success() => format!(" ({status})"),
        _ if !wrote => " (it stopped reading)".into(),
        _ => String::new(),
    };
    AuthorError::project(
        format!("`{command}` {message}{ended}"),
        "for each case (a line of JSON) it must write one line: a number, or {\"score\": …}; at the end it may write {\"seconds\": …}, its own time for the scoring alone",
    )
}

/// What the program wrote.
struct Told {
    scores: Vec<Option<f64>>,
    own_seconds: Option<f64>,
    computed_s: Option<f64>,
}

fn read(output: ChildStdout, items: usize) -> std::result::Result<Told, String> {
    let mut output = BufReader::new(output);
    let mut scores = Vec::with_capacity(items);
    let (mut own_seconds, mut computed_s) = (None, None);
    let mut text = String::new();
    for number in 1.. {
        text.clear();
        let bytes = output.by_ref().take(LINE_BYTES_MAX).read_line(&mut text);
        match bytes {
            Ok(0) => break,
            Ok(bytes) if bytes as u64 >= LINE_BYTES_MAX => return Err(format!("wrote a line {number} without end")),
            Ok(_) => {}
            Err(error) => return Err(format!("wrote a line {number} that is no text: {error}")),
        }
        if text.trim().is_empty() {
            continue;
        }
        let value: Value = serde_json::from_str(&text)
            .map_err(|_| format!("wrote a line {number} that is no score: {:.80}", text.trim().escape_debug()))?;
        if let Some(seconds) = value.get("seconds").and_then(Value::as_f64) {
            own_seconds = Some(seconds);
            computed_s = value.get("computed_seconds").and_then(Value::as_f64);
        } else if scores.len() == items {
            return Err(format!("wrote more than {items} scores"));
        } else {
            scores.push(value.as_f64().or_else(|| value.get("score").and_then(Value::as_f64)));
        }
    }
    if scores.len() < items {
        return Err(format!("wrote {} scores for {items} cases", scores.len()));
    }
    Ok(Told { scores, own_seconds, computed_s })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(count: usize) -> Vec<String> {
        vec!["{}".to_owned(); count]
    }

    #[test]
    fn a_program_answers_line_by_line_or_at_the_end() {
        let done = run(
            "cat >/dev/null; printf '1\\n{\"score\": 0.5}\\nnull\\n{\"seconds\": 0.25, \"computed_seconds\": 0.2}\\n'",
            &lines(3),
            3,
        )
        .unwrap();
        assert_eq!((done.own_seconds, done.computed_s), (Some(0.25), Some(0.2)));
        assert_eq!(done.scores, [Some(1.0), Some(0.5), None]);
        let many = run("while read line; do echo 1; done", &lines(100), 2000).unwrap();
        assert_eq!(many.scores.len(), 2000);
        assert!(many.own_seconds.is_none() && many.seconds > 0.0);
    }

    #[test]
    fn a_program_that_answers_otherwise_is_refused() {
        for (command, why) in [
            ("cat >/dev/null; echo 1", "wrote 1 scores for 2 cases"),
            ("cat >/dev/null; printf '1\\n1\\n1\\n'", "more than 2 scores"),
            ("cat >/dev/null; echo hello", "a line 1 that is no score: hello"),
            ("exit 3", "wrote 0 scores"),
        ] {
            let error = run(command, &lines(2), 2).err().unwrap();
            assert!(error.to_string().contains(why), "{error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn speeds_of_different_work_are_not_compared() {
        let sample = RewardSample { prompt: String::new(), completion: "c".into(), reference: None, metadata: vec![] };
        let samples = vec![sample; 2];
        agree("x", &samples, &[1.0, 0.5], &[Some(1.0), Some(0.5)]).unwrap();
        let error = agree("x", &samples, &[1.0, 0.5], &[Some(1.0), None]).unwrap_err().to_string();
        assert!(error.contains("1 of 2 samples") && error.contains("no score instead of 0.5"), "{error}");
    }
}
