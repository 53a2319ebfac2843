//! A process that ends with the launcher that started it.
//!
//! Its standard input is a pipe whose other end only the launcher has: the end of input means that the launcher wants it to
//! stop, or is dead, however it died. No signal can say that as surely.

use std::io::Read;
use std::time::Duration;

use signal_hook::consts::SIGTERM;

/// Set for processes that a launcher has started, to the milliseconds that they may take to stop.
pub const LAUNCHED_VARIABLE: &str = "COSMOS_LAUNCHED_STOP_MS";

/// Watches the launcher, if there is one: when it closes the pipe, this process gets SIGTERM, and is ended when that has
/// not helped in time.
pub fn end_with_the_launcher() {
    let Some(stop_ms) = std::env::var(LAUNCHED_VARIABLE).ok().and_then(|text| text.parse::<u64>().ok()) else { return };
    let watch = move || {
        let mut rest = [0u8; 64];
        loop {
            match std::io::stdin().read(&mut rest) {
                Ok(0) => break,
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => break,
                _ => {}
            }
        }
        tracing::info!("the launcher asks to stop");
        if let Err(error) = signal_hook::low_level::raise(SIGTERM) {
            tracing::warn!("cannot ask this process to stop: {error}");
        }
        std::thread::sleep(Duration::from_millis(stop_ms));
        tracing::error!("this process did not stop within {stop_ms} ms and ends now");
        std::process::exit(1);
    };
    if let Err(error) = std::thread::Builder::new().name("parent".into()).spawn(watch) {
        tracing::warn!("cannot watch the launcher: {error}");
    }
}
