//! The order in which samples are taken: reproducible from a seed, resumable from two numbers.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// How the rows of an epoch are ordered.
///
/// Shuffled, the order of epoch `e` is a Fisher–Yates shuffle of `0..len` driven by ChaCha8, whose 32-byte key is the
/// seed (8 bytes, little-endian), the epoch (8 bytes, little-endian) and the text `cosmos-order-v1\0`. For `i` from
/// `len - 1` down to 1 the element at `i` changes places with the one at `j`, uniform in `0..=i`. `j` is the high half
/// of the 128-bit product of a 64-bit draw with `i + 1`; a draw is thrown away when the low half is less than
/// `2^64 mod (i + 1)`, so that no place is favoured. The result depends on nothing else: not on the machine, the number
/// of threads or the batch size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Seed of the shuffle.
    pub seed: u64,
    /// `false` takes the rows as they are stored.
    pub shuffle: bool,
}

impl Order {
    /// The rows `0..len` in the order of `epoch` (counted from 0): each exactly once.
    pub fn indices(&self, len: u64, epoch: u64) -> Vec<u64> {
        let mut indices: Vec<u64> = (0..len).collect();
        if self.shuffle {
            let mut generator = self.generator(epoch);
            for i in (1..indices.len()).rev() {
                let j = below(&mut generator, i as u64 + 1);
                indices.swap(i, j as usize);
            }
        }
        indices
    }

    fn generator(&self, epoch: u64) -> ChaCha8Rng {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&epoch.to_le_bytes());
        key[16..].copy_from_slice(b"cosmos-order-v1\0");
        ChaCha8Rng::from_seed(key)
    }
}

/// A number uniform in `0..bound` (Lemire, "Fast random integer generation in an interval", 2019).
fn below(generator: &mut ChaCha8Rng, bound: u64) -> u64 {
    let threshold = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(generator.next_u64()) * u128::from(bound);
        if product as u64 >= threshold {
            return (product >> 64) as u64;
        }
    }
}

/// How far a run has come in its data: what a checkpoint keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Epoch of the next sample, counted from 0.
    pub epoch: u64,
    /// How many samples of that epoch were taken.
    pub position: u64,
}

/// The samples of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The epoch that all of them belong to.
    pub epoch: u64,
    /// Row numbers, in order.
    pub indices: Vec<u64>,
}

/// Hands out the rows of `0..len`, epoch after epoch.
///
/// Its whole state is a [`Cursor`]: a sampler made with the same order, length and epochs and moved to that cursor goes
/// on exactly as the first one would have.
#[derive(Debug, Clone)]
pub struct Sampler {
    order: Order,
    len: u64,
    epochs: u64,
    cursor: Cursor,
    /// The order of the epoch that it is in, made when first needed.
    current: Option<(u64, Vec<u64>)>,
}

impl Sampler {
    /// A sampler over `0..len` for `epochs` passes, at the start.
    pub fn new(order: Order, len: u64, epochs: u64) -> Self {
        Self { order, len, epochs, cursor: Cursor::default(), current: None }
    }

    /// The next `n` rows, or `None` after the last epoch. A batch never reaches over the end of an epoch: the last one
    /// of an epoch is shorter when `n` does not divide the length. `n` = 0 gives an empty batch.
    pub fn next_batch(&mut self, n: u64) -> Option<Batch> {
        if self.cursor.position >= self.len {
            self.cursor = Cursor { epoch: self.cursor.epoch.saturating_add(1), position: 0 };
        }
        let Cursor { epoch, position } = self.cursor;
        if self.len == 0 || epoch >= self.epochs {
            return None;
        }
        if self.current.as_ref().is_none_or(|(of, _)| *of != epoch) {
            self.current = Some((epoch, self.order.indices(self.len, epoch)));
        }
        let (_, indices) = self.current.as_ref()?;
        let end = position.saturating_add(n).min(self.len);
        self.cursor.position = end;
        Some(Batch { epoch, indices: indices[position as usize..end as usize].to_vec() })
    }

    /// Where it is: keep this in the checkpoint.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Goes on from `cursor`. A position beyond the end counts as the end of its epoch.
    pub fn seek(&mut self, cursor: Cursor) {
        self.cursor = cursor;
    }

    /// How many samples are still to come in all epochs.
    pub fn remaining(&self) -> u64 {
        let taken = self.len.saturating_mul(self.cursor.epoch).saturating_add(self.cursor.position.min(self.len));
        self.len.saturating_mul(self.epochs).saturating_sub(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ORDER: Order = Order { seed: 7, shuffle: true };

    #[test]
    fn every_row_once_and_epochs_differ() {
        let first = ORDER.indices(1000, 0);
        let second = ORDER.indices(1000, 1);
        assert_ne!(first, second);
        assert_ne!(first, Order { seed: 8, shuffle: true }.indices(1000, 0));
        assert_eq!(first, ORDER.indices(1000, 0));
        for mut order in [first, second] {
            order.sort_unstable();
            assert!(order.into_iter().eq(0..1000));
        }
        assert_eq!(Order { seed: 7, shuffle: false }.indices(4, 3), [0, 1, 2, 3]);
    }

    #[test]
    fn order_never_changes_between_versions() {
        // Computed by a program of its own, from the description above.
        assert_eq!(Order { seed: 0, shuffle: true }.indices(10, 0), [2, 9, 6, 7, 4, 1, 0, 5, 8, 3]);
        assert_eq!(
            Order { seed: 12345, shuffle: true }.indices(20, 3),
            [5, 7, 12, 0, 6, 10, 15, 8, 18, 3, 17, 2, 16, 14, 11, 13, 1, 19, 9, 4]
        );
    }

    #[test]
    fn places_are_uniform() {
        let mut counts = [[0_u32; 5]; 5];
        for epoch in 0..20_000 {
            for (place, row) in ORDER.indices(5, epoch).into_iter().enumerate() {
                counts[place][row as usize] += 1;
            }
        }
        // 4000 expected, standard deviation 57: five of them on either side.
        assert!(counts.iter().flatten().all(|c| (3715..=4285).contains(c)), "{counts:?}");
    }

    #[test]
    fn epochs_end_and_short_batches() {
        let mut sampler = Sampler::new(ORDER, 5, 2);
        let sizes: Vec<_> = std::iter::from_fn(|| sampler.next_batch(2)).map(|b| (b.epoch, b.indices.len())).collect();
        assert_eq!(sizes, [(0, 2), (0, 2), (0, 1), (1, 2), (1, 2), (1, 1)]);
        assert_eq!((sampler.remaining(), sampler.next_batch(1)), (0, None));
        assert_eq!(Sampler::new(ORDER, 0, 3).next_batch(1), None);
    }

    proptest! {
        #[test]
        fn resumed_is_as_never_stopped(len in 1_u64..50, sizes in prop::collection::vec(1_u64..9, 1..30), cut in 0_usize..30) {
            let mut whole = Sampler::new(ORDER, len, 3);
            let mut first = whole.clone();
            let expected: Vec<_> = sizes.iter().map(|n| whole.next_batch(*n)).collect();
            let cut = cut.min(sizes.len());
            let mut got: Vec<_> = sizes[..cut].iter().map(|n| first.next_batch(*n)).collect();
            let kept = serde_json::to_string(&first.cursor()).unwrap();
            let mut second = Sampler::new(ORDER, len, 3);
            second.seek(serde_json::from_str(&kept).unwrap());
            prop_assert_eq!(second.remaining(), first.remaining());
            got.extend(sizes[cut..].iter().map(|n| second.next_batch(*n)));
            prop_assert_eq!(got, expected);
        }
    }
}
