//! The answer that a completion gives.

/// The last match of the first kind that occurs: `\boxed{…}`, `**…**`, `\[⏎…⏎\]`, `is \(…\)`, `\[\n…\n\]` with a written
/// backslash-n. `None`: no answer.
pub fn answer(completion: &str) -> Option<&str> {
    last_boxed(completion)
        .or_else(|| last_between(completion, "**", "**"))
        .or_else(|| last_between(completion, "\\[\n", "\n\\]"))
        .or_else(|| last_between(completion, "is \\(", "\\)"))
        .or_else(|| last_between(completion, "\\[\\n", "\\n\\]"))
}

/// Inside the box, braces may nest this deep.
const BOX_DEPTH_MAX: usize = 2;

/// What is in the last `\boxed{…}` whose braces balance and nest at most two deep.
pub fn last_boxed(text: &str) -> Option<&str> {
    const OPEN: &str = "\\boxed{";
    let mut last = None;
    let mut at = 0;
    while let Some(found) = text[at..].find(OPEN) {
        let start = at + found + OPEN.len();
        at = match closing_brace(&text[start..]) {
            Some(len) => {
                last = Some(&text[start..start + len]);
                start + len + 1
            }
            None => start,
        };
    }
    last
}

/// Where the brace that closes a box stands in `inside`.
fn closing_brace(inside: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, c) in inside.bytes().enumerate() {
        match c {
            b'{' if depth == BOX_DEPTH_MAX => return None,
            b'{' => depth += 1,
            b'}' if depth == 0 => return Some(at),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

fn last_between<'a>(text: &'a str, open: &str, close: &str) -> Option<&'a str> {
    let mut last = None;
    let mut rest = text;
    while let Some(start) = rest.find(open) {
        let inside = &rest[start + open.len()..];
        let Some(end) = inside.find(close) else { break };
        last = Some(&inside[..end]);
        rest = &inside[end + close.len()..];
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_in_order() {
        assert_eq!(answer("**7** and \\boxed{8}"), Some("8"));
        assert_eq!(answer("\\boxed{1} \\boxed{\\frac{1}{x^{2}}}"), Some("\\frac{1}{x^{2}}"));
        assert_eq!(answer("\\boxed{a{b{c{d}}}} **7**"), Some("7"));
        assert_eq!(answer("\\boxed{\\boxed{3}}"), Some("\\boxed{3}"));
        assert_eq!(answer("is \\(4\\)\n\\[\n5\n\\]"), Some("5"));
        assert_eq!(answer("the sum is \\(4\\)"), Some("4"));
        assert_eq!(answer("\\[\\n6\\n\\]"), Some("6"));
        assert_eq!(answer("**open"), None);
        assert_eq!(answer("42"), None);
        assert_eq!(answer("\\boxed{open **b**"), Some("b"));
    }
}
