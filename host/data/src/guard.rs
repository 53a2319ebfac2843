//! Foreign readers on foreign bytes.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `read`, a call into a library that parses bytes from outside, and turns a panic in it into its error text.
///
/// The Arrow, parquet and tokenizer readers check most of what they read, but still index and slice by numbers from the
/// file in places. The values they were given are dropped with the error, so no half-changed state is seen afterwards.
pub(crate) fn guarded<T, E: std::fmt::Display>(read: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            Err(format!("its reader gave up: {text}"))
        }
    }
}
