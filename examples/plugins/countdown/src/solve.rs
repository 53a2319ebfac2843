//! Which targets a handful of numbers reaches, and the one solution that an example shows.
//!
//! # The canonical solution
//! Most problems have many solutions, and a student imitates one. The rule should be the easiest function to learn:
//! one that depends on the multiset of numbers and the target only, never on the order in which the prompt lists them,
//! and that is settled by few, local decisions. So, in this order:
//! 1. the fewest parentheses, which is also the shortest text (all solutions use the same digits): the structure is
//!    mostly a flat chain, and brackets need not be balanced over a distance;
//! 2. the fewest `/`, then `*`, then `-`: sums are preferred, and the rarer an operator, the more its choice means;
//! 3. of what is left, in reading order, the larger number and the commoner operator first. Descending order makes
//!    `9+2-1` of `1 2 9`, never `2-1+9` or `9-1+2`: every intermediate value of a chain of sums stays positive, the
//!    first symbol is mostly the largest number in the prompt, and commuted forms never compete.
//!
//! Only non-negative intermediate values are searched. That loses no target: a solution with a negative intermediate value
//! can be rewritten by swapping the two sides of a subtraction and the sign of what it is added to or multiplied with.

use std::cmp::Ordering;
use std::collections::HashMap;

/// A set of operators out of `+ - * /`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ops {
    add: bool,
    sub: bool,
    mul: bool,
    div: bool,
}

impl Ops {
    /// Reads a text such as `+-*`.
    ///
    /// # Errors
    /// When it is empty or holds anything else.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut ops = Ops { add: false, sub: false, mul: false, div: false };
        for c in text.chars() {
            match c {
                '+' => ops.add = true,
                '-' => ops.sub = true,
                '*' => ops.mul = true,
                '/' => ops.div = true,
                other => return Err(format!("`custom.countdown.ops` holds `{other}`: choose from `+-*/`")),
            }
        }
        if text.is_empty() {
            return Err("`custom.countdown.ops` is empty: choose from `+-*/`".to_owned());
        }
        Ok(ops)
    }

    /// How many operators there are.
    pub fn count(self) -> u64 {
        [self.add, self.sub, self.mul, self.div].iter().filter(|on| **on).count() as u64
    }
}

/// A non-negative fraction in lowest terms. With at most five numbers of at most 99 neither part passes 10^10.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Fraction {
    num: i64,
    den: i64,
}

impl Fraction {
    fn new(num: i64, den: i64) -> Self {
        let (mut a, mut b) = (num, den);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        Fraction { num: num / a, den: den / a }
    }

    fn add(self, other: Self) -> Self {
        Self::new(self.num * other.den + other.num * self.den, self.den * other.den)
    }

    fn sub(self, other: Self) -> Option<Self> {
        let num = self.num * other.den - other.num * self.den;
        (num >= 0).then(|| Self::new(num, self.den * other.den))
    }

    fn mul(self, other: Self) -> Self {
        Self::new(self.num * other.num, self.den * other.den)
    }

    fn div(self, other: Self) -> Option<Self> {
        (other.num != 0).then(|| Self::new(self.num * other.den, self.den * other.num))
    }
}

/// The targets from 1 to `target_max` that `numbers` reach with each of them used exactly once, ascending.
pub fn targets(numbers: &[u16], ops: Ops, target_max: u32) -> Vec<u32> {
    let full = (1usize << numbers.len()) - 1;
    let mut values: Vec<Vec<Fraction>> = vec![Vec::new(); full + 1];
    for mask in 1..=full {
        let mut found = Vec::new();
        if mask.count_ones() == 1 {
            found.push(Fraction::new(i64::from(numbers[mask.trailing_zeros() as usize]), 1));
        }
        for (left, right) in splits(mask) {
            if left < right {
                continue; // the other order of the same split is covered by trying both below
            }
            for &a in &values[left] {
                for &b in &values[right] {
                    if ops.add {
                        found.push(a.add(b));
                    }
                    if ops.sub {
                        found.extend(a.sub(b));
                        found.extend(b.sub(a));
                    }
                    if ops.mul {
                        found.push(a.mul(b));
                    }
                    if ops.div {
                        found.extend(a.div(b));
                        found.extend(b.div(a));
                    }
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        values[mask] = found;
    }
    let mut targets: Vec<u32> = values[full]
        .iter()
        .filter(|v| v.den == 1 && v.num >= 1 && v.num <= i64::from(target_max))
        .map(|v| v.num as u32)
        .collect();
    targets.sort_unstable();
    targets
}

/// Ways to split a set in two non-empty parts, both orders.
fn splits(mask: usize) -> impl Iterator<Item = (usize, usize)> {
    (1..mask).filter(move |left| left & mask == *left).map(move |left| (left, mask ^ left))
}

/// How tightly the outermost operator binds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Shape {
    Sum,
    Product,
    Number,
}

/// Symbols in the order of preference at the same place: smaller is better.
const CLOSE: u16 = 0;
const ADD: u16 = 1;
const SUB: u16 = 2;
const MUL: u16 = 3;
const DIV: u16 = 4;
const OPEN: u16 = 5;

/// A larger number is preferred, and any number to an opening parenthesis does not matter: rule 1 settled that.
fn number_symbol(number: u16) -> u16 {
    u16::MAX - number
}

/// One way to write a value. Ordered by preference: the smallest is the canonical one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Written {
    parens: u8,
    divs: u8,
    muls: u8,
    subs: u8,
    symbols: Vec<u16>,
}

impl Written {
    fn number(number: u16) -> Self {
        Written { parens: 0, divs: 0, muls: 0, subs: 0, symbols: vec![number_symbol(number)] }
    }

    fn join(left: &Self, left_parens: bool, op: u16, right: &Self, right_parens: bool) -> Self {
        let mut symbols = Vec::with_capacity(left.symbols.len() + right.symbols.len() + 5);
        let mut push = |part: &Self, parens: bool| {
            if parens {
                symbols.push(OPEN);
            }
            symbols.extend_from_slice(&part.symbols);
            if parens {
                symbols.push(CLOSE);
            }
        };
        push(left, left_parens);
        push(&Written { symbols: vec![op], ..Written::number(0) }, false);
        push(right, right_parens);
        Written {
            parens: left.parens + right.parens + u8::from(left_parens) + u8::from(right_parens),
            divs: left.divs + right.divs + u8::from(op == DIV),
            muls: left.muls + right.muls + u8::from(op == MUL),
            subs: left.subs + right.subs + u8::from(op == SUB),
            symbols,
        }
    }

    fn render(&self) -> String {
        let mut text = String::new();
        for &symbol in &self.symbols {
            match symbol {
                CLOSE => text.push(')'),
                ADD => text.push('+'),
                SUB => text.push('-'),
                MUL => text.push('*'),
                DIV => text.push('/'),
                OPEN => text.push('('),
                number => text.push_str(&(u16::MAX - number).to_string()),
            }
        }
        text
    }
}

impl Ord for Written {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.parens, self.divs, self.muls, self.subs)
            .cmp(&(other.parens, other.divs, other.muls, other.subs))
            .then_with(|| self.symbols.cmp(&other.symbols))
    }
}

impl PartialOrd for Written {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

type Table = HashMap<(Fraction, Shape), Written>;

/// The canonical solution as text without the `=target`, or `None` when there is none.
pub fn solution(numbers: &[u16], ops: Ops, target: u32) -> Option<String> {
    let full = (1usize << numbers.len()) - 1;
    let mut tables: Vec<Table> = vec![Table::new(); full + 1];
    for mask in 1..=full {
        let mut table = Table::new();
        if mask.count_ones() == 1 {
            let number = numbers[mask.trailing_zeros() as usize];
            table.insert((Fraction::new(i64::from(number), 1), Shape::Number), Written::number(number));
        }
        for (left, right) in splits(mask) {
            for (&(a, a_shape), a_text) in &tables[left] {
                for (&(b, b_shape), b_text) in &tables[right] {
                    let goal = (mask == full).then_some(Fraction::new(i64::from(target), 1));
                    let mut offer = |value: Option<Fraction>, op: u16| {
                        let Some(value) = value else { return };
                        if goal.is_some_and(|goal| goal != value) {
                            return;
                        }
                        let product = op == MUL || op == DIV;
                        let left_parens = product && a_shape == Shape::Sum;
                        let right_parens = b_shape == Shape::Sum || (product && b_shape == Shape::Product);
                        let written = Written::join(a_text, left_parens, op, b_text, right_parens);
                        let shape = if product { Shape::Product } else { Shape::Sum };
                        table
                            .entry((value, shape))
                            .and_modify(|best| {
                                if written < *best {
                                    *best = written.clone()
                                }
                            })
                            .or_insert(written);
                    };
                    if ops.add {
                        offer(Some(a.add(b)), ADD);
                    }
                    if ops.sub {
                        offer(a.sub(b), SUB);
                    }
                    if ops.mul {
                        offer(Some(a.mul(b)), MUL);
                    }
                    if ops.div {
                        offer(a.div(b), DIV);
                    }
                }
            }
        }
        tables[mask] = table;
    }
    tables[full].values().min().map(Written::render)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn solve(numbers: &[u16], ops: &str, target: u32) -> Option<String> {
        solution(numbers, Ops::parse(ops).unwrap(), target)
    }

    #[test]
    fn canonical_solutions() {
        assert_eq!(solve(&[3, 5, 2], "+-*", 16).as_deref(), Some("(5+3)*2"));
        assert_eq!(solve(&[1, 2, 9], "+-*", 10).as_deref(), Some("9+2-1"));
        assert_eq!(solve(&[2, 1, 9], "+-*", 10).as_deref(), Some("9+2-1"));
        assert_eq!(solve(&[2, 1, 9], "+-*", 12).as_deref(), Some("9+2+1"));
        assert_eq!(solve(&[9, 9, 9], "+-*", 1), None);
        assert_eq!(solve(&[3, 3, 8, 8], "+-*/", 24).as_deref(), Some("8/(3-8/3)"));
    }

    #[test]
    fn every_target_has_a_solution_and_only_those() {
        for numbers in [vec![1, 1], vec![2, 3, 7], vec![5, 5, 9], vec![1, 4, 6, 8]] {
            for ops in ["+", "+-*", "+-*/", "*/"] {
                let ops = Ops::parse(ops).unwrap();
                let reached = targets(&numbers, ops, 99);
                let solved: Vec<u32> = (1..=99).filter(|t| solution(&numbers, ops, *t).is_some()).collect();
                assert_eq!(reached, solved, "{numbers:?}");
            }
        }
    }

    #[test]
    fn negative_intermediates_lose_no_target() {
        // Brute force with signed values over all trees of three numbers.
        for a in 1..=5i64 {
            for b in 1..=5i64 {
                for c in 1..=5i64 {
                    let apply = |x: i64, y: i64| [x + y, x - y, x * y];
                    let mut brute = std::collections::BTreeSet::new();
                    for (x, y, z) in [(a, b, c), (a, c, b), (b, a, c), (b, c, a), (c, a, b), (c, b, a)] {
                        for first in apply(x, y) {
                            brute.extend(apply(first, z));
                            brute.extend(apply(z, first));
                        }
                    }
                    let brute: Vec<u32> =
                        brute.into_iter().filter(|v| (1..=99).contains(v)).map(|v| v as u32).collect();
                    assert_eq!(targets(&[a as u16, b as u16, c as u16], Ops::parse("+-*").unwrap(), 99), brute);
                }
            }
        }
    }
}
