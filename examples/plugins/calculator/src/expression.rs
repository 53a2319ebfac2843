//! Exact arithmetic on what a model wrote, bounded in time and memory for any text.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Signed, ToPrimitive, Zero};

/// Characters of an expression at most.
const CHARS_MAX: usize = 1000;
/// How deep parentheses and signs may nest.
const DEPTH_MAX: usize = 64;
/// Bits of a numerator or denominator at most.
const BITS_MAX: u64 = 4096;
/// Digits behind the decimal point that are shown of a number that has no end.
const DIGITS_SHOWN: usize = 10;
/// Longest decimal that is shown whole.
const EXACT_DIGITS_MAX: u32 = 30;

/// The value of an expression of numbers, `+ - * / % ^ **`, and parentheses. `×`, `·`, `÷`, `−`, commas between thousands
/// and `$` are understood too.
///
/// # Errors
/// What is wrong with it, as the model may read it.
pub fn value(text: &str) -> Result<BigRational, String> {
    if text.chars().count() > CHARS_MAX {
        return Err(format!("the expression is longer than {CHARS_MAX} characters"));
    }
    let mut parser = Parser { chars: normal(text).chars().collect(), at: 0 };
    let value = parser.sum(0)?;
    match parser.peek() {
        None => Ok(value),
        Some(c) => Err(format!("`{}` is not expected there", c.escape_default())),
    }
}

/// One way to write each operator, no spaces, no commas between digits.
fn normal(text: &str) -> String {
    let chars: Vec<char> = text.chars().filter(|c| !c.is_whitespace() && *c != '$').collect();
    let mut out = String::new();
    for (i, &c) in chars.iter().enumerate() {
        let digit = |j: Option<usize>| j.and_then(|j| chars.get(j)).is_some_and(char::is_ascii_digit);
        match c {
            '×' | '·' => out.push('*'),
            '÷' => out.push('/'),
            '−' | '–' => out.push('-'),
            '*' if chars.get(i + 1) == Some(&'*') => out.push('^'),
            '*' if i > 0 && chars[i - 1] == '*' => {}
            ',' if digit(i.checked_sub(1)) && digit(Some(i + 1)) => {}
            other => out.push(other),
        }
    }
    out
}

struct Parser {
    chars: Vec<char>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn take(&mut self, wanted: &[char]) -> Option<char> {
        let c = self.peek().filter(|c| wanted.contains(c))?;
        self.at += 1;
        Some(c)
    }

    fn sum(&mut self, depth: usize) -> Result<BigRational, String> {
        if depth > DEPTH_MAX {
            return Err(format!("it nests deeper than {DEPTH_MAX} levels"));
        }
        let mut value = self.product(depth)?;
        while let Some(operator) = self.take(&['+', '-']) {
            let right = self.product(depth)?;
            value = bounded(if operator == '+' { value + right } else { value - right })?;
        }
        Ok(value)
    }

    fn product(&mut self, depth: usize) -> Result<BigRational, String> {
        let mut value = self.signed(depth)?;
        while let Some(operator) = self.take(&['*', '/', '%']) {
            let right = self.signed(depth)?;
            if operator != '*' && right.is_zero() {
                return Err("division by zero".to_owned());
            }
            value = bounded(match operator {
                '*' => value * right,
                '/' => value / right,
                // The remainder has the sign of the divisor, as in Python.
                _ => &value - &right * (&value / &right).floor(),
            })?;
        }
        Ok(value)
    }

    fn signed(&mut self, depth: usize) -> Result<BigRational, String> {
        if depth > DEPTH_MAX {
            return Err(format!("it nests deeper than {DEPTH_MAX} levels"));
        }
        match self.take(&['+', '-']) {
            Some('-') => Ok(-self.signed(depth + 1)?),
            Some(_) => self.signed(depth + 1),
            None => self.power(depth),
        }
    }

    fn power(&mut self, depth: usize) -> Result<BigRational, String> {
        let base = self.atom(depth)?;
        if self.take(&['^']).is_none() {
            return Ok(base);
        }
        let exponent = self.signed(depth + 1)?;
        raise(base, &exponent)
    }

    fn atom(&mut self, depth: usize) -> Result<BigRational, String> {
        if self.take(&['(']).is_some() {
            let value = self.sum(depth + 1)?;
            return self.take(&[')']).map(|_| value).ok_or_else(|| "a `)` is missing".to_owned());
        }
        let start = self.at;
        while self.peek().is_some_and(|c| c.is_ascii_digit() || c == '.') {
            self.at += 1;
        }
        let digits: String = self.chars[start..self.at].iter().collect();
        if digits.is_empty() {
            return Err(match self.peek() {
                Some(c) => format!("a number is expected where `{}` stands", c.escape_default()),
                None => "a number is expected at the end".to_owned(),
            });
        }
        let (whole, fraction) = digits.split_once('.').unwrap_or((&digits, ""));
        let number = format!("{whole}{fraction}");
        let numerator: BigInt = number.parse().map_err(|_| format!("`{digits}` is not a number"))?;
        bounded(BigRational::new(numerator, BigInt::from(10).pow(fraction.len() as u32)))
    }
}

fn raise(base: BigRational, exponent: &BigRational) -> Result<BigRational, String> {
    let power = exponent.is_integer().then(|| exponent.to_integer().to_i32()).flatten();
    let power = power.ok_or("an exponent must be a whole number, and not a large one")?;
    if base.is_zero() && power < 0 {
        return Err("division by zero".to_owned());
    }
    let bits = base.numer().bits().max(base.denom().bits());
    let trivial = base.is_zero() || base.is_integer() && base.numer().magnitude().is_one();
    if !trivial && bits.saturating_mul(u64::from(power.unsigned_abs())) > BITS_MAX {
        return Err("the result has too many digits".to_owned());
    }
    Ok(if trivial {
        // 0, 1 and -1 to any power, without computing it.
        match (power, base.is_negative() && power % 2 == 0) {
            (0, _) | (_, true) => BigRational::one(),
            _ => base,
        }
    } else {
        base.pow(power)
    })
}

fn bounded(value: BigRational) -> Result<BigRational, String> {
    if value.numer().bits().max(value.denom().bits()) > BITS_MAX {
        return Err("the result has too many digits".to_owned());
    }
    Ok(value)
}

/// A value as the model reads it: exact where the decimals end, else a fraction and its beginning.
pub fn shown(value: &BigRational) -> String {
    if value.is_integer() {
        return value.to_integer().to_string();
    }
    let digits = (1..=EXACT_DIGITS_MAX).find(|d| (BigInt::from(10).pow(*d) % value.denom()).is_zero());
    match digits {
        Some(digits) => decimal(value, digits as usize),
        None => format!("{value} (about {})", decimal(value, DIGITS_SHOWN)),
    }
}

/// The value with this many decimals, rounded half away from zero.
fn decimal(value: &BigRational, digits: usize) -> String {
    let scaled = (value.abs() * BigRational::from(BigInt::from(10).pow(digits as u32))).round().to_integer();
    let text = format!("{:0>width$}", scaled.to_string(), width = digits + 1);
    let (whole, fraction) = text.split_at(text.len() - digits);
    format!("{}{whole}.{fraction}", if value.is_negative() { "-" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shows(text: &str) -> String {
        value(text).map_or_else(|e| format!("error: {e}"), |v| shown(&v))
    }

    #[test]
    fn exact() {
        for (text, expected) in [
            ("48/2", "24"),
            (" (48 + 24) * 3 ", "216"),
            ("2^3^2", "512"),
            ("2**-2", "0.25"),
            ("-2^2", "-4"),
            ("-7 % 3", "2"),
            ("7.5 % 2", "1.5"),
            ("0.1+0.2", "0.3"),
            ("1,000 × 1.5 ÷ 2", "750"),
            ("$12/60*50", "10"),
            ("1/3", "1/3 (about 0.3333333333)"),
            ("-2/3", "-2/3 (about -0.6666666667)"),
            ("1−3", "-2"),
            (".5 + 5.", "5.5"),
            ("--3", "3"),
            ("(-1)^1000000", "1"),
            ("0^0", "1"),
        ] {
            assert_eq!(shows(text), expected, "{text}");
        }
    }

    #[test]
    fn refused() {
        for (text, why) in [
            ("", "at the end"),
            ("1+", "at the end"),
            ("1 2)", "not expected"),
            ("(1", "`)` is missing"),
            ("two", "where `t` stands"),
            ("1/0", "division by zero"),
            ("5 % (2-2)", "division by zero"),
            ("0^-1", "division by zero"),
            ("2^0.5", "whole number"),
            ("9^9^9", "too many digits"),
            ("10^4000", "too many digits"),
            ("1.2.3", "not a number"),
            ("__import__('os')", "where `_` stands"),
            (&"(".repeat(100), "nests deeper"),
            (&"-".repeat(100), "nests deeper"),
            (&"1".repeat(1001), "longer than"),
        ] {
            assert!(shows(text).contains(why), "{text}: {}", shows(text));
        }
    }
}
