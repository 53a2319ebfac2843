//! The grader of mathematical answers: any answer and reference are judged, soon, and the same way round.
#![no_main]

use deepmath::{clean, compare, is_right};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|pair: (&str, &str)| {
    let (answer, reference) = pair;
    let (cleaned, right) = (clean::clean(answer), clean::clean(reference));
    assert!(compare::equal(&cleaned, &cleaned), "an answer equals itself: {cleaned:?}");
    let _ = compare::equal(&cleaned, &right);
    let _ = compare::rounded(&cleaned);
    let _ = is_right(answer, reference);
    let _ = is_right(&format!("\\boxed{{{answer}}}"), reference);
});
