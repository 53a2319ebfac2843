//! The final answer, by GSM8K's rule: the number behind the last `####`.

use num_rational::BigRational;

use crate::expression;

/// Characters of a number at most.
const CHARS_MAX: usize = 64;

/// The number behind the last `####` of a text; none when there is no number.
pub fn final_answer(text: &str) -> Option<BigRational> {
    let (_, after) = text.rsplit_once("####")?;
    number(after.lines().next().unwrap_or_default())
}

/// A number as people write it: a sign, thousands separated by commas, decimals, a currency in front, a unit of one
/// character or a full stop behind.
pub fn number(text: &str) -> Option<BigRational> {
    let text = text.trim().trim_end_matches(['.', '%']).trim_start_matches(['$', '€', '£']).trim();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => ("-", digits.trim_start_matches(['$', '€', '£'])),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let plain = digits.chars().all(|c| c.is_ascii_digit() || matches!(c, '.' | ',' | '/'));
    let starts = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    if !plain || !starts || digits.len() > CHARS_MAX {
        return None;
    }
    expression::value(&format!("{sign}{}", digits.replace(',', ""))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_people_write_it() {
        let same = |a: &str, b: &str| number(a).is_some() && number(a) == number(b);
        for (a, b) in [
            ("72", " 72. "),
            ("1,000", "1000.0"),
            ("$5", "5"),
            ("-$5", "-5"),
            ("50%", "50"),
            ("1/2", "0.5"),
            ("+3", "3"),
        ] {
            assert!(same(a, b), "{a} {b}");
        }
        for none in ["", "-", "six", "1+1", "1/0", "4 apples", "..", &"9".repeat(65)] {
            assert_eq!(number(none), None, "{none}");
        }
        assert_eq!(final_answer("#### 1\nthen #### 2\nmore"), number("2"));
        assert_eq!(final_answer("2"), None);
    }
}
