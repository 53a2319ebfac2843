//! Text to token ids and back, by a model's `tokenizer.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::DataError;
use crate::guard::guarded;

/// Bytes of a `tokenizer.json`; the largest known ones have some 35 MB.
const FILE_BYTES_MAX: u64 = 512 << 20;
/// Tokens of one emitted piece of text: after this many the stream no longer waits for a character to become whole.
const PENDING_TOKENS_MAX: usize = 16;

/// A Hugging Face tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    /// Id to token, added tokens included.
    tokens: BTreeMap<u32, String>,
    /// The merges of a byte-pair encoding in order of rank; empty for other models.
    merges: Vec<(String, String)>,
    fingerprint: String,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, given itself or by its folder.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] names the file and what is wrong with it: missing, too large, no JSON, a tokenizer that
    /// contradicts itself.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, DataError> {
        let mut path = path.as_ref().to_owned();
        let error = |path: &Path, detail: String| DataError::Tokenizer { path: path.to_owned(), detail };
        if path.is_dir() {
            let folder = path;
            path = folder.join("tokenizer.json");
            if !path.is_file() {
                let slow = ["tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"];
                let detail = match slow.iter().find(|name| folder.join(name).exists()) {
                    Some(name) => format!(
                        "has no `tokenizer.json` but `{name}`: convert it with `AutoTokenizer.from_pretrained(…).save_pretrained(…)`"
                    ),
                    None => "has no `tokenizer.json`".into(),
                };
                return Err(error(&folder, detail));
            }
        }
        let size_bytes = std::fs::metadata(&path).map_err(|e| error(&path, e.to_string()))?.len();
        if size_bytes > FILE_BYTES_MAX {
            return Err(error(&path, format!("has {size_bytes} bytes, more than the limit of {FILE_BYTES_MAX}")));
        }
        let bytes = std::fs::read(&path).map_err(|e| error(&path, e.to_string()))?;
        Self::from_bytes(&bytes, &path)
    }

    /// Reads the content of a `tokenizer.json`; `path` is for messages.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn from_bytes(bytes: &[u8], path: impl Into<PathBuf>) -> Result<Self, DataError> {
        let path = path.into();
        let error = |detail: String| DataError::Tokenizer { path: path.clone(), detail };
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(error)?;
        // Truncation and padding are a caller's business: both would change what a prompt means without a word.
        guarded(|| inner.with_truncation(None).map(|_| ())).map_err(error)?;
        inner.with_padding(None);
        let mut tokens = BTreeMap::new();
        for (token, id) in inner.get_vocab(true) {
            if let Some(other) = tokens.insert(id, token.clone())
                && other != token
            {
                return Err(error(format!("gives id {id} to both `{other}` and `{token}`")));
            }
        }
        if tokens.is_empty() {
            return Err(error("has no token".into()));
        }
        let merges = merges(bytes);
        let fingerprint = fingerprint(&tokens, &merges);
        Ok(Self { inner, path, tokens, merges, fingerprint })
    }

    /// Token ids of `text`. `add_special_tokens` lets the tokenizer add what it puts around a text (such as BOS); text
    /// that came from a chat template has those already, so it is encoded with `false`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] when the text has no encoding (a model without an unknown token).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, DataError> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special_tokens)).map_err(|e| self.error(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`; `skip_special` leaves special tokens out. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] names the first id that the tokenizer does not know.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, DataError> {
        if let Some(id) = ids.iter().find(|id| !self.tokens.contains_key(id)) {
            return Err(self.error(format!("has no token with id {id} (its largest is {})", self.id_end() - 1)));
        }
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|e| self.error(e))
    }

    /// The text of a single token, special or not, for tables and logs. A part of a character shows as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn decode_token(&self, id: u32) -> Result<String, DataError> {
        self.decode(&[id], false)
    }

    /// A decoder that is fed token by token.
    pub fn stream(&self, skip_special: bool) -> TextStream<'_> {
        TextStream { tokenizer: self, skip_special, ids: Vec::new(), read: 0 }
    }

    /// How many tokens there are, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// One more than the largest id: a model's embedding needs at least this many rows.
    pub fn id_end(&self) -> u32 {
        self.tokens.last_key_value().map_or(0, |(id, _)| id.saturating_add(1))
    }

    /// The id of a token as it is written in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id as it is written in the vocabulary (in a byte-level vocabulary a space is `Ġ`).
    pub fn id_to_token(&self, id: u32) -> Option<&str> {
        self.tokens.get(&id).map(String::as_str)
    }

    /// The file that it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256, in hexadecimal, over all (id, token) pairs in order of id and all merges in order of rank. Equal for two
    /// tokenizers that agree on what every id means, whatever else their files say.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// `None` when both mean the same by every id, else the first difference in words.
    pub fn first_difference(&self, other: &Self) -> Option<String> {
        if self.fingerprint == other.fingerprint {
            return None;
        }
        let last = self.tokens.keys().chain(other.tokens.keys()).max().copied()?;
        let show = |token: Option<&String>| token.map_or("no token".into(), |t| format!("`{}`", t.escape_debug()));
        let differs = self
            .tokens
            .keys()
            .chain(other.tokens.keys())
            .filter(|id| self.tokens.get(id) != other.tokens.get(id))
            .min()
            .copied();
        if let Some(id) = differs {
            let (ours, theirs) = (show(self.tokens.get(&id)), show(other.tokens.get(&id)));
            return Some(format!(
                "id {id} is {ours} in `{}` and {theirs} in `{}` (ids go up to {last})",
                self.path.display(),
                other.path.display()
            ));
        }
        let rank =
            (0..self.merges.len().max(other.merges.len())).find(|r| self.merges.get(*r) != other.merges.get(*r))?;
        let show = |merge: Option<&(String, String)>| merge.map_or("none".into(), |(a, b)| format!("`{a}` + `{b}`"));
        Some(format!(
            "merge {rank} is {} in `{}` and {} in `{}`",
            show(self.merges.get(rank)),
            self.path.display(),
            show(other.merges.get(rank)),
            other.path.display()
        ))
    }

    fn error(&self, detail: String) -> DataError {
        DataError::Tokenizer { path: self.path.clone(), detail }
    }
}

/// Turns tokens into text as they come, never in the middle of a character.
///
/// The text of a token can depend on the tokens before it, so the last piece is decoded again with every new token, and
/// what is new of it is given out once it no longer ends within a character.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The tokens of the piece given out last, then those not given out yet.
    ids: Vec<u32>,
    /// How many of `ids` were given out.
    read: usize,
}

impl TextStream<'_> {
    /// Takes the next token and returns the text that is now certain, which may be empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String, DataError> {
        self.ids.push(id);
        let new = self.pending()?;
        if new.is_empty() || (new.ends_with('\u{fffd}') && self.ids.len() - self.read < PENDING_TOKENS_MAX) {
            return Ok(String::new());
        }
        self.ids.drain(..self.read);
        self.read = self.ids.len();
        Ok(new)
    }

    /// The text that is still held back, with U+FFFD for the part of a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String, DataError> {
        let rest = self.pending();
        self.ids.clear();
        rest
    }

    fn pending(&self) -> Result<String, DataError> {
        let before = self.tokenizer.decode(&self.ids[..self.read], self.skip_special)?;
        let all = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(all.get(before.len()..).unwrap_or_default().to_owned())
    }
}

/// The merges in a `tokenizer.json`, written as `"a b"` or `["a", "b"]`.
fn merges(bytes: &[u8]) -> Vec<(String, String)> {
    #[derive(Deserialize)]
    struct File {
        model: Model,
    }
    #[derive(Deserialize)]
    struct Model {
        #[serde(default)]
        merges: Vec<Merge>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Merge {
        Pair(String, String),
        Text(String),
    }
    // The tokenizer itself was read from the same bytes, so a failure here means a model without merges.
    let file: Option<File> = serde_json::from_slice(bytes).ok();
    let merges = file.map(|file| file.model.merges).unwrap_or_default();
    let split =
        |text: String| text.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap_or((text, String::new()));
    merges
        .into_iter()
        .map(|merge| match merge {
            Merge::Pair(a, b) => (a, b),
            Merge::Text(text) => split(text),
        })
        .collect()
}

/// Lengths go before texts, so that no two different vocabularies hash the same bytes.
fn fingerprint(tokens: &BTreeMap<u32, String>, merges: &[(String, String)]) -> String {
    let mut hash = Sha256::new();
    let text = |hash: &mut Sha256, text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    };
    hash.update((tokens.len() as u64).to_le_bytes());
    for (id, token) in tokens {
        hash.update(id.to_le_bytes());
        text(&mut hash, token);
    }
    for (a, b) in merges {
        text(&mut hash, a);
        text(&mut hash, b);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
