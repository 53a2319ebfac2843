//! Output heads without their models, and mixtures of what several of them say.
//!
//! A teacher in another process ships its last hidden states; whoever trains or validates applies its head here, with the
//! same kernels as the whole model would, so that the logits have the same bits. Logits of several teachers become those
//! of one distribution, the weighted mixture, before an objective sees them.

use std::ops::Range;

use cosmos_kernels::{Isa, vocabulary};
use rayon::prelude::*;

use crate::block::BlockEngine;
use crate::burn_engine::BurnEngine;
use crate::cpu_engine::CpuEngine;
use crate::model::{Family, LogitsSource, Model, ModelConfig};
use crate::score::softmax::{apply_temperature, divides};
use crate::{EngineError, Result};

/// From hidden states to logits.
pub trait Head: Send {
    /// Logits of a row.
    fn vocab(&self) -> usize;
    /// Width of the hidden states.
    fn hidden(&self) -> usize;
    /// Rows of logits to hold at a time.
    fn chunk_rows(&self) -> usize;
    /// Logits `[rows, vocab]` of hidden states `[rows, hidden]` into `out` (cleared first).
    ///
    /// # Errors
    /// Hidden states that are no whole rows, and those of the device.
    fn logits_rv(&mut self, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()>;
}

/// The head of a whole model.
pub struct ModelHead<'a>(pub &'a mut dyn Model);

impl Head for ModelHead<'_> {
    fn vocab(&self) -> usize {
        self.0.config().vocab_size
    }

    fn hidden(&self) -> usize {
        self.0.config().hidden_size
    }

    fn chunk_rows(&self) -> usize {
        self.0.head_chunk_rows()
    }

    fn logits_rv(&mut self, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()> {
        if !self.0.vocab_shard().is_whole() {
            return Err(EngineError::invalid(
                format!("the head of this rank has {:?}", self.0.vocab_shard()),
                "load the teacher's head alone, or do not cut the teacher by `tp_size` or `cp_size`",
            ));
        }
        self.0.head_logits_rv(hidden_rh, out)
    }
}

/// A head on an engine, and nothing else of its model.
struct EngineHead<E: BlockEngine> {
    engine: E,
    table: E::Table,
}

impl<E: BlockEngine> Head for EngineHead<E> {
    fn vocab(&self) -> usize {
        self.engine.config().vocab_size
    }

    fn hidden(&self) -> usize {
        self.engine.config().hidden_size
    }

    fn chunk_rows(&self) -> usize {
        self.engine.head_chunk_rows()
    }

    fn logits_rv(&mut self, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        if !hidden_rh.len().is_multiple_of(self.hidden()) {
            return Err(not_rows(hidden_rh.len(), self.hidden()));
        }
        if hidden_rh.is_empty() {
            return Ok(());
        }
        self.engine.head(&self.table, hidden_rh, out)
    }
}

fn not_rows(values: usize, hidden: usize) -> EngineError {
    EngineError::invalid(
        format!("{values} hidden values are no whole rows of a head {hidden} wide"),
        "use the head of the teacher that computed the hidden states",
    )
}

/// A head on `device` from its values `[vocab, hidden]`.
///
/// # Errors
/// Values that do not fill the shape, a device that is not there.
pub fn load(device: &str, vocab: usize, hidden: usize, values_vh: &[f32]) -> Result<Box<dyn Head>> {
    if vocab == 0 || hidden == 0 || vocab.checked_mul(hidden) != Some(values_vh.len()) {
        return Err(EngineError::invalid(
            format!("{} values do not fill a head of {vocab} x {hidden}", values_vh.len()),
            "fetch the head again from its teacher",
        ));
    }
    let config = alone(vocab, hidden);
    Ok(match device {
        "cpu" => {
            let engine = CpuEngine::new(config);
            Box::new(EngineHead { table: engine.table(values_vh), engine })
        }
        _ => {
            let engine = BurnEngine::new(config, device)?;
            Box::new(EngineHead { table: engine.table(values_vh), engine })
        }
    })
}

/// The head's values `[vocab, hidden]` of a model; the embedding's when the two are tied. Collective where it is sharded.
///
/// # Errors
/// Those of the collective.
pub fn values_of(model: &dyn Model) -> Result<Vec<f32>> {
    let config = model.config();
    let own = if config.tie_word_embeddings { config.embed_params() } else { config.head_params() };
    let at = model.whole_params().iter().position(|spec| own.first().is_some_and(|head| head.name == spec.name));
    let Some(index) = at else {
        return Err(EngineError::invalid("the model has no parameter that is its head", ""));
    };
    model.gather(index, &model.read_param(index))
}

/// The architecture of an engine that only ever runs a head: nothing but the two sizes is looked at.
fn alone(vocab_size: usize, hidden_size: usize) -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        vocab_size,
        hidden_size,
        intermediate_size: 1,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        num_key_value_heads: 1,
        head_dim: 2,
        max_position_embeddings: 1,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_scaling: None,
        tie_word_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
    }
}

/// What one teacher says about rows of a loss.
pub struct Part<'a> {
    /// Its head.
    pub head: &'a mut dyn Head,
    /// Hidden states `[answered rows, hidden]`.
    pub hidden_rh: Vec<f32>,
    /// Which rows it answers and its weight there, by row and without overlap. Their rows are those of `hidden_rh`.
    pub spans: Vec<(Range<usize>, f64)>,
}

impl Part<'_> {
    /// `(row, index of its hidden state, weight)` of the answered rows within `rows`.
    fn answered(&self, rows: &Range<usize>) -> Vec<(usize, usize, f64)> {
        let mut found = Vec::new();
        let mut before = 0;
        for (span, weight) in &self.spans {
            let (start, end) = (span.start.max(rows.start), span.end.min(rows.end));
            found.extend((start..end.max(start)).map(|row| (row, before + row - span.start, *weight)));
            before += span.len();
        }
        found
    }
}

/// Logits of the weighted mixture of what teachers say, recomputed from their last hidden states whenever an objective asks.
///
/// The mixture is one of distributions: `p = Σ w softmax(z / T)` over the first `vocab` tokens, with the weights of a row
/// scaled to sum to one. It is given back as logits `T log p`, so that the objective, which divides by the temperature,
/// sees `log p`. A row with a single teacher keeps that teacher's logits bit for bit.
pub struct MixedLogits<'a> {
    parts: Vec<Part<'a>>,
    rows: usize,
    vocab: usize,
    /// The tokens that are given.
    columns: Range<usize>,
    temperature: f32,
    /// Sum of the weights of each row, and how many teachers it has.
    totals: Vec<(f64, u32)>,
    part_rv: Vec<f32>,
}

impl<'a> MixedLogits<'a> {
    /// A mixture over `rows` rows of `vocab` tokens at a temperature.
    ///
    /// # Errors
    /// A row that no teacher answers, hidden states that do not fit their spans or their head, a weight that is not above 0,
    /// a head with fewer than `vocab` tokens.
    pub fn new(parts: Vec<Part<'a>>, rows: usize, vocab: usize, temperature: f32) -> Result<Self> {
        let mut totals = vec![(0.0, 0u32); rows];
        for part in &parts {
            let answered: usize = part.spans.iter().map(|(span, _)| span.len()).sum();
            if part.hidden_rh.len() != answered * part.head.hidden() {
                return Err(EngineError::invalid(
                    format!(
                        "{} hidden values for {answered} rows of a teacher {} wide",
                        part.hidden_rh.len(),
                        part.head.hidden()
                    ),
                    "keep the hidden states of every scored token, and use the head of the teacher that computed them",
                ));
            }
            if part.head.vocab() < vocab {
                return Err(EngineError::invalid(
                    format!("a teacher's head has {} tokens where {vocab} are compared", part.head.vocab()),
                    "teacher and student must share one vocabulary",
                ));
            }
            let mut end = 0;
            for (span, weight) in &part.spans {
                if span.start < end || span.end < span.start {
                    return Err(EngineError::invalid(format!("rows {span:?} follow row {end}"), "spans rise"));
                }
                end = span.end;
                let Some(own) = totals.get_mut(span.clone()).filter(|_| weight.is_finite() && *weight > 0.0) else {
                    return Err(EngineError::invalid(
                        format!("rows {span:?} of {rows} with the weight {weight}"),
                        "weights are above 0",
                    ));
                };
                own.iter_mut().for_each(|(total, count)| (*total, *count) = (*total + weight, *count + 1));
            }
        }
        if let Some(row) = totals.iter().position(|(_, count)| *count == 0) {
            return Err(EngineError::invalid(
                format!("no teacher answers row {row}"),
                "keep the hidden states of every scored token",
            ));
        }
        Ok(Self { parts, rows, vocab, columns: 0..vocab, temperature, totals, part_rv: Vec::new() })
    }

    /// Gives the logits of these tokens only: the part of a rank that the vocabulary is cut over. The mixture stays one over
    /// the whole vocabulary.
    ///
    /// # Errors
    /// Tokens beyond the vocabulary.
    pub fn only(mut self, columns: Range<usize>) -> Result<Self> {
        if columns.end > self.vocab || columns.is_empty() {
            return Err(EngineError::invalid(format!("tokens {columns:?} of {} are wanted", self.vocab), ""));
        }
        self.columns = columns;
        Ok(self)
    }
}

impl LogitsSource for MixedLogits<'_> {
    fn logits_rv(&mut self, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        if rows.end > self.rows {
            return Err(EngineError::invalid(
                format!("teacher rows {rows:?} wanted, {} kept", self.rows),
                "keep the hidden states of every scored token",
            ));
        }
        if let [part] = self.parts.as_mut_slice()
            && part.head.vocab() == self.columns.len()
            && part.head.chunk_rows() >= rows.len()
        {
            // One teacher answers every row, and all of it is wanted: its logits as they come.
            let width = part.head.hidden();
            return part.head.logits_rv(&part.hidden_rh[rows.start * width..rows.end * width], out);
        }
        let (vocab, columns, totals) = (self.vocab, self.columns.clone(), &self.totals);
        let width_out = columns.len();
        let temperature = self.temperature;
        out.clear();
        out.resize(rows.len() * width_out, f32::NEG_INFINITY);
        for part in &mut self.parts {
            let (width, wide) = (part.head.hidden(), part.head.vocab());
            let answered = part.answered(&rows);
            // The student's chunk may be larger than what the teacher's head should hold at once.
            for chunk in answered.chunks(part.head.chunk_rows().max(1)) {
                let (Some(first), Some(last)) = (chunk.first(), chunk.last()) else { continue };
                // Rows that follow each other have hidden states that do.
                part.head.logits_rv(&part.hidden_rh[first.1 * width..(last.1 + 1) * width], &mut self.part_rv)?;
                let mut rest = out.as_mut_slice();
                let mut at = rows.start;
                let mut pairs: Vec<(&mut [f32], &mut [f32], f64, bool)> = Vec::with_capacity(chunk.len());
                for ((row, _, weight), logits_v) in chunk.iter().zip(self.part_rv.chunks_exact_mut(wide)) {
                    let (_, from) = std::mem::take(&mut rest).split_at_mut((row - at) * width_out);
                    let (own, after) = from.split_at_mut(width_out);
                    (rest, at) = (after, row + 1);
                    let (total, count) = totals[*row];
                    pairs.push((own, &mut logits_v[..vocab], weight / total, count == 1));
                }
                pairs.into_par_iter().for_each(|(out_v, logits_v, share, alone)| match alone {
                    true => out_v.copy_from_slice(&logits_v[columns.clone()]),
                    false => add_share(out_v, logits_v, columns.clone(), share, temperature),
                });
            }
        }
        if divides(temperature) {
            out.par_chunks_mut(width_out).zip(&totals[rows]).filter(|(_, (_, count))| *count > 1).for_each(
                |(row_v, _)| {
                    row_v.iter_mut().for_each(|z| *z *= temperature);
                },
            );
        }
        Ok(())
    }
}

/// `out = log(exp(out) + share · softmax(z / temperature))` of the tokens in `columns`; NaN where `z` has no softmax.
fn add_share(out_v: &mut [f32], logits_v: &mut [f32], columns: Range<usize>, share: f64, temperature: f32) {
    apply_temperature(logits_v, temperature);
    let Some(sums) = vocabulary::sums(Isa::best(), logits_v) else { return out_v.fill(f32::NAN) };
    let shift = share.ln() - sums.sum.ln();
    vocabulary::add_density(Isa::best(), out_v, &logits_v[columns], sums.max, shift as f32);
}

/// `log(exp(a) + exp(b))`; NaN if either is.
pub fn log_add(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        return f64::NAN;
    }
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if low == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Position, TokenBatch};

    fn model(vocab: usize, tied: bool, device: &str, seed: u64) -> Box<dyn Model> {
        let config = ModelConfig {
            num_hidden_layers: 2,
            intermediate_size: 24,
            num_attention_heads: 2,
            head_dim: 8,
            max_position_embeddings: 32,
            tie_word_embeddings: tied,
            initializer_range: 0.4,
            ..alone(vocab, 16)
        };
        crate::model::random(&config, device, seed).unwrap()
    }

    /// Last hidden states of three positions and the logits that the whole model makes of them.
    fn rows(model: &mut dyn Model) -> (Vec<f32>, Vec<f32>) {
        let batch = TokenBatch::new(&[&[1, 2, 3, 4][..]]).unwrap();
        let positions: Vec<Position> = (1..4).map(|t| Position { b: 0, t }).collect();
        let hidden_rh = model.hidden_rh(&batch, &positions).unwrap();
        let mut logits_rv = Vec::new();
        model.head_logits_rv(&hidden_rh, &mut logits_rv).unwrap();
        (hidden_rh, logits_rv)
    }

    #[test]
    fn a_head_alone_gives_the_models_bits() {
        for (device, tied) in [("cpu", false), ("cpu", true), ("burn:flex", false), ("burn:flex", true)] {
            let mut model = model(37, tied, device, 5);
            let (hidden_rh, whole_rv) = rows(model.as_mut());
            let mut head = load(device, 37, 16, &values_of(model.as_ref()).unwrap()).unwrap();
            let mut alone_rv = Vec::new();
            head.logits_rv(&hidden_rh, &mut alone_rv).unwrap();
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&alone_rv), bits(&whole_rv), "{device}, tied: {tied}");
            assert!(head.logits_rv(&hidden_rh[1..], &mut alone_rv).is_err());
        }
        assert!(load("cpu", 37, 16, &[0.0; 3]).is_err());
        assert!(load("cpu", usize::MAX, 16, &[0.0; 3]).is_err());
    }

    fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let e: Vec<f64> = logits.iter().map(|z| (f64::from(z - max) / temperature).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.iter().map(|e| e / sum).collect()
    }

    #[test]
    fn a_mixture_is_one_of_distributions() {
        let (mut a, mut b) = (model(37, false, "cpu", 1), model(41, true, "cpu", 2));
        let ((hidden_a, logits_a), (hidden_b, logits_b)) = (rows(a.as_mut()), rows(b.as_mut()));
        for temperature in [1.0f32, 0.7, 2.0] {
            // Row 0: only `a`; row 1: both; row 2: only `b`.
            let (mut head_a, mut head_b) = (ModelHead(a.as_mut()), ModelHead(b.as_mut()));
            let parts = vec![
                Part { head: &mut head_a, hidden_rh: hidden_a[..32].to_vec(), spans: vec![(0..1, 5.0), (1..2, 1.0)] },
                Part { head: &mut head_b, hidden_rh: hidden_b[16..].to_vec(), spans: vec![(1..3, 3.0)] },
            ];
            let mut mixed = MixedLogits::new(parts, 3, 36, temperature).unwrap();
            let mut got = Vec::new();
            mixed.logits_rv(0..3, &mut got).unwrap();
            assert_eq!(got[..36], logits_a[..36]);
            assert_eq!(got[72..], logits_b[82..82 + 36]);
            let t = f64::from(temperature);
            let (p, q) = (softmax(&logits_a[37..37 + 36], t), softmax(&logits_b[41..41 + 36], t));
            let found = softmax(&got[36..72], t);
            for v in 0..36 {
                let expected = 0.25 * p[v] + 0.75 * q[v];
                assert!((found[v] - expected).abs() < 1e-7, "{v}: {} and {expected}", found[v]);
                // Logits of the mixture are its log-probs: they need no normaliser.
                assert!((f64::from(got[36 + v]) / t - expected.ln()).abs() < 1e-5);
            }
            // Any chunks of rows give the same.
            let mut part = Vec::new();
            mixed.logits_rv(1..3, &mut part).unwrap();
            assert_eq!(part, got[36..]);
            assert!(mixed.logits_rv(1..4, &mut part).is_err());
            // So do the parts of the vocabulary that ranks hold.
            let mut mixed = mixed.only(10..25).unwrap();
            mixed.logits_rv(0..3, &mut part).unwrap();
            let columns: Vec<f32> = got.chunks(36).flat_map(|row| &row[10..25]).copied().collect();
            assert_eq!(part, columns);
            assert!(mixed.only(30..37).is_err());
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let mut a = model(37, false, "cpu", 1);
        let (hidden_rh, _) = rows(a.as_mut());
        let mut refused = |hidden_rh: &[f32], spans: Vec<(Range<usize>, f64)>, rows: usize, vocab: usize| {
            let mut head = ModelHead(a.as_mut());
            let part = Part { head: &mut head, hidden_rh: hidden_rh.to_vec(), spans };
            MixedLogits::new(vec![part], rows, vocab, 1.0).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(refused(&hidden_rh, vec![(0..3, 1.0)], 3, 37), "");
        assert!(refused(&hidden_rh[1..], vec![(0..3, 1.0)], 3, 37).contains("hidden values"));
        assert!(refused(&hidden_rh, vec![(0..3, 1.0)], 4, 37).contains("row 3"));
        assert!(refused(&hidden_rh, vec![(0..3, 0.0)], 3, 37).contains("weight"));
        assert!(refused(&hidden_rh, vec![(1..4, 1.0)], 3, 37).contains("rows 1..4"));
        assert!(refused(&hidden_rh, vec![(1..3, 1.0), (0..1, 1.0)], 3, 37).contains("rows 0..1 follow row 3"));
        assert!(refused(&hidden_rh, vec![(0..3, 1.0)], 3, 38).contains("37 tokens"));
    }

    #[test]
    fn logs_add() {
        assert!((log_add(0.25f64.ln(), 0.5f64.ln()) - 0.75f64.ln()).abs() < 1e-15);
        assert_eq!(log_add(f64::NEG_INFINITY, f64::NEG_INFINITY), f64::NEG_INFINITY);
        assert_eq!(log_add(f64::NEG_INFINITY, -1.5), -1.5);
        assert!((log_add(-1000.0, -1000.0) - (-1000.0 + 2f64.ln())).abs() < 1e-12);
        assert!(log_add(f64::NAN, 0.0).is_nan() && log_add(0.0, f64::NAN).is_nan());
    }
}
