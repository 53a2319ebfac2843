//! Times the engine's phases and writes them as JSON.
//!
//! `--suite compare`: rollout, teacher scoring and one training step on given checkpoints and sequences; the other half
//! of `benchmarks/compare.py`, which does the same work in transformers and TRL.
//! `--suite decode`: decoding with weights in f32, bf16 or int8: speed, memory, and the mismatch to training.
//! `--suite train`: steps of next-token loss and AdamW on a checkpoint, and the peak of memory; `benchmarks/train.py`.
//! `--suite device`: matrix products, forward and decode of a device, on random models; what `tests/gpu.sh` keeps.

use std::collections::HashMap;
use std::error::Error;
use std::hint::black_box;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::str::FromStr;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use cosmos_engine::EngineError;
use cosmos_engine::batch::{Position, TokenBatch};
use cosmos_engine::generate::{GenerateOptions, GenerateRequest, SamplingParams, generate};
use cosmos_engine::model::{self, Family, LogitsSource, Model, ModelConfig, Prefill};
use cosmos_engine::objective::{
    DistillKind, DistillSpec, LossType, Normaliser, ObjectiveSpec, PolicyLoss, Report, Sample, SftLoss, SftSample,
    TeacherView,
};
use cosmos_engine::optim::{Adam, AdamConfig};
use cosmos_engine::score::{ScoreOptions, ScoreRequest, score};
use serde_json::{Value, json};

mod decode;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// As in the shipped binary: Flex allocates every result.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: &str = "usage: bench --suite compare --student DIR --teacher DIR --sequences FILE --prompt-tokens N \
                     [--micro-batch N] [--seconds-min S] [--only rollout|score|train] [--repeats N] [--device D] [--json FILE]\n       \
                     bench --suite train --student DIR \
                     --sequences FILE --steps N --learning-rate R [--update in-backward|after] [--device D] [--json FILE]\n       \
                     bench --suite decode \
                     --shape small|qwen2.5-0.5b --format f32|bf16|int8|int8-head [--slots 1,32] [--steps N] [--device D] \
                     [--json FILE]\n       bench --suite device [--device D] [--json FILE]";

fn main() -> Result<()> {
    let arguments = Arguments::read()?;
    let report = match arguments.text("suite")? {
        "compare" => compare(&arguments)?,
        "decode" => decode::suite(&arguments)?,
        "train" => train(&arguments)?,
        "device" => device_suite(arguments.text("device").unwrap_or("cpu"))?,
        other => return Err(format!("unknown suite `{other}`\n{USAGE}").into()),
    };
    match arguments.text("json") {
        Ok(path) => std::fs::write(path, format!("{report:#}\n"))?,
        Err(_) => println!("{report:#}"),
    }
    Ok(())
}

/// `--name value` pairs.
struct Arguments(HashMap<String, String>);

impl Arguments {
    fn read() -> Result<Self> {
        let mut pairs = HashMap::new();
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let name = word.strip_prefix("--").ok_or(USAGE)?;
            pairs.insert(name.to_owned(), words.next().ok_or(USAGE)?);
        }
        Ok(Self(pairs))
    }

    fn text(&self, name: &str) -> Result<&str> {
        self.0.get(name).map(String::as_str).ok_or_else(|| format!("`--{name}` is missing\n{USAGE}").into())
    }

    fn number<T: FromStr<Err: std::fmt::Display>>(&self, name: &str) -> Result<T> {
        Ok(self.text(name)?.parse().map_err(|e| format!("`--{name}`: {e}"))?)
    }

    fn sequences(&self) -> Result<Vec<Vec<u32>>> {
        Ok(serde_json::from_str(&std::fs::read_to_string(self.text("sequences")?)?)?)
    }
}

/// Seconds of `work`, and what it gave.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let start = Instant::now();
    let value = work()?;
    Ok((start.elapsed().as_secs_f64(), value))
}

/// Seconds of processor time of `work`, on all threads together, beside those of the clock.
fn timed_both<T>(work: impl FnOnce() -> Result<T>) -> Result<(f64, f64, T)> {
    let before = cpu_seconds();
    let (seconds, value) = timed(work)?;
    Ok((seconds, cpu_seconds() - before, value))
}

/// `work` again and again until `seconds_min` have passed: seconds and processor seconds of one, and what the first gave.
fn repeated<T>(seconds_min: f64, mut work: impl FnMut() -> Result<T>) -> Result<(f64, f64, T)> {
    let mut times = 1.0;
    let (wall, cpu, first) = timed_both(|| {
        let start = Instant::now();
        let first = work()?;
        while start.elapsed().as_secs_f64() < seconds_min {
            work()?;
            times += 1.0;
        }
        Ok(first)
    })?;
    Ok((wall / times, cpu / times, first))
}

/// Processor time of this process so far, or 0 where the system does not say.
fn cpu_seconds() -> f64 {
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else { return 0.0 };
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    // User and system time, in hundredths of a second on every Linux.
    after_name.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum::<f64>() / 100.0
}

// ---- compare ----------------------------------------------------------------------------------------------------------

fn compare(arguments: &Arguments) -> Result<Value> {
    let device = arguments.text("device").unwrap_or("cpu");
    let mut student = model::load(Path::new(arguments.text("student")?), device)?;
    let mut teacher = model::load(Path::new(arguments.text("teacher")?), device)?;
    let sequences = arguments.sequences()?;
    let prompt_len = arguments.number("prompt-tokens")?;
    let micro_batch = arguments.number("micro-batch").unwrap_or(8);
    if sequences.iter().any(|s| s.len() <= prompt_len) || micro_batch == 0 {
        return Err("every sequence must be longer than the prompt, and the micro-batch at least 1".into());
    }
    // Everything of a phase's size first, so that none pays for first touches: a rollout of all sequences, and a micro-batch
    // through what comes in micro-batches. The reference has had its first round by then.
    let few = &sequences[..micro_batch.min(sequences.len())];
    rollout(student.as_mut(), &sequences, prompt_len)?;
    score_all(teacher.as_mut(), few, prompt_len, micro_batch)?;
    accumulate(student.as_mut(), teacher.as_mut(), few, prompt_len, micro_batch)?;
    let settings = AdamConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, ..AdamConfig::default() };
    let mut adam = Adam::new(settings, student.params());
    // A rate of 0 touches the moments' memory and leaves the weights as they are.
    adam.step(student.as_mut(), 0.0, Some(1.0))?;
    student.zero_grads();

    if let Ok(only) = arguments.text("only") {
        let mut seconds = Vec::new();
        for _ in 0..arguments.number("repeats").unwrap_or(5) {
            let (student, teacher) = (student.as_mut(), teacher.as_mut());
            seconds.push(timed_both(|| match only {
                "rollout" => rollout(student, &sequences, prompt_len).map(drop),
                "score" => score_all(teacher, &sequences, prompt_len, micro_batch).map(drop),
                "train" => accumulate(student, teacher, &sequences, prompt_len, micro_batch).map(drop),
                other => Err(format!("unknown phase `{other}`: use `rollout`, `score` or `train`").into()),
            })?);
        }
        let tokens: usize = sequences.iter().map(|s| s.len() - prompt_len).sum();
        let runs: Vec<Value> = seconds
            .iter()
            .map(|(wall, cpu, ())| json!({ "seconds": wall, "cpu_seconds": cpu, "tokens_per_second": tokens as f64 / wall }))
            .collect();
        return Ok(json!({ "device": device, "phase": only, "completion_tokens": tokens, "runs": runs }));
    }
    let seconds_min = arguments.number("seconds-min").unwrap_or(0.0);
    let (rollout_seconds, rollout_cpu, tokens) =
        repeated(seconds_min, || rollout(student.as_mut(), &sequences, prompt_len))?;
    let (score_seconds, score_cpu, logprob_sum) =
        repeated(seconds_min, || score_all(teacher.as_mut(), &sequences, prompt_len, micro_batch))?;
    let (train_seconds, train_cpu, report) = repeated(seconds_min, || {
        let report = accumulate(student.as_mut(), teacher.as_mut(), &sequences, prompt_len, micro_batch)?;
        let stats = adam.step(student.as_mut(), 1e-4, Some(1.0))?;
        if !stats.finite {
            return Err("the gradient is not finite".into());
        }
        student.zero_grads();
        Ok(report)
    })?;
    Ok(json!({
        "device": device,
        "rollout": { "seconds": rollout_seconds, "cpu_seconds": rollout_cpu, "completion_tokens": tokens },
        "score": { "seconds": score_seconds, "cpu_seconds": score_cpu, "logprob_sum": logprob_sum },
        "train": { "seconds": train_seconds, "cpu_seconds": train_cpu, "loss": report.total, "tokens": report.tokens },
    }))
}

/// Samples as many tokens as each sequence has after its prompt, at temperature 1 and with no stop id.
fn rollout(student: &mut dyn Model, sequences: &[Vec<u32>], prompt_len: usize) -> Result<usize> {
    let requests: Vec<GenerateRequest> = (0..)
        .zip(sequences)
        .map(|(id, s)| GenerateRequest {
            id,
            prompt: s[..prompt_len].to_vec(),
            n: 1,
            max_new_tokens: s.len() - prompt_len,
            ..GenerateRequest::default()
        })
        .collect();
    let params = SamplingParams { seed: 7, ..SamplingParams::default() };
    let context_limit = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let options = GenerateOptions { slots: sequences.len(), context_limit, ..GenerateOptions::default() };
    let mut tokens = 0;
    generate(student, &requests, &params, &options, &mut |done| {
        tokens += done.tokens.len();
        ControlFlow::Continue(())
    })?;
    Ok(tokens)
}

/// Sum of the completion tokens' log-probs; the top 8 of each token are computed too.
fn score_all(teacher: &mut dyn Model, sequences: &[Vec<u32>], prompt_len: usize, mini_batch: usize) -> Result<f64> {
    let requests: Vec<ScoreRequest<'_>> =
        sequences.iter().map(|ids| ScoreRequest { ids, first: prompt_len, candidates: None }).collect();
    let options = ScoreOptions { top_k: 8, mini_batch, ..ScoreOptions::default() };
    let scored = score(teacher, &requests, &options)?;
    Ok(scored.iter().flat_map(|s| &s.logprobs).map(|&l| f64::from(l)).sum())
}

/// The teacher's head over its kept hidden states.
struct TeacherLogits<'a> {
    teacher: &'a mut dyn Model,
    hidden_rh: Vec<f32>,
    width: usize,
}

impl LogitsSource for TeacherLogits<'_> {
    fn logits_rv(&mut self, rows: Range<usize>, out: &mut Vec<f32>) -> std::result::Result<(), EngineError> {
        self.teacher.head_logits_rv(&self.hidden_rh[rows.start * self.width..rows.end * self.width], out)
    }
}

/// Full-vocabulary reverse KL, micro-batch after micro-batch, into the student's gradients.
fn accumulate(
    student: &mut dyn Model,
    teacher: &mut dyn Model,
    sequences: &[Vec<u32>],
    prompt_len: usize,
    micro_batch: usize,
) -> Result<Report> {
    let distill = DistillSpec {
        kind: DistillKind::FullVocab,
        beta: 1.0,
        coef: 1.0,
        discount: 0.0,
        kl_clip: None,
        include_prompt: false,
    };
    let spec = ObjectiveSpec { loss: LossType::TokenMean, distill: Some(distill), ..ObjectiveSpec::default() };
    let samples: Vec<Sample> = sequences
        .iter()
        .map(|ids| Sample { ids: ids.clone(), prompt_len, teacher: TeacherView::Full, ..Sample::default() })
        .collect();
    let normaliser = Normaliser::of(&spec, &samples, 1.0);
    let width = teacher.config().hidden_size;
    let mut total = Report::default();
    for group in samples.chunks(micro_batch) {
        let requests: Vec<ScoreRequest<'_>> =
            group.iter().map(|s| ScoreRequest { ids: &s.ids, first: prompt_len, candidates: None }).collect();
        let options =
            ScoreOptions { mini_batch: micro_batch, keep_hidden: true, head: false, ..ScoreOptions::default() };
        let hidden_rh =
            score(teacher, &requests, &options)?.into_iter().flat_map(|s| s.hidden_rh.unwrap_or_default()).collect();
        let mut source = TeacherLogits { teacher: &mut *teacher, hidden_rh, width };
        let mut loss = PolicyLoss::new(&spec, group, normaliser, Some(&mut source))?;
        let (batch, positions) = loss.batch()?;
        student.forward_backward(&batch, &positions, &mut loss)?;
        total.merge(loss.into_report());
    }
    Ok(total)
}

// ---- train ------------------------------------------------------------------------------------------------------------

/// Seconds and losses of every step, warm-up and all; the memory that the process held after loading and after the first
/// step, and the most at once. Parameters are updated within the backward, as a run does that does not clip, or after it.
fn train(arguments: &Arguments) -> Result<Value> {
    let device = arguments.text("device").unwrap_or("cpu");
    let mut model = model::load(Path::new(arguments.text("student")?), device)?;
    let sequences = arguments.sequences()?;
    let (steps, rate): (usize, f64) = (arguments.number("steps")?, arguments.number("learning-rate")?);
    let samples: Vec<SftSample> = sequences.into_iter().map(|ids| SftSample::response(ids, 1)).collect();
    let scored: usize = samples.iter().map(SftSample::scored).sum();
    let settings = AdamConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.01, ..AdamConfig::default() };
    let mut adam = Adam::new(settings, model.params());
    let (mut seconds, mut losses, mut norms) = (Vec::new(), Vec::new(), Vec::new());
    let in_backward = match arguments.text("update").unwrap_or("in-backward") {
        "in-backward" => true,
        "after" => false,
        other => return Err(format!("`--update` is `{other}`\n{USAGE}").into()),
    };
    let mut held = vec![("loaded", memory_bytes("VmRSS:"), memory_bytes("VmHWM:"))];
    for step in 0..steps {
        let (passed, loss) = timed(|| {
            let mut loss = SftLoss::new(&samples, 1.0 / scored.max(1) as f64)?;
            let (batch, positions) = loss.batch()?;
            let stats = if in_backward {
                adam.step_in_backward(model.as_mut(), rate, &batch, &positions, &mut loss)?
            } else {
                model.forward_backward(&batch, &positions, &mut loss)?;
                let stats = adam.step(model.as_mut(), rate, None)?;
                model.zero_grads();
                stats
            };
            if !stats.finite {
                return Err("the gradient is not finite".into());
            }
            norms.push(stats.grad_norm);
            Ok(loss.total())
        })?;
        seconds.push(passed);
        losses.push(loss);
        if step == 0 {
            held.push(("first step", memory_bytes("VmRSS:"), memory_bytes("VmHWM:")));
        }
    }
    let held: Vec<Value> = held
        .into_iter()
        .map(|(after, now, peak)| json!({ "after": after, "bytes": now, "peak_bytes": peak }))
        .collect();
    let peak = memory_bytes("VmHWM:");
    Ok(json!({
        "device": device, "seconds": seconds, "losses": losses, "grad_norms": norms, "memory": held, "peak_bytes": peak,
    }))
}

/// Bytes of memory that this process holds (`VmRSS:`) or has held at most (`VmHWM:`), or 0 where the system does not say.
fn memory_bytes(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(what));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.map_or(0, |kib| kib * 1024)
}

// ---- device -----------------------------------------------------------------------------------------------------------

fn device_suite(name: &str) -> Result<Value> {
    let cpu = matches!(name, "cpu" | "burn:flex");
    let sizes: &[usize] = if cpu { &[256, 512, 1024] } else { &[1024, 4096, 8192] };
    // The native engine's products are those of `cargo run --release -p cosmos-kernels --example roofline`.
    let sizes = if name == "cpu" { &[] } else { sizes };
    let products: Vec<Value> = sizes.iter().map(|&n| matrix_product(name, n)).collect::<Result<_>>()?;
    // A small model where the CPU is meant, one the shape of Qwen3-0.6B where a GPU is.
    let config = if cpu { qwen3(256, 6, 8, 4, 32, 768, 8192) } else { qwen3(1024, 28, 16, 8, 128, 3072, 32_768) };
    let mut model = model::random(&config, name, 1)?;
    let parameters: usize = model.params().iter().map(|p| p.shape.iter().product::<usize>()).sum();
    Ok(json!({
        "device": name,
        "parameters": parameters,
        "matrix_products": products,
        "forward": forward(model.as_mut(), if cpu { 8 } else { 16 }, if cpu { 128 } else { 1024 })?,
        "decode": decode(model.as_mut(), 32, 32, if cpu { 64 } else { 128 })?,
    }))
}

fn qwen3(
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    intermediate: usize,
    vocab: usize,
) -> ModelConfig {
    ModelConfig {
        family: Family::Qwen3,
        vocab_size: vocab,
        hidden_size: hidden,
        intermediate_size: intermediate,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_scaling: None,
        tie_word_embeddings: true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: true,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
    }
}

fn open(name: &str) -> Result<Device> {
    match name {
        "burn:flex" => Ok(Device::flex()),
        #[cfg(feature = "burn-cuda")]
        "burn:cuda" => Ok(Device::cuda(0)),
        other => Err(format!("device `{other}` is not in this build; `--features burn-cuda` adds `burn:cuda`").into()),
    }
}

/// Square f32 products; the best of several, since the first ones compile and tune kernels.
fn matrix_product(name: &str, n: usize) -> Result<Value> {
    let device = open(name)?;
    let matrix = || Tensor::<2>::random([n, n], Distribution::Default, &device);
    let (a, b) = (matrix(), matrix());
    let sync = || device.sync().map_err(|e| format!("the device failed: {e:?}"));
    sync()?;
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        let (seconds, product) = timed(|| {
            let product = a.clone().matmul(b.clone());
            sync()?;
            Ok(product)
        })?;
        black_box(product);
        best = best.min(seconds);
    }
    Ok(json!({ "n": n, "seconds": best, "tflops": 2.0 * (n as f64).powi(3) / best / 1e12 }))
}

fn tokens(model: &dyn Model, rows: usize, length: usize) -> Vec<Vec<u32>> {
    let vocab = model.config().vocab_size;
    (0..rows).map(|row| (0..length).map(|t| ((row * 7919 + t * 104_729 + 1) % vocab) as u32).collect()).collect()
}

/// Hidden states of every last token: the whole network without a large head.
fn forward(model: &mut dyn Model, rows: usize, length: usize) -> Result<Value> {
    let sequences = tokens(model, rows, length);
    let batch = TokenBatch::new(&sequences.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
    let positions: Vec<Position> = (0..rows).map(|b| Position { b, t: length - 1 }).collect();
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let (seconds, hidden) = timed(|| Ok(model.hidden_rh(&batch, &positions)?))?;
        black_box(hidden);
        best = best.min(seconds);
    }
    Ok(json!({ "rows": rows, "length": length, "seconds": best, "tokens_per_second": (rows * length) as f64 / best }))
}

/// Steps of `rows` sequences after a prompt; each step's logits reach the host, as the sampler needs them.
fn decode(model: &mut dyn Model, rows: usize, prompt_len: usize, steps: usize) -> Result<Value> {
    let prompts = tokens(model, rows, prompt_len);
    let mut decoder = model.decoder(rows, prompt_len + 2 * steps)?;
    let entries: Vec<Prefill<'_>> =
        prompts.iter().enumerate().map(|(slot, prompt)| Prefill { slots: vec![slot], prompt }).collect();
    let (prefill_seconds, logits) = timed(|| Ok(decoder.prefill(&entries)?))?;
    black_box(logits);
    let next: Vec<(usize, u32)> = (0..rows).map(|slot| (slot, 1)).collect();
    let mut run = || {
        timed(|| {
            (0..steps).try_for_each(|_| decoder.step(&next).map(|logits| drop(black_box(logits))).map_err(Into::into))
        })
    };
    // The first half warms up.
    run()?;
    let (seconds, ()) = run()?;
    Ok(json!({
        "rows": rows, "prompt_tokens": prompt_len, "steps": steps, "prefill_seconds": prefill_seconds,
        "seconds": seconds, "tokens_per_second": (rows * steps) as f64 / seconds,
    }))
}
