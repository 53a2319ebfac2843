//! Panics as errors of this program.
//!
//! Some libraries panic on broken files; the crates below catch that and make an error of it. The runtime's own report
//! would stand above that error and look like a crash, so it is only logged. A panic that nobody catches is a bug of
//! ours and says so. With `RUST_BACKTRACE` set everything is printed as usual.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use crate::failure::{Exit, Failure};

/// What the last panic said, and where.
static LAST: Mutex<String> = Mutex::new(String::new());

/// Runs `work`; a panic in it is a failure that asks for a report.
pub fn caught(work: impl FnOnce() -> Result<Exit, Failure>) -> Result<Exit, Failure> {
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        std::panic::set_hook(Box::new(|panic| {
            tracing::debug!("{panic}");
            *LAST.lock().unwrap_or_else(PoisonError::into_inner) = panic.to_string();
        }));
    }
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let last = std::mem::take(&mut *LAST.lock().unwrap_or_else(PoisonError::into_inner));
        Err(Failure::failed(format!("a bug in cosmos-host: {last}"))
            .with_hint("please report it with the command and its input; `RUST_BACKTRACE=1` shows where it happened"))
    })
}

#[cfg(test)]
mod tests {
    use super::caught;
    use crate::failure::Exit;

    #[test]
    fn a_panic_is_a_failure_that_says_where() {
        let failure = caught(|| panic!("seven is odd")).unwrap_err();
        assert_eq!(failure.exit(), Exit::Failed);
        assert!(failure.notices()[0].message.starts_with("a bug in cosmos-host"));
    }
}
