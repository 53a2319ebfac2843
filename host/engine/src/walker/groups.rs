//! Master values of all groups of parameters.

use std::ops::{Index, IndexMut, Range};

use cosmos_kernels::memory::Buffer;

/// The values of one group after the other in one buffer: memory comes in large pages, and what an allocation each would lose
/// to them comes to hundredths of a model.
pub(super) struct Groups {
    values: Buffer,
    ranges: Vec<Range<usize>>,
}

impl Groups {
    /// None yet, with room for `len` values.
    pub fn with_capacity(len: usize) -> Self {
        Self { values: Buffer::dirty(len), ranges: Vec::new() }
    }

    /// Adds a group of `len` values, which the caller sets.
    pub fn add(&mut self, len: usize) -> &mut [f32] {
        let start = self.ranges.last().map_or(0, |range| range.end);
        self.ranges.push(start..start + len);
        &mut self.values[start..start + len]
    }

    /// Number of groups.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// The groups in order.
    pub fn iter(&self) -> impl Iterator<Item = &[f32]> {
        self.ranges.iter().map(|range| &self.values[range.clone()])
    }

    /// Bytes of all values.
    pub fn bytes(&self) -> usize {
        4 * self.values.len()
    }
}

impl Index<usize> for Groups {
    type Output = [f32];
    fn index(&self, group: usize) -> &[f32] {
        &self.values[self.ranges[group].clone()]
    }
}

impl IndexMut<usize> for Groups {
    fn index_mut(&mut self, group: usize) -> &mut [f32] {
        &mut self.values[self.ranges[group].clone()]
    }
}
