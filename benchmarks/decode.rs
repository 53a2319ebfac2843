//! `--suite decode`: tokens a second, bytes a second and memory of decoding with weights in one format, and how far its
//! log-probs are from those of training.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use cosmos_engine::generate::{GenerateOptions, GenerateRequest, SamplingParams, generate};
use cosmos_engine::model::{self, Model, ModelConfig, Prefill, WeightFormat};
use cosmos_engine::score::{ScoreOptions, ScoreRequest, score};
use serde_json::{Value, json};

use crate::{Arguments, Result, timed};

/// Prompt tokens of each sequence.
const PROMPT: usize = 16;
/// Runs of which the fastest counts.
const RUNS: usize = 3;

/// The suite: `--shape small|qwen2.5-0.5b --format f32|bf16|int8|int8-head [--slots 1,32] [--steps N] [--device D]`.
pub fn suite(arguments: &Arguments) -> Result<Value> {
    let (shape, name) = (arguments.text("shape")?, arguments.text("format")?);
    let device = arguments.text("device").unwrap_or("cpu");
    let steps = arguments.number("steps").unwrap_or(32);
    let slots = arguments
        .text("slots")
        .unwrap_or("1,32")
        .split(',')
        .map(str::parse)
        .collect::<std::result::Result<Vec<usize>, _>>()?;
    let (config, format) = (config_of(shape)?, format_of(name)?);
    let empty_mib = memory_mib("VmRSS");
    let mut model = model::random_frozen(&config, device, format, 1)?;
    let held_mib = memory_mib("VmRSS") - empty_mib;
    let bytes = weight_bytes(&config, format);
    let speeds: Vec<Value> =
        slots.into_iter().map(|slots| speed(model.as_mut(), slots, steps, bytes)).collect::<Result<_>>()?;
    let peak_mib = memory_mib("VmHWM");
    drop(model);
    let (read, copied) = bandwidths();
    Ok(json!({
        "device": device, "shape": shape, "format": name, "parameters": config.parameter_count(),
        "memory_read_gb_per_s": read, "memory_copied_gb_per_s": copied,
        "weight_mib_read_a_step": bytes / f64::from(1 << 20), "held_mib": held_mib, "peak_mib": peak_mib,
        "decode": speeds, "training": beside_training(&config, device, format)?,
    }))
}

fn config_of(shape: &str) -> Result<ModelConfig> {
    let text = match shape {
        "small" => {
            r#"{"model_type": "qwen3", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768,
            "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
            "max_position_embeddings": 4096, "tie_word_embeddings": true}"#
        }
        "qwen2.5-0.5b" => {
            r#"{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768, "tie_word_embeddings": true}"#
        }
        other => return Err(format!("unknown shape `{other}`: use `small` or `qwen2.5-0.5b`").into()),
    };
    Ok(ModelConfig::from_json(text, Path::new("config.json"))?)
}

fn format_of(name: &str) -> Result<WeightFormat> {
    Ok(match name {
        "f32" => WeightFormat::F32,
        "bf16" => WeightFormat::Bf16,
        "int8" => WeightFormat::Int8 { head: false },
        "int8-head" => WeightFormat::Int8 { head: true },
        other => return Err(format!("unknown format `{other}`: use `f32`, `bf16`, `int8` or `int8-head`").into()),
    })
}

/// GB/s of reading and of copying (what is read and what is written) more than any cache holds, on all threads.
fn bandwidths() -> (f64, f64) {
    let from = vec![1.0f32; 64 << 20];
    let mut to = vec![0.0f32; from.len()];
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let part = from.len().div_ceil(threads);
    let best = |work: &mut dyn FnMut()| {
        let seconds = || {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        };
        std::iter::repeat_with(seconds).take(8).fold(f64::INFINITY, f64::min)
    };
    let bytes = 4.0 * from.len() as f64;
    let reading = best(&mut || {
        std::thread::scope(|scope| {
            for part in from.chunks(part) {
                scope.spawn(|| {
                    let mut sums = [0.0f32; 64];
                    for chunk in part.as_chunks::<64>().0 {
                        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x);
                    }
                    black_box(sums);
                });
            }
        });
    });
    let copying = best(&mut || {
        std::thread::scope(|scope| {
            for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
                scope.spawn(|| to.copy_from_slice(from));
            }
        });
        black_box(&to);
    });
    (bytes / reading / 1e9, 2.0 * bytes / copying / 1e9)
}

/// Bytes of weights that a step of decoding reads.
fn weight_bytes(config: &ModelConfig, format: WeightFormat) -> f64 {
    let matrices = |params: Vec<model::ParamSpec>| -> usize {
        params.iter().filter(|spec| spec.shape.len() == 2).map(model::ParamSpec::len).sum()
    };
    let blocks: usize = (0..config.num_hidden_layers).map(|layer| matrices(config.block_params(layer))).sum();
    let head = config.vocab_size * config.hidden_size;
    let int8 = 1.0 + 4.0 / 128.0;
    let (block, table) = match format {
        WeightFormat::F32 => (4.0, 4.0),
        WeightFormat::Bf16 => (2.0, 2.0),
        WeightFormat::Int8 { head } => (int8, if head { int8 } else { 2.0 }),
    };
    block * blocks as f64 + table * head as f64
}

/// A line of `/proc/self/status` in MiB, 0 where there is none.
fn memory_mib(name: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<f64>().ok()).map_or(0.0, |kib| kib / 1024.0)
}

fn speed(model: &mut dyn Model, slots: usize, steps: usize, bytes: f64) -> Result<Value> {
    let vocab = model.config().vocab_size;
    let prompt: Vec<u32> = (0..PROMPT).map(|t| ((t * 104_729 + 1) % vocab) as u32).collect();
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let mut decoder = model.decoder(slots, PROMPT + steps + 1)?;
        decoder.prefill(&[Prefill { slots: (0..slots).collect(), prompt: &prompt }])?;
        let mut step = |token: u32| -> Result<()> {
            let entries: Vec<(usize, u32)> =
                (0..slots).map(|slot| (slot, (token + slot as u32) % vocab as u32)).collect();
            let logits = black_box(decoder.step(&entries)?);
            decoder.recycle(logits);
            Ok(())
        };
        step(0)?;
        let (seconds, ()) = timed(|| (1..=steps as u32).try_for_each(&mut step))?;
        best = best.min(seconds / steps as f64);
    }
    Ok(json!({
        "slots": slots, "steps": steps, "step_ms": best * 1e3, "tokens_per_second": slots as f64 / best,
        "weights_gb_per_s": bytes / best / 1e9,
    }))
}

/// A model in training that decodes in `format`: what the copy costs after a step, and its log-probs against those of
/// training.
fn beside_training(config: &ModelConfig, device: &str, format: WeightFormat) -> Result<Value> {
    let mut trained = model::random(config, device, 1)?;
    trained.decode_in(format)?;
    for index in 0..trained.params().len() {
        let values = trained.read_param(index);
        trained.write_param(index, &values)?;
    }
    // All parameters count as changed: what an optimizer step leaves behind.
    let (update_seconds, _) = timed(|| trained.decoder(1, 8).map(drop).map_err(Into::into))?;
    let requests: Vec<GenerateRequest> = (0..8)
        .map(|id| GenerateRequest {
            id,
            prompt: vec![id as u32 + 1, 7, 9, 11],
            n: 1,
            max_new_tokens: 32,
            ..GenerateRequest::default()
        })
        .collect();
    let options = GenerateOptions { logprobs: true, slots: 8, context_limit: 64, ..GenerateOptions::default() };
    let (mut sequences, mut recorded) = (Vec::new(), Vec::new());
    generate(
        trained.as_mut(),
        &requests,
        &SamplingParams { seed: 3, ..SamplingParams::default() },
        &options,
        &mut |done| {
            sequences.push([requests[done.id as usize].prompt.as_slice(), &done.tokens].concat());
            recorded.extend(done.logprobs);
            ControlFlow::Continue(())
        },
    )?;
    let asked: Vec<ScoreRequest<'_>> =
        sequences.iter().map(|ids| ScoreRequest { ids, first: 4, candidates: None }).collect();
    let own = score(trained.as_mut(), &asked, &ScoreOptions { mini_batch: 8, ..ScoreOptions::default() })?;
    let differences: Vec<f64> =
        own.iter().flat_map(|s| &s.logprobs).zip(&recorded).map(|(a, b)| f64::from((a - b).abs())).collect();
    Ok(json!({
        "update_seconds": update_seconds, "tokens": differences.len(),
        "logprob_mismatch_mean": differences.iter().sum::<f64>() / differences.len() as f64,
        "logprob_mismatch_max": differences.iter().copied().fold(0.0, f64::max),
    }))
}
