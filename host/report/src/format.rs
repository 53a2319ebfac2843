//! Numbers as people read them.

/// A number with about four significant digits: `12,345`, `3.142`, `0.0012`, `1.2e-7`.
pub fn format_number(value: f64) -> String {
    let magnitude = value.abs();
    if !value.is_finite() {
        return if value.is_nan() {
            "nan".into()
        } else if value > 0.0 {
            "inf".into()
        } else {
            "-inf".into()
        };
    }
    if magnitude == 0.0 {
        "0".into()
    } else if !(1e-4..1e9).contains(&magnitude) {
        format!("{value:.2e}")
    } else if magnitude >= 1000.0 {
        let sign = if value < 0.0 { "-" } else { "" };
        // Below 1e9, so the rounded magnitude fits.
        format!("{sign}{}", format_count(magnitude.round() as u64))
    } else if magnitude >= 100.0 {
        format!("{value:.1}")
    } else if magnitude >= 10.0 {
        format!("{value:.2}")
    } else if magnitude >= 0.1 {
        format!("{value:.3}")
    } else {
        format!("{value:.4}")
    }
}

/// A count with thousands separated: `1,234,567`.
pub fn format_count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A fraction as a percentage: `0.123` is `12.3 %`.
pub fn format_percent(fraction: f64) -> String {
    if fraction.is_finite() { format!("{:.1} %", fraction * 100.0) } else { format_number(fraction) }
}

/// A duration in seconds: `0.8s`, `42s`, `3m05s`, `2h07m`, `3d04h`.
pub fn format_seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds.round() as u64;
    let (minutes, hours, days) = (whole / 60, whole / 3600, whole / 86_400);
    if minutes == 0 {
        format!("{whole}s")
    } else if hours == 0 {
        format!("{minutes}m{:02}s", whole % 60)
    } else if days == 0 {
        format!("{hours}h{:02}m", minutes % 60)
    } else {
        format!("{days}d{:02}h", hours % 24)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let cases = [
            (0.0, "0"),
            (1234567.0, "1,234,567"),
            (-1234.4, "-1,234"),
            (2.71234, "2.712"),
            (0.00123, "0.0012"),
            (1.2e-7, "1.20e-7"),
            (5e12, "5.00e12"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ];
        for (value, text) in cases {
            assert_eq!(format_number(value), text);
        }
    }

    #[test]
    fn counts_durations_and_percentages_read_well() {
        assert_eq!([0, 999, 1000, 12_345_678].map(format_count), ["0", "999", "1,000", "12,345,678"]);
        let seconds = [0.84, 9.99, 42.4, 59.7, 185.0, 7620.0, 273_600.0, f64::INFINITY];
        assert_eq!(seconds.map(format_seconds), ["0.8s", "10s", "42s", "1m00s", "3m05s", "2h07m", "3d04h", "?"]);
        assert_eq!(format_percent(0.1234), "12.3 %");
    }
}
