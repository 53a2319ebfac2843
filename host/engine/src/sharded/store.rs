//! A rank's shards of the groups of parameters: put together, and their gradients summed and handed out.

use std::ops::Range;
use std::sync::Arc;

use cosmos_parallel::{Collective, FlatLayout};

use super::cut::GroupPlan;
use super::memory::{Held, Meter};
use super::{Rounding, ShardOptions, Source};
use crate::{EngineError, Result};

/// This rank's shard of one group.
pub(super) struct Shard {
    pub plan: GroupPlan,
    layout: FlatLayout,
    /// Which of the group's values these are.
    own: Range<usize>,
    /// Master values, padded.
    pub values: Vec<f32>,
    /// Gradients accumulated; empty until the first backward.
    pub grads: Vec<f32>,
    /// Gradients of the call under way, where they must be summed over more ranks before they are added.
    delta: Vec<f32>,
    fsdp: Arc<dyn Collective>,
}

/// A group put together.
pub(super) struct Whole {
    /// None when the shard is the whole.
    owned: Option<(Vec<f32>, Held)>,
}

impl Whole {
    pub fn values<'a>(&'a self, shard: &'a Shard) -> &'a [f32] {
        match &self.owned {
            Some((values, _)) => values,
            None => &shard.values[..shard.plan.len],
        }
    }
}

impl Shard {
    pub fn new(
        plan: GroupPlan,
        fsdp: Arc<dyn Collective>,
        rounding: Rounding,
        source: &mut Source<'_>,
    ) -> Result<Self> {
        let layout =
            FlatLayout::new(plan.len, fsdp.world()).ok_or_else(|| EngineError::invalid("a group without ranks", ""))?;
        let own = layout.range(fsdp.rank());
        let mut shard = Self {
            values: vec![0.0; layout.shard_len()],
            grads: Vec::new(),
            delta: Vec::new(),
            plan,
            layout,
            own,
            fsdp,
        };
        for index in 0..shard.plan.places.len() {
            let (inside, runs) = (shard.piece(index), shard.runs(index));
            source(shard.plan.first + index, &runs, &mut shard.values[inside]);
        }
        rounding.apply(&mut shard.values);
        Ok(shard)
    }

    /// Which part of the group's parameter `index` this rank holds, within the parameter's rectangle.
    fn part(&self, index: usize) -> Range<usize> {
        part_of(&self.plan.places[index].range, &self.own)
    }

    /// Where this rank's piece of the group's parameter `index` lies in the shard.
    pub fn piece(&self, index: usize) -> Range<usize> {
        let part = self.part(index);
        if part.is_empty() {
            return 0..0;
        }
        let first = self.plan.places[index].range.start + part.start - self.own.start;
        first..first + part.len()
    }

    /// Where that piece lies in the whole parameter.
    pub fn runs(&self, index: usize) -> Vec<(usize, usize)> {
        self.plan.places[index].region.runs(self.part(index))
    }

    /// The ranks' shards put together.
    pub fn whole(&self, rounding: Rounding, meter: &Arc<Meter>) -> Result<Whole> {
        if self.fsdp.world() == 1 && rounding == Rounding::F32 {
            return Ok(Whole { owned: None });
        }
        let held = meter.hold(4 * self.layout.padded_len());
        let mut all = vec![0.0; self.layout.padded_len()];
        if rounding == Rounding::F32 {
            self.fsdp.all_gather(&self.values, &mut all)?;
        } else {
            let mut mine = self.values.clone();
            rounding.apply(&mut mine);
            self.fsdp.all_gather(&mine, &mut all)?;
        }
        all.truncate(self.plan.len);
        Ok(Whole { owned: Some((all, held)) })
    }

    /// Room for the gradient of the whole group, zeros.
    pub fn whole_grads(&self, meter: &Arc<Meter>) -> (Vec<f32>, Held) {
        let len = self.layout.padded_len();
        (vec![0.0; len], meter.hold(4 * len))
    }

    /// Sums the ranks' gradients of the whole group and takes this rank's shard.
    pub fn reduce(&mut self, mut whole: Vec<f32>, options: &ShardOptions, later: bool) -> Result<()> {
        let len = self.layout.shard_len();
        let to = if later { &mut self.delta } else { &mut self.grads };
        to.resize(len, 0.0);
        if self.fsdp.world() > 1 {
            options.reduce_dtype.apply(&mut whole);
            let mut mine = vec![0.0; len];
            self.fsdp.reduce_scatter_sum(&whole, &mut mine)?;
            whole = mine;
        }
        to.iter_mut().zip(whole).for_each(|(sum, value)| *sum += value);
        Ok(())
    }

    /// Sums what was set aside over the copies, and with the copy at the other end of the pipeline where there is one,
    /// then adds it to the gradients.
    pub fn settle(
        &mut self,
        copies: &dyn Collective,
        other_end: Option<(&dyn Collective, usize)>,
        options: &ShardOptions,
    ) -> Result<()> {
        let len = self.layout.shard_len();
        self.delta.resize(len, 0.0);
        if copies.world() > 1 {
            options.reduce_dtype.apply(&mut self.delta);
            copies.all_reduce_sum(&mut self.delta)?;
        }
        if let Some((pipeline, other)) = other_end {
            pipeline.send(other, &self.delta)?;
            let mut theirs = vec![0.0; len];
            pipeline.recv(other, &mut theirs)?;
            // The sum of two numbers does not depend on their order, so both ends have the same.
            self.delta.iter_mut().zip(theirs).for_each(|(sum, value)| *sum += value);
        }
        self.grads.resize(len, 0.0);
        self.grads.iter_mut().zip(&self.delta).for_each(|(sum, value)| *sum += value);
        self.delta.fill(0.0);
        Ok(())
    }

    pub fn grads_mut(&mut self) -> &mut Vec<f32> {
        self.grads.resize(self.layout.shard_len(), 0.0);
        &mut self.grads
    }

    /// Bytes of values and of gradients.
    pub fn bytes(&self) -> (usize, usize) {
        (4 * self.values.capacity(), 4 * (self.grads.capacity() + self.delta.capacity()))
    }
}

/// Which values of a parameter at `place` of a buffer lie in `own` of it.
pub(super) fn part_of(place: &Range<usize>, own: &Range<usize>) -> Range<usize> {
    let start = own.start.clamp(place.start, place.end) - place.start;
    let end = own.end.clamp(place.start, place.end) - place.start;
    start..end.max(start)
}
