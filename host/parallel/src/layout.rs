//! How a flat tensor is cut into equal shards.

use std::ops::Range;

/// A flat tensor of `len` values in equal shards, one per rank. The last shards are padded, since a gather needs equal parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlatLayout {
    len: usize,
    ranks: usize,
}

impl FlatLayout {
    /// `len` values over `ranks` ranks; none without a rank.
    pub fn new(len: usize, ranks: usize) -> Option<FlatLayout> {
        (ranks > 0).then_some(FlatLayout { len, ranks })
    }

    /// Values of a shard, padding included.
    pub fn shard_len(&self) -> usize {
        self.len.div_ceil(self.ranks)
    }

    /// Values of all shards together, padding included.
    pub fn padded_len(&self) -> usize {
        self.shard_len() * self.ranks
    }

    /// Which of the tensor's values a rank holds; shorter than a shard where padding follows, empty past the last rank.
    pub fn range(&self, rank: usize) -> Range<usize> {
        let start = rank.saturating_mul(self.shard_len()).min(self.len);
        start..start.saturating_add(self.shard_len()).min(self.len)
    }

    /// A rank's shard of `tensor`, padded with zeros; none when `tensor` has another length.
    pub fn shard(&self, tensor: &[f32], rank: usize) -> Option<Vec<f32>> {
        if tensor.len() != self.len {
            return None;
        }
        let mut shard = tensor[self.range(rank)].to_vec();
        shard.resize(self.shard_len(), 0.0);
        Some(shard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shards_put_together_are_the_tensor(len in 0..200_usize, ranks in 1..9_usize) {
            let tensor: Vec<f32> = (0..len).map(|i| i as f32 + 1.0).collect();
            let layout = FlatLayout::new(len, ranks).unwrap();
            let all: Vec<f32> = (0..ranks).flat_map(|rank| layout.shard(&tensor, rank).unwrap()).collect();
            prop_assert_eq!(all.len(), layout.padded_len());
            prop_assert_eq!(&all[..len], &tensor[..]);
            prop_assert!(all[len..].iter().all(|v| *v == 0.0));
            prop_assert_eq!((0..ranks).map(|r| layout.range(r).len()).sum::<usize>(), len);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(FlatLayout::new(4, 0), None);
        let layout = FlatLayout::new(4, 2).unwrap();
        assert_eq!((layout.shard(&[1.0], 0), layout.range(usize::MAX)), (None, 4..4));
    }
}
