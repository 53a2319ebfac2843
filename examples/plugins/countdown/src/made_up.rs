//! All problems of a chosen size: every (multiset of numbers, target) pair that has a solution.
//!
//! One pair in `holdout`, chosen by a hash of the numbers and the target alone, is held out; so the training and the
//! validation problems are disjoint whatever the seed, and a pair held out in a small game is held out in a larger one.
//! Training shows a pair once per distinct order of its numbers; validation shows it once, in a seeded order.
//! Nothing but the table of pairs (eight bytes each) is kept; solutions are found when an example is asked for.

use cosmos_plugin_sdk::{Dataset, Example, Prompt, Settings};
use serde::Deserialize;

use crate::solve::{Ops, solution, targets};

/// A game with more pairs than this is refused.
const PAIRS_MAX: usize = 1_000_000;
/// A game whose enumeration takes more combinations of two values than this is refused: about a second.
const WORK_MAX: u64 = 60_000_000;

/// `custom.countdown`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Game {
    numbers: u64,
    max: u64,
    ops: String,
    target_max: u64,
    seed: u64,
    holdout: u64,
}

impl Default for Game {
    fn default() -> Self {
        Game { numbers: 3, max: 9, ops: "+-*".to_owned(), target_max: 99, seed: 0, holdout: 10 }
    }
}

/// One solvable pair.
#[derive(Clone, Copy, Debug)]
struct Pair {
    /// Index of the multiset in `MadeUp::multisets`.
    multiset: u32,
    target: u16,
}

/// The training or the validation problems of one game.
#[derive(Debug)]
pub struct MadeUp {
    seed: u64,
    held_out: bool,
    ops: Ops,
    width: usize,
    /// Ascending numbers, `width` a multiset.
    multisets: Vec<u16>,
    pairs: Vec<Pair>,
    /// Index of the first example of each pair, and the total at the end.
    starts: Vec<u64>,
    len: u64,
}

impl MadeUp {
    /// Enumerates the game that `settings` describe; `held_out` chooses the validation problems.
    ///
    /// # Errors
    /// A setting that is out of its range, or a game that is too large or leaves no problem.
    pub fn new(held_out: bool, settings: &Settings) -> Result<Self, String> {
        let game: Game = settings.custom("countdown")?;
        in_range("numbers", game.numbers, 2, 5)?;
        in_range("max", game.max, 1, 99)?;
        in_range("target_max", game.target_max, 1, u64::from(u16::MAX))?;
        in_range("holdout", game.holdout, 2, u64::MAX)?;
        let ops = Ops::parse(&game.ops)?;
        let width = game.numbers as usize;
        if multiset_count(width as u64, game.max) * combinations(width, ops) > WORK_MAX {
            return Err(format!(
                "`custom.countdown`: {width} numbers up to {} are too many problems; lower `max` or `numbers`",
                game.max
            ));
        }
        let multisets = multisets(width, game.max as u16);
        let mut made =
            MadeUp { seed: game.seed, held_out, ops, width, multisets, pairs: Vec::new(), starts: vec![0], len: 0 };
        made.collect_pairs(game.target_max as u32, game.holdout)?;
        made.len = *made.starts.last().unwrap_or(&0);
        if made.len == 0 {
            return Err(format!(
                "`custom.countdown` leaves no {} problem; raise `max` or `target_max`, or change `holdout`",
                if held_out { "validation" } else { "training" }
            ));
        }
        if held_out {
            made.len = settings.dataset.limit(made.len)?;
        }
        Ok(made)
    }

    fn collect_pairs(&mut self, target_max: u32, holdout: u64) -> Result<(), String> {
        let mut end = 0;
        for index in 0..self.multisets.len() / self.width {
            let numbers = &self.multisets[index * self.width..][..self.width];
            for target in targets(numbers, self.ops, target_max) {
                if (pair_hash(numbers, target) % holdout == 0) != self.held_out {
                    continue;
                }
                end += if self.held_out { 1 } else { orders(numbers) };
                self.pairs.push(Pair { multiset: index as u32, target: target as u16 });
                self.starts.push(end);
            }
            if self.pairs.len() > PAIRS_MAX {
                return Err(format!(
                    "`custom.countdown` makes more than {PAIRS_MAX} problems; lower `max`, `numbers` or `target_max`"
                ));
            }
        }
        Ok(())
    }

    /// The numbers in prompt order and the target of the example at `index`.
    fn problem(&self, index: u64) -> (Vec<u16>, &[u16], u32) {
        let place = shuffled(index, *self.starts.last().unwrap_or(&1), self.seed);
        let which = self.starts.partition_point(|start| *start <= place) - 1;
        let pair = self.pairs[which];
        let numbers = &self.multisets[pair.multiset as usize * self.width..][..self.width];
        let target = u32::from(pair.target);
        let order = if self.held_out {
            mix(self.seed ^ pair_hash(numbers, target)) % orders(numbers)
        } else {
            place - self.starts[which]
        };
        (nth_order(numbers, order), numbers, target)
    }
}

impl Dataset for MadeUp {
    fn len(&self) -> Result<u64, String> {
        Ok(self.len)
    }

    fn get(&self, index: u64) -> Result<Example, String> {
        if index >= self.len {
            return Err(format!("index {index} is outside the dataset of {} examples", self.len));
        }
        let (listed, ascending, target) = self.problem(index);
        let answer = solution(ascending, self.ops, target)
            .ok_or_else(|| format!("no solution of {ascending:?} for {target}"))?;
        let spaced: Vec<String> = listed.iter().map(u16::to_string).collect();
        Ok(Example {
            // The colon ends the question, so that the completion starts with the answer's first digit or parenthesis.
            prompt: Prompt::Text(format!("{}={target}:", spaced.join(" "))),
            reference: Some(serde_json::json!({"nums": listed, "target": target}).to_string()),
            response: Some(format!("{answer}={target}")),
            metadata: Vec::new(),
        })
    }
}

fn in_range(key: &str, value: u64, min: u64, max: u64) -> Result<(), String> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(format!("`custom.countdown.{key}` is {value}: choose from {min} to {max}"))
}

/// An upper estimate of how many pairs of values `targets` combines for one multiset.
fn combinations(width: usize, ops: Ops) -> u64 {
    let fan = 1 + u64::from(ops.count()) * 2;
    match width {
        2 => fan,
        3 => 3 * fan * fan,
        4 => 15 * fan * fan * fan,
        _ => 105 * fan * fan * fan * fan,
    }
}

/// How many ascending lists of `width` numbers from 1 to `max` there are: the binomial of `max + width - 1` over `width`.
fn multiset_count(width: u64, max: u64) -> u64 {
    (1..=width).fold(1, |count, i| count * (max + i - 1) / i)
}

/// All ascending lists of `width` numbers from 1 to `max`, one after the other.
fn multisets(width: usize, max: u16) -> Vec<u16> {
    let mut all = Vec::new();
    let mut current = vec![1u16; width];
    loop {
        all.extend_from_slice(&current);
        let Some(grow) = current.iter().rposition(|n| *n < max) else { return all };
        let value = current[grow] + 1;
        current[grow..].fill(value);
    }
}

/// How many distinct orders the ascending `numbers` have.
fn orders(numbers: &[u16]) -> u64 {
    let mut count = 1;
    let mut run = 0;
    for (i, n) in numbers.iter().enumerate() {
        run = if i > 0 && numbers[i - 1] == *n { run + 1 } else { 1 };
        count = count * (i as u64 + 1) / run;
    }
    count
}

/// The `n`-th distinct order of the ascending `numbers`, in lexicographic order.
fn nth_order(numbers: &[u16], mut n: u64) -> Vec<u16> {
    let mut left = numbers.to_vec();
    let mut order = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let mut at = 0;
        loop {
            let mut rest = left.clone();
            rest.remove(at);
            let below = orders(&rest);
            let next = at + left[at..].iter().take_while(|v| **v == left[at]).count();
            if n < below || next >= left.len() {
                order.push(left[at]);
                left = rest;
                break;
            }
            n -= below;
            at = next;
        }
    }
    order
}

/// SplitMix64's finaliser (Steele, Lea and Flood 2014): every output bit depends on every input bit.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn pair_hash(ascending: &[u16], target: u32) -> u64 {
    ascending.iter().fold(mix(u64::from(target)), |hash, n| mix(hash ^ u64::from(*n)))
}

/// A seeded permutation of `0..len` with no table: a four-round Feistel network over the next even number of bits,
/// walked until it lands inside (at most four steps on average). Neighbouring indices become unrelated problems, so a
/// prefix of the dataset is a fair sample of it.
fn shuffled(index: u64, len: u64, seed: u64) -> u64 {
    let half_bits = (64 - len.saturating_sub(1).leading_zeros()).div_ceil(2).max(1);
    let half_mask = (1u64 << half_bits) - 1;
    let mut x = index;
    loop {
        let (mut left, mut right) = (x >> half_bits, x & half_mask);
        for round in 0..4 {
            (left, right) = (right, left ^ (mix(mix(seed ^ (round << 56)) ^ right) & half_mask));
        }
        x = left << half_bits | right;
        if x < len {
            return x;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::grade::{Reference, is_right};

    fn open(held_out: bool, json: &str) -> Result<MadeUp, String> {
        MadeUp::new(held_out, &Settings::parse(json).unwrap())
    }

    fn pairs(made: &MadeUp) -> Vec<(Vec<u16>, Vec<u16>, u32)> {
        (0..made.len)
            .map(|i| made.problem(i))
            .map(|(listed, ascending, target)| (listed, ascending.to_vec(), target))
            .collect()
    }

    #[test]
    fn train_and_validation_are_disjoint_and_complete() {
        for (json, seed) in [("{}", 0), (r#"{"custom":{"countdown":{"seed":7}}}"#, 7)] {
            let train = pairs(&open(false, json).unwrap());
            let validation = pairs(&open(true, json).unwrap());
            let shown: HashSet<_> = train.iter().map(|(_, a, t)| (a.clone(), *t)).collect();
            let held: HashSet<_> = validation.iter().map(|(_, a, t)| (a.clone(), *t)).collect();
            assert!(shown.is_disjoint(&held), "seed {seed}");
            assert_eq!(held.len(), validation.len(), "each held-out pair is shown once");
            let ops = Ops::parse("+-*").unwrap();
            let all: usize = multisets(3, 9).chunks(3).map(|m| targets(m, ops, 99).len()).sum();
            assert_eq!(shown.len() + held.len(), all);
            let part = held.len() as f64 / all as f64;
            assert!((0.08..0.12).contains(&part), "held out {part}");
            let listed: HashSet<_> = train.iter().map(|(l, _, t)| (l.clone(), *t)).collect();
            assert_eq!(listed.len(), train.len(), "each order is its own example, and only once");
            let orders: u64 = shown.iter().map(|(a, _)| orders(a)).sum();
            assert_eq!(orders, train.len() as u64);
        }
    }

    #[test]
    fn the_split_does_not_depend_on_the_seed() {
        let held = |seed: u64| {
            let json = format!(r#"{{"custom":{{"countdown":{{"seed":{seed}}}}}}}"#);
            let pairs = pairs(&open(true, &json).unwrap());
            (pairs.iter().map(|(_, a, t)| (a.clone(), *t)).collect::<HashSet<_>>(), pairs)
        };
        let (one, listed_one) = held(1);
        let (two, listed_two) = held(2);
        assert_eq!(one, two);
        assert_ne!(listed_one, listed_two);
    }

    #[test]
    fn every_example_is_right_by_the_grader() {
        for held_out in [false, true] {
            let made = open(held_out, r#"{"custom":{"countdown":{"ops":"+-*/","max":6}}}"#).unwrap();
            for index in 0..made.len {
                let example = made.get(index).unwrap();
                let reference = Reference::parse(&example.reference.unwrap()).unwrap();
                let response = example.response.unwrap();
                assert!(is_right(&response, &reference), "{response}");
                assert!(response.chars().all(|c| "0123456789+-*/()=".contains(c)));
                let Prompt::Text(prompt) = example.prompt else { panic!("not a text") };
                assert!(prompt.ends_with(&format!("={}:", reference.target)), "{prompt}");
            }
            assert!(made.get(made.len).is_err());
        }
    }

    #[test]
    fn a_larger_game_is_fine_and_a_huge_one_is_refused() {
        let made = open(false, r#"{"custom":{"countdown":{"numbers":4,"max":12}}}"#).unwrap();
        assert!(made.len > 500_000);
        made.get(made.len - 1).unwrap();
        assert!(open(false, r#"{"custom":{"countdown":{"numbers":5,"max":99}}}"#).unwrap_err().contains("too many"));
        assert!(open(false, r#"{"custom":{"countdown":{"numbres":4}}}"#).unwrap_err().contains("numbres"));
        assert!(open(false, r#"{"custom":{"countdown":{"holdout":1}}}"#).unwrap_err().contains("holdout"));
        assert!(open(false, r#"{"custom":{"countdown":{"ops":"+^"}}}"#).unwrap_err().contains('^'));
    }

    #[test]
    fn test_size_takes_a_prefix() {
        let all = open(true, "{}").unwrap();
        let some = open(true, r#"{"dataset":{"test_size":16}}"#).unwrap();
        assert_eq!(some.len, 16);
        assert_eq!(some.get(3).unwrap(), all.get(3).unwrap());
    }

    #[test]
    fn orders_are_distinct_permutations() {
        for numbers in [vec![1, 2, 3, 4], vec![1, 1, 2, 2], vec![5, 5, 5], vec![1, 2, 2]] {
            let all: HashSet<_> = (0..orders(&numbers)).map(|n| nth_order(&numbers, n)).collect();
            assert_eq!(all.len() as u64, orders(&numbers));
            assert!(all.iter().all(|order| {
                let mut sorted = order.clone();
                sorted.sort_unstable();
                sorted == numbers
            }));
        }
    }

    #[test]
    fn multisets_are_counted_without_listing_them() {
        for (width, max) in [(2, 1), (3, 9), (4, 12), (5, 5)] {
            assert_eq!(
                multiset_count(width, u64::from(max)),
                (multisets(width as usize, max).len() / width as usize) as u64
            );
        }
    }

    #[test]
    fn shuffling_is_a_permutation() {
        for len in [1, 2, 3, 5, 64, 1000, 1025] {
            let seen: HashSet<_> = (0..len).map(|i| shuffled(i, len, 42)).collect();
            assert_eq!(seen.len() as u64, len);
        }
    }
}
