//! The value of an arithmetic text, exactly, within bounds on time and memory.
//!
//! The accepted language is what a Python-syntax calculator would take of a numbers game: whole and decimal numbers,
//! `+ - * / // % **`, unary signs, parentheses, factorials, and `sqrt`, `factorial`, `floor`, `ceiling`, `abs`. `**` binds
//! to the right and tighter than a sign on its left, as in Python. Anything else has no value.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Signed, ToPrimitive, Zero};

/// Parentheses, signs and powers may nest this deep.
const DEPTH_MAX: usize = 100;
/// No intermediate value's numerator or denominator may pass this.
const BITS_MAX: u64 = 2048;
/// Operations one text may take: bounds the time at some tens of milliseconds.
const STEPS_MAX: usize = 1_000;
/// The largest number whose factorial stays within the bits.
const FACTORIAL_MAX: u32 = 250;

/// The exact value of `text`, or `None` when it is not an arithmetic expression within the bounds.
pub fn value(text: &str) -> Option<BigRational> {
    let mut reader = Reader { text: text.as_bytes(), at: 0, depth: 0, parens: 0, steps: 0 };
    reader.skip_blanks();
    let value = reader.sum()?;
    reader.skip_blanks();
    // A line break outside parentheses ends a Python expression; only blank lines may follow it.
    reader.text[reader.at..].iter().all(u8::is_ascii_whitespace).then_some(value)
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    depth: usize,
    parens: usize,
    steps: usize,
}

impl Reader<'_> {
    fn skip_blanks(&mut self) {
        while let Some(c) = self.text.get(self.at) {
            let blank = matches!(c, b' ' | b'\t' | b'\x0c') || (self.parens > 0 && matches!(c, b'\n' | b'\r'));
            if !blank {
                return;
            }
            self.at += 1;
        }
    }

    /// Takes `token` if it comes next, and the blanks after it.
    fn take(&mut self, token: &[u8]) -> bool {
        if !self.text[self.at..].starts_with(token) {
            return false;
        }
        self.at += token.len();
        self.skip_blanks();
        true
    }

    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        if self.depth >= DEPTH_MAX {
            return None;
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    /// Counts an operation and refuses a value that has grown too large.
    fn bounded(&mut self, value: BigRational) -> Option<BigRational> {
        self.steps += 1;
        (self.steps <= STEPS_MAX && value.numer().bits() <= BITS_MAX && value.denom().bits() <= BITS_MAX)
            .then_some(value)
    }

    fn sum(&mut self) -> Option<BigRational> {
        let mut total = self.product()?;
        loop {
            let value = if self.take(b"+") {
                total + self.product()?
            } else if self.take(b"-") {
                total - self.product()?
            } else {
                return Some(total);
            };
            total = self.bounded(value)?;
        }
    }

    fn product(&mut self) -> Option<BigRational> {
        let mut total = self.signed()?;
        loop {
            let value = if self.take(b"//") {
                (total / nonzero(self.signed()?)?).floor()
            } else if self.take(b"/") {
                total / nonzero(self.signed()?)?
            } else if self.take(b"%") {
                let by = nonzero(self.signed()?)?;
                let times = (&total / &by).floor();
                total - by * times
            } else if self.text[self.at..].starts_with(b"*")
                && !self.text[self.at..].starts_with(b"**")
                && self.take(b"*")
            {
                total * self.signed()?
            } else {
                return Some(total);
            };
            total = self.bounded(value)?;
        }
    }

    fn signed(&mut self) -> Option<BigRational> {
        if self.take(b"+") {
            self.deeper(Self::signed)
        } else if self.take(b"-") {
            self.deeper(Self::signed).map(|v| -v)
        } else {
            self.power()
        }
    }

    fn power(&mut self) -> Option<BigRational> {
        let base = self.factorial()?;
        if !self.take(b"**") {
            return Some(base);
        }
        let exponent = self.deeper(Self::signed)?;
        let value = power(&base, &exponent)?;
        self.bounded(value)
    }

    fn factorial(&mut self) -> Option<BigRational> {
        let mut value = self.atom()?;
        while self.take(b"!") {
            let n = value.is_integer().then(|| value.numer().to_u32()).flatten().filter(|n| *n <= FACTORIAL_MAX)?;
            let product = (1..=n).fold(BigInt::one(), |product, k| product * k);
            value = self.bounded(BigRational::from(product))?;
        }
        Some(value)
    }

    fn atom(&mut self) -> Option<BigRational> {
        let rest = &self.text[self.at..];
        match rest.first()? {
            b'(' => self.parenthesised(),
            b'0'..=b'9' | b'.' => self.number(),
            c if c.is_ascii_alphabetic() => {
                let len = rest.iter().take_while(|c| c.is_ascii_alphabetic()).count();
                let name = std::str::from_utf8(&rest[..len]).ok()?.to_owned();
                self.at += len;
                self.skip_blanks();
                let value = self.parenthesised()?;
                let value = function(&name, value)?;
                self.bounded(value)
            }
            _ => None,
        }
    }

    fn parenthesised(&mut self) -> Option<BigRational> {
        self.parens += 1;
        let open = self.take(b"(");
        let value = if open { self.deeper(Self::sum) } else { None }?;
        self.parens -= 1;
        let closed = self.text.get(self.at) == Some(&b')') || {
            self.skip_line_breaks();
            self.text.get(self.at) == Some(&b')')
        };
        if !closed {
            return None;
        }
        self.at += 1;
        self.skip_blanks();
        Some(value)
    }

    fn skip_line_breaks(&mut self) {
        while self.text.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
    }

    /// `12`, `1.5`, `.5`, `2.`, `1e3`; a whole number may not start with a zero, as in Python.
    fn number(&mut self) -> Option<BigRational> {
        let digits = |from: &[u8]| from.iter().take_while(|c| c.is_ascii_digit()).count();
        let rest = &self.text[self.at..];
        let whole = digits(rest);
        let has_point = rest.get(whole) == Some(&b'.');
        let fraction = if has_point { digits(&rest[whole + 1..]) } else { 0 };
        if whole + fraction == 0 || whole + fraction > 1000 {
            return None;
        }
        let mut len = whole + usize::from(has_point) + fraction;
        let mut exponent = -(fraction as i32);
        let mut is_decimal = has_point;
        if matches!(rest.get(len), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(rest.get(len + 1), Some(b'+' | b'-')));
            let count = digits(rest.get(len + 1 + sign..)?);
            let text = std::str::from_utf8(rest.get(len + 1..len + 1 + sign + count)?).ok()?;
            exponent = exponent.checked_add(text.parse::<i32>().ok().filter(|e| e.abs() <= 1000)?)?;
            len += 1 + sign + count;
            is_decimal = true;
        }
        if !is_decimal && whole > 1 && rest[0] == b'0' && rest[..whole].iter().any(|c| *c != b'0') {
            return None;
        }
        let mantissa: Vec<u8> =
            rest[..len].iter().copied().take_while(|c| !matches!(c, b'e' | b'E')).filter(u8::is_ascii_digit).collect();
        self.at += len;
        // A letter right after a number, as in `22a`, is no operator.
        if self.text.get(self.at).is_some_and(|c| c.is_ascii_alphanumeric() || *c == b'_' || *c == b'.') {
            return None;
        }
        self.skip_blanks();
        let mantissa = BigRational::from(BigInt::parse_bytes(&mantissa, 10)?);
        let scale = BigRational::from(BigInt::from(10)).pow(exponent);
        self.bounded(mantissa * scale)
    }
}

fn nonzero(value: BigRational) -> Option<BigRational> {
    (!value.is_zero()).then_some(value)
}

/// `base ** exponent` where that is rational and small enough.
fn power(base: &BigRational, exponent: &BigRational) -> Option<BigRational> {
    if exponent.is_integer() {
        let exponent = exponent.numer();
        if base.is_zero() && exponent.is_negative() {
            return None;
        }
        if base.is_zero() || base.is_one() {
            return Some(if exponent.is_zero() { BigRational::one() } else { base.clone() });
        }
        if base == &-BigRational::one() {
            return Some(if exponent.bit(0) { base.clone() } else { BigRational::one() });
        }
        let exponent = exponent.to_i32().filter(|e| e.unsigned_abs() as u64 <= BITS_MAX)?;
        let bits = base.numer().bits().max(base.denom().bits());
        return (bits * exponent.unsigned_abs() as u64 <= 2 * BITS_MAX).then(|| base.pow(exponent));
    }
    // A root: only where it is exact, for two equal irrational sides cannot be told from two nearly equal ones.
    let degree = exponent.denom().to_u32().filter(|d| *d <= 64)?;
    power(&root(base, degree)?, &BigRational::from(exponent.numer().clone()))
}

fn root(value: &BigRational, degree: u32) -> Option<BigRational> {
    if value.is_negative() {
        return None;
    }
    let exact = |part: &BigInt| Some(part.nth_root(degree)).filter(|r| &r.pow(degree) == part);
    Some(BigRational::new(exact(value.numer())?, exact(value.denom())?))
}

fn function(name: &str, value: BigRational) -> Option<BigRational> {
    match name {
        "sqrt" => root(&value, 2),
        "floor" => Some(value.floor()),
        "ceiling" => Some(value.ceil()),
        "abs" | "Abs" => Some(value.abs()),
        "factorial" => {
            let n = value.is_integer().then(|| value.numer().to_u32()).flatten().filter(|n| *n <= FACTORIAL_MAX)?;
            Some(BigRational::from((1..=n).fold(BigInt::one(), |product, k| product * k)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(text: &str, num: i64, den: i64) -> bool {
        value(text) == Some(BigRational::new(num.into(), den.into()))
    }

    #[test]
    fn values() {
        assert!(is("1 + 2*3", 7, 1));
        assert!(is("(1+2)*3", 9, 1));
        assert!(is("7/2", 7, 2));
        assert!(is("7//2", 3, 1));
        assert!(is("-7//2", -4, 1));
        assert!(is("-7 % 3", 2, 1));
        assert!(is("-2**2", -4, 1));
        assert!(is("2**-1", 1, 2));
        assert!(is("2**3**2", 512, 1));
        assert!(is("3!+-1", 5, 1));
        assert!(is("4**0.5", 2, 1));
        assert!(is("sqrt(9)*2", 6, 1));
        assert!(is("16.0", 16, 1));
        assert!(is(".5e1", 5, 1));
        assert!(is("(1\n+2)\n", 3, 1));
        assert!(is("1 - -1", 2, 1));
    }

    #[test]
    fn no_values() {
        for text in [
            "", "1+", "1 2", "(1", "1)", "2(3)", "(2)(3)", "05", "1,2", "1\n+2", "22a", "x", "1<2", "[1]", "1/0",
            "2**0.5", "1e", "1.2.3", "sqrt(2)", "foo(1)", "×", "!3",
        ] {
            assert_eq!(value(text), None, "{text}");
        }
    }
}
