//! The prompts of one or several datasets, and the order in which a run takes them.

use std::collections::HashMap;
use std::sync::Arc;

use cosmos_data::order::Order;

use crate::error::Result;
use crate::offers::Offered;
use crate::task::{Dataset, Item, Text};

/// One dataset of a run.
pub struct Part {
    /// `plugin/dataset`, or the columns' source.
    pub name: String,
    /// Which offer it is; none: columns of a table.
    pub offered: Option<Offered>,
    /// Its share of the prompts, where the datasets are mixed by weight.
    pub weight: Option<f64>,
    /// The rows.
    pub dataset: Dataset,
}

/// The datasets of a run as one: the rows of the first, then those of the second, and so on.
pub struct Mixture {
    parts: Vec<Part>,
    /// Index of each dataset's first row.
    starts: Vec<u64>,
}

impl Mixture {
    /// Joins `parts`.
    pub fn new(parts: Vec<Part>) -> Self {
        let mut next = 0u64;
        let starts = parts
            .iter()
            .map(|part| {
                let start = next;
                next = next.saturating_add(part.dataset.len());
                start
            })
            .collect();
        Self { parts, starts }
    }

    /// The datasets.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Rows of all datasets.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|p| p.dataset.len()).fold(0, u64::saturating_add)
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Index of the first row of dataset `part`.
    pub fn start(&self, part: usize) -> u64 {
        self.starts[part]
    }

    /// Prompts at `indices`, each with the dataset that it comes from; a failed one is `Err` with its reason.
    pub fn get(&mut self, indices: &[u64], text: &Text) -> Result<Vec<std::result::Result<Item, String>>> {
        let mut found: Vec<std::result::Result<Item, String>> =
            indices.iter().map(|index| Err(format!("index {index} is beyond the datasets"))).collect();
        for (source, part) in self.parts.iter_mut().enumerate() {
            let start = self.starts[source];
            let own = start..start.saturating_add(part.dataset.len());
            let places: Vec<usize> = (0..indices.len()).filter(|i| own.contains(&indices[*i])).collect();
            let rows: Vec<u64> = places.iter().map(|i| indices[*i] - start).collect();
            if rows.is_empty() {
                continue;
            }
            for (place, item) in places.into_iter().zip(part.dataset.get(&rows, text)?) {
                found[place] = item.map(|item| Item { source, ..item });
            }
        }
        Ok(found)
    }
}

/// Which row each prompt of the run is: a pure function of the seed and the prompt's number, so that a resumed run takes
/// the same.
///
/// Without weights an epoch is a permutation of all rows. With weights an epoch has as many prompts as it takes until
/// the first dataset is used up when each gets its share; the seeded permutation decides where in the epoch each
/// dataset's prompts stand. Every dataset walks through its own permutations, one after the other, however many of its
/// rows an epoch takes.
#[derive(Clone)]
pub struct Schedule {
    order: Order,
    /// Rows of each dataset.
    lens: Vec<u64>,
    /// Prompts of each dataset in one epoch, when mixed by weight.
    shares: Option<Vec<u64>>,
    /// Permutations in use, by dataset (the whole epoch last) and pass.
    known: HashMap<(usize, u64), Arc<Vec<u64>>>,
}

impl Schedule {
    /// The order of datasets with `lens` rows, none of which is 0; `weights`, all above 0, mix them.
    pub fn new(order: Order, lens: Vec<u64>, weights: Option<&[f64]>) -> Self {
        let shares = weights.filter(|w| w.len() == lens.len() && w.len() > 1).map(|weights| {
            let total: f64 = weights.iter().sum();
            let share = |weight: &f64| weight / total;
            // Prompts until the first dataset is used up.
            let prompts =
                weights.iter().zip(&lens).map(|(w, len)| *len as f64 / share(w)).fold(f64::INFINITY, f64::min);
            weights.iter().zip(&lens).map(|(w, len)| ((share(w) * prompts).round() as u64).clamp(1, *len)).collect()
        });
        Self { order, lens, shares, known: HashMap::new() }
    }

    /// Prompts of one epoch.
    pub fn epoch_len(&self) -> u64 {
        self.shares.as_ref().unwrap_or(&self.lens).iter().copied().fold(0, u64::saturating_add)
    }

    /// Index, over all datasets, of prompt number `ordinal` of the run. Epochs are counted from 1, as in the original.
    pub fn index(&mut self, ordinal: u64) -> u64 {
        let len = self.epoch_len().max(1);
        let (epoch, position) = (ordinal / len + 1, (ordinal % len) as usize);
        let whole = self.lens.len();
        let Some(shares) = self.shares.clone() else {
            let order = self.order;
            return self.permutation(whole, epoch, move || order.indices(len, epoch))[position];
        };
        let order = self.order;
        let place = self.permutation(whole, epoch, || match order.shuffle {
            true => order.indices(len, epoch),
            false => even(&shares),
        })[position];
        let mut first = 0;
        let mut part = 0;
        while place >= first + shares[part] {
            first += shares[part];
            part += 1;
        }
        // The dataset's own count of prompts so far, epochs before included.
        let draw = (epoch - 1) * shares[part] + (place - first);
        let own = self.lens[part];
        let (pass, row) = (draw / own + 1, (draw % own) as usize);
        let order = Order { seed: self.order.seed.wrapping_add((part as u64 + 1).wrapping_mul(SEED_STEP)), ..order };
        let start: u64 = self.lens[..part].iter().sum();
        start + self.permutation(part, pass, move || order.indices(own, pass))[row]
    }

    fn permutation(&mut self, of: usize, pass: u64, make: impl FnOnce() -> Vec<u64>) -> Arc<Vec<u64>> {
        if let Some(known) = self.known.get(&(of, pass)) {
            return Arc::clone(known);
        }
        // An epoch reaches over at most two passes of a dataset.
        self.known.retain(|(other, earlier), _| *other != of || *earlier + 2 > pass);
        let made = Arc::new(make());
        self.known.insert((of, pass), Arc::clone(&made));
        made
    }
}

/// Distance of the datasets' seeds: the golden ratio in 64 bits, so that neighbouring seeds of a run stay apart.
const SEED_STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// Places of an unshuffled epoch: every dataset spread evenly, its own prompts in their order.
fn even(shares: &[u64]) -> Vec<u64> {
    let total: u64 = shares.iter().sum();
    let starts: Vec<u64> = shares.iter().scan(0, |next, n| Some(std::mem::replace(next, *next + n))).collect();
    let mut taken = vec![0u64; shares.len()];
    (0..total)
        .map(|position| {
            // The dataset that is furthest behind its share; the first of equals.
            let behind = |i: &usize| {
                i128::from(position + 1) * i128::from(shares[*i]) - i128::from(taken[*i]) * i128::from(total)
            };
            let open = (0..shares.len()).filter(|i| taken[*i] < shares[*i]);
            let next = open.max_by_key(|i| (behind(i), std::cmp::Reverse(*i))).unwrap_or(0);
            taken[next] += 1;
            starts[next] + taken[next] - 1
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order(shuffle: bool) -> Order {
        Order { seed: 7, shuffle }
    }

    #[test]
    fn one_dataset_keeps_the_order_it_always_had() {
        let mut schedule = Schedule::new(order(true), vec![10], Some(&[3.0]));
        let got: Vec<u64> = (0..20).map(|o| schedule.index(o)).collect();
        assert_eq!(got, [order(true).indices(10, 1), order(true).indices(10, 2)].concat());
    }

    #[test]
    fn joined_datasets_give_each_row_once_an_epoch() {
        let mut schedule = Schedule::new(order(true), vec![4, 6], None);
        for epoch in 0..3 {
            let mut got: Vec<u64> = (0..10).map(|p| schedule.index(epoch * 10 + p)).collect();
            got.sort_unstable();
            assert!(got.into_iter().eq(0..10));
        }
    }

    #[test]
    fn weights_are_kept_exactly_and_no_row_repeats_before_its_dataset_is_used_up() {
        let mut schedule = Schedule::new(order(true), vec![70, 1000], Some(&[0.7, 0.3]));
        assert_eq!(schedule.epoch_len(), 100);
        let mut second = Vec::new();
        for epoch in 0..3 {
            let got: Vec<u64> = (0..100).map(|p| schedule.index(epoch * 100 + p)).collect();
            let mut first: Vec<u64> = got.iter().copied().filter(|i| *i < 70).collect();
            first.sort_unstable();
            assert!(first.into_iter().eq(0..70), "the smaller dataset is seen once an epoch");
            second.extend(got.into_iter().filter(|i| *i >= 70));
        }
        assert_eq!(second.len(), 90);
        second.sort_unstable();
        second.dedup();
        assert_eq!(second.len(), 90, "the larger one goes on where it stopped");
    }

    #[test]
    fn unshuffled_prompts_are_spread_evenly_and_in_order() {
        let mut schedule = Schedule::new(order(false), vec![4, 2], Some(&[2.0, 1.0]));
        let got: Vec<u64> = (0..6).map(|o| schedule.index(o)).collect();
        assert_eq!(got, [0, 4, 1, 2, 5, 3]);
    }

    proptest! {
        #[test]
        fn the_order_depends_on_the_number_alone(
            lens in prop::collection::vec(1u64..40, 1..4),
            weights in prop::collection::vec(0.01f64..5.0, 4),
            start in 0u64..200,
            shuffle: bool,
        ) {
            let weights = &weights[..lens.len()];
            let total: u64 = lens.iter().sum();
            let mut whole = Schedule::new(order(shuffle), lens.clone(), Some(weights));
            let expected: Vec<u64> = (0..start + 20).map(|o| whole.index(o)).collect();
            let mut resumed = Schedule::new(order(shuffle), lens, Some(weights));
            let got: Vec<u64> = (start..start + 20).map(|o| resumed.index(o)).collect();
            prop_assert_eq!(&got[..], &expected[start as usize..]);
            prop_assert!(expected.iter().all(|i| *i < total));
        }
    }
}
