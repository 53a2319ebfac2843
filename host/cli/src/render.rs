//! Errors as the user sees them: `error: …`, the place with its source line, the causes, and a `hint: …` line.

use std::fmt::Write as _;
use std::io::Write as _;

use anstyle::{AnsiColor, Style};

use crate::failure::{Excerpt, Notice};

const ERROR: Style = AnsiColor::Red.on_default().bold();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default().bold();
const FRAME: Style = AnsiColor::Blue.on_default().bold();

/// Longer source lines are cut: wrapped, the mark would stand under the wrong text.
const EXCERPT_CHARS_MAX: usize = 160;

/// Prints notices on standard error.
pub fn notices<'a>(notices: impl IntoIterator<Item = &'a Notice>) {
    let text: String = notices.into_iter().map(text).collect();
    // Nothing is left to tell anyone when standard error is gone.
    let _ = anstream::stderr().write_all(text.as_bytes());
}

fn text(notice: &Notice) -> String {
    let (label, style) = if notice.is_warning { ("warning", WARNING) } else { ("error", ERROR) };
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{style}{label}{style:#}: {}", notice.message);
    if let Some(place) = &notice.place {
        let margin = " ".repeat(place.excerpt.as_ref().map_or(1, |e| e.line.to_string().len()));
        let _ = writeln!(out, "{margin}{FRAME}-->{FRAME:#} {place}");
        if let Some(excerpt) = &place.excerpt {
            mark(&mut out, style, &margin, excerpt);
        }
    }
    for cause in &notice.causes {
        let _ = writeln!(out, "  caused by: {cause}");
    }
    if let Some(hint) = &notice.hint {
        let _ = writeln!(out, "{HINT}hint{HINT:#}: {hint}");
    }
    out
}

/// The source line with a mark under the value, as compilers print it.
fn mark(out: &mut String, style: Style, margin: &str, excerpt: &Excerpt) {
    // A tab would move the mark.
    let shown: String = excerpt.text.replace('\t', " ").chars().take(EXCERPT_CHARS_MAX).collect();
    let length = shown.chars().count();
    let before = excerpt.column.saturating_sub(1).min(length);
    let width = excerpt.width.clamp(1, (length - before).max(1));
    let (line, space, carets) = (excerpt.line, " ".repeat(before), "^".repeat(width));
    let _ = writeln!(out, "{margin} {FRAME}|{FRAME:#}");
    let _ = writeln!(out, "{FRAME}{line} |{FRAME:#} {shown}");
    let _ = writeln!(out, "{margin} {FRAME}|{FRAME:#} {space}{style}{carets}{style:#}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Place;

    fn plain(line: usize, column: usize, width: usize, source: &str) -> String {
        let excerpt = Some(Excerpt { line, column, width, text: source.into() });
        let place = Some(Place { name: format!("a.toml:{line}:{column}"), excerpt });
        let notice = Notice { message: "`train.epoch` must be an integer".into(), place, ..Notice::default() };
        anstream::adapter::strip_str(&text(&Notice { hint: Some("write `epoch = 3`".into()), ..notice })).to_string()
    }

    #[test]
    fn a_place_shows_its_line_and_a_mark() {
        assert_eq!(
            plain(12, 9, 3, "epoch = \"3\""),
            "error: `train.epoch` must be an integer\n  --> a.toml:12:9\n   |\n12 | epoch = \"3\"\n   |         ^^^\nhint: write `epoch = 3`\n"
        );
    }

    #[test]
    fn a_place_outside_its_line_still_prints() {
        assert!(plain(1, 99, 50, "x").contains('^'));
        assert!(plain(1, 0, 0, "").contains('^'));
    }
}
