//! A trap in words that help: what the guest did, in which of its functions, and the last thing it said.

use wasmtime::component::ResourceTableError;
use wasmtime::{Trap, WasmBacktrace};

use crate::sandbox::GuestState;
use crate::voice::{REASON_BYTES_MAX, lock, one_line};

/// Functions named for one trap.
const FRAMES_MAX: usize = 4;
/// One function's name.
const NAME_BYTES_MAX: usize = 96;
/// A mangled name; longer ones are shown as they are.
const MANGLED_BYTES_MAX: usize = 1024;

/// The guest's time is up.
#[derive(Debug, thiserror::Error)]
#[error("the deadline was reached")]
pub(crate) struct DeadlineReached;

pub(crate) fn explain(error: &wasmtime::Error, state: &GuestState) -> String {
    let limits = &state.limits;
    let trap = error.downcast_ref::<Trap>();
    let what = if error.downcast_ref::<DeadlineReached>().is_some() {
        format!("took longer than {} ms", state.clock.limit().as_millis())
    } else if let Some(denied) = &state.meter.denied {
        denied.clone()
    } else if let Some(exit) = error.downcast_ref::<wasmtime_wasi::I32Exit>() {
        format!("ended itself with exit code {}", exit.0)
    } else if trap == Some(&Trap::StackOverflow) {
        format!("call stack exhausted, `stack_bytes_max` = {}: endless recursion?", limits.stack_bytes_max)
    } else if trap == Some(&Trap::UnreachableCodeReached) {
        "trapped: a panic, an abort or unreachable code".into()
    } else if let Some(trap) = trap {
        format!("trapped: {trap}")
    } else if matches!(error.downcast_ref::<ResourceTableError>(), Some(ResourceTableError::Full)) {
        "holds too many open handles".into()
    } else {
        let text = format!("{error:#}");
        if text.contains("fuel allocated for hostcalls") {
            format!("gave the host more data than `result_bytes_max` = {}", limits.result_bytes_max)
        } else if error.downcast_ref::<WasmBacktrace>().is_some() {
            // The chain's text repeats the whole backtrace.
            error.root_cause().to_string()
        } else {
            text
        }
    };
    let mut reason = one_line(&what, REASON_BYTES_MAX / 2);
    // The words before the place: whoever cuts the reason should cut names of functions.
    let words = lock(&state.voice).last_words();
    if let Some(words) = &words {
        reason.push_str(&format!("; its last words: {words}"));
    }
    if let Some(place) = error.downcast_ref::<WasmBacktrace>().and_then(place) {
        reason.push_str(if words.is_some() { "; " } else { ", " });
        reason.push_str(&place);
    }
    one_line(&reason, REASON_BYTES_MAX)
}

/// The guest's functions from the innermost outwards, without the machinery of a panic.
fn place(backtrace: &WasmBacktrace) -> Option<String> {
    let names: Vec<String> = backtrace
        .frames()
        .iter()
        .map(|frame| match frame.func_name() {
            Some(name) => one_line(&readable(name), NAME_BYTES_MAX),
            None => format!("function {}", frame.func_index()),
        })
        .collect();
    let shown = outward(&names)?;
    let mut text = format!("in `{}`", shown[0]);
    if shown.len() > 1 {
        let callers: Vec<_> = shown[1..].iter().map(|name| format!("`{name}`")).collect();
        text.push_str(&format!(" called by {}", callers.join(", ")));
    }
    Some(text)
}

/// A Rust name without its mangling and its hash; any other as it is. Names are the guest's, and a mangled one can
/// stand for a much longer one.
fn readable(name: &str) -> String {
    if name.len() > MANGLED_BYTES_MAX {
        return name[..name.floor_char_boundary(MANGLED_BYTES_MAX)].into();
    }
    format!("{:#}", rustc_demangle::demangle(name))
}

/// What a panic runs through before it traps.
const MACHINERY: &[&str] = &[
    "core::panicking::",
    "core::option::",
    "core::result::",
    "core::slice::index::",
    "core::str::slice_error_fail",
    "std::panicking::",
    "std::process::",
    "std::rt::",
    "std::sys",
    "std::alloc::",
    "alloc::alloc::",
    "alloc::raw_vec::",
    "panic_abort::",
    "rust_panic",
    "rust_begin_unwind",
    "__rust",
    "__rg_",
    "__assert_fail",
];

fn outward(names: &[String]) -> Option<&[String]> {
    let machinery = |name: &String| {
        let name = name.trim_start_matches('<');
        name == "abort" || name == "_abort" || MACHINERY.iter().any(|start| name.starts_with(start))
    };
    let first = names.iter().position(|name| !machinery(name)).unwrap_or(0);
    let shown = names.get(first..names.len().min(first + FRAMES_MAX))?;
    (!shown.is_empty()).then_some(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_readable_and_start_outside_the_panic() {
        let symbols = [
            "abort",
            "_ZN4core9panicking9panic_fmt17h0123456789abcdefE",
            "_ZN9countdown5grade8is_right17h0123456789abcdefE",
            "score",
        ];
        let names: Vec<String> = symbols.iter().map(|name| readable(name)).collect();
        assert_eq!(outward(&names).unwrap(), ["countdown::grade::is_right", "score"]);
        assert_eq!(outward(&names[..2]).unwrap().len(), 2);
        assert_eq!(outward(&[]), None);
        assert_eq!(readable(&"_RNv".repeat(9999)).len(), MANGLED_BYTES_MAX);
        let deep = vec!["f".to_string(); 20];
        assert_eq!(outward(&deep).unwrap().len(), FRAMES_MAX);
    }
}
