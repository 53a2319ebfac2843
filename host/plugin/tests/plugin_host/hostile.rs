//! Every guest here misbehaves on a completion that starts with `!`, and only that sample may be lost.

use std::time::{Duration, Instant};

use cosmos_plugin::{Capabilities, Grant, Limits, PluginError};

use crate::guests::{Bench, component, outcomes, quick, reward_module, samples, wit};

/// What a machine that is busy with other tests may add to a limit on time.
const BUSY: Duration = Duration::from_secs(30);

/// The guilty one of three fails for `reason`, its neighbours and the next batch do not.
fn only_the_guilty_fails(guest: &str, limits: Limits, reason: &str) {
    only_the_guilty_of_granted_fails(guest, &[], limits, "!bad", reason);
}

fn only_the_guilty_of_granted_fails(guest: &str, grants: &[Grant], limits: Limits, bad: &str, reason: &str) {
    let bench = Bench::new();
    let in_time = reason.contains("took longer");
    // Only where the deadline itself is tried may it be short: a busy machine must not decide.
    let patient = Limits { call_ms_max: 60_000, item_ms_max: 60_000, init_ms_max: 60_000, ..limits.clone() };
    let limits = if in_time { limits } else { patient };
    // The batch, then each of its items with a start of its own: what the limits allow at most.
    let ms_max = limits.call_ms_max + 3 * (limits.item_ms_max + limits.init_ms_max);
    let mut reward = bench.load_with(guest, grants, limits).unwrap().reward("r", "").unwrap();
    let started = Instant::now();
    let results = outcomes(&mut reward, &["a", bad, "ccc"]);
    assert!(started.elapsed() < Duration::from_millis(ms_max + ms_max / 10) + BUSY, "{guest}: {:?}", started.elapsed());
    assert_eq!(results[0], Ok(1.0), "{guest}");
    assert_eq!(results[2], Ok(3.0), "{guest}");
    let found = results[1].as_ref().unwrap_err();
    assert!(found.contains(reason), "{guest}: {found}");
    assert_eq!(outcomes(&mut reward, &["after"]), [Ok(5.0)], "{guest}");
}

#[test]
fn endless_loop() {
    let started = Instant::now();
    only_the_guilty_fails("endless_loop", quick(), "took longer than 500 ms");
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_reward_keeps_its_deadline_when_plugin_and_host_are_gone() {
    let mut reward = Bench::new().load_with("endless_loop", &[], quick()).unwrap().reward("r", "").unwrap();
    let results = outcomes(&mut reward, &["!", "aa"]);
    assert!(results[0].as_ref().unwrap_err().contains("took longer than 500 ms"), "{results:?}");
    assert_eq!(results[1], Ok(2.0));
}

#[test]
fn endless_host_calls() {
    only_the_guilty_of_granted_fails("host_call_loop", &[Grant::Log], quick(), "!", "took longer than 500 ms");
}

#[test]
fn endless_waiting_without_sleep() {
    // Asking the clock without waiting, reading an input that has ended, yielding.
    for completion in ["p", "q", "y"] {
        let mut reward = Bench::new().reward("wasi", quick());
        let started = Instant::now();
        let results = outcomes(&mut reward, &[completion]);
        assert!(results[0].as_ref().unwrap_err().contains("took longer than 500 ms"), "{completion}: {results:?}");
        assert!(started.elapsed() < Duration::from_secs(2) + BUSY, "{completion}");
        assert_eq!(outcomes(&mut reward, &["environment"]), [Ok(0.0)], "{completion}");
    }
}

#[test]
fn memory_bomb() {
    only_the_guilty_fails("memory_bomb", quick(), "out of memory");
    only_the_guilty_fails(
        "memory_bomb",
        Limits { memory_bytes_max: 1 << 20, ..quick() },
        "`memory_bytes_max` = 1048576",
    );
}

#[test]
fn table_bomb() {
    only_the_guilty_fails("table_bomb", quick(), "`table_elements_max` = 200000");
    only_the_guilty_fails("many_tables", quick(), "`table_elements_max` = 200000");
}

#[test]
fn deep_recursion() {
    only_the_guilty_fails("deep_recursion", quick(), "`stack_bytes_max` = 1048576");
    only_the_guilty_fails("deep_recursion", Limits { stack_bytes_max: 128 << 10, ..quick() }, "call stack exhausted");
}

#[test]
fn panic() {
    only_the_guilty_fails("panic", quick(), "a panic, an abort or unreachable code, in `score`");
}

#[test]
fn pointers_outside_memory() {
    only_the_guilty_fails("out_of_bounds", quick(), "list");
}

#[test]
fn invalid_utf8() {
    only_the_guilty_fails("invalid_utf8", quick(), "utf-8");
}

#[test]
fn wrong_list_length() {
    only_the_guilty_fails("wrong_length", quick(), "returned 0 results for 1 item");
}

#[test]
fn every_wrong_number_of_results() {
    for (bad, reason) in [
        ("-", "returned 0 results for 1 item"),
        ("+", "returned 2 results for 1 item"),
        ("0", "returned 0 results for 1 item"),
        ("k", "returned 1000 results for 1 item"),
        ("g", "list"),
    ] {
        only_the_guilty_of_granted_fails("list_lengths", &[], quick(), bad, reason);
    }
}

#[test]
fn text_and_numbers_that_are_multiplied_for_the_host() {
    only_the_guilty_fails("amplifier", quick(), "`result_bytes_max` = 16777216");
    only_the_guilty_fails("metrics_bomb", quick(), "`result_bytes_max` = 16777216");
}

#[test]
fn memory_for_the_host_that_is_not_there_or_never_comes() {
    let long = "!".repeat(2000);
    only_the_guilty_of_granted_fails("realloc_wild", &[], quick(), &long, "realloc return");
    only_the_guilty_of_granted_fails("realloc_loop", &[], quick(), &long, "took longer than 500 ms");
}

#[test]
fn calling_the_host_while_the_host_calls() {
    let long = "!".repeat(2000);
    only_the_guilty_of_granted_fails("reentrant", &[Grant::Log], quick(), &long, "cannot leave component instance");
}

#[test]
fn trouble_after_a_good_answer() {
    only_the_guilty_fails("late_trap", quick(), "a panic, an abort");
    only_the_guilty_fails("late_loop", quick(), "took longer than 500 ms");
}

#[test]
fn logging_what_is_no_text() {
    only_the_guilty_of_granted_fails("log_not_utf8", &[Grant::Log], quick(), "!", "utf-8");
}

#[test]
fn scores_that_are_no_numbers_fail_without_a_retry() {
    let mut reward = Bench::new().reward("odd_scores", quick());
    let results = outcomes(&mut reward, &["n", "aa", "i", "h"]);
    assert_eq!(results[0], Err("the score is NaN".into()));
    assert_eq!(results[1], Ok(2.0));
    assert_eq!(results[2], Err("the score is inf".into()));
    assert!(results[3].as_ref().unwrap_err().contains("`score_abs_max` = 1e6"), "{:?}", results[3]);
}

#[test]
fn a_sample_error_is_the_plugins_own_word_escaped() {
    let mut reward = Bench::new().reward("well_behaved", quick());
    assert_eq!(outcomes(&mut reward, &["?", "bb", ""]), [Err("no\\nidea".into()), Ok(2.0), Ok(0.0)]);
}

#[test]
fn a_poisoned_instance_is_replaced() {
    let mut reward = Bench::new().reward("poisoned", quick());
    assert_eq!(outcomes(&mut reward, &["!", "bb"]), [Ok(1.0), Ok(2.0)]);
    // The instance traps on everything now; fresh ones do not.
    assert_eq!(outcomes(&mut reward, &["a", "bb"]), [Ok(1.0), Ok(2.0)]);
    assert_eq!(outcomes(&mut reward, &["a"]), [Ok(1.0)]);
}

#[test]
fn instances_are_kept_and_recycled() {
    let mut reward = Bench::new().reward("counter", Limits { calls_per_instance_max: 3, workers: 1, ..quick() });
    // Opening the reward was the first call of its instance, though not one that the guest saw.
    let counted: Vec<f64> = (0..5).map(|_| outcomes(&mut reward, &["x"])[0].clone().unwrap()).collect();
    assert_eq!(counted, [1.0, 2.0, 1.0, 2.0, 3.0]);
}

#[test]
fn many_samples_go_in_batches_of_64_and_one_mebibyte() {
    let mut reward = Bench::new().reward("counter", Limits { workers: 1, ..quick() });
    let many = vec!["x"; 1025];
    let calls: Vec<f64> = outcomes(&mut reward, &many).into_iter().map(Result::unwrap).collect();
    assert_eq!((calls[0], calls[63], calls[64], calls[1023], calls[1024]), (1.0, 1.0, 2.0, 16.0, 17.0));

    let long = "x".repeat(400 << 10);
    let too_long = "x".repeat(2 << 20);
    let results = outcomes(&mut reward, &[&long, &long, &too_long, &long, "x"]);
    assert_eq!((&results[0], &results[1]), (&Ok(18.0), &Ok(18.0)));
    assert!(results[2].as_ref().unwrap_err().contains("`batch_bytes_max` = 1048576"));
    assert_eq!((&results[3], &results[4]), (&Ok(19.0), &Ok(19.0)));
    assert_eq!(reward.score(&[]).unwrap(), []);
    assert!(reward.memory_bytes().unwrap().unwrap() >= 128 << 10);
}

#[test]
fn failures_before_the_first_sample_are_errors() {
    let bench = Bench::new();
    let open = |guest: &str| bench.load_with(guest, &[], quick()).unwrap().reward("r", "{\"a\": 1}").err().unwrap();
    for (guest, reason) in [
        ("trap_in_init", "a panic, an abort"),
        ("loop_in_init", "took longer than 2000 ms"),
        ("error_in_init", "{\"a\": 1}"),
    ] {
        let error = open(guest);
        assert!(matches!(error, PluginError::Call { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
        assert!(error.to_string().contains("plugin `hostile` failed in `reward.init` of `r`"), "{error}");
    }
    let error = bench.load_with("loop_in_start", &[], quick()).unwrap_err();
    assert!(error.to_string().contains("while it was started: took longer than 2000 ms"), "{error}");
    let error = bench.load_with("trap_in_start", &[], quick()).unwrap_err();
    assert!(error.to_string().contains("while it was started: trapped: a panic"), "{error}");
    let error = bench.load_with("grow_in_start", &[], quick()).unwrap_err();
    assert!(error.to_string().contains("out of memory: 268566528 bytes wanted"), "{error}");
    let error = bench.load_with("well_behaved", &[], Limits { memory_bytes_max: 1 << 16, ..quick() }).unwrap_err();
    assert!(error.to_string().contains("out of memory"), "{error}");
}

#[test]
fn a_description_that_is_no_text_is_refused() {
    let bench = Bench::new();
    let named = |name: &str| {
        let module = reward_module("well_behaved").replacen("\"hostile1.0", &format!("\"{name}1.0"), 1);
        let path = bench.file("p", &component(&module, &wit(), "reward-plugin"));
        bench.host.load(&path, &[], quick(), Capabilities::default()).unwrap_err().to_string()
    };
    let error = named("\\ff\\feostile");
    assert!(error.contains("failed in `metadata.describe`") && error.contains("utf-8"), "{error}");
    let error = named("\\1b[2Jabc");
    assert!(error.contains("describes itself wrongly: its name has the character '\\u{1b}'"), "{error}");
}

#[test]
fn offers_and_settings_are_checked_before_the_guest_runs() {
    let plugin = Bench::new().load_with("well_behaved", &[], quick()).unwrap();
    assert_eq!(plugin.info().name, "hostile");
    assert_eq!(plugin.info().rewards[0].role, "train");
    assert_eq!(plugin.limits().memory_bytes_max, 64 << 20);
    let error = plugin.reward("s", "").err().unwrap();
    assert!(error.hint().unwrap().contains("`r` (train)"), "{error}");
    let error = plugin.dataset("d", "").err().unwrap();
    assert!(error.hint().unwrap().contains("no datasets at all"), "{error}");
    for settings in ["[", "3", "{\"a\": }"] {
        let error = plugin.reward("r", settings).err().unwrap();
        assert!(matches!(error, PluginError::BadSettings { .. }), "{error}");
    }
}

#[test]
fn rewards_of_one_plugin_run_side_by_side() {
    let plugin = Bench::new().load_with("endless_loop", &[], quick()).unwrap();
    std::thread::scope(|scope| {
        for number in 0..4 {
            let plugin = &plugin;
            scope.spawn(move || {
                let mut reward = plugin.reward("r", "").unwrap();
                let guilty = number == 0;
                let results = reward.score(&samples(&[if guilty { "!" } else { "aa" }])).unwrap();
                assert_eq!(results[0].is_err(), guilty);
            });
        }
    });
}
