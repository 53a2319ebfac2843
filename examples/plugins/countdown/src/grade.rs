//! Is a completion a right equation?
//!
//! The text inside the first `<answer>…</answer>` (else the whole completion) must be `left=right`: the numbers written
//! on the left are the given ones, each exactly once; the first whole number on the right is the target; and both sides
//! have the same value. Both are read as numbers and operators by [`crate::arith`], never run as code.

use serde::Deserialize;

use crate::arith;

/// An answer longer than this is wrong without being read: no equation over a handful of numbers needs it.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// The numbers, ascending.
    pub nums: Vec<u64>,
    /// The target.
    pub target: u64,
}

#[derive(Deserialize)]
struct RawReference {
    nums: Vec<f64>,
    target: f64,
}

impl Reference {
    /// Reads `{"nums": [3, 5, 2], "target": 16}`.
    ///
    /// # Errors
    /// When it is something else.
    pub fn parse(json: &str) -> Result<Self, String> {
        let wrong = |why: &dyn std::fmt::Display| {
            format!("the reference is not {{\"nums\": [whole numbers], \"target\": whole number}}: {why}")
        };
        let raw: RawReference = serde_json::from_str(json).map_err(|e| wrong(&e))?;
        let whole = |v: f64| (v >= 0.0 && v < 9e15 && v.fract() == 0.0).then_some(v as u64).ok_or_else(|| wrong(&v));
        let mut nums = raw.nums.into_iter().map(whole).collect::<Result<Vec<_>, _>>()?;
        nums.sort_unstable();
        Ok(Reference { nums, target: whole(raw.target)? })
    }
}

/// Whether `completion` answers `reference`.
pub fn is_right(completion: &str, reference: &Reference) -> bool {
    let answer = answer_text(completion);
    if answer.len() > ANSWER_BYTES_MAX {
        return false;
    }
    let mut sides = answer.split('=');
    let (Some(left), Some(right), None) = (sides.next(), sides.next(), sides.next()) else { return false };
    let Some(mut used) = whole_numbers(left).collect::<Option<Vec<u64>>>() else { return false };
    used.sort_unstable();
    if used != reference.nums || whole_numbers(right).next() != Some(Some(reference.target)) {
        return false;
    }
    match (arith::value(left), arith::value(right)) {
        (Some(left), Some(right)) => left == right,
        _ => false,
    }
}

fn answer_text(completion: &str) -> &str {
    const OPEN: &str = "<answer>";
    let inside = completion.find(OPEN).map(|at| &completion[at + OPEN.len()..]);
    let inside = inside.and_then(|rest| rest.find("</answer>").map(|end| &rest[..end]));
    inside.unwrap_or(completion).trim()
}

/// Every run of digits; `None` for one that is larger than any given number.
fn whole_numbers(text: &str) -> impl Iterator<Item = Option<u64>> {
    text.split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty()).map(|run| run.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(completion: &str, nums: &[u64], target: u64) -> bool {
        let mut nums = nums.to_vec();
        nums.sort_unstable();
        is_right(completion, &Reference { nums, target })
    }

    #[test]
    fn rules() {
        assert!(right("(3+5)*2=16", &[3, 5, 2], 16));
        assert!(right("so <answer> (3 + 5)*2 = 16.0\n</answer> or <answer>1=1</answer>", &[3, 5, 2], 16));
        for wrong in [
            "",
            "=",
            "16=(3+5)*2",
            "(3+5)*2",
            "(3+5)*2=16=16",
            "(3+5)*2==16",
            "3+5*2=16",
            "(3+5)*2=-16",
            "(3+5)*2+0=16",
            "(3+5*2=16",
            "[(3+5)*2]=16",
            "(3+5)x2=16",
            "(3+5)*2=16!",
            "(3+5)*2=16a",
            "(3+5)*2=\\boxed{16}",
        ] {
            assert!(!right(wrong, &[3, 5, 2], 16), "{wrong}");
        }
    }

    #[test]
    fn hostile_text_is_wrong_and_quick() {
        let nines = "9**9**9**9=1";
        let deep = format!("{}1{}=1", "(".repeat(30_000), ")".repeat(30_000));
        let long = "1+".repeat(2_000_000) + "1=1";
        let minus = format!("{}1=1", "-".repeat(60_000));
        let factorial = format!("1{}=1", "!".repeat(60_000));
        for text in [
            nines,
            &deep,
            &long,
            &minus,
            &factorial,
            "9!!!!=1",
            "99999999999999999999999!=1",
            "1/0=1",
            "0**-1=1",
            "1e999999999=1",
            "(-1)**0.5=1",
            "\0=1",
            "é=1",
        ] {
            assert!(!right(text, &[1], 2), "{:.20}", text);
        }
    }

    #[test]
    fn broken_references_are_errors() {
        assert_eq!(Reference::parse(r#"{"nums":[5,3.0],"target":16}"#), Ok(Reference { nums: vec![3, 5], target: 16 }));
        for broken in ["", "[]", r#"{"nums":[1]}"#, r#"{"nums":["a"],"target":1}"#, r#"{"nums":[1.5],"target":1}"#] {
            assert!(Reference::parse(broken).is_err(), "{broken}");
        }
    }

    /// The golden vectors, where this checkout has them beside it.
    #[test]
    fn golden() {
        let root = std::env::var("COSMOS_GOLDEN_DIR")
            .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/golden").to_owned());
        let Ok(text) = std::fs::read_to_string(format!("{root}/graders/countdown.jsonl")) else {
            eprintln!("skipped: no golden graders in {root}");
            return;
        };
        let mut wrong = Vec::new();
        for line in text.lines() {
            let case: serde_json::Value = serde_json::from_str(line).unwrap();
            let reference = Reference::parse(&case["reference"].to_string()).unwrap();
            let score = f64::from(u8::from(is_right(case["completion"].as_str().unwrap(), &reference)));
            if Some(score) != case["score"].as_f64() {
                wrong.push(case.to_string());
            }
        }
        assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    }
}
