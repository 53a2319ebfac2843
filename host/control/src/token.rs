//! The secret that a run's processes share.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{ControlError, Result};

/// The environment variable that hands a token to a process; never the command line, which everybody may read.
pub const TOKEN_VARIABLE: &str = "COSMOS_CONTROL_TOKEN";

const RANDOM_BYTES: usize = 32;
const CHARS_MIN: usize = 32;
const CHARS_MAX: usize = 256;

/// A run's bearer token. Not shown by `{:?}`.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// A new one from the operating system's random numbers.
    pub fn random() -> Result<Self> {
        let path = Path::new("/dev/urandom");
        let mut bytes = [0u8; RANDOM_BYTES];
        File::open(path).and_then(|mut file| file.read_exact(&mut bytes)).map_err(|source| ControlError::Io {
            doing: "read",
            path: path.into(),
            source,
        })?;
        Ok(Self(bytes.iter().map(|b| format!("{b:02x}")).collect()))
    }

    /// A given one: 32 to 256 printable ASCII characters without blanks.
    pub fn parse(text: &str) -> Result<Self> {
        let text = text.trim();
        let bad = |reason: &str| Err(ControlError::Token { reason: reason.into() });
        if !(CHARS_MIN..=CHARS_MAX).contains(&text.len()) {
            return bad(&format!("has {} characters, and not {CHARS_MIN} to {CHARS_MAX}", text.len()));
        }
        if !text.bytes().all(|b| b.is_ascii_graphic()) {
            return bad("has characters that a header cannot carry");
        }
        Ok(Self(text.into()))
    }

    /// The secret itself, to be handed on.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether `offered` is this token. The time taken tells nothing about where they differ.
    pub fn admits(&self, offered: &[u8]) -> bool {
        let own = self.0.as_bytes();
        let mut differs = (own.len() ^ offered.len()) as u64;
        for (index, byte) in own.iter().enumerate() {
            // The length of what is offered is no secret; its bytes are compared over the whole length of ours.
            let other = offered.get(index).copied().unwrap_or(0);
            differs |= u64::from(std::hint::black_box(byte ^ other));
        }
        std::hint::black_box(differs) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_token_is_admitted() {
        let token = Token::random().unwrap();
        assert!(token.admits(token.reveal().as_bytes()));
        assert!(!token.admits(b""));
        assert!(!token.admits(&token.reveal().as_bytes()[1..]));
        assert!(!token.admits(format!("{}0", token.reveal()).as_bytes()));
        assert!(!token.admits(Token::random().unwrap().reveal().as_bytes()));
    }

    #[test]
    fn a_token_is_not_printed() {
        let token = Token::random().unwrap();
        assert!(!format!("{token:?}").contains(token.reveal()));
    }

    #[test]
    fn bad_tokens_are_refused_without_being_repeated() {
        for bad in ["short", &"x".repeat(257), &format!("{}\n{}", "a".repeat(20), "b".repeat(20)), &"é".repeat(20)] {
            let error = Token::parse(bad).unwrap_err().to_string();
            assert!(!error.contains(bad), "{error}");
        }
    }
}
