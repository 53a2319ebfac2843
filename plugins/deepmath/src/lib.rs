//! The DeepMath recipe: training prompts with no reward (the teacher is the signal), validation on AIME-style problems
//! with a grader for mathematical answers.
//!
//! The grader follows the rules that such recipes use (extract, clean, compare), but no text of the model is ever run as
//! code: [`latex`] reads a bounded subset of LaTeX and [`eval`] compares values at fixed points.

pub mod clean;
pub mod compare;
pub mod eval;
pub mod extract;
pub mod latex;
pub mod rows;

use cosmos_plugin_sdk::{
    Dataset, DatasetOffer, DatasetRole, Description, Plugin, Reward, RewardOffer, RewardRole, Sample, Score, Settings,
    export_plugin, plain_score,
};

/// The plugin.
pub struct DeepMath;

export_plugin!(DeepMath);

impl Plugin for DeepMath {
    fn describe() -> Description {
        let dataset = |name: &str, role| DatasetOffer { name: name.to_owned(), role };
        let reward = |name: &str, role| RewardOffer { name: name.to_owned(), role };
        Description {
            name: "deepmath".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            summary: "DeepMath training prompts, AIME-style validation, a grader for mathematical answers".to_owned(),
            datasets: vec![dataset("train", DatasetRole::Train), dataset("validation", DatasetRole::Validation)],
            rewards: vec![reward("zero", RewardRole::Train), reward("math", RewardRole::Validation)],
            settings_schema: include_str!("../schema.json").to_owned(),
            wants: vec!["table".to_owned(), "chat-template".to_owned()],
        }
    }

    fn dataset(name: &str, settings: &Settings) -> Result<Box<dyn Dataset>, String> {
        match name {
            "train" => Ok(Box::new(rows::Training::open(settings)?)),
            "validation" => Ok(Box::new(rows::Validation::open(settings)?)),
            _ => Err(format!("no dataset `{name}` here: choose `train` or `validation`")),
        }
    }

    fn reward(name: &str, _settings: &Settings) -> Result<Box<dyn Reward>, String> {
        match name {
            "zero" => Ok(Box::new(Zero)),
            "math" => Ok(Box::new(MathAnswer)),
            _ => Err(format!("no reward `{name}` here: choose `zero` or `math`")),
        }
    }
}

/// Training has no reward of its own: distillation's signal is the teacher.
struct Zero;

impl Reward for Zero {
    fn score(&self, _sample: &Sample) -> Result<Score, String> {
        Ok(plain_score(0.0))
    }
}

/// 1 for a right answer, else 0.
struct MathAnswer;

impl Reward for MathAnswer {
    fn score(&self, sample: &Sample) -> Result<Score, String> {
        let right = is_right(&sample.completion, &reference_answer(&sample.reference));
        Ok(plain_score(if right { 1.0 } else { 0.0 }))
    }
}

/// The right answer: a JSON string, or else the text as it is.
fn reference_answer(reference: &str) -> String {
    serde_json::from_str::<String>(reference).unwrap_or_else(|_| reference.to_owned())
}

/// Whether `completion` ends in the answer `reference`.
pub fn is_right(completion: &str, reference: &str) -> bool {
    let Some(answer) = extract::answer(completion) else { return false };
    let (answer, reference) = (clean::clean(answer), clean::clean(reference));
    compare::equal(&answer, &reference) || compare::rounded(&answer) == compare::rounded(&reference)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(answer: &str, reference: &str) -> bool {
        is_right(&format!("so \\boxed{{{answer}}}."), reference)
    }

    #[test]
    fn answers() {
        for (answer, reference) in [
            ("204", "204"),
            ("\\frac{1}{2}", "0.5"),
            ("\\dfrac{4+2 \\sqrt{3}}{3}", "2.4880339"),
            ("50\\%", "0.5"),
            ("x=5", "5"),
            ("10{,}000", "10000"),
            ("2x - y + z = -2", "-2 x+y-z-2=0"),
            ("\\frac{1}{\\sqrt{a} \\sqrt{b}}", "\\frac{1}{a^{\\frac{1}{2}} b^{\\frac{1}{2}}}"),
            ("\\sqrt{2}K\\cosx", "\\sqrt{2} K \\cos{\\left(x \\right)}"),
            ("\\frac58", "0.625"),
            ("8.2890331 \\cdot 10^{142}", "\\frac{100!}{2^{50}}"),
            ("(x-1)(x+1)", "x^2-1"),
            (
                "\\begin{pmatrix} 1 & 1/2 \\\\ 3 & 4 \\end{pmatrix}",
                "\\begin{pmatrix} 1 & 0.5 \\\\ 3 & 4 \\end{pmatrix}",
            ),
            ("3 \\text{ cm}", "3"),
            ("90^\\circ", "90"),
        ] {
            assert!(right(answer, reference), "{answer} = {reference}");
            assert!(compare::equal(&clean::clean(reference), &clean::clean(answer)), "{reference} = {answer}");
        }
        for (answer, reference) in [
            ("204", "205"),
            ("", "0"),
            ("x", "y"),
            ("\\frac{1}{3}", "\\frac{1}{2}"),
            ("x^2", "2x"),
            ("1/0", "1"),
            ("\\sqrt{x^2}", "-x"),
        ] {
            assert!(!right(answer, reference), "{answer} != {reference}");
        }
    }

    #[test]
    fn hostile_text_ends_quickly() {
        let texts = [
            "9^{9^{9^{9^9}}}".to_owned(),
            "99999999!!!!".to_owned(),
            "(".repeat(100_000),
            "{".repeat(100_000),
            "|".repeat(50_000),
            "\\frac".repeat(20_000),
            "\\sqrt".repeat(20_000),
            "-".repeat(100_000) + "1",
            "x".repeat(1_000_000),
            "\\sin".repeat(20_000) + "x",
            "1+".repeat(100_000) + "1",
            "x^".repeat(3_000) + "x",
            "(1,".repeat(2_000),
            "=".repeat(5_000),
            "\\begin{pmatrix}".repeat(1_000),
            "[1".repeat(3_000) + &"]".repeat(3_000),
        ];
        for text in &texts {
            assert!(!compare::equal(&clean::clean(text), "7"), "{:.20}", text);
            assert!(!compare::equal(&clean::clean(text), "[[7,x]]"), "{:.20}", text);
            is_right(text, "7");
        }
        assert_eq!(extract::answer(&"\\boxed{".repeat(100_000)), None);
        assert_eq!(extract::answer(&"\\boxed{a{b}".repeat(50_000)), None);
    }

    /// The golden vectors, where this checkout has them beside it.
    #[test]
    fn golden() {
        let root = std::env::var("COSMOS_GOLDEN_DIR")
            .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/golden").to_owned());
        for (file, part) in [("math_real_completions", 0.99), ("math_answer_pairs", 0.97)] {
            let Ok(text) = std::fs::read_to_string(format!("{root}/graders/{file}.jsonl")) else {
                eprintln!("skipped: no {file} in {root}");
                continue;
            };
            let (mut count, mut wrong) = (0, Vec::new());
            for line in text.lines() {
                let case: serde_json::Value = serde_json::from_str(line).unwrap();
                let score = f64::from(u8::from(is_right(
                    case["completion"].as_str().unwrap(),
                    case["reference"].as_str().unwrap(),
                )));
                count += 1;
                if Some(score) != case["score"].as_f64() {
                    let completion = case["completion"].as_str().unwrap();
                    let tail: String =
                        completion.chars().rev().take(160).collect::<Vec<_>>().into_iter().rev().collect();
                    wrong.push(format!("{} expected {}: {tail:?} | {}", case["id"], case["score"], case["reference"]));
                }
            }
            let equal = 1.0 - wrong.len() as f64 / count as f64;
            println!("{file}: {} of {count} differ ({equal:.4} equal)\n{}", wrong.len(), wrong.join("\n"));
            assert!(equal >= part);
        }
    }
}
