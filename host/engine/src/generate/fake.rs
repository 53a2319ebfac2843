//! A model whose logits are a hash of the whole context: any mix-up of slots, positions or prompts shows at once.

use std::path::Path;

use crate::batch::{Position, TokenBatch};
use crate::model::{Decoder, HeadLoss, Model, ModelConfig, ParamSpec, Prefill, VocabShard};
use crate::{EngineError, Result};

pub(crate) const VOCAB: usize = 50;

fn extend(hash: u32, token: u32) -> u32 {
    (hash.wrapping_mul(2_654_435_761) ^ token.wrapping_mul(40_503).wrapping_add(0x9e37)).rotate_left(7) & 0xff_ffff
}

fn logits_of(hash: u32, out: &mut Vec<f32>) {
    out.extend((0..VOCAB as u32).map(|v| {
        let mut x = (hash ^ v.wrapping_mul(0x85eb_ca6b)).wrapping_mul(0xc2b2_ae35);
        x ^= x >> 13;
        x = x.wrapping_mul(0x27d4_eb2f);
        ((x >> 8) & 0xffff) as f32 / 65536.0 * 6.0 - 3.0
    }));
}

/// Logits after `tokens`.
pub(crate) fn logits_after(tokens: &[u32]) -> Vec<f32> {
    let mut out = Vec::new();
    logits_of(tokens.iter().fold(0, |h, &t| extend(h, t)), &mut out);
    out
}

pub(crate) struct FakeModel {
    config: ModelConfig,
    specs: Vec<ParamSpec>,
    value: Vec<f32>,
    gradient: Vec<f32>,
    /// Rows that the head takes at a time.
    pub chunk_rows: usize,
    /// Times that the head was asked.
    pub head_calls: usize,
    /// Makes the logits of this context (its last token) NaN.
    pub poison: Option<u32>,
    /// Which ids the head gives; none: all.
    pub shard: Option<VocabShard>,
    /// Rounds logits, so that many are equal.
    pub coarse: bool,
}

impl FakeModel {
    pub fn new() -> Self {
        Self::with_param("w", &[0.0], &[0.0])
    }

    pub fn with_param(name: &str, value: &[f32], gradient: &[f32]) -> Self {
        let text = format!(
            r#"{{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": {VOCAB}, "hidden_size": 2, "intermediate_size": 4,
            "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false, "hidden_act": "silu"}}"#
        );
        let config = ModelConfig::from_json(&text, Path::new("config.json")).unwrap();
        let specs = vec![ParamSpec { name: name.to_owned(), shape: vec![value.len()] }];
        Self {
            config,
            specs,
            value: value.to_vec(),
            gradient: gradient.to_vec(),
            chunk_rows: 3,
            head_calls: 0,
            poison: None,
            shard: None,
            coarse: false,
        }
    }

    pub fn set_gradient(&mut self, gradient: &[f32]) {
        self.gradient = gradient.to_vec();
    }
}

impl Model for FakeModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn params(&self) -> &[ParamSpec] {
        &self.specs
    }

    fn read_param(&self, _index: usize) -> Vec<f32> {
        self.value.clone()
    }

    fn write_param(&mut self, _index: usize, values: &[f32]) -> Result<()> {
        self.value.copy_from_slice(values);
        Ok(())
    }

    fn hidden_rh(&mut self, batch: &TokenBatch, positions: &[Position]) -> Result<Vec<f32>> {
        let hash = |p: &Position| {
            assert!(p.t < batch.lens_b[p.b], "a position in the padding");
            batch.ids_bt[p.b * batch.t..][..=p.t].iter().fold(0, |h, &t| extend(h, t))
        };
        Ok(positions.iter().flat_map(|p| [hash(p) as f32, 1.0]).collect())
    }

    fn head_logits_rv(&mut self, hidden_rh: &[f32], out: &mut Vec<f32>) -> Result<()> {
        assert!(hidden_rh.len() <= 2 * self.chunk_rows, "more rows than a chunk");
        self.head_calls += 1;
        out.clear();
        let mut row = Vec::new();
        for h in hidden_rh.chunks_exact(2) {
            row.clear();
            logits_of(h[0] as u32, &mut row);
            if self.coarse {
                row.iter_mut().for_each(|z| *z = z.round());
            }
            out.extend_from_slice(&row[self.vocab_shard().ids()]);
        }
        Ok(())
    }

    fn vocab_shard(&self) -> VocabShard {
        self.shard.clone().unwrap_or_else(|| VocabShard::whole(VOCAB))
    }

    fn head_chunk_rows(&self) -> usize {
        self.chunk_rows
    }

    fn forward_backward(&mut self, batch: &TokenBatch, positions: &[Position], loss: &mut dyn HeadLoss) -> Result<()> {
        let hidden_rh = self.hidden_rh(batch, positions)?;
        let mut logits_rv = Vec::new();
        for pass in usize::from(!loss.needs_first_pass())..2 {
            for (chunk, own_rh) in hidden_rh.chunks(2 * self.chunk_rows).enumerate() {
                let start = chunk * self.chunk_rows;
                self.head_logits_rv(own_rh, &mut logits_rv)?;
                let rows = start..start + own_rh.len() / 2;
                if pass == 0 { loss.observe(rows, &logits_rv)? } else { loss.gradient(rows, &mut logits_rv)? }
            }
        }
        Ok(())
    }

    fn read_grad(&self, _index: usize) -> Vec<f32> {
        self.gradient.clone()
    }

    fn zero_grads(&mut self) {
        self.gradient.fill(0.0);
    }

    fn update_params(&mut self, update: &mut dyn FnMut(usize, &mut [f32], &mut [f32])) -> Result<()> {
        update(0, &mut self.value, &mut self.gradient);
        Ok(())
    }

    fn decoder(&mut self, slots: usize, capacity: usize) -> Result<Box<dyn Decoder + '_>> {
        Ok(Box::new(FakeDecoder { contexts: vec![None; slots], capacity, poison: self.poison }))
    }
}

struct FakeDecoder {
    contexts: Vec<Option<Vec<u32>>>,
    capacity: usize,
    poison: Option<u32>,
}

impl FakeDecoder {
    fn row(&self, context: &[u32], out: &mut Vec<f32>) {
        let start = out.len();
        out.extend(logits_after(context));
        if context.last().copied() == self.poison {
            out[start + 5] = f32::NAN;
        }
    }
}

impl Decoder for FakeDecoder {
    fn slots(&self) -> usize {
        self.contexts.len()
    }

    fn prefill(&mut self, entries: &[Prefill<'_>]) -> Result<Vec<f32>> {
        let mut out = Vec::new();
        for entry in entries {
            for &slot in &entry.slots {
                assert!(self.contexts[slot].is_none(), "slot {slot} is taken");
                self.contexts[slot] = Some(entry.prompt.to_vec());
            }
            self.row(entry.prompt, &mut out);
        }
        Ok(out)
    }

    fn step(&mut self, entries: &[(usize, u32)]) -> Result<Vec<f32>> {
        let mut out = Vec::new();
        for &(slot, token) in entries {
            let context = self.contexts[slot].as_mut().expect("a slot in use");
            context.push(token);
            if context.len() > self.capacity {
                return Err(EngineError::invalid("a sequence outgrew its slot", ""));
            }
            let context = context.clone();
            self.row(&context, &mut out);
        }
        Ok(out)
    }

    fn release(&mut self, slot: usize) {
        assert!(self.contexts[slot].take().is_some(), "slot {slot} was free");
    }
}
