//! Logs on standard error.

use std::io::{IsTerminal, Write};

use tracing_subscriber::EnvFilter;

use crate::failure::Failure;

/// Whoever reads the log may be gone: a launcher that was killed, a closed terminal. That must not end a run that has still to
/// be saved, so what cannot be written is dropped.
struct Forgiving(std::io::Stderr);

impl Write for Forgiving {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let _ = self.0.flush();
        Ok(())
    }
}

/// Starts logging with `--log-level`, else `COSMOS_LOG_LEVEL`, else `info`. A bare level is for our own crates; the
/// libraries below stay at `warn`.
pub fn start(asked: Option<&str>) -> Result<(), Failure> {
    let from_environment = std::env::var("COSMOS_LOG_LEVEL").ok().filter(|v| !v.trim().is_empty());
    let (origin, level) = match (asked, from_environment) {
        (Some(level), _) => ("--log-level", level.to_owned()),
        (None, Some(level)) => ("COSMOS_LOG_LEVEL", level),
        (None, None) => ("--log-level", "info".to_owned()),
    };
    let filter = filter(&level).ok_or_else(|| {
        Failure::usage(format!("`{level}` is no log level (from {origin})"))
            .with_hint("use error, warn, info, debug or trace, or a list such as `info,cosmos_engine=debug`")
    })?;
    let color = std::io::stderr().is_terminal()
        && anstream::AutoStream::choice(&std::io::stderr()) != anstream::ColorChoice::Never;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Forgiving(std::io::stderr()))
        .with_ansi(color)
        .with_target(level.contains("debug") || level.contains("trace"))
        .finish();
    tracing::subscriber::set_global_default(subscriber)
        .map_err(|e| Failure::failed(format!("cannot start logging: {e}")))
}

fn filter(level: &str) -> Option<EnvFilter> {
    let level = level.trim().to_ascii_lowercase();
    // Python's names, which the original's variable takes.
    let level = match level.as_str() {
        "warning" => "warn",
        "critical" | "fatal" => "error",
        other => other,
    };
    // A bare word that is no level would be taken for the name of a crate.
    let parts: Vec<String> = level.split(',').map(|part| directive(part.trim())).collect::<Option<_>>()?;
    EnvFilter::try_new(parts.join(",")).ok()
}

fn directive(part: &str) -> Option<String> {
    match part {
        "off" => Some("off".to_owned()),
        "error" => Some("error".to_owned()),
        "warn" | "info" | "debug" | "trace" => Some(format!("warn,cosmos={part}")),
        other => other.contains('=').then(|| other.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::filter;

    #[test]
    fn a_bare_level_is_for_our_own_crates() {
        assert_eq!(filter("DEBUG").unwrap().to_string(), "cosmos=debug,warn");
        assert_eq!(filter("info,cosmos_engine=trace").unwrap().to_string(), "cosmos_engine=trace,cosmos=info,warn");
    }

    #[test]
    fn a_word_that_is_no_level_is_refused() {
        assert!(filter("loud").is_none());
        assert!(filter("").is_none());
        assert!(filter("cosmos=loud").is_none());
    }
}
