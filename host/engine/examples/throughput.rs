//! Tokens a second of a small student on the CPU: forward and backward, scoring, decoding.
//!
//! `cargo run --release -p cosmos-engine --example throughput -- [device] [hidden] [layers] [vocabulary]`

use std::hint::black_box;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use cosmos_engine::batch::{Position, TokenBatch};
use cosmos_engine::model::{self, HeadLoss, ModelConfig, Prefill};
use cosmos_engine::{EngineError, Result};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROWS: usize = 256;
const TOKENS: usize = 24;
const PROMPT: usize = 12;
const RUNS: u32 = 5;

/// A gradient that costs next to nothing.
struct Half;

impl HeadLoss for Half {
    fn needs_first_pass(&self) -> bool {
        false
    }
    fn observe(&mut self, _: Range<usize>, _: &[f32]) -> Result<()> {
        Ok(())
    }
    fn gradient(&mut self, _: Range<usize>, logits_rv: &mut [f32]) -> Result<()> {
        logits_rv.iter_mut().for_each(|l| *l *= 0.5);
        Ok(())
    }
}

/// The best of several runs, in tokens a second.
fn report(name: &str, tokens: usize, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    work()?;
    let mut best = f64::INFINITY;
    let cpu = cpu_seconds();
    for _ in 0..RUNS {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    let cpu = (cpu_seconds() - cpu) / f64::from(RUNS);
    println!(
        "{name:>18}: {:>9.0} tokens/s  ({:.1} ms, {:.1} ms on all cores together)",
        tokens as f64 / best,
        best * 1e3,
        cpu * 1e3
    );
    Ok(())
}

/// Processor time of this process so far, or 0 where the system does not say. On a busy machine it tells more than the
/// clock does.
fn cpu_seconds() -> f64 {
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else { return 0.0 };
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    // User and system time, in hundredths of a second on every Linux.
    let ticks = after_name.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let device = arguments.next().unwrap_or_else(|| "cpu".into());
    let hidden: usize = arguments.next().unwrap_or_else(|| "192".into()).parse()?;
    let layers: usize = arguments.next().unwrap_or_else(|| "4".into()).parse()?;
    let vocab: usize = arguments.next().unwrap_or_else(|| "24".into()).parse()?;
    let text = format!(
        r#"{{"model_type": "qwen3", "vocab_size": {vocab}, "hidden_size": {hidden}, "intermediate_size": {}, "num_hidden_layers": {layers},
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": {}, "max_position_embeddings": 256}}"#,
        hidden * 8 / 3,
        hidden / 4
    );
    let config = ModelConfig::from_json(&text, Path::new("config.json"))?;
    let mut model = model::random(&config, &device, 1)?;
    println!("{device}, {} parameters, {ROWS} rows of {TOKENS} tokens", config.parameter_count());

    let rows: Vec<Vec<u32>> =
        (0..ROWS).map(|row| (0..TOKENS).map(|t| ((row * 7 + t * 5) % 24) as u32).collect()).collect();
    let batch = TokenBatch::new(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
    let positions: Vec<Position> = (0..ROWS).flat_map(|b| (0..TOKENS).map(move |t| Position { b, t })).collect();
    report("forward", ROWS * TOKENS, &mut || {
        black_box(model.hidden_rh(&batch, &positions)?);
        Ok(())
    })?;
    report("forward + backward", ROWS * TOKENS, &mut || model.forward_backward(&batch, &positions, &mut Half))?;
    report("update", 1, &mut || model.update_params(&mut |_, _, gradient| gradient.fill(0.0)))?;
    for slots in [1, 32, ROWS] {
        report(&format!("decode, {slots} slots"), slots * (TOKENS - PROMPT), &mut || {
            let mut decoder = model.decoder(slots, TOKENS)?;
            let entries: Vec<Prefill<'_>> = rows[..slots]
                .iter()
                .enumerate()
                .map(|(slot, row)| Prefill { slots: vec![slot], prompt: &row[..PROMPT] })
                .collect();
            black_box(decoder.prefill(&entries)?);
            for t in PROMPT..TOKENS {
                let step: Vec<(usize, u32)> =
                    rows[..slots].iter().enumerate().map(|(slot, row)| (slot, row[t])).collect();
                black_box(decoder.step(&step)?);
            }
            Ok::<(), EngineError>(())
        })?;
    }
    Ok(())
}
