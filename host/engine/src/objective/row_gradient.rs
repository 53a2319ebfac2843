//! The gradient at a row of logits in a few numbers, from which it is written over the logits.

use std::ops::Range;

use cosmos_kernels::Isa;
use cosmos_kernels::vocabulary::{self, Distribution};
use rayon::prelude::*;

use crate::score::softmax::{RowStats, apply_temperature};
use crate::{EngineError, Result};

/// `d loss / d z = (p · (a + b · log p) + added + by_teacher · slopes) / T` of one row, where p is the softmax of its logits.
/// Every number is made of its own logit alone, so a part of the row gets the same bits as the whole.
#[derive(Debug, Clone, Default)]
pub(super) struct RowGradient {
    /// p, a and b; none is a row without a gradient, such as one that was not finite.
    dense: Option<(Distribution, f32, f32)>,
    /// What is added at single ids, in order.
    added: Vec<(u32, f32)>,
    /// Factor on the derivatives that stand in the teacher's row.
    pub by_teacher: Option<f32>,
}

impl RowGradient {
    /// `p · (a + b · log p)`.
    pub fn new(stats: &RowStats, a: f64, b: f64) -> Self {
        Self { dense: Some((stats.distribution(), a as f32, b as f32)), ..Self::default() }
    }

    /// Adds `value` at `id`.
    pub fn add(&mut self, id: u32, value: f64) {
        self.added.push((id, value as f32));
    }

    /// Replaces the logits of the ids from `first` on, which were divided by the temperature, by the gradient.
    pub fn write(&self, first: usize, z_v: &mut [f32], teacher_v: Option<&[f32]>, temperature: f32) {
        let Some((distribution, a, b)) = self.dense else { return z_v.fill(0.0) };
        vocabulary::weigh(Isa::best(), z_v, distribution, a, b);
        for (id, value) in &self.added {
            if let Some(z) = (*id as usize).checked_sub(first).and_then(|at| z_v.get_mut(at)) {
                *z += value;
            }
        }
        if let Some(by) = self.by_teacher {
            vocabulary::add_scaled(Isa::best(), z_v, teacher_v.unwrap_or(&[]), by);
        }
        apply_temperature(z_v, temperature);
    }

    /// Those of a chunk of rows, without a teacher's.
    pub fn write_all(gradients: &[Self], first: usize, logits_rv: &mut [f32], temperature: f32) {
        let width = (logits_rv.len() / gradients.len().max(1)).max(1);
        let rows = logits_rv.par_chunks_mut(width).zip(gradients);
        rows.for_each(|(z_v, gradient)| gradient.write(first, z_v, None, temperature));
    }

    /// Those of `rows` out of `settled`, over logits of the ids from `first` on that are not yet divided by the temperature.
    ///
    /// # Errors
    /// Rows that were not settled.
    pub fn remake(
        settled: &[Self],
        rows: Range<usize>,
        first: usize,
        logits_rp: &mut [f32],
        temperature: f32,
    ) -> Result<()> {
        let Some(gradients) =
            settled.get(rows.clone()).filter(|g| !g.is_empty() && logits_rp.len().is_multiple_of(g.len()))
        else {
            return Err(EngineError::invalid(format!("rows {rows:?} of {} settled ones", settled.len()), ""));
        };
        logits_rp.par_chunks_mut(1 << 16).for_each(|part| apply_temperature(part, temperature));
        Self::write_all(gradients, first, logits_rp, temperature);
        Ok(())
    }
}
