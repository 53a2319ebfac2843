//! Tuples, intervals, their unions, and sets, compared item by item before cleaning takes their commas away. In a set and
//! in a union the order does not matter. Nothing is equal here that is not equal item by item.

use crate::{clean, compare};

/// Longer answers are not taken apart.
const BYTES_MAX: usize = 4096;
/// Items of one collection: each of a set's is compared with each of the other's.
const ITEMS_MAX: usize = 32;
/// Collections within collections.
const DEPTH_MAX: usize = 3;

/// Whether both are collections of the same kind with equal items.
pub fn equal(answer: &str, reference: &str) -> bool {
    answer.len().max(reference.len()) <= BYTES_MAX && equal_within(&bare(answer), &bare(reference), DEPTH_MAX)
}

/// Without what only shapes the look of brackets and spaces.
fn bare(text: &str) -> String {
    let mut text = text.trim().trim_matches('$').replace("\\left", "").replace("\\right", "");
    for space in ["\\,", "\\;", "\\!", "\\ "] {
        text = text.replace(space, " ");
    }
    text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}").trim().to_owned()
}

#[derive(PartialEq)]
enum Kind {
    Union,
    Set,
    /// Opening and closing bracket: `(1,2]` is another interval than `[1,2)`.
    Ordered(char, char),
}

fn equal_within(answer: &str, reference: &str, depth: usize) -> bool {
    let (Some((kind, a)), Some((other, r))) = (items(answer), items(reference)) else { return false };
    if depth == 0 || kind != other || a.len() != r.len() || a.len() > ITEMS_MAX {
        return false;
    }
    let same = |a: &str, r: &str| {
        equal_within(a, r, depth - 1) || {
            let (a, r) = (clean::clean(a), clean::clean(r));
            !a.is_empty() && compare::equal(&a, &r)
        }
    };
    if let Kind::Ordered(..) = kind {
        return a.iter().zip(&r).all(|(a, r)| same(a, r));
    }
    let mut left: Vec<&str> = r;
    a.iter().all(|a| {
        let found = left.iter().position(|r| same(a, r));
        found.map(|at| left.swap_remove(at)).is_some()
    })
}

/// The kind of a collection and its items, or `None` when `text` is none.
fn items(text: &str) -> Option<(Kind, Vec<&str>)> {
    let text = text.trim();
    let parts = split(text, "\\cup")?;
    if parts.len() > 1 {
        return Some((Kind::Union, parts));
    }
    if let Some(inside) = text.strip_prefix("\\{").and_then(|rest| rest.strip_suffix("\\}")) {
        return Some((Kind::Set, split(inside, ",")?));
    }
    let open = text.chars().next().filter(|c| matches!(c, '(' | '['))?;
    let close = text.chars().next_back().filter(|c| matches!(c, ')' | ']'))?;
    let inside = text.get(1..text.len().checked_sub(1)?)?;
    let items = split(inside, ",")?;
    // `(2x+1)` is an expression.
    (items.len() > 1).then_some((Kind::Ordered(open, close), items))
}

/// `text` at each `mark` outside brackets; `None` when brackets do not match or it is too much.
fn split<'a>(text: &'a str, mark: &str) -> Option<Vec<&'a str>> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0usize);
    for (at, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.checked_sub(1)?,
            _ if depth == 0 && at >= start && text[at..].starts_with(mark) => {
                parts.push(text[start..at].trim());
                start = at + mark.len();
            }
            _ => {}
        }
        if parts.len() >= ITEMS_MAX {
            return None;
        }
    }
    parts.push(text[start..].trim());
    (depth == 0).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::equal;

    #[test]
    fn items_decide() {
        for (answer, reference) in [
            ("(1/2, 3)", "\\left(\\frac{1}{2},3\\right)"),
            ("\\{1, 2, \\sqrt{3}\\}", "\\{\\sqrt 3, 1, 2\\}"),
            ("(-18, 1]", "\\left(-18, 1\\right]"),
            ("(1,2) \\cup [3,4)", "[3, 4)\\cup(1, 2)"),
            ("\\{(1,2),(3,4)\\}", "\\{(3,4),(1,\\frac42)\\}"),
            ("(2, -12/5)", "(2,\\dfrac{-12}{5})"),
            ("\\left\\{5\\right\\}", "\\{5\\}"),
        ] {
            assert!(equal(answer, reference) && equal(reference, answer), "{answer} = {reference}");
        }
        for (answer, reference) in [
            ("(1,2)", "(2,1)"),
            ("(1,2)", "[1,2)"),
            ("(1,2]", "(1,2)"),
            ("(1,23)", "(12,3)"),
            ("\\{1,2\\}", "\\{1,2,2\\}"),
            ("\\{1,1,2\\}", "\\{1,2,2\\}"),
            ("\\{1,2\\}", "(1,2)"),
            ("(x+1)", "(x+1)"),
            ("(1,2)\\cup(3,4)", "(1,2)\\cup(3,5)"),
            ("(,)", "(,)"),
            ("(", "("),
            ("(]", "(]"),
            ("\\{", "\\{"),
            (")(", ")("),
            ("", ""),
        ] {
            assert!(!equal(answer, reference), "{answer} != {reference}");
        }
    }
}
