//! Do two cleaned answers say the same? The order of the attempts is that of the graders that AIME-style recipes use.
//!
//! Two of their steps do nothing here: a reference that is one capital letter of a multiple choice never occurs, for
//! cleaning lower-cases; and answers are never run as a program (their last resort), since [`crate::eval`] already
//! knows the arithmetic that this would give.

use crate::eval;
use crate::latex::{self, Expr};

/// Answers longer than this are compared as text only.
const ANSWER_BYTES_MAX: usize = 4096;
/// Lists within lists, and the like, are followed this deep.
const DEPTH_MAX: usize = 8;
/// Numbers within this, relative to the larger, are equal.
const RELATIVE: f64 = 1e-4;

/// Whether `answer` says what `reference` says.
pub fn equal(answer: &str, reference: &str) -> bool {
    equal_within(answer, reference, DEPTH_MAX)
}

fn equal_within(answer: &str, reference: &str, depth: usize) -> bool {
    let (answer, reference) = (answer.trim(), reference.trim());
    if answer.to_lowercase() == reference.to_lowercase() {
        return true;
    }
    if let (Some(a), Some(r)) = (number(answer), number(reference)) {
        // An answer in percent, or one that should have been, counts.
        return [r / 100.0, r, r * 100.0].iter().any(|r| close(a, *r));
    }
    if answer.is_empty() || depth == 0 || answer.len().max(reference.len()) > ANSWER_BYTES_MAX {
        return false;
    }
    if without_brackets(answer, reference) {
        return true;
    }
    if let (Some(a), Some(r)) = (list(answer), list(reference))
        && a.len() == r.len()
        && a.iter().zip(&r).all(|(a, r)| equal_within(a, r, depth - 1))
    {
        return true;
    }
    if let (Some(a), Some(r)) = (matrix(answer), matrix(reference)) {
        return same_matrix(&a, &r, depth);
    }
    if let Some(same) = equations(answer, reference, depth) {
        return same;
    }
    expressions(answer, reference)
}

/// Whether both are equations, and the same one up to moving terms and sign, whatever stands on the left.
pub fn same_equation(answer: &str, reference: &str) -> bool {
    answer.len().max(reference.len()) <= ANSWER_BYTES_MAX
        && answer.contains('=')
        && reference.contains('=')
        && equations(answer, reference, 1) == Some(true)
}

/// A plain number, with a percent sign at its end if any.
fn number(text: &str) -> Option<f64> {
    let text = text.replace(',', "");
    if let Some(value) = float(&text) {
        return Some(value);
    }
    let percent = text.strip_suffix('%')?;
    float(percent.strip_suffix('\\').unwrap_or(percent)).map(|v| v / 100.0)
}

/// A decimal number as programs write it; no names such as `inf`, which in an answer are words.
fn float(text: &str) -> Option<f64> {
    let digits = text.bytes().any(|c| c.is_ascii_digit());
    let plain = text.bytes().all(|c| c.is_ascii_digit() || matches!(c, b'+' | b'-' | b'.' | b'e' | b'E'));
    (digits && plain).then(|| text.parse().ok()).flatten()
}

fn close(a: f64, b: f64) -> bool {
    a == b || (a.is_finite() && b.is_finite() && (a - b).abs() <= RELATIVE * a.abs().max(b.abs()))
}

/// A number below 1 to two significant digits, anything else as it is. Two answers with the same result are equal:
/// tiny and negative numbers are compared loosely.
pub fn rounded(answer: &str) -> String {
    match float(answer).filter(|v| *v < 1.0) {
        Some(value) => two_digits(value),
        None => answer.to_owned(),
    }
}

/// As C's `%.2g`: fixed notation for exponents from -4 to 1, no trailing zeros.
fn two_digits(value: f64) -> String {
    let scientific = format!("{value:.1e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trimmed = |digits: &str| {
        if digits.contains('.') {
            digits.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            digits.to_owned()
        }
    };
    if (-4..2).contains(&exponent) {
        let places = usize::try_from(1 - exponent).unwrap_or(0);
        return trimmed(&format!("{value:.places$}"));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", trimmed(mantissa), exponent.abs())
}

fn without_brackets(answer: &str, reference: &str) -> bool {
    let wrapped = |text: &str, open: char, close: char| text.starts_with(open) && text.ends_with(close);
    let outer = (wrapped(answer, '[', ']') && !reference.starts_with('('))
        || (wrapped(answer, '(', ')') && !reference.starts_with('['));
    let strip = |text: &str| -> String {
        let text = if outer { text.trim_matches(['[', ']', '(', ')']) } else { text };
        text.chars().filter(|c| !matches!(c, '{' | '}' | '(' | ')')).collect::<String>().to_lowercase()
    };
    strip(answer) == strip(reference)
}

/// The items of `(a,b)` or `[a,b)`: which bracket does not matter.
fn list(text: &str) -> Option<Vec<&str>> {
    let bracketed = text.len() >= 2 && text.starts_with(['(', '[']) && text.ends_with([')', ']']);
    bracketed.then(|| text[1..text.len() - 1].split(',').collect())
}

/// The cells of a `pmatrix` or `bmatrix`, row by row.
fn matrix(text: &str) -> Option<Vec<Vec<&str>>> {
    let inside = ["pmatrix", "bmatrix"].iter().find_map(|kind| {
        text.strip_prefix("\\begin{")?
            .strip_prefix(kind)?
            .strip_prefix('}')?
            .strip_suffix('}')?
            .strip_suffix(kind)?
            .strip_suffix("\\end{")
    })?;
    Some(
        inside
            .split("\\\\")
            .map(|row| row.split('&').map(str::trim).collect())
            .filter(|row: &Vec<&str>| row != &[""])
            .collect(),
    )
}

fn same_matrix(a: &[Vec<&str>], b: &[Vec<&str>], depth: usize) -> bool {
    let same_row = |(a, b): (&Vec<&str>, &Vec<&str>)| {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal_within(a, b, depth - 1))
    };
    a.len() == b.len() && a.iter().zip(b).all(same_row)
}

/// Two equations are the same up to moving terms and sign; `x=5` is the answer 5. `None`: not such a case.
fn equations(answer: &str, reference: &str, depth: usize) -> Option<bool> {
    let sides = |text: &str| {
        text.split_once('=')
            .filter(|(_, right)| !right.contains('='))
            .map(|(l, r)| (l.trim().to_owned(), r.trim().to_owned()))
    };
    match (sides(answer), sides(reference)) {
        (Some(a), Some(r)) => {
            let difference = |(left, right): &(String, String)| latex::parse(&format!("{left}-({right})"));
            let (a, r) = (difference(&a)?, difference(&r)?);
            eval::equal_up_to_sign(&a, &r, true).then_some(true)
        }
        (Some((left, right)), None) if left.chars().count() <= 2 && !reference.contains('=') => {
            equal_within(&right, reference, depth - 1).then_some(true)
        }
        (None, Some((left, right))) if left.chars().count() <= 2 && !answer.contains('=') => {
            equal_within(answer, &right, depth - 1).then_some(true)
        }
        _ => None,
    }
}

fn expressions(answer: &str, reference: &str) -> bool {
    let parse = |text: &str| -> Option<Expr> { latex::parse(&text.replace("\\\\", "\\")) };
    let same = |answer: &str, reference: &str| match (parse(answer), parse(reference)) {
        (Some(a), Some(r)) => eval::equal(&a, &r),
        _ => false,
    };
    // A percent sign is read over; where one side only has it, that side may also be a hundredth.
    let percent = |text: &str| text.strip_suffix('%').map(|t| format!("({})/100", t.strip_suffix('\\').unwrap_or(t)));
    same(answer, reference)
        || match (percent(answer), percent(reference)) {
            (Some(answer), None) => same(&answer, reference),
            (None, Some(reference)) => same(answer, &reference),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_lenient_about_percent() {
        assert!(equal("12", "1200") && equal("50%", "0.5") && equal("50\\%", "50") && equal("9999", "10000"));
        assert!(!equal("9998", "10000") && !equal("0", "0.001") && !equal("inf", "infinity") && !equal("1e999", "7"));
    }

    #[test]
    fn brackets_lists_and_equations() {
        assert!(equal("[1,2)", "(1,2.0]") && equal("{x}", "x") && equal("[1,\\frac{1}{2}]", "[1,0.5]"));
        assert!(equal("x+y=2", "2-y=x") && equal("x=3", "3") && equal("3", "x=\\frac{6}{2}"));
        assert!(!equal("(1,2)", "(1,3)") && !equal("x+y=2", "x+y=3") && !equal("(1,2,3)", "(1,2)"));
    }

    #[test]
    fn small_numbers_are_rounded() {
        for (text, short) in [
            ("-123", "-1.2e+02"),
            ("0.996", "1"),
            ("0.0304", "0.03"),
            ("-7.25", "-7.2"),
            ("0.00001234", "1.2e-05"),
            ("0", "0"),
            ("123", "123"),
            ("x", "x"),
        ] {
            assert_eq!(rounded(text), short);
        }
        assert_eq!(rounded("0.0304"), rounded("0.03"));
        assert_ne!(rounded("0.034"), rounded("0.03"));
        assert_ne!(rounded("123"), rounded("120"));
    }
}
