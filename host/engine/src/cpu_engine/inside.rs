//! One rank's part of a block: some heads and some columns of the SwiGLU (tensor parallel, Shoeybi et al. 2019), some tokens
//! of each sequence (context parallel, Jacobs et al. 2023).
//!
//! Where ranks meet, `∑` over tensor parallel ranks, `⇄` between context parallel ones:
//! ```text
//! forward    (q, k, v) ⇄ all tokens of some heads; attention; m ⇄ some tokens of all heads
//!            z = x + ∑ m·Wᵀ_o + b_o        y = z + ∑ a·Wᵀ_d + b_d
//! backward   dẑ = ∑ (dg, du)·W_gu          dx̂ = ∑ draw·W_qkv
//!            (q, k, v), m, dm ⇄ before the attention's, (dq, dk, dv) ⇄ after it
//! ```
//! The stream `x`, its norms and their gradients are the same on all tensor parallel ranks. What each has seen a part of,
//! the norms of heads and key-value heads that ranks share, is summed at the end ([`Inside::join`]).

use std::ops::Range;
use std::sync::Arc;

use cosmos_kernels::attention::Heads;
use cosmos_kernels::memory::Buffer;
use cosmos_parallel::{Axis, Collective, RankGroups, SubMesh};

use super::layout::Layout;
use crate::Result;
use crate::model::ModelConfig;
use crate::sharded::cut::{HeadPart, TpPart};

/// What a rank needs to know inside a block.
pub(super) struct Inside {
    tp: Arc<dyn Collective>,
    cp: Arc<dyn Collective>,
    /// Ids whose embeddings this rank has.
    pub vocab: Range<usize>,
    /// Columns of the SwiGLU.
    pub inner: usize,
    /// This rank's heads.
    pub heads: Heads,
    /// Which of them each context parallel rank attends with.
    context: Vec<HeadPart>,
    /// This rank's key-value heads among all of them, if ranks share them.
    shared_kv: Option<(Range<usize>, usize)>,
}

impl Inside {
    /// None for a rank that has whole blocks.
    pub fn of(config: &ModelConfig, groups: &RankGroups, part: &TpPart) -> Option<Self> {
        let group = |axis| groups.group(SubMesh::Along(axis)).clone();
        let (tp, cp) = (group(Axis::Tp), group(Axis::Cp));
        (tp.world() * cp.world() > 1).then(|| Self {
            tp,
            cp,
            vocab: part.vocab.clone(),
            inner: part.inner.len(),
            heads: Heads { heads: part.heads.heads.len(), kv_heads: part.heads.kv_heads.len(), dim: config.head_dim },
            context: part.context.clone(),
            shared_kv: part.shares_kv.then(|| (part.heads.kv_heads.clone(), config.num_key_value_heads)),
        })
    }

    /// The sum over tensor parallel ranks.
    pub fn sum(&self, values: &mut [f32]) -> Result<()> {
        if self.tp.world() > 1 && !values.is_empty() {
            self.tp.all_reduce_sum(values)?;
        }
        Ok(())
    }

    /// Context parallel ranks.
    pub fn contexts(&self) -> usize {
        self.cp.world()
    }

    /// Which position this rank's first token has, of `t` tokens here.
    pub fn first_position(&self, t: usize) -> usize {
        self.cp.rank() * t
    }

    /// The heads that this rank attends with.
    pub fn attending(&self) -> Heads {
        let own = &self.context[self.cp.rank()];
        Heads { heads: own.heads.len(), kv_heads: own.kv_heads.len(), dim: self.heads.dim }
    }

    /// Columns of queries, keys and values that each context parallel rank attends with.
    pub fn qkv_spans(&self) -> Vec<Vec<Range<usize>>> {
        let Heads { heads, kv_heads, dim } = self.heads;
        let wide = |first: usize, range: &Range<usize>| (first + range.start) * dim..(first + range.end) * dim;
        let spans = |part: &HeadPart| {
            vec![wide(0, &part.heads), wide(heads, &part.kv_heads), wide(heads + kv_heads, &part.kv_heads)]
        };
        self.context.iter().map(spans).collect()
    }

    /// Columns of what comes out of the attention, likewise.
    pub fn mixed_spans(&self) -> Vec<Vec<Range<usize>>> {
        let dim = self.heads.dim;
        self.context
            .iter()
            .map(|part| std::iter::once(part.heads.start * dim..part.heads.end * dim).collect())
            .collect()
    }

    /// From this rank's tokens with all columns, `x` `[b · t, width]`, to all tokens with its own columns,
    /// `[b · ranks · t, own]`.
    pub fn to_all_tokens(&self, b: usize, x: &[f32], width: usize, spans: &[Vec<Range<usize>>]) -> Result<Buffer> {
        let (ranks, rank) = (self.cp.world(), self.cp.rank());
        let rows = x.len() / width;
        let (t, most) = (rows / b, widest(spans));
        let mut send = vec![0.0; ranks * rows * most];
        for (part, spans) in send.chunks_exact_mut((rows * most).max(1)).zip(spans) {
            for (to, from) in part.chunks_exact_mut(most).zip(x.chunks_exact(width)) {
                copy_spans(from, spans, to);
            }
        }
        let mut received = vec![0.0; send.len()];
        self.cp.all_to_all(&send, &mut received)?;
        let own = wide(&spans[rank]);
        let mut all = Buffer::dirty(ranks * rows * own);
        for (from_rank, part) in received.chunks_exact((rows * most).max(1)).enumerate() {
            for (row, from) in part.chunks_exact(most).enumerate() {
                let token = (row / t) * ranks * t + from_rank * t + row % t;
                all[token * own..(token + 1) * own].copy_from_slice(&from[..own]);
            }
        }
        Ok(all)
    }

    /// The way back: columns that several ranks bring are summed.
    pub fn to_own_tokens(&self, b: usize, all: &[f32], width: usize, spans: &[Vec<Range<usize>>]) -> Result<Buffer> {
        let (ranks, rank) = (self.cp.world(), self.cp.rank());
        let (own, most) = (wide(&spans[rank]), widest(spans));
        let rows = all.len() / own / ranks;
        let t = rows / b;
        let mut send = vec![0.0; ranks * rows * most];
        for (to_rank, part) in send.chunks_exact_mut((rows * most).max(1)).enumerate() {
            for (row, to) in part.chunks_exact_mut(most).enumerate() {
                let token = (row / t) * ranks * t + to_rank * t + row % t;
                to[..own].copy_from_slice(&all[token * own..(token + 1) * own]);
            }
        }
        let mut received = vec![0.0; send.len()];
        self.cp.all_to_all(&send, &mut received)?;
        let mut x = Buffer::zeros(rows * width);
        for (part, spans) in received.chunks_exact((rows * most).max(1)).zip(spans) {
            for (from, to) in part.chunks_exact(most).zip(x.chunks_exact_mut(width)) {
                let mut at = 0;
                for span in spans {
                    let (from, to) = (&from[at..at + span.len()], &mut to[span.clone()]);
                    to.iter_mut().zip(from).for_each(|(sum, value)| *sum += value);
                    at += span.len();
                }
            }
        }
        Ok(x)
    }

    /// Sums what each tensor parallel rank has seen a part of.
    pub fn join(&self, layout: &Layout, grads: &mut [f32]) -> Result<()> {
        if self.tp.world() == 1 {
            return Ok(());
        }
        let norms: Vec<Range<usize>> = layout.qk_norms.iter().flat_map(|(q, k)| [q.clone(), k.clone()]).collect();
        let mut joint: Vec<f32> = norms.iter().flat_map(|range| &grads[range.clone()]).copied().collect();
        let norms_len = joint.len();
        let mut shared: Vec<(Range<usize>, Range<usize>)> = Vec::new();
        if let Some((own, all)) = &self.shared_kv {
            // Keys, then values, of the weights and the biases; each rank puts its heads where they stand among all.
            let parts = [(Some(&layout.qkv), layout.hidden), (layout.qkv_bias.as_ref(), 1)];
            for (range, columns) in parts.into_iter().filter_map(|(range, columns)| Some((range?, columns))) {
                let head = self.heads.dim * columns;
                for kind in 0..2 {
                    let first = range.start + (self.heads.heads + kind * self.heads.kv_heads) * head;
                    let base = joint.len();
                    joint.resize(base + all * head, 0.0);
                    let to = base + own.start * head..base + own.end * head;
                    let from = first..first + to.len();
                    joint[to.clone()].copy_from_slice(&grads[from.clone()]);
                    shared.push((from, to));
                }
            }
        }
        if joint.is_empty() {
            return Ok(());
        }
        self.tp.all_reduce_sum(&mut joint)?;
        let mut rest = &joint[..norms_len];
        for range in norms {
            let (own, others) = rest.split_at(range.len());
            grads[range].copy_from_slice(own);
            rest = others;
        }
        for (own, place) in shared {
            grads[own].copy_from_slice(&joint[place]);
        }
        Ok(())
    }
}

fn wide(spans: &[Range<usize>]) -> usize {
    spans.iter().map(Range::len).sum()
}

fn widest(spans: &[Vec<Range<usize>>]) -> usize {
    spans.iter().map(|spans| wide(spans)).max().unwrap_or(0).max(1)
}

fn copy_spans(from: &[f32], spans: &[Range<usize>], to: &mut [f32]) {
    let mut at = 0;
    for span in spans {
        to[at..at + span.len()].copy_from_slice(&from[span.clone()]);
        at += span.len();
    }
}
