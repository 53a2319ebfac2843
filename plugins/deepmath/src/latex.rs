//! A bounded reader for the mathematics in answers: the LaTeX that models and solutions write, as an expression.
//!
//! Precedence: implicit products bind tighter than written ones, so that `1/2x` is `1/(2x)`; a function without
//! parentheses takes the implicit product after it, so that `\sin 2t` is `\sin(2t)`. Letters are one-letter symbols
//! (with their subscript), `e` and `i` are the constants. Relations, sets and anything unknown are refused: such answers are
//! compared as text. What follows a full stop or a dollar sign is remark, not mathematics.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::Zero;

/// Answers with more tokens than this are compared as text only.
const TOKENS_MAX: usize = 1500;
/// Groups, powers and functions may nest this deep.
const DEPTH_MAX: usize = 60;
/// Digits in one number.
const DIGITS_MAX: usize = 400;

/// Index of a node in [`Expr::nodes`]; children come before their parents.
pub type Id = usize;

/// One operation. Operands are indices of earlier nodes.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// An exact number.
    Number(BigRational),
    /// A free symbol, by its name.
    Symbol(String),
    /// π.
    Pi,
    /// Euler's number.
    Euler,
    /// The imaginary unit.
    Imaginary,
    /// Sum of two.
    Add(Id, Id),
    /// Product of two.
    Mul(Id, Id),
    /// Quotient.
    Div(Id, Id),
    /// Negation.
    Neg(Id),
    /// Power.
    Pow(Id, Id),
    /// Radicand and degree.
    Root(Id, Id),
    /// Argument and base.
    Log(Id, Id),
    /// Factorial.
    Factorial(Id),
    /// A named function of one argument.
    Call(Function, Id),
}

/// Functions of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Function {
    Sin,
    Cos,
    Tan,
    Cot,
    Sec,
    Csc,
    Arcsin,
    Arccos,
    Arctan,
    Sinh,
    Cosh,
    Tanh,
    Exp,
    Ln,
    Abs,
    Floor,
    Ceiling,
}

impl Function {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "sin" => Function::Sin,
            "cos" => Function::Cos,
            "tan" => Function::Tan,
            "cot" => Function::Cot,
            "sec" => Function::Sec,
            "csc" => Function::Csc,
            "arcsin" => Function::Arcsin,
            "arccos" => Function::Arccos,
            "arctan" => Function::Arctan,
            "sinh" => Function::Sinh,
            "cosh" => Function::Cosh,
            "tanh" => Function::Tanh,
            "exp" => Function::Exp,
            "ln" => Function::Ln,
            _ => return None,
        })
    }

    /// `\sin^{-1}` is the inverse function, not a power.
    fn inverse(self) -> Option<Self> {
        Some(match self {
            Function::Sin => Function::Arcsin,
            Function::Cos => Function::Arccos,
            Function::Tan => Function::Arctan,
            _ => return None,
        })
    }
}

/// An expression: the last node is the whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Expr {
    /// Operands before operations.
    pub nodes: Vec<Node>,
}

impl Expr {
    /// Whether no free symbol occurs.
    pub fn is_closed(&self) -> bool {
        !self.nodes.iter().any(|n| matches!(n, Node::Symbol(_)))
    }

    fn push(&mut self, node: Node) -> Id {
        self.nodes.push(node);
        self.nodes.len() - 1
    }
}

/// Reads `text`, or `None` when it is not an expression within the bounds.
pub fn parse(text: &str) -> Option<Expr> {
    let mut reader = Reader { tokens: tokens(text)?, at: 0, depth: 0, bars: 0, expr: Expr::default() };
    let root = reader.sum()?;
    debug_assert_eq!(root + 1, reader.expr.nodes.len(), "the whole is the last node");
    match reader.peek() {
        None | Some(Token::Char('.' | '$' | ';' | ':' | '?')) => Some(reader.expr),
        Some(_) => None,
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Number(String),
    Letter(char),
    Command(String),
    Char(char),
}

/// Commands with a meaning of their own. A longer unknown command that starts with one of these is that command and
/// letters (`\cosx` once its space is gone); longest first.
const COMMANDS: &[&str] = &[
    "varepsilon",
    "operatorname",
    "displaystyle",
    "textstyle",
    "epsilon",
    "upsilon",
    "omicron",
    "arcsin",
    "arccos",
    "arctan",
    "lambda",
    "lfloor",
    "rfloor",
    "varphi",
    "mathrm",
    "mathbf",
    "mathit",
    "alpha",
    "gamma",
    "delta",
    "theta",
    "kappa",
    "sigma",
    "omega",
    "infty",
    "times",
    "lceil",
    "rceil",
    "lvert",
    "rvert",
    "right",
    "binom",
    "dfrac",
    "tfrac",
    "cfrac",
    "cdot",
    "sinh",
    "cosh",
    "tanh",
    "beta",
    "zeta",
    "iota",
    "frac",
    "sqrt",
    "left",
    "vert",
    "text",
    "bigl",
    "bigr",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "exp",
    "log",
    "div",
    "big",
    "eta",
    "rho",
    "tau",
    "phi",
    "chi",
    "psi",
    "ln",
    "lg",
    "pi",
    "mu",
    "xi",
    "pm",
    "mp",
];

/// Commands that relate, collect or continue: an answer with one of these is no expression.
const REFUSED: &[&str] = &[
    "le",
    "leq",
    "leqslant",
    "ge",
    "geq",
    "geqslant",
    "ne",
    "neq",
    "lt",
    "gt",
    "in",
    "notin",
    "to",
    "approx",
    "equiv",
    "sim",
    "cong",
    "cup",
    "cap",
    "subset",
    "subseteq",
    "mid",
    "mathbb",
    "setminus",
    "emptyset",
    "varnothing",
    "begin",
    "end",
    "int",
    "sum",
    "prod",
    "lim",
    "ldots",
    "cdots",
    "dots",
    "rightarrow",
    "leftarrow",
    "implies",
    "iff",
    "forall",
    "exists",
    "land",
    "lor",
    "quad",
    "qquad",
    "overline",
    "bmod",
    "pmod",
    "mod",
];

fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if found.len() > TOKENS_MAX {
            return None;
        }
        if c.is_whitespace() || c == '~' {
            rest = &rest[c.len_utf8()..];
        } else if c.is_ascii_digit() || (c == '.' && rest[1..].starts_with(|d: char| d.is_ascii_digit())) {
            let whole = rest.bytes().take_while(u8::is_ascii_digit).count();
            let fraction =
                rest[whole..].strip_prefix('.').map_or(0, |f| f.bytes().take_while(u8::is_ascii_digit).count());
            let len = whole + if fraction > 0 { fraction + 1 } else { 0 };
            found.push(Token::Number(rest[..len].to_owned()));
            rest = &rest[len..];
        } else if c == '\\' {
            rest = command(&rest[1..], &mut found)?;
        } else if c.is_alphabetic() {
            found.push(Token::Letter(c));
            rest = &rest[c.len_utf8()..];
        } else {
            found.push(Token::Char(c));
            rest = &rest[c.len_utf8()..];
        }
    }
    Some(found)
}

/// Takes one command off `rest`, which starts after the backslash.
fn command<'a>(rest: &'a str, found: &mut Vec<Token>) -> Option<&'a str> {
    let len = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
    if len == 0 {
        let c = rest.chars().next()?;
        match c {
            '{' | '}' | '|' => found.push(Token::Char(c)),
            ',' | ';' | ':' | '!' | ' ' | '%' | '$' => {}
            _ => return None,
        }
        return Some(&rest[c.len_utf8()..]);
    }
    let name = &rest[..len];
    if REFUSED.contains(&name) {
        return None;
    }
    let known = COMMANDS.iter().copied().filter(|known| name.starts_with(known)).max_by_key(|known| known.len());
    let taken = known.unwrap_or(name);
    let after = &rest[taken.len()..];
    match taken {
        "left" | "right" | "bigl" | "bigr" | "big" => return Some(after.strip_prefix('.').unwrap_or(after)),
        "displaystyle" | "textstyle" | "mathrm" | "mathbf" | "mathit" | "text" => {}
        "lvert" | "rvert" | "vert" => found.push(Token::Char('|')),
        _ => found.push(Token::Command(taken.to_owned())),
    }
    Some(after)
}

struct Reader {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    /// How many `|…|` are open: inside one, a bar closes it.
    bars: usize,
    expr: Expr,
}

impl Reader {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    fn take_char(&mut self, c: char) -> bool {
        let there = self.peek() == Some(&Token::Char(c));
        self.at += usize::from(there);
        there
    }

    fn take_command(&mut self, name: &str) -> bool {
        let there = matches!(self.peek(), Some(Token::Command(c)) if c == name);
        self.at += usize::from(there);
        there
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

    fn number(&mut self, value: i64) -> Id {
        self.expr.push(Node::Number(BigRational::from(BigInt::from(value))))
    }

    /// `\pm` is an unknown sign: the same one wherever it occurs, and opposite for `\mp`.
    fn plus_minus(&mut self, operand: Id, negative: bool) -> Id {
        let sign = self.expr.push(Node::Symbol("\\pm".to_owned()));
        let signed = self.expr.push(Node::Mul(sign, operand));
        if negative { self.expr.push(Node::Neg(signed)) } else { signed }
    }

    fn sum(&mut self) -> Option<Id> {
        let mut total = self.product()?;
        loop {
            let term = if self.take_char('+') {
                self.product()?
            } else if self.take_char('-') || self.take_char('−') {
                let term = self.product()?;
                self.expr.push(Node::Neg(term))
            } else if self.take_command("pm") {
                let term = self.product()?;
                self.plus_minus(term, false)
            } else if self.take_command("mp") {
                let term = self.product()?;
                self.plus_minus(term, true)
            } else {
                return Some(total);
            };
            total = self.expr.push(Node::Add(total, term));
        }
    }

    fn product(&mut self) -> Option<Id> {
        let mut total = self.signed()?;
        loop {
            if self.take_char('*')
                || self.take_char('·')
                || self.take_char('×')
                || self.take_command("cdot")
                || self.take_command("times")
            {
                let factor = self.signed()?;
                total = self.expr.push(Node::Mul(total, factor));
            } else if self.take_char('/') || self.take_char('÷') || self.take_command("div") {
                let factor = self.signed()?;
                total = self.expr.push(Node::Div(total, factor));
            } else {
                return Some(total);
            }
        }
    }

    fn signed(&mut self) -> Option<Id> {
        if self.take_char('+') {
            self.deeper(Self::signed)
        } else if self.take_char('-') || self.take_char('−') {
            let operand = self.deeper(Self::signed)?;
            Some(self.expr.push(Node::Neg(operand)))
        } else if self.take_command("pm") {
            let operand = self.deeper(Self::signed)?;
            Some(self.plus_minus(operand, false))
        } else if self.take_command("mp") {
            let operand = self.deeper(Self::signed)?;
            Some(self.plus_minus(operand, true))
        } else {
            self.implicit_product(true)
        }
    }

    /// Factors side by side. `functions`: whether `\sin` and the like may be among them after the first.
    fn implicit_product(&mut self, functions: bool) -> Option<Id> {
        let mut total = self.power()?;
        while self.starts_factor(functions) {
            let factor = self.power()?;
            total = self.expr.push(Node::Mul(total, factor));
        }
        Some(total)
    }

    fn starts_factor(&self, functions: bool) -> bool {
        match self.peek() {
            Some(Token::Number(_) | Token::Letter(_) | Token::Char('(' | '[' | '{')) => true,
            Some(Token::Char('|')) => self.bars == 0,
            Some(Token::Command(name)) => match name.as_str() {
                "cdot" | "times" | "div" | "pm" | "mp" | "rfloor" | "rceil" => false,
                "log" | "lg" => functions,
                other => functions || Function::named(other).is_none(),
            },
            _ => false,
        }
    }

    fn power(&mut self) -> Option<Id> {
        let mut base = self.atom()?;
        loop {
            if self.take_char('!') {
                base = self.expr.push(Node::Factorial(base));
            } else if self.take_char('^') {
                let exponent = self.exponent()?;
                base = self.expr.push(Node::Pow(base, exponent));
            } else if self.peek() == Some(&Token::Char('*')) && self.tokens.get(self.at + 1) == Some(&Token::Char('*'))
            {
                self.at += 2;
                let exponent = self.deeper(Self::signed_power)?;
                base = self.expr.push(Node::Pow(base, exponent));
            } else {
                return Some(base);
            }
        }
    }

    fn signed_power(&mut self) -> Option<Id> {
        if self.take_char('-') {
            let operand = self.deeper(Self::signed_power)?;
            return Some(self.expr.push(Node::Neg(operand)));
        }
        self.power()
    }

    /// After `^`: a group, or one atom with an optional sign; a whole number is one atom.
    fn exponent(&mut self) -> Option<Id> {
        if self.take_char('-') {
            let operand = self.deeper(Self::atom)?;
            return Some(self.expr.push(Node::Neg(operand)));
        }
        self.deeper(Self::atom)
    }

    fn atom(&mut self) -> Option<Id> {
        let token = self.peek()?.clone();
        match token {
            Token::Number(digits) => {
                self.at += 1;
                let value = decimal(&digits)?;
                Some(self.expr.push(Node::Number(value)))
            }
            Token::Letter(letter) => {
                self.at += 1;
                Some(self.symbol(letter.to_string()))
            }
            Token::Char('(') => self.group('(', ')'),
            Token::Char('[') => self.group('[', ']'),
            Token::Char('{') => self.group('{', '}'),
            Token::Char('|') if self.bars == 0 => {
                self.at += 1;
                self.bars += 1;
                let inside = self.deeper(Self::sum)?;
                self.bars -= 1;
                self.take_char('|').then(|| self.expr.push(Node::Call(Function::Abs, inside)))
            }
            Token::Char(_) => None,
            Token::Command(name) => {
                self.at += 1;
                self.deeper(|reader| reader.command(&name))
            }
        }
    }

    fn group(&mut self, open: char, close: char) -> Option<Id> {
        if !self.take_char(open) {
            return None;
        }
        let bars = std::mem::take(&mut self.bars);
        let inside = self.deeper(Self::sum)?;
        self.bars = bars;
        self.take_char(close).then_some(inside)
    }

    /// A symbol with its subscript and primes, or a constant.
    fn symbol(&mut self, mut name: String) -> Id {
        if self.take_char('_') {
            name.push('_');
            let mut depth = 0usize;
            while let Some(token) = self.peek() {
                match token {
                    Token::Char('{') => depth += 1,
                    Token::Char('}') if depth == 0 => break,
                    Token::Char('}') => depth -= 1,
                    Token::Number(text) | Token::Command(text) => name.push_str(text),
                    Token::Letter(c) | Token::Char(c) => name.push(*c),
                }
                self.at += 1;
                if depth == 0 {
                    break;
                }
            }
        }
        while self.take_char('\'') {
            name.push('\'');
        }
        let node = match name.as_str() {
            "e" => Node::Euler,
            "i" => Node::Imaginary,
            _ => Node::Symbol(name),
        };
        self.expr.push(node)
    }

    /// One argument of a command: a group, or a single digit, letter or command.
    fn argument(&mut self) -> Option<Id> {
        if let Some(Token::Number(digits)) = self.tokens.get(self.at).cloned() {
            let (first, rest) = digits.split_at(1);
            if rest.is_empty() {
                self.at += 1;
            } else {
                self.tokens[self.at] = Token::Number(rest.to_owned());
            }
            let value = first.parse().ok()?;
            return Some(self.number(value));
        }
        self.deeper(Self::atom)
    }

    fn command(&mut self, name: &str) -> Option<Id> {
        match name {
            "frac" | "dfrac" | "tfrac" | "cfrac" => {
                let over = self.argument()?;
                let under = self.argument()?;
                Some(self.expr.push(Node::Div(over, under)))
            }
            "binom" => {
                let n = self.argument()?;
                let k = self.argument()?;
                Some(self.binomial(n, k))
            }
            "sqrt" => {
                let degree =
                    if self.peek() == Some(&Token::Char('[')) { self.group('[', ']')? } else { self.number(2) };
                let radicand = self.argument()?;
                Some(self.expr.push(Node::Root(radicand, degree)))
            }
            "log" | "lg" => {
                let base = if self.take_char('_') { self.argument()? } else { self.number(10) };
                let argument = self.function_argument()?;
                Some(self.expr.push(Node::Log(argument, base)))
            }
            "lfloor" => self.fenced(Function::Floor, "rfloor"),
            "lceil" => self.fenced(Function::Ceiling, "rceil"),
            "pi" => Some(self.expr.push(Node::Pi)),
            "operatorname" => self.group('{', '}'),
            "cdot" | "times" | "div" | "pm" | "mp" | "rfloor" | "rceil" => None,
            _ => match Function::named(name) {
                Some(function) => self.call(function),
                None => Some(self.symbol(format!("\\{name}"))),
            },
        }
    }

    fn fenced(&mut self, function: Function, close: &str) -> Option<Id> {
        let bars = std::mem::take(&mut self.bars);
        let inside = self.sum()?;
        self.bars = bars;
        self.take_command(close).then(|| self.expr.push(Node::Call(function, inside)))
    }

    fn call(&mut self, function: Function) -> Option<Id> {
        let exponent = if self.take_char('^') { Some(self.exponent()?) } else { None };
        let is_inverse = exponent.is_some_and(|id| self.is_minus_one(id));
        let argument = self.function_argument()?;
        match (exponent, function.inverse()) {
            (Some(_), Some(inverse)) if is_inverse => Some(self.expr.push(Node::Call(inverse, argument))),
            (Some(exponent), _) => {
                let called = self.expr.push(Node::Call(function, argument));
                Some(self.expr.push(Node::Pow(called, exponent)))
            }
            (None, _) => Some(self.expr.push(Node::Call(function, argument))),
        }
    }

    fn is_minus_one(&self, id: Id) -> bool {
        let one = BigRational::from(BigInt::from(1));
        matches!(self.expr.nodes[id], Node::Neg(inner) if self.expr.nodes[inner] == Node::Number(one))
    }

    /// A group right after the function, or the implicit product after it.
    fn function_argument(&mut self) -> Option<Id> {
        match self.peek()? {
            Token::Char('(') => self.group('(', ')'),
            Token::Char('[') => self.group('[', ']'),
            Token::Char('{') => self.group('{', '}'),
            Token::Command(name) if Function::named(name).is_some() => self.deeper(Self::atom),
            _ => self.deeper(|reader| reader.implicit_product(false)),
        }
    }

    fn binomial(&mut self, n: Id, k: Id) -> Id {
        let minus_k = self.expr.push(Node::Neg(k));
        let rest = self.expr.push(Node::Add(n, minus_k));
        let [n, k, rest] = [n, k, rest].map(|id| self.expr.push(Node::Factorial(id)));
        let under = self.expr.push(Node::Mul(k, rest));
        self.expr.push(Node::Div(n, under))
    }
}

fn decimal(digits: &str) -> Option<BigRational> {
    if digits.len() > DIGITS_MAX {
        return None;
    }
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let numerator: BigInt = format!("0{whole}{fraction}").parse().ok()?;
    if numerator.is_zero() {
        return Some(BigRational::zero());
    }
    Some(BigRational::new(numerator, BigInt::from(10).pow(fraction.len() as u32)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_refuses() {
        for text in [
            "1",
            "-x",
            "\\frac12",
            "2\\sqrt[3]{x}",
            "\\sin^2x",
            "\\sin2t\\cost",
            "|x-1|",
            "\\left|x\\right|",
            "c_{1}e^{-x}",
            "y_1'",
            "\\pi r^2",
            "yes.",
            "\\log_{2}8",
            "\\lceil n/2\\rceil",
            "5!",
            "x**2",
            "\\pm3",
            "\\binom{5}{2}",
            "a.b",
        ] {
            assert!(parse(text).is_some(), "{text}");
        }
        for text in [
            "",
            "+",
            "x=1",
            "x<1",
            "x\\leq1",
            "(1",
            "1)",
            "\\frac{1}",
            "{}",
            "\\{1,2\\}",
            "x\\cup y",
            "\\begin{pmatrix}1\\end{pmatrix}",
            "|x",
            "\\sqrt",
            "\\",
            "1+",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn operands_come_first() {
        let expr = parse("\\frac{x+1}{\\sin^{-1}y}").unwrap();
        for (at, node) in expr.nodes.iter().enumerate() {
            let operands = match node {
                Node::Add(a, b)
                | Node::Mul(a, b)
                | Node::Div(a, b)
                | Node::Pow(a, b)
                | Node::Root(a, b)
                | Node::Log(a, b) => vec![*a, *b],
                Node::Neg(a) | Node::Factorial(a) | Node::Call(_, a) => vec![*a],
                _ => vec![],
            };
            assert!(operands.iter().all(|o| *o < at));
        }
    }
}
