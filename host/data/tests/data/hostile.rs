//! Bytes that nobody meant: an error or a table, never a panic.

use std::sync::LazyLock;

use cosmos_data::{ChatTemplate, Message, Tokenizer};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{arrow_bytes, batch, open, parquet_bytes, write};

static DIR: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());
static ARROW: LazyLock<Vec<u8>> = LazyLock::new(|| arrow_bytes(&[batch(0, 20), batch(20, 30)]));
static PARQUET: LazyLock<Vec<u8>> = LazyLock::new(|| parquet_bytes(&batch(0, 30), 10));

/// Reads a file with these bytes as far as it goes.
fn read_all(ending: &str, bytes: &[u8]) {
    let path = DIR.path().join(format!("{:?}.{ending}", std::thread::current().id()));
    write(&path, bytes);
    if let Ok(table) = open(&path, &[]) {
        let count = table.len().min(200);
        let _ = table.rows(0, count, &[]);
        let _ = table.rows_at(&[table.len() - 1], &[]);
    }
}

/// A sound file with some bytes changed.
fn damaged(whole: &'static LazyLock<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let len = whole.len();
    (prop::collection::vec((0..len, any::<u8>()), 1..8), 1..=len).prop_map(move |(changes, keep)| {
        let mut bytes = whole.to_vec();
        changes.into_iter().for_each(|(place, byte)| bytes[place] = byte);
        if keep % 4 == 0 {
            bytes.truncate(keep);
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        ["arrow", "parquet", "jsonl", "json"].iter().for_each(|ending| read_all(ending, &bytes));
        let _ = Tokenizer::from_bytes(&bytes, "t.json");
    }

    #[test]
    fn bytes_behind_a_mark(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        read_all("arrow", &[b"ARROW1\0\0\xff\xff\xff\xff".as_slice(), &bytes, b"ARROW1"].concat());
        read_all("parquet", &[b"PAR1".as_slice(), &bytes, &(bytes.len() as u32).to_le_bytes(), b"PAR1"].concat());
    }

    #[test]
    fn damaged_arrow(bytes in damaged(&ARROW)) {
        read_all("arrow", &bytes);
    }

    #[test]
    fn damaged_parquet(bytes in damaged(&PARQUET)) {
        read_all("parquet", &bytes);
    }

    #[test]
    fn json_like_text(text in "[\\[\\]{}\",:0-9a-z\\\\ \n-]{0,80}") {
        read_all("jsonl", text.as_bytes());
        read_all("json", text.as_bytes());
        let _ = Tokenizer::from_bytes(text.as_bytes(), "t.json");
    }

    #[test]
    fn template_like_text(text in "(\\{[{%]|[%}]\\}|[a-z.|()\\[\\]'\"+*~0-9 -]|for|if|end|set|macro|in|messages|generation){0,40}") {
        if let Ok(template) = ChatTemplate::from_source("t", &text, &[]) {
            let _ = template.render(&[Message::new("user", "hello")], true, &serde_json::Map::new());
        }
    }
}

#[test]
fn deep_json_is_an_error() {
    let deep = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    read_all("jsonl", deep.as_bytes());
    read_all("json", deep.as_bytes());
    let _ = Tokenizer::from_bytes(deep.as_bytes(), "t.json");
}
