//! The grader of the numbers game: any completion and reference are judged, soon.
#![no_main]

use countdown::arith;
use countdown::grade::{Reference, is_right};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|pair: (&str, &str)| {
    let (completion, reference) = pair;
    if let Some(value) = arith::value(completion) {
        assert!(value.numer().bits() <= 4096 && value.denom().bits() <= 4096);
    }
    let reference =
        Reference::parse(reference).unwrap_or(Reference { nums: vec![1, 2, 3], target: 6 });
    let _ = is_right(completion, &reference);
    let _ = is_right(&format!("<answer>{completion}={}</answer>", reference.target), &reference);
});
