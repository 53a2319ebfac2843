//! Which part of the rows: split expressions, and rows held out for validation.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::DataError;

/// `dataset.test_size`: an integer counts rows, a float is their share.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TestSize {
    /// This many rows, or all when there are fewer.
    Count(u64),
    /// This share of the rows, rounded down: 0.0 to 1.0.
    Ratio(f64),
}

impl TestSize {
    /// How many of `len` rows of a validation set are used: its first ones.
    ///
    /// # Errors
    /// [`DataError::BadTestSize`] for a ratio outside 0 to 1.
    pub fn rows(self, len: u64) -> Result<u64, DataError> {
        match self {
            Self::Count(count) => Ok(count.min(len)),
            Self::Ratio(ratio) if (0.0..=1.0).contains(&ratio) => Ok(((len as f64 * ratio) as u64).min(len)),
            Self::Ratio(ratio) => {
                Err(DataError::BadTestSize { value: ratio.to_string(), detail: "is not a ratio from 0 to 1".into() })
            }
        }
    }
}

/// Rows for validation and rows for training, out of one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestSplit {
    /// The first rows, for validation.
    pub test: Range<u64>,
    /// All others.
    pub train: Range<u64>,
}

/// Holds the first rows of a table out for validation, as a run does that has no validation dataset of its own.
///
/// # Errors
/// [`DataError::BadTestSize`] when either side would be empty or the ratio is none.
pub fn split_test(len: u64, test_size: TestSize) -> Result<TestSplit, DataError> {
    let test = test_size.rows(len)?;
    let value = match test_size {
        TestSize::Count(count) => count.to_string(),
        TestSize::Ratio(ratio) => ratio.to_string(),
    };
    let side = match test {
        0 => "validation",
        _ if test == len => "training",
        _ => return Ok(TestSplit { test: 0..test, train: test..len }),
    };
    Err(DataError::BadTestSize { value, detail: format!("leaves no row for {side} out of {len}") })
}

/// One summand of a split expression: `train`, `train[10:20]`, `train[-5%:]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SplitPart {
    /// The split's name; empty for the only one there is.
    pub name: String,
    /// Which of its rows.
    pub cut: Cut,
}

/// Rows from one edge to another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cut {
    from: Option<Edge>,
    to: Option<Edge>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Edge {
    /// A row, counted from the end when negative.
    Row(i64),
    /// Percent of the rows, from the end when negative.
    Percent(i64),
}

impl Cut {
    /// The rows out of `len`: percentages to the nearest row (ties to even), edges beyond the ends moved to them.
    pub fn range(&self, len: u64) -> Range<u64> {
        let place = |edge: Option<Edge>, default: u64| {
            let Some(edge) = edge else { return default };
            let row = match edge {
                Edge::Row(row) => i128::from(row),
                Edge::Percent(percent) => (len as f64 * percent as f64 / 100.0).round_ties_even() as i128,
            };
            let row = if row < 0 { row + i128::from(len) } else { row };
            row.clamp(0, i128::from(len)) as u64
        };
        let (from, to) = (place(self.from, 0), place(self.to, len));
        from..to.max(from)
    }
}

/// Reads the splits of a config. An empty list, or one of only empty texts, means the only split there is.
pub(super) fn parse(splits: &[String]) -> Result<Vec<SplitPart>, DataError> {
    let mut parts = Vec::new();
    for split in splits.iter().filter(|split| !split.trim().is_empty()) {
        for part in split.split('+') {
            parts.push(parse_part(split, part.trim())?);
        }
    }
    if parts.is_empty() {
        parts.push(SplitPart { name: String::new(), cut: Cut::default() });
    }
    Ok(parts)
}

fn parse_part(split: &str, part: &str) -> Result<SplitPart, DataError> {
    let error = |detail: &str| DataError::BadSplit { split: split.to_owned(), detail: detail.to_owned() };
    let (name, cut) = match part.split_once('[') {
        None => (part, Cut::default()),
        Some((name, rest)) => {
            let inside = rest.strip_suffix(']').ok_or_else(|| error("`[` must be closed by `]` at the end"))?;
            let (from, to) = inside.split_once(':').ok_or_else(|| error("`[…]` must have a `:`"))?;
            let edge = |text: &str| parse_edge(text.trim()).map_err(|detail| error(&detail));
            (name, Cut { from: edge(from)?, to: edge(to)? })
        }
    };
    let name = name.trim();
    if name.is_empty() {
        return Err(error("a split has no name"));
    }
    if !name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '.' | '-')) {
        return Err(error(&format!("`{name}` is not a split's name")));
    }
    Ok(SplitPart { name: name.to_owned(), cut })
}

fn parse_edge(text: &str) -> Result<Option<Edge>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let number = |text: &str| text.trim().parse().map_err(|_| format!("`{text}` is not a whole number"));
    match text.strip_suffix('%') {
        None => Ok(Some(Edge::Row(number(text)?))),
        Some(percent) => match number(percent)? {
            percent @ -100..=100 => Ok(Some(Edge::Percent(percent))),
            percent => Err(format!("{percent}% is not between -100% and 100%")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(expression: &str, len: u64) -> Range<u64> {
        parse(&[expression.to_owned()]).unwrap()[0].cut.range(len)
    }

    #[test]
    fn cuts() {
        assert_eq!(range("train", 10), 0..10);
        assert_eq!(range("train[:3]", 10), 0..3);
        assert_eq!(range("train[-3:]", 10), 7..10);
        assert_eq!(range("train[10%:20%]", 995), 100..199);
        assert_eq!(range("train[:99]", 10), 0..10);
        assert_eq!(range("train[8:2]", 10), 8..8);
        assert_eq!(range("train[-10%:]", 50), 45..50);
    }

    #[test]
    fn several_and_none() {
        let names = |splits: &[&str]| {
            let splits: Vec<_> = splits.iter().map(|s| (*s).to_owned()).collect();
            parse(&splits).unwrap().into_iter().map(|p| p.name).collect::<Vec<_>>()
        };
        assert_eq!(names(&["train+test[:5]", "x"]), ["train", "test", "x"]);
        assert_eq!(names(&[""]), [""]);
        assert_eq!(names(&[]), [""]);
    }

    #[test]
    fn nonsense_is_refused() {
        for expression in
            ["train[", "train[5]", "train[a:b]", "[:5]", "a/b", "train[:101%]", "train[:5](closest)", "a++b"]
        {
            let error = parse(&[expression.to_owned()]).unwrap_err();
            assert!(error.to_string().contains(expression), "{error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn test_sizes() {
        assert_eq!(TestSize::Ratio(0.1).rows(995).unwrap(), 99);
        assert_eq!(TestSize::Count(5000).rows(100).unwrap(), 100);
        assert_eq!(split_test(100, TestSize::Ratio(0.1)).unwrap(), TestSplit { test: 0..10, train: 10..100 });
        assert_eq!(split_test(100, TestSize::Count(1)).unwrap().train, 1..100);
        for (len, size) in [(5, 0.1), (5, 1.0), (5, -0.5), (5, f64::NAN), (0, 0.5)] {
            assert!(split_test(len, TestSize::Ratio(size)).is_err());
        }
        assert!(split_test(5, TestSize::Count(5)).is_err());
        assert_eq!(serde_json::from_str::<TestSize>("3").unwrap(), TestSize::Count(3));
        assert_eq!(serde_json::from_str::<TestSize>("0.5").unwrap(), TestSize::Ratio(0.5));
    }
}
