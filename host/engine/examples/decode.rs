//! Tokens a second of a rollout on the CPU, and where its time goes: prompts, steps, and the choice of tokens.
//!
//! `cargo run --release -p cosmos-engine --example decode -- [sequences] [new tokens] [rounds]`, on the 5.77 M-parameter
//! Qwen3 of `benchmarks/compare.py --size medium` with random weights. The last line is a batch with very uneven lengths.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use cosmos_engine::generate::{GenerateOptions, GenerateRequest, GenerateStats, SamplingParams, generate};
use cosmos_engine::model::{self, Model, ModelConfig, Prefill};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PROMPT: usize = 32;
const VOCAB: usize = 4096;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn argument(at: usize, default: usize) -> Result<usize> {
    Ok(std::env::args().nth(at).map(|text| text.parse()).transpose()?.unwrap_or(default))
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn main() -> Result<()> {
    let (sequences, new_tokens, rounds) = (argument(1, 32)?, argument(2, 128)?, argument(3, 3)?);
    if sequences == 0 || new_tokens == 0 || rounds == 0 {
        return Err("sequences, new tokens and rounds must be at least 1".into());
    }
    let text = format!(
        r#"{{"model_type": "qwen3", "vocab_size": {VOCAB}, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048, "tie_word_embeddings": true}}"#
    );
    let config = ModelConfig::from_json(&text, Path::new("config.json"))?;
    let mut model = model::random(&config, "cpu", 1)?;
    println!("{} parameters, {} threads", config.parameter_count(), rayon::current_num_threads());
    let prompts: Vec<Vec<u32>> = (0..sequences)
        .map(|row| (0..PROMPT).map(|t| ((row * 7919 + t * 104_729 + 1) % VOCAB) as u32).collect())
        .collect();

    phases(model.as_mut(), &prompts, new_tokens, rounds)?;
    let even = vec![new_tokens; sequences];
    rollout(model.as_mut(), "rollout", &prompts, &even, rounds)?;
    // A few long completions among many short ones, three of them for each slot.
    let prompts: Vec<Vec<u32>> = (0..3).flat_map(|_| prompts.iter().cloned()).collect();
    let uneven: Vec<usize> = (0..prompts.len())
        .map(|i| if i % 8 == 0 { new_tokens } else { 1 + (i * 37) % new_tokens.div_ceil(3) })
        .collect();
    rollout(model.as_mut(), "uneven lengths", &prompts, &uneven, rounds)
}

/// Prompts and steps without any choice of tokens.
fn phases(model: &mut dyn Model, prompts: &[Vec<u32>], steps: usize, rounds: usize) -> Result<()> {
    let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
    for _ in 0..=rounds {
        let mut decoder = model.decoder(prompts.len(), PROMPT + steps)?;
        let entries: Vec<Prefill<'_>> =
            prompts.iter().enumerate().map(|(slot, prompt)| Prefill { slots: vec![slot], prompt }).collect();
        let start = Instant::now();
        black_box(decoder.prefill(&entries)?);
        prefills.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        for step in 1..steps {
            let next: Vec<(usize, u32)> =
                (0..prompts.len()).map(|slot| (slot, ((slot * 31 + step * 17) % VOCAB) as u32)).collect();
            let logits = black_box(decoder.step(&next)?);
            decoder.recycle(logits);
        }
        decodes.push(start.elapsed().as_secs_f64());
    }
    let rows = prompts.len() as f64;
    let (prefill, decode) = (median(prefills.split_off(1)), median(decodes.split_off(1)));
    println!("{:>16}: {:>8.0} tokens/s  {:.2} ms", "prompts", rows * PROMPT as f64 / prefill, prefill * 1e3);
    println!(
        "{:>16}: {:>8.0} tokens/s  {:.3} ms a step",
        "steps alone",
        rows * (steps - 1) as f64 / decode,
        decode * 1e3 / (steps - 1).max(1) as f64
    );
    Ok(())
}

/// A whole rollout, as training runs it: one slot for each of the first completions.
fn rollout(model: &mut dyn Model, name: &str, prompts: &[Vec<u32>], lens: &[usize], rounds: usize) -> Result<()> {
    let requests: Vec<GenerateRequest> = (0..)
        .zip(prompts.iter().zip(lens))
        .map(|(id, (prompt, len))| GenerateRequest {
            id,
            prompt: prompt.clone(),
            n: 1,
            max_new_tokens: *len,
            ..GenerateRequest::default()
        })
        .collect();
    let slots = argument(1, 32)?;
    let options = GenerateOptions { slots, context_limit: 2048, logprobs: true, ..GenerateOptions::default() };
    let params = SamplingParams { seed: 7, ..SamplingParams::default() };
    let (mut seconds, mut stats, mut sum) = (Vec::new(), GenerateStats::default(), 0u64);
    for _ in 0..=rounds {
        sum = 0;
        stats = generate(model, &requests, &params, &options, &mut |done| {
            let of = |hash: u64, token: &u32| hash.wrapping_mul(31).wrapping_add(u64::from(*token));
            sum = sum.wrapping_add(done.tokens.iter().fold(done.id, of));
            ControlFlow::Continue(())
        })?;
        seconds.push(stats.seconds);
    }
    let seconds = median(seconds.split_off(1));
    println!(
        "{name:>16}: {:>8.0} tokens/s  {:.1} ms, {} steps, slots busy {:.1} %, completions hash to {sum:016x}",
        stats.completion_tokens as f64 / seconds,
        seconds * 1e3,
        stats.steps,
        100.0 * stats.row_steps as f64 / (slots * stats.steps.max(1)) as f64
    );
    Ok(())
}
