//! Learning-rate factors of the original's scheduler.

use cosmos_engine::optim::{DecayType, Schedule, Warmup};
use cosmos_testkit::{golden, read_json};
use serde_json::Value;

fn schedule(case: &Value) -> Schedule {
    let number = |key: &str| case[key].as_f64().unwrap_or_else(|| panic!("`{key}` of {case}"));
    let warmup = &case["optm_warmup_steps"];
    let ratio = warmup.as_f64().filter(|w| warmup.is_f64() && *w <= 1.0);
    Schedule {
        total_steps: number("total_steps") as u64,
        warmup: ratio.map_or_else(|| Warmup::Steps(warmup.as_f64().expect("warm-up") as u64), Warmup::Ratio),
        decay_ratio: case["optm_decay_ratio"].as_f64(),
        decay_type: match case["optm_decay_type"].as_str() {
            Some("linear") => DecayType::Linear,
            Some("sqrt") => DecayType::Sqrt,
            Some("cosine") => DecayType::Cosine,
            None | Some("none") => DecayType::None,
            Some(other) => panic!("decay type `{other}`"),
        },
        min_lr_factor: number("optm_min_lr_factor"),
        warmup_start_factor: number("optm_warmup_start_factor"),
    }
}

#[test]
fn golden_lr_schedules() {
    let Some(path) = golden("lr_schedules.json") else { return };
    let cases = read_json(&path);
    let cases = cases.as_array().expect("a list of schedules");
    assert!(!cases.is_empty());
    for (index, case) in cases.iter().enumerate() {
        let schedule = schedule(case);
        schedule.check().expect("a schedule that makes sense");
        for (step, expected) in case["factors"].as_array().expect("factors").iter().enumerate() {
            let (got, expected) = (schedule.factor(step as u64), expected.as_f64().expect("a number"));
            assert!(
                (got - expected).abs() <= 1e-12,
                "schedule {index}, step {step}: {got} where {expected} is expected"
            );
        }
    }
}
