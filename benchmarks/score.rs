//! Scoring and the objectives of a large vocabulary, one order a line: our half of `benchmarks/score.py`.
//!
//! Started with a folder with the model; reads orders as JSON lines and answers each with one line:
//!
//! - `{"do": "score", "sequences": [[ids]], "top_k": k, "mini_batch": n}`: log-probs of all tokens but the first;
//! - `{"do": "teach", "folder": "…", "sequences": [[ids]]}`: another teacher's head and hidden states, kept for `train`;
//! - `{"do": "train", "sequences": [[ids]], "loss": "nll" | "jsd", "beta": b, "mini_batch": n}`: forward, loss and backward
//!   over all tokens but the first; `jsd` against the mixture of all teachers so far, whose head products it includes.
//!
//! Every answer has the seconds of the work by the clock and of processor time, and `peak_bytes`, the most memory that the process held meanwhile, where the
//! system tells it.

use std::error::Error;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use cosmos_engine::batch::{Position, TokenBatch};
use cosmos_engine::head::{self, Head, MixedLogits, Part};
use cosmos_engine::model::{self, HeadLoss, Model};
use cosmos_engine::objective::{
    DistillKind, DistillSpec, LossType, Normaliser, ObjectiveSpec, PolicyLoss, Sample, SftLoss, SftSample, TeacherView,
};
use cosmos_engine::score::{ScoreOptions, ScoreRequest, score};
use serde::Deserialize;
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// As in the shipped binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Order {
    Score { sequences: Vec<Vec<u32>>, top_k: usize, mini_batch: usize },
    Teach { folder: String, sequences: Vec<Vec<u32>> },
    Train { sequences: Vec<Vec<u32>>, loss: Loss, beta: f64, mini_batch: usize },
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Loss {
    Nll,
    Jsd,
}

/// A teacher as a trainer sees it: its head, and its last hidden states of every row.
struct Teacher {
    head: Box<dyn Head>,
    hidden_rh: Vec<f32>,
}

fn main() -> Result<()> {
    let folder = std::env::args().nth(1).ok_or("usage: score FOLDER < orders")?;
    let mut model = model::load(Path::new(&folder), "cpu")?;
    let mut teachers = Vec::new();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", json!({ "resident_bytes": memory("VmRSS:") }))?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        forget_peak();
        let mut answer = match serde_json::from_str(&line?)? {
            Order::Score { sequences, top_k, mini_batch } => scored(model.as_mut(), &sequences, top_k, mini_batch)?,
            Order::Teach { folder, sequences } => {
                teachers.push(teacher(&folder, &sequences)?);
                json!({})
            }
            Order::Train { sequences, loss, beta, mini_batch } => match loss {
                Loss::Nll => train_nll(model.as_mut(), &sequences, mini_batch)?,
                Loss::Jsd => train_jsd(model.as_mut(), &mut teachers, &sequences, beta, mini_batch)?,
            },
        };
        answer["peak_bytes"] = json!(memory("VmHWM:"));
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

/// A number of bytes from the process's own status, where the system has one.
fn memory(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Lets the peak start again from what is resident now; a system that cannot keeps the peak of the whole run.
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Seconds by the clock, and of processor time on all threads together.
#[derive(Clone, Copy, Default)]
struct Seconds {
    wall: f64,
    cpu: f64,
}

impl Seconds {
    /// Of `work`, added to what is there.
    fn add<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let (start, before) = (Instant::now(), cpu_seconds());
        let done = work()?;
        self.wall += start.elapsed().as_secs_f64();
        self.cpu += cpu_seconds() - before;
        Ok(done)
    }
}

/// Processor time of all threads of this process so far, 0 where the system does not say.
fn cpu_seconds() -> f64 {
    // Asking the scheduler brings this thread's own count up to date.
    std::thread::yield_now();
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let stats = threads.flatten().filter_map(|thread| std::fs::read_to_string(thread.path().join("schedstat")).ok());
    stats.filter_map(|text| text.split(' ').next()?.parse::<f64>().ok()).sum::<f64>() / 1e9
}

fn scored(model: &mut dyn Model, sequences: &[Vec<u32>], top_k: usize, mini_batch: usize) -> Result<Value> {
    let requests: Vec<ScoreRequest<'_>> =
        sequences.iter().map(|ids| ScoreRequest { ids, first: 1, candidates: None }).collect();
    let options = ScoreOptions { top_k, mini_batch, ..ScoreOptions::default() };
    let mut seconds = Seconds::default();
    let scored = seconds.add(|| Ok(score(model, &requests, &options)?))?;
    let logprobs: Vec<&[f32]> = scored.iter().map(|s| s.logprobs.as_slice()).collect();
    let top_sum: f64 = scored.iter().flat_map(|s| &s.top_logprobs).map(|&l| f64::from(l)).sum();
    Ok(json!({ "seconds": seconds.wall, "cpu_seconds": seconds.cpu, "logprobs": logprobs, "top_sum": top_sum }))
}

fn teacher(folder: &str, sequences: &[Vec<u32>]) -> Result<Teacher> {
    let mut model = model::load(Path::new(folder), "cpu")?;
    let requests: Vec<ScoreRequest<'_>> =
        sequences.iter().map(|ids| ScoreRequest { ids, first: 1, candidates: None }).collect();
    let options = ScoreOptions { keep_hidden: true, head: false, ..ScoreOptions::default() };
    let scored = score(model.as_mut(), &requests, &options)?;
    let hidden_rh = scored.into_iter().flat_map(|s| s.hidden_rh.unwrap_or_default()).collect();
    let config = model.config();
    let head = head::load("cpu", config.vocab_size, config.hidden_size, &head::values_of(model.as_ref())?)?;
    Ok(Teacher { head, hidden_rh })
}

/// One forward and backward.
fn step(
    seconds: &mut Seconds,
    model: &mut dyn Model,
    (batch, positions): (TokenBatch, Vec<Position>),
    loss: &mut dyn HeadLoss,
) -> Result<()> {
    seconds.add(|| Ok(model.forward_backward(&batch, &positions, loss)?))
}

fn train_nll(model: &mut dyn Model, sequences: &[Vec<u32>], mini_batch: usize) -> Result<Value> {
    model.zero_grads();
    let rows: usize = sequences.iter().map(|ids| ids.len() - 1).sum();
    let samples: Vec<SftSample> = sequences.iter().map(|ids| SftSample::response(ids.clone(), 1)).collect();
    let (mut seconds, mut total) = (Seconds::default(), 0.0);
    for part in samples.chunks(mini_batch) {
        let mut loss = SftLoss::new(part, 1.0 / rows as f64)?;
        step(&mut seconds, model, loss.batch()?, &mut loss)?;
        total += loss.total();
    }
    Ok(
        json!({ "seconds": seconds.wall, "cpu_seconds": seconds.cpu, "loss": total, "gradient_norm": gradient_norm(model)? }),
    )
}

fn train_jsd(
    model: &mut dyn Model,
    teachers: &mut [Teacher],
    sequences: &[Vec<u32>],
    beta: f64,
    mini_batch: usize,
) -> Result<Value> {
    model.zero_grads();
    let distill = DistillSpec {
        kind: DistillKind::FullVocab,
        beta,
        coef: 1.0,
        discount: 0.0,
        kl_clip: None,
        include_prompt: false,
    };
    let spec = ObjectiveSpec { loss: LossType::TokenMean, distill: Some(distill), ..ObjectiveSpec::default() };
    let samples: Vec<Sample> = sequences
        .iter()
        .map(|ids| Sample { ids: ids.clone(), prompt_len: 1, teacher: TeacherView::Full, ..Sample::default() })
        .collect();
    let normaliser = Normaliser::of(&spec, &samples, 1.0);
    let vocab = model.config().vocab_size;
    let (mut seconds, mut total, mut first) = (Seconds::default(), 0.0, 0);
    for part in samples.chunks(mini_batch) {
        let rows: usize = part.iter().map(|s| s.ids.len() - 1).sum();
        let parts = teachers
            .iter_mut()
            .map(|teacher| {
                let width = teacher.head.hidden();
                let hidden_rh = teacher.hidden_rh[first * width..(first + rows) * width].to_vec();
                Part { head: teacher.head.as_mut(), hidden_rh, spans: vec![(0..rows, 1.0)] }
            })
            .collect();
        first += rows;
        let mut source = MixedLogits::new(parts, rows, vocab, spec.temperature)?;
        let mut loss = PolicyLoss::new(&spec, part, normaliser, Some(&mut source))?;
        step(&mut seconds, model, loss.batch()?, &mut loss)?;
        total += loss.into_report().total;
    }
    Ok(
        json!({ "seconds": seconds.wall, "cpu_seconds": seconds.cpu, "loss": total, "gradient_norm": gradient_norm(model)? }),
    )
}

fn gradient_norm(model: &dyn Model) -> Result<f64> {
    let squares = |values: &[f32]| values.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
    Ok(model.sum_of_squares(&squares)?.sqrt())
}
