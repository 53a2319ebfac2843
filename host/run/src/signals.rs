//! SIGTERM, SIGINT and the configured signals ask the run to save and leave with exit code 75.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2};

use crate::error::{Result, RunError};

/// While it lives, SIGTERM and SIGINT end the process, as they do by themselves everywhere but in the first process of a
/// container: the system keeps from that one what nobody listens to.
pub struct EndAtOnce(Arc<AtomicBool>);

impl EndAtOnce {
    /// Listens.
    pub fn listen() -> Result<Self> {
        let lives = Arc::new(AtomicBool::new(true));
        for signal in [SIGTERM, SIGINT] {
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&lives))
                .map_err(|e| RunError::config("", format!("cannot listen to signal {signal}: {e}"), ""))?;
        }
        Ok(Self(lives))
    }
}

impl Drop for EndAtOnce {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Set once somebody asked the run to leave.
#[derive(Clone, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Listens to SIGTERM, SIGINT and `names` (`train.signal_to_handle`). A second SIGINT ends the process at once.
    pub fn listen(names: &[String]) -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        let register = |signal: i32| {
            if signal == SIGINT {
                signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&flag))?;
            }
            signal_hook::flag::register(signal, Arc::clone(&flag))
        };
        let mut signals = vec![SIGTERM, SIGINT, SIGUSR1];
        for name in names {
            match name.as_str() {
                "SIGTERM" | "SIGINT" | "SIGUSR1" => {}
                "SIGUSR2" => signals.push(SIGUSR2),
                other => {
                    return Err(RunError::config(
                        "",
                        format!("`train.signal_to_handle` names `{other}`, which cannot be handled"),
                        "use SIGTERM, SIGINT, SIGUSR1 or SIGUSR2",
                    ));
                }
            }
        }
        for signal in signals {
            register(signal).map_err(|e| RunError::config("", format!("cannot listen to signal {signal}: {e}"), ""))?;
        }
        Ok(Self(flag))
    }

    /// Asks the run to leave.
    #[cfg(test)]
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the run shall leave.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
