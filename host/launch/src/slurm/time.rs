//! Time limits as people and Slurm write them.

use crate::error::{LaunchError, Result};

const HOURS_MAX: f64 = 24.0 * 365.0;

/// Hours with decimals, as `[D-]HH:MM:SS`; rounded up to whole minutes, as Slurm does.
pub fn hours(hours: f64) -> Result<String> {
    if !(hours > 0.0 && hours <= HOURS_MAX) {
        return Err(LaunchError::usage(
            format!("`--duration {hours}` is no number of hours above 0 and up to {HOURS_MAX}"),
            "as in `--duration 1.5`",
        ));
    }
    let minutes = (hours * 60.0 - 1e-9).ceil().max(1.0) as u64;
    Ok(format!("{:02}:{:02}:00", minutes / 60, minutes % 60))
}

/// Seconds of a time as Slurm reads it: `MM`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`.
pub fn seconds_of(text: &str) -> Result<u64> {
    let wrong = || {
        LaunchError::usage(
            format!("`{text}` is no time as Slurm reads it"),
            "as in `90` (minutes), `04:00:00` or `1-12:00:00`",
        )
    };
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (Some(number(days).ok_or_else(wrong)?), rest),
        None => (None, text),
    };
    let parts: Option<Vec<u64>> = rest.split(':').map(number).collect();
    let (h, m, s) = match (days.is_some(), parts.ok_or_else(wrong)?.as_slice()) {
        (true, [h]) => (*h, 0, 0),
        (true, [h, m]) => (*h, *m, 0),
        (false, [m]) => (0, *m, 0),
        (false, [m, s]) => (0, *m, *s),
        (_, [h, m, s]) => (*h, *m, *s),
        _ => return Err(wrong()),
    };
    let seconds = ((days.unwrap_or(0) * 24 + h) * 60 + m) * 60 + s;
    if seconds == 0 { Err(wrong()) } else { Ok(seconds) }
}

/// Small enough that no sum of them overflows.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.len() <= 6 && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}
