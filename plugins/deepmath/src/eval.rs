//! Are two expressions equal? Exactly where both are rational; else by their values.
//!
//! Closed expressions have one value each, compared to a relative 1e-4 as such graders do, so that a decimal may stand
//! for a root. Expressions with free symbols are compared at fixed pseudo-random points: some real, of both signs, some
//! complex, so that `\sqrt{x^2}` is not `x`. Two different expressions of the size of an answer agree at all of them
//! with negligible probability, and the points are the same on every machine. Everything is bounded by the number of nodes.

use num_bigint::BigInt;
use num_complex::Complex64;
use num_rational::BigRational;
use num_traits::{One, Signed, ToPrimitive, Zero};

use crate::latex::{Expr, Function, Node};

/// Closed values closer than this, relative to the larger, are equal.
const RELATIVE_CLOSED: f64 = 1e-4;
/// The same where symbols occur: rounding only.
const RELATIVE_OPEN: f64 = 1e-8;
/// Values below this are rounding of zero.
const ABSOLUTE: f64 = 1e-10;
/// Points where expressions with symbols are compared.
const POINTS: u64 = 8;
/// At so many points both must have a value.
const POINTS_MIN: usize = 3;

/// Exact values stay below this size; beyond, floating point decides.
const EXACT_BITS_MAX: u64 = 2048;
/// Larger expressions are not worked out exactly.
const EXACT_NODES_MAX: usize = 400;
/// The largest exact factorial.
const FACTORIAL_MAX: u32 = 250;

/// Whether `a` and `b` are equal.
pub fn equal(a: &Expr, b: &Expr) -> bool {
    equal_up_to_sign(a, b, false)
}

/// Whether `a` equals `b`, or also `-b` if `either_sign`: the two sides' differences of one equation, or of its negation.
pub fn equal_up_to_sign(a: &Expr, b: &Expr, either_sign: bool) -> bool {
    if let (Some(a), Some(b)) = (exact(a), exact(b)) {
        return close_exact(&a, &b) || (either_sign && close_exact(&a, &-b));
    }
    let closed = a.is_closed() && b.is_closed();
    same_values(a, b, 1.0, closed) || (either_sign && same_values(a, b, -1.0, closed))
}

fn close_exact(a: &BigRational, b: &BigRational) -> bool {
    let tolerance = BigRational::new(BigInt::one(), BigInt::from((1.0 / RELATIVE_CLOSED) as u32));
    (a - b).abs() <= tolerance * a.abs().max(b.abs())
}

fn same_values(a: &Expr, b: &Expr, sign: f64, closed: bool) -> bool {
    let relative = if closed { RELATIVE_CLOSED } else { RELATIVE_OPEN };
    let mut compared = 0;
    for point in 0..if closed { 1 } else { POINTS } {
        let (Some(a), Some(b)) = (value(a, point), value(b, point)) else { continue };
        if (a - b * sign).norm() > relative * a.norm().max(b.norm()) + ABSOLUTE {
            return false;
        }
        compared += 1;
    }
    compared >= if closed { 1 } else { POINTS_MIN }
}

/// The exact value of a rational expression of moderate size.
fn exact(expr: &Expr) -> Option<BigRational> {
    if expr.nodes.len() > EXACT_NODES_MAX {
        return None;
    }
    let mut values: Vec<Option<BigRational>> = Vec::with_capacity(expr.nodes.len());
    for node in &expr.nodes {
        let value = exact_node(node, &values)
            .filter(|v| v.numer().bits() <= EXACT_BITS_MAX && v.denom().bits() <= EXACT_BITS_MAX);
        values.push(value);
    }
    values.pop()?
}

fn exact_node(node: &Node, values: &[Option<BigRational>]) -> Option<BigRational> {
    let of = |id: &usize| values[*id].as_ref();
    match node {
        Node::Number(value) => Some(value.clone()),
        Node::Add(a, b) => Some(of(a)? + of(b)?),
        Node::Mul(a, b) => Some(of(a)? * of(b)?),
        Node::Div(a, b) => of(b).filter(|b| !b.is_zero()).and_then(|b| Some(of(a)? / b)),
        Node::Neg(a) => of(a).map(|a| -a),
        Node::Pow(a, b) => exact_power(of(a)?, of(b)?),
        Node::Root(a, degree) => exact_root(of(a)?, of(degree)?),
        Node::Factorial(a) => {
            let n = of(a).filter(|a| a.is_integer())?.numer().to_u32().filter(|n| *n <= FACTORIAL_MAX)?;
            Some(BigRational::from((1..=n).fold(BigInt::one(), |product, k| product * k)))
        }
        Node::Call(Function::Abs, a) => Some(of(a)?.abs()),
        Node::Call(Function::Floor, a) => Some(of(a)?.floor()),
        Node::Call(Function::Ceiling, a) => Some(of(a)?.ceil()),
        _ => None,
    }
}

fn exact_power(base: &BigRational, exponent: &BigRational) -> Option<BigRational> {
    let power = exponent.is_integer().then(|| exponent.numer().to_i32()).flatten()?;
    let bits = base.numer().bits().max(base.denom().bits());
    let fits = bits.saturating_mul(u64::from(power.unsigned_abs())) <= 2 * EXACT_BITS_MAX;
    (fits && !(base.is_zero() && power < 0)).then(|| base.pow(power))
}

fn exact_root(radicand: &BigRational, degree: &BigRational) -> Option<BigRational> {
    let degree = degree.is_integer().then(|| degree.numer().to_u32()).flatten().filter(|d| (1..=64).contains(d))?;
    if radicand.is_negative() && degree % 2 == 0 {
        return None;
    }
    let root = |part: &BigInt| Some(part.nth_root(degree)).filter(|r| &r.pow(degree) == part);
    Some(BigRational::new(root(radicand.numer())?, root(radicand.denom())?))
}

/// The value of `expr` at `point`, or `None` where it has none that is finite.
fn value(expr: &Expr, point: u64) -> Option<Complex64> {
    let mut values: Vec<Complex64> = Vec::with_capacity(expr.nodes.len());
    let mut closed: Vec<bool> = Vec::with_capacity(expr.nodes.len());
    for node in &expr.nodes {
        let (next, is_closed) = match node {
            Node::Number(value) => (Complex64::from(value.to_f64().unwrap_or(f64::NAN)), true),
            Node::Symbol(name) => (symbol_at(name, point), false),
            Node::Pi => (Complex64::from(std::f64::consts::PI), true),
            Node::Euler => (Complex64::from(std::f64::consts::E), true),
            Node::Imaginary => (Complex64::I, true),
            Node::Add(a, b) => (values[*a] + values[*b], closed[*a] && closed[*b]),
            Node::Mul(a, b) => (values[*a] * values[*b], closed[*a] && closed[*b]),
            Node::Div(a, b) => (values[*a] / values[*b], closed[*a] && closed[*b]),
            Node::Neg(a) => (-values[*a], closed[*a]),
            Node::Pow(a, b) => (power(values[*a], values[*b]), closed[*a] && closed[*b]),
            Node::Root(a, degree) => (root(values[*a], values[*degree], closed[*a]), closed[*a] && closed[*degree]),
            Node::Log(a, base) => (values[*a].ln() / values[*base].ln(), closed[*a] && closed[*base]),
            Node::Factorial(a) => (gamma(values[*a] + 1.0), closed[*a]),
            Node::Call(function, a) => (call(*function, values[*a]), closed[*a]),
        };
        values.push(next);
        closed.push(is_closed);
    }
    values.pop().filter(|v| v.re.is_finite() && v.im.is_finite())
}

/// The value of a symbol: of size 0.3 to 2.3, real at the first points, positive at the very first, complex at the later ones.
fn symbol_at(name: &str, point: u64) -> Complex64 {
    // FNV-1a, then SplitMix64's finaliser.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let draw = |stream: u64| {
        let mut x = hash.wrapping_add(stream.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let size = 0.3 + 2.0 * draw(3 * point + 1);
    match point {
        0 => Complex64::from(size),
        1..=3 => Complex64::from(if draw(3 * point + 2) < 0.5 { size } else { -size }),
        _ => Complex64::from_polar(size, std::f64::consts::TAU * draw(3 * point + 3)),
    }
}

fn is_real(z: Complex64) -> bool {
    z.im == 0.0
}

fn power(base: Complex64, exponent: Complex64) -> Complex64 {
    if is_real(exponent) && exponent.re.fract() == 0.0 && exponent.re.abs() <= 1024.0 {
        return base.powi(exponent.re as i32);
    }
    if base.is_zero() {
        return if exponent.re > 0.0 { base } else { Complex64::from(f64::NAN) };
    }
    if is_real(base) && base.re > 0.0 && is_real(exponent) {
        return Complex64::from(base.re.powf(exponent.re));
    }
    base.powc(exponent)
}

/// The principal root; of a negative number, the real one where the degree is odd, as written answers mean it.
fn root(radicand: Complex64, degree: Complex64, closed: bool) -> Complex64 {
    if degree == Complex64::from(2.0) {
        return radicand.sqrt();
    }
    let odd = is_real(degree) && (degree.re % 2.0).abs() == 1.0;
    if closed && odd && is_real(radicand) && radicand.re < 0.0 {
        return Complex64::from(-(-radicand.re).powf(1.0 / degree.re));
    }
    power(radicand, Complex64::from(1.0) / degree)
}

fn call(function: Function, z: Complex64) -> Complex64 {
    let step =
        |rounded: fn(f64) -> f64| if is_real(z) { Complex64::from(rounded(z.re)) } else { Complex64::from(f64::NAN) };
    match function {
        Function::Sin => z.sin(),
        Function::Cos => z.cos(),
        Function::Tan => z.tan(),
        Function::Cot => z.cos() / z.sin(),
        Function::Sec => z.cos().inv(),
        Function::Csc => z.sin().inv(),
        Function::Arcsin => z.asin(),
        Function::Arccos => z.acos(),
        Function::Arctan => z.atan(),
        Function::Sinh => z.sinh(),
        Function::Cosh => z.cosh(),
        Function::Tanh => z.tanh(),
        Function::Exp => z.exp(),
        Function::Ln => z.ln(),
        Function::Abs => Complex64::from(z.norm()),
        Function::Floor => step(f64::floor),
        Function::Ceiling => step(f64::ceil),
    }
}

/// The gamma function: Lanczos' approximation with g = 7 and nine terms, mirrored on the left half-plane.
fn gamma(z: Complex64) -> Complex64 {
    const TERMS: [f64; 8] = [
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    if z.re < 0.5 {
        let mirrored = (Complex64::from(std::f64::consts::PI) * z).sin();
        return Complex64::from(std::f64::consts::PI) / (mirrored * gamma(Complex64::from(1.0) - z));
    }
    let z = z - 1.0;
    let sum = TERMS.iter().enumerate().fold(Complex64::from(0.999_999_999_999_809_9), |sum, (i, term)| {
        sum + Complex64::from(*term) / (z + (i as f64 + 1.0))
    });
    let t = z + 7.5;
    Complex64::from(std::f64::consts::TAU.sqrt()) * t.powc(z + 0.5) * (-t).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::latex::parse;

    fn same(a: &str, b: &str) -> bool {
        equal(&parse(a).unwrap(), &parse(b).unwrap())
    }

    #[test]
    fn equal_and_not() {
        for (a, b) in [
            ("(x+1)^2", "x^2+2x+1"),
            ("\\sin^2x+\\cos^2x", "1"),
            ("\\frac{1}{\\sqrt2}", "\\frac{\\sqrt2}{2}"),
            ("\\sqrt[3]{-8}", "-2"),
            ("e^{i\\pi}", "-1"),
            ("\\log 1000", "3"),
            ("\\log_{2}8", "3"),
            ("\\ln e^2", "2"),
            ("5!", "120"),
            ("n!", "n(n-1)!"),
            ("\\binom{5}{2}", "10"),
            ("\\lfloor 7/2\\rfloor", "3"),
            ("-1\\pm\\sqrt x", "\\pm\\sqrt x-1"),
            ("x^{3/2}", "x\\sqrt x"),
            ("10^{500}", "10^{499}\\cdot 10"),
            ("1/2x", "\\frac{1}{2x}"),
            ("|x-1|", "|1-x|"),
        ] {
            assert!(same(a, b), "{a} = {b}");
        }
        for (a, b) in [
            ("x", "y"),
            ("\\sqrt{x^2}", "x"),
            ("x", "1"),
            ("0", "10^{-5}"),
            ("1", "1.001"),
            ("x+\\frac17", "x"),
            ("10^{500}", "10^{501}"),
            ("c_1", "c_2"),
            ("1/0", "1/0"),
        ] {
            assert!(!same(a, b), "{a} != {b}");
        }
    }

    #[test]
    fn gamma_is_a_factorial() {
        for (n, product) in
            [(1.0, 1.0), (5.0, 24.0), (0.5, std::f64::consts::PI.sqrt()), (-0.5, -2.0 * std::f64::consts::PI.sqrt())]
        {
            assert!((gamma(Complex64::from(n)).re - product).abs() < 1e-10 * product.abs());
        }
    }
}
