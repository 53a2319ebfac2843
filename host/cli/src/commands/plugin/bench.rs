//! `plugin bench`.

use std::io::{IsTerminal as _, Write as _};

use cosmos_author::bench::{self, Comparison, Options, Report, SAMPLES_MAX, Speed, Times};
use cosmos_author::cases::{self, Case, Kind, Subject};
use cosmos_author::target::Target;
use cosmos_plugin::{Inspection, Limits, LoadTimes, PluginHost, RewardSample};
use serde_json::Value;

use super::workbench::{Loadable, Trial, shown};
use crate::commands::TableOrJson;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Components up to this size compile in a second or so.
const QUICK_COMPILE_BYTES: u64 = 1 << 20;
/// Text of a made-up completion.
const TEXT_BYTES: usize = 4096;

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The program after `--against` reads cases (JSONL: `prompt`, `completion`, `reference`, `metadata`) on standard \
                        input and writes a line for each: a number, or {\"score\": …}. Its start is not counted. When its last line is \
                        {\"seconds\": …}, its own time for the scoring alone, reading and writing are not counted either."
)]
pub struct Args {
    #[command(flatten)]
    trial: Trial,
    /// Reward to measure, by name or role [default: the one with the most cases]
    #[arg(long, value_name = "NAME")]
    reward: Option<String>,
    /// Lengthen completions to this many bytes by text before them [default: 4096 without cases, else as they are]
    #[arg(long, value_name = "BYTES")]
    text_bytes: Option<usize>,
    /// Seconds of each of the measurements
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, value_parser = seconds)]
    seconds: f64,
    /// Instances that score at once when all cores are measured [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
    /// Measure compiling even when it takes long (Python: a minute)
    #[arg(long)]
    cold: bool,
    /// Shell command of a program that does the same work; measured in turns with the plugin
    #[arg(long, value_name = "COMMAND")]
    against: Option<String>,
    /// To read, or JSON for programs
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: TableOrJson,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give 0.05 to 600 seconds".into()),
    }
}

/// Runs it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let loadable = args.trial.prepare()?;
    let options = options(&args, loadable)?;
    let told = std::io::stderr().is_terminal();
    let result = bench::measure(&options, &mut |what| {
        if told {
            // Progress that nobody can see is no failure.
            let _ = write!(std::io::stderr(), "\r\x1b[Kmeasuring {what} …");
        }
    });
    if told {
        let _ = write!(std::io::stderr(), "\r\x1b[K");
    }
    let report = result?;
    match args.format {
        TableOrJson::Json => out.json(&report)?,
        TableOrJson::Table => show(&report, &options, out)?,
    }
    Ok(Exit::Done)
}

fn options(args: &Args, loadable: Loadable) -> Result<Options, Failure> {
    let Loadable { target, grants, capabilities, inspection } = loadable;
    let limits = Limits::default();
    let chat = capabilities.chat.clone();
    let cases = args.trial.cases(&target)?.unwrap_or_default();
    let subject = subject(&cases, args.reward.as_deref(), &inspection, &target)?;
    let mut samples = Vec::new();
    if let Some((_, members)) = &subject {
        for case in members.iter().take(SAMPLES_MAX) {
            let sample = case.sample(chat.as_deref());
            let sample =
                sample.map_err(|e| Failure::usage(format!("the chat template: {e}")).at(&case.place.to_string()))?;
            samples.extend(sample);
        }
    }
    let bytes = args.text_bytes.or(samples.is_empty().then_some(TEXT_BYTES)).unwrap_or(0);
    if bytes > limits.batch_bytes_max {
        return Err(Failure::usage(format!("{bytes} bytes are more than a call takes, {}", limits.batch_bytes_max))
            .with_hint("use a smaller `--text-bytes`"));
    }
    if samples.is_empty() {
        let made_up = |n: usize| RewardSample {
            prompt: "How much is 17 + 25?".into(),
            completion: format!("So the answer is {n}."),
            reference: Some(Value::from("42").to_string()),
            metadata: Vec::new(),
        };
        samples.extend((0..64).map(made_up));
    }
    for sample in &mut samples {
        sample.completion = bench::padded(&sample.completion, bytes);
    }
    let settings = subject.as_ref().and_then(|(subject, _)| subject.settings.clone());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Options {
        component: target.component,
        grants,
        limits,
        capabilities,
        cache: PluginHost::default_cache_dir(),
        reward: subject.and_then(|(subject, _)| subject.name),
        settings: Value::Object(settings.unwrap_or_else(|| args.trial.settings.clone())).to_string(),
        samples,
        seconds: args.seconds,
        workers: args.workers.map_or(cores, usize::from),
        cold: args.cold || inspection.bytes <= QUICK_COMPILE_BYTES,
        against: args.against.clone(),
    })
}

/// The reward to measure under its real name, with its settings and cases; none when the plugin has no reward.
fn subject<'a>(
    cases: &'a [Case],
    asked: Option<&str>,
    inspection: &Inspection,
    target: &Target,
) -> Result<Option<(Subject, Vec<&'a Case>)>, Failure> {
    let Some(info) = &inspection.description else {
        let why = inspection.description_error.clone().unwrap_or_default();
        return Err(Failure::usage(format!("`{}` cannot describe itself: {why}", shown(&target.component))));
    };
    if info.rewards.is_empty() && asked.is_none() {
        return Ok(None);
    }
    let mut groups: Vec<(Subject, Vec<&Case>)> = Vec::new();
    for case in cases.iter().filter(|case| case.subject.kind == Kind::Reward) {
        let name = cases::offer_name(info, Kind::Reward, case.subject.name.as_deref().or(asked))?;
        let subject = Subject { name: Some(name), ..case.subject.clone() };
        match groups.iter_mut().find(|(known, _)| *known == subject) {
            Some((_, members)) => members.push(case),
            None => groups.push((subject, vec![case])),
        }
    }
    if let Some(asked) = asked {
        let name = cases::offer_name(info, Kind::Reward, Some(asked))?;
        groups.retain(|(subject, _)| subject.name.as_deref() == Some(&name));
        if groups.is_empty() {
            groups.push((Subject { kind: Kind::Reward, name: Some(name), settings: None }, Vec::new()));
        }
    }
    if groups.is_empty() {
        let name = cases::offer_name(info, Kind::Reward, None)?;
        groups.push((Subject { kind: Kind::Reward, name: Some(name), settings: None }, Vec::new()));
    }
    // The first of the longest.
    Ok(groups.into_iter().rev().max_by_key(|(_, members)| members.len()))
}

fn show(report: &Report, options: &Options, out: &mut Output) -> Result<(), Failure> {
    let machine = &report.machine;
    out.line(format!(
        "{} {}  {}, {}",
        report.plugin,
        report.version,
        shown(&report.component),
        bytes(report.component_bytes as f64)
    ))?;
    let load = machine.load.map_or_else(String::new, |load| format!(", load {load:.1}"));
    out.line(format!("{}, {} cores{load}", machine.processor, machine.cores))?;
    if let Some(reward) = &report.reward {
        let failed = match report.samples_failed {
            0 => String::new(),
            n => format!("; {n} more fail and are left out"),
        };
        let mean = bytes(report.text_bytes_mean);
        out.line(format!("reward `{reward}`, {} samples of {mean} each in the mean{failed}", report.samples))?;
    }
    start(report, options, out)?;
    if report.reward.is_none() {
        out.line("\nIt offers no reward: there is nothing more to measure.")?;
    }
    if !report.speed.is_empty() {
        out.line(format!(
            "\n{:<28}{:>12}{:>26}{:>12}{:>12}{:>12}{:>12}",
            "Speed", "scores/s", "of 5 rounds", "call p50", "call p99", "score p50", "score p99"
        ))?;
        report.speed.iter().try_for_each(|speed| row(speed, out))?;
        if let Some(us) = report.speed.first().and_then(|speed| speed.computed_us_per_score) {
            out.line(format!("  a score takes {} of processor time in full batches, host included", time(us)))?;
        }
    }
    if let Some(memory) = &report.memory {
        let part = |value: Option<u64>| value.map_or_else(|| "?".to_owned(), |value| bytes(value as f64));
        out.line("\nMemory")?;
        out.line(format!(
            "  {:<26}{:>12}  of at most {}",
            "instance",
            bytes(memory.instance_bytes as f64),
            bytes(memory.instance_bytes_max as f64)
        ))?;
        let (now, peak) = (part(memory.host_bytes), part(memory.host_bytes_peak));
        out.line(format!("  {:<26}{now:>12}  {peak} at its peak", "this process"))?;
    }
    if let Some(comparison) = &report.against {
        against(comparison, out)?;
    }
    if machine.is_busy() {
        out.line("\nThe machine is busy with other work: only processor times are what they would be without it.")?;
    }
    Ok(())
}

fn start(report: &Report, options: &Options, out: &mut Output) -> Result<(), Failure> {
    out.line("\nStart")?;
    let start = &report.start;
    match start.cold_ms {
        Some(ms) => out.line(format!("  {:<26}{:>12}", "cold: compiled", time(ms * 1e3)))?,
        None => out.line(format!("  {:<26}{:>12}  `--cold` compiles it again", "cold: compiled", "-"))?,
    }
    let times = |name: &str, times: &Option<Times>, out: &mut Output| match times {
        Some(t) => out.line(format!(
            "  {name:<26}{:>12}  {} to {} in {} starts",
            time(t.median_ms * 1e3),
            time(t.min_ms * 1e3),
            time(t.max_ms * 1e3),
            t.count
        )),
        None => Ok(()),
    };
    times("from the cache", &start.cached, out)?;
    if let Some(LoadTimes { read_ms, cached_ms, instantiate_ms, describe_ms, .. }) = start.parts {
        let parts = [("read", read_ms), ("load code", cached_ms.unwrap_or(0.0)), ("instantiate", instantiate_ms)];
        let parts: Vec<String> = parts
            .into_iter()
            .chain([("describe", describe_ms)])
            .map(|(name, ms)| format!("{name} {}", time(ms * 1e3)))
            .collect();
        out.line(format!("  {:<26}{:>12}  {}", "", "", parts.join(", ")))?;
    }
    times("open the reward", &start.open, out)?;
    if options.cache.is_none() {
        out.line("  no cache folder: set `HOME` or `XDG_CACHE_HOME`, so that components compile only once")?;
    }
    Ok(())
}

fn row(speed: &Speed, out: &mut Output) -> Result<(), Failure> {
    let cores = if speed.workers == 1 { "one core".to_owned() } else { format!("{} cores", speed.workers) };
    let range = format!("{} to {}", count(speed.scores_per_second_min), count(speed.scores_per_second_max));
    out.line(format!(
        "  {:<26}{:>12}{range:>26}{:>12}{:>12}{:>12}{:>12}",
        format!("{} a call, {cores}", count(speed.samples_per_call as f64)),
        count(speed.scores_per_second),
        time(speed.call_us_p50),
        time(speed.call_us_p99),
        time(speed.score_us_p50),
        time(speed.score_us_p99),
    ))
}

fn against(comparison: &Comparison, out: &mut Output) -> Result<(), Failure> {
    let Comparison { ratio, ratio_min, ratio_max, .. } = comparison;
    out.line(format!("\nAgainst `{}`", comparison.command))?;
    out.line(format!(
        "  {:<26}{:>12} scores/s on one core",
        "this plugin",
        count(comparison.plugin_scores_per_second)
    ))?;
    let clock = if comparison.own_clock { "by its own clock" } else { "reading and writing included" };
    out.line(format!("  {:<26}{:>12} scores/s, {clock}", "the program", count(comparison.program_scores_per_second)))?;
    out.line(format!(
        "  the plugin is {ratio:.2} times as fast ({ratio_min:.2} to {ratio_max:.2} in {} turns); both score all {} samples alike",
        comparison.rounds, comparison.samples
    ))?;
    match comparison.computed_ratio {
        Some(ratio) => out.line(format!("  by processor time it is {ratio:.2} times as fast")),
        None => Ok(()),
    }
}

/// With thousands separators.
fn count(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Microseconds, milliseconds or seconds, three digits.
fn time(us: f64) -> String {
    let (value, unit) = match us {
        us if us < 1e3 => (us, "µs"),
        us if us < 1e6 => (us / 1e3, "ms"),
        us => (us / 1e6, "s"),
    };
    format!("{} {unit}", three(value))
}

fn bytes(bytes: f64) -> String {
    let (value, unit) = match bytes {
        b if b < 1024.0 => return format!("{b:.0} B"),
        b if b < 1024.0 * 1024.0 => (b / 1024.0, "KiB"),
        b => (b / (1024.0 * 1024.0), "MiB"),
    };
    format!("{} {unit}", three(value))
}

fn three(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(["0", "999", "1,000", "1,234,567"], [0.0, 999.0, 1e3, 1_234_567.0].map(count));
        assert_eq!(["3.20 µs", "12.0 ms", "1.50 s", "205 µs"], [3.2, 12e3, 1.5e6, 205.0].map(time));
        assert_eq!(["12 B", "4.00 KiB", "64.0 MiB"], [12.0, 4096.0, 67_108_864.0].map(bytes));
    }
}
