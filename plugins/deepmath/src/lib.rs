//! The DeepMath recipe: training prompts with no reward (the teacher is the signal), validation on AIME-style problems
//! with a grader for mathematical answers.
//!
//! The grader follows the rules that such recipes use (extract, clean, compare), but no text of the model is ever run as
//! code: [`latex`] reads a bounded subset of LaTeX and [`eval`] compares values at fixed points.

pub mod clean;
pub mod collection;
pub mod compare;
pub mod eval;
pub mod extract;
pub mod latex;
pub mod rows;

use cosmos_plugin_sdk::{
    Dataset, DatasetRole, Description, Plugin, Reward, RewardRole, Sample, Score, Settings, export_plugin,
};

/// The plugin.
pub struct DeepMath;

export_plugin!(DeepMath);

impl Plugin for DeepMath {
    fn describe() -> Description {
        Description::new(
            "deepmath",
            env!("CARGO_PKG_VERSION"),
            "DeepMath training prompts, AIME-style validation, a grader for mathematical answers",
        )
        .dataset("train", DatasetRole::Train)
        .dataset("validation", DatasetRole::Validation)
        .reward("zero", RewardRole::Train)
        .reward("math", RewardRole::Validation)
        .settings_schema(include_str!("../schema.json"))
        .wants("table")
        .wants("chat-template")
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
        Ok(Score::new(0.0))
    }
}

/// 1 for a right answer, else 0.
struct MathAnswer;

impl Reward for MathAnswer {
    fn score(&self, sample: &Sample) -> Result<Score, String> {
        let right = is_right(&sample.completion, &sample.reference_text());
        Ok(Score::new(if right { 1.0 } else { 0.0 }))
    }
}

/// Whether `completion` ends in the answer `reference`.
pub fn is_right(completion: &str, reference: &str) -> bool {
    let Some(raw) = extract::answer(completion) else { return false };
    let (answer, right) = (clean::clean(raw), clean::clean(reference));
    compare::equal(&answer, &right)
        || compare::rounded(&answer) == compare::rounded(&right)
        || collection::equal(raw, reference)
        || compare::same_equation(&clean::clean_whole(raw), &clean::clean_whole(reference))
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
            "\\text{".repeat(170_000),
            "\\text{".repeat(90_000) + "\n" + &"\\text{".repeat(90_000) + "}",
            "^{-1".repeat(250_000),
            "1\\times10^".repeat(100_000),
            "10^{".repeat(250_000),
            "{1,".repeat(1_300) + &"}".repeat(1_300),
            "\\{(1,[2,".repeat(400),
            "(1,2)\\cup".repeat(30) + "(3,4)",
            "a=".repeat(2_000) + "1",
            "1,".repeat(500_000),
            "9".repeat(1_000_000),
            "0.".to_owned() + &"3".repeat(1_000_000),
            "x_{".repeat(1_300) + &"}".repeat(1_300),
            "\\binom{999999}{5}".repeat(200),
            "250!".repeat(900),
            "\\sqrt[64]{9999999999}".repeat(150),
            (0..700).map(|n| format!("x_{{{n}}}+")).collect::<String>() + "1",
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
