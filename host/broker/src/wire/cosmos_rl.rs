//! The original's teacher messages: msgpack maps with nested lists.
//!
//! A request is the value of the stream field `teacher_request`, one per prompt with all its completions; a result is the
//! value stored under each completion's UUID. In both, an element of a token list is itself a list: the sampled token alone
//! (`top_k = 0`), or the sampled token and the other candidates.
//!
//! Sizes that the bytes claim are checked against [`WireLimits`] and against the bytes that are left before anything is
//! reserved for them. Unknown keys are skipped, a key given twice is refused.

use rmp::Marker;
use rmp::decode::{self, NumValueReadError, ValueReadError};
use rmp::encode;

use crate::{BrokerError, Result, Rows};

const REQUEST: &str = "teacher request (cosmos-rl msgpack)";
const RESULT: &str = "teacher result (cosmos-rl msgpack)";

/// The largest message that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireLimits {
    /// Bytes of a whole message.
    pub bytes_max: usize,
    /// Keys of a message.
    pub keys_max: usize,
    /// Completions of one request.
    pub completions_max: usize,
    /// Positions of a prompt or a completion.
    pub positions_max: usize,
    /// Candidates of one position.
    pub candidates_max: usize,
    /// Bytes of a text: a UUID, a name, a time.
    pub text_bytes_max: usize,
    /// Lists within lists under an unknown key.
    pub depth_max: usize,
}

impl Default for WireLimits {
    fn default() -> WireLimits {
        WireLimits {
            bytes_max: 512 << 20,
            keys_max: 64,
            completions_max: 4096,
            positions_max: 1 << 21,
            candidates_max: 1 << 12,
            text_bytes_max: 4096,
            depth_max: 16,
        }
    }
}

/// A request for scores of all completions of one prompt, or the end marker.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Request {
    /// The last message of a run. Left out of the bytes when false.
    pub is_end: bool,
    /// Row of the prompt in the dataset; -1 in the end marker.
    pub prompt_idx: i64,
    /// [n][t][k or k + 1] per completion and position the sampled token, then the other candidates.
    pub completion_token_ids: Vec<Rows<u32>>,
    /// [p - 1][k or k + 1] the same for the prompt's tokens after the first; none when the key is absent.
    pub prompt_token_ids: Option<Rows<u32>>,
    /// [n] the key of each completion's result.
    pub teacher_result_uuid: Vec<String>,
    /// Who sent it.
    pub replica_name: String,
}

/// The scores of one completion.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores {
    /// [p + t - 1][k] natural log-probs, at the trainer's temperature.
    pub teacher_logprobs: Rows<f64>,
    /// [t][..] the request's tokens, when the trainer wants them back.
    pub completion_token_ids: Option<Rows<u32>>,
    /// [p - 1][..] the same for the prompt.
    pub prompt_token_ids: Option<Rows<u32>>,
    /// ISO time of the scoring.
    pub timestamp: String,
    /// Who scored it.
    pub replica_name: String,
}

/// Reads a request.
///
/// # Errors
/// [`BrokerError::BadBytes`] with the byte and the key.
pub fn decode_request(bytes: &[u8], limits: &WireLimits) -> Result<Request> {
    let mut reader = Reader::new(REQUEST, bytes, limits)?;
    let mut request = Request::default();
    reader.map(|reader, key| {
        match key {
            "is_end" => request.is_end = reader.bool("is_end")?,
            "prompt_idx" => request.prompt_idx = reader.integer("prompt_idx")?,
            "completion_token_ids" => {
                let field = "completion_token_ids";
                let n = reader.list(field, limits.completions_max)?;
                let mut completions = Vec::with_capacity(n);
                for _ in 0..n {
                    completions.push(reader.rows(field, Reader::token)?);
                }
                request.completion_token_ids = completions;
            }
            "prompt_token_ids" => request.prompt_token_ids = reader.optional_rows("prompt_token_ids", Reader::token)?,
            "teacher_result_uuid" => {
                let field = "teacher_result_uuid";
                let n = reader.list(field, limits.completions_max)?;
                request.teacher_result_uuid = (0..n).map(|_| reader.text(field)).collect::<Result<_>>()?;
            }
            "replica_name" => request.replica_name = reader.text("replica_name")?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let (completions, keys) = (request.completion_token_ids.len(), request.teacher_result_uuid.len());
    if completions != keys {
        let reason = format!("{keys} result keys for {completions} completions");
        return Err(reader.bad("teacher_result_uuid", reason));
    }
    Ok(request)
}

/// Reads the scores of one completion.
///
/// # Errors
/// [`BrokerError::BadBytes`] with the byte and the key.
pub fn decode_scores(bytes: &[u8], limits: &WireLimits) -> Result<Scores> {
    let mut reader = Reader::new(RESULT, bytes, limits)?;
    let mut scores = Scores::default();
    let mut found = false;
    reader.map(|reader, key| {
        match key {
            "teacher_logprobs" => {
                found = true;
                scores.teacher_logprobs = reader.rows("teacher_logprobs", Reader::number)?;
            }
            "completion_token_ids" => {
                scores.completion_token_ids = reader.optional_rows("completion_token_ids", Reader::token)?;
            }
            "prompt_token_ids" => scores.prompt_token_ids = reader.optional_rows("prompt_token_ids", Reader::token)?,
            "timestamp" => scores.timestamp = reader.text("timestamp")?,
            "replica_name" => scores.replica_name = reader.text("replica_name")?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    if !found {
        return Err(reader.bad("teacher_logprobs", "the key is missing".into()));
    }
    Ok(scores)
}

/// Writes a request with the original's keys, in its order.
pub fn encode_request(request: &Request) -> Vec<u8> {
    let keys = 4 + usize::from(request.is_end) + usize::from(request.prompt_token_ids.is_some());
    let mut out = Writer::default();
    out.map(keys);
    if request.is_end {
        out.key("is_end");
        sure(encode::write_bool(&mut out.bytes, true));
    }
    out.key("prompt_idx");
    sure(encode::write_sint(&mut out.bytes, request.prompt_idx));
    out.key("completion_token_ids");
    out.list(request.completion_token_ids.len());
    for completion in &request.completion_token_ids {
        out.rows(completion, Writer::token);
    }
    if let Some(rows) = &request.prompt_token_ids {
        out.key("prompt_token_ids");
        out.rows(rows, Writer::token);
    }
    out.key("teacher_result_uuid");
    out.list(request.teacher_result_uuid.len());
    for uuid in &request.teacher_result_uuid {
        out.text(uuid);
    }
    out.key("replica_name");
    out.text(&request.replica_name);
    out.bytes
}

/// Writes the scores of one completion with the original's keys, in its order.
pub fn encode_scores(scores: &Scores) -> Vec<u8> {
    let tokens =
        [("completion_token_ids", &scores.completion_token_ids), ("prompt_token_ids", &scores.prompt_token_ids)];
    let mut out = Writer::default();
    out.map(3 + tokens.iter().filter(|(_, rows)| rows.is_some()).count());
    out.key("teacher_logprobs");
    out.rows(&scores.teacher_logprobs, Writer::number);
    for (key, rows) in tokens {
        if let Some(rows) = rows {
            out.key(key);
            out.rows(rows, Writer::token);
        }
    }
    out.key("timestamp");
    out.text(&scores.timestamp);
    out.key("replica_name");
    out.text(&scores.replica_name);
    out.bytes
}

struct Reader<'a> {
    format: &'static str,
    rest: &'a [u8],
    total: usize,
    limits: &'a WireLimits,
}

impl<'a> Reader<'a> {
    fn new(format: &'static str, bytes: &'a [u8], limits: &'a WireLimits) -> Result<Reader<'a>> {
        let reader = Reader { format, rest: bytes, total: bytes.len(), limits };
        if bytes.len() > limits.bytes_max {
            return Err(reader.bad("message", format!("{} bytes, more than {}", bytes.len(), limits.bytes_max)));
        }
        Ok(reader)
    }

    fn bad(&self, field: &'static str, reason: String) -> BrokerError {
        BrokerError::BadBytes { format: self.format, at: self.total - self.rest.len(), field, reason }
    }

    /// Reads the map that a message is: `use_key` reads the value of a key, or says that it does not know the key.
    fn map(&mut self, mut use_key: impl FnMut(&mut Reader<'a>, &str) -> Result<bool>) -> Result<()> {
        let keys = decode::read_map_len(&mut self.rest).map_err(|e| self.bad("message", value_error(e)))?;
        self.checked_len("message", keys, self.limits.keys_max)?;
        let mut seen: Vec<&str> = Vec::new();
        for _ in 0..keys {
            let key = self.text_ref("message")?;
            if seen.contains(&key) {
                return Err(self.bad("message", format!("the key `{}` comes twice", key.escape_debug())));
            }
            seen.push(key);
            if !use_key(self, key)? {
                self.skip(self.limits.depth_max)?;
            }
        }
        if self.rest.is_empty() { Ok(()) } else { Err(self.bad("message", "bytes after its end".into())) }
    }

    /// A length that fits the limit and the bytes that are left; every element takes at least one.
    fn checked_len(&self, field: &'static str, len: u32, max: usize) -> Result<usize> {
        let len = len as usize;
        if len > max {
            return Err(self.bad(field, format!("{len} elements, more than {max}")));
        }
        if len > self.rest.len() {
            return Err(self.bad(field, format!("{len} elements, but only {} bytes are left", self.rest.len())));
        }
        Ok(len)
    }

    fn list(&mut self, field: &'static str, max: usize) -> Result<usize> {
        let len = decode::read_array_len(&mut self.rest).map_err(|e| self.bad(field, value_error(e)))?;
        self.checked_len(field, len, max)
    }

    fn rows<T>(
        &mut self,
        field: &'static str,
        mut value: impl FnMut(&mut Reader<'a>, &'static str) -> Result<T>,
    ) -> Result<Rows<T>> {
        let positions = self.list(field, self.limits.positions_max)?;
        let mut rows = Rows::default();
        // Room for one value a row: what upstream sends most.
        rows.reserve(positions, positions);
        for _ in 0..positions {
            for _ in 0..self.list(field, self.limits.candidates_max)? {
                rows.push_value(value(self, field)?);
            }
            rows.end_row();
        }
        Ok(rows)
    }

    fn optional_rows<T>(
        &mut self,
        field: &'static str,
        value: impl FnMut(&mut Reader<'a>, &'static str) -> Result<T>,
    ) -> Result<Option<Rows<T>>> {
        if self.rest.first() == Some(&Marker::Null.to_u8()) {
            self.rest = &self.rest[1..];
            return Ok(None);
        }
        self.rows(field, value).map(Some)
    }

    fn token(&mut self, field: &'static str) -> Result<u32> {
        decode::read_int(&mut self.rest).map_err(|e| self.bad(field, number_error(e, "a token id from 0 to 2^32 - 1")))
    }

    fn integer(&mut self, field: &'static str) -> Result<i64> {
        decode::read_int(&mut self.rest).map_err(|e| self.bad(field, number_error(e, "a whole number")))
    }

    /// A float, or a whole number, which is how some writers put `-0.0` or `-1.0`.
    fn number(&mut self, field: &'static str) -> Result<f64> {
        match self.rest.first().map(|byte| Marker::from_u8(*byte)) {
            Some(Marker::F64) => decode::read_f64(&mut self.rest).map_err(|e| self.bad(field, value_error(e))),
            Some(Marker::F32) => {
                decode::read_f32(&mut self.rest).map(f64::from).map_err(|e| self.bad(field, value_error(e)))
            }
            _ => decode::read_int::<i64, _>(&mut self.rest)
                .map(|whole| whole as f64)
                .map_err(|e| self.bad(field, number_error(e, "a number"))),
        }
    }

    fn bool(&mut self, field: &'static str) -> Result<bool> {
        decode::read_bool(&mut self.rest).map_err(|e| self.bad(field, value_error(e)))
    }

    fn text(&mut self, field: &'static str) -> Result<String> {
        self.text_ref(field).map(str::to_owned)
    }

    fn text_ref(&mut self, field: &'static str) -> Result<&'a str> {
        let len = decode::read_str_len(&mut self.rest).map_err(|e| self.bad(field, value_error(e)))?;
        let len = self.checked_len(field, len, self.limits.text_bytes_max)?;
        let text = std::str::from_utf8(&self.rest[..len]).map_err(|e| self.bad(field, e.to_string()))?;
        self.rest = &self.rest[len..];
        Ok(text)
    }

    /// Passes over a value of any kind.
    fn skip(&mut self, depth: usize) -> Result<()> {
        const FIELD: &str = "unknown key";
        let marker = decode::read_marker(&mut self.rest).map_err(|e| self.bad(FIELD, e.0.to_string()))?;
        let (bytes, elements) = match marker {
            Marker::FixPos(_) | Marker::FixNeg(_) | Marker::Null | Marker::True | Marker::False | Marker::Reserved => {
                (0, 0)
            }
            Marker::U8 | Marker::I8 => (1, 0),
            Marker::U16 | Marker::I16 => (2, 0),
            Marker::U32 | Marker::I32 | Marker::F32 => (4, 0),
            Marker::U64 | Marker::I64 | Marker::F64 => (8, 0),
            Marker::FixStr(len) => (u64::from(len), 0),
            Marker::Str8 | Marker::Bin8 => (self.big_endian(1)?, 0),
            Marker::Str16 | Marker::Bin16 => (self.big_endian(2)?, 0),
            Marker::Str32 | Marker::Bin32 => (self.big_endian(4)?, 0),
            // An extension has one byte of type before its data.
            Marker::FixExt1 => (2, 0),
            Marker::FixExt2 => (3, 0),
            Marker::FixExt4 => (5, 0),
            Marker::FixExt8 => (9, 0),
            Marker::FixExt16 => (17, 0),
            Marker::Ext8 => (1 + self.big_endian(1)?, 0),
            Marker::Ext16 => (1 + self.big_endian(2)?, 0),
            Marker::Ext32 => (1 + self.big_endian(4)?, 0),
            Marker::FixArray(len) => (0, u64::from(len)),
            Marker::Array16 => (0, self.big_endian(2)?),
            Marker::Array32 => (0, self.big_endian(4)?),
            Marker::FixMap(len) => (0, 2 * u64::from(len)),
            Marker::Map16 => (0, 2 * self.big_endian(2)?),
            Marker::Map32 => (0, 2 * self.big_endian(4)?),
        };
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.rest = self.rest.get(bytes..).ok_or_else(|| self.bad(FIELD, "the bytes end within a value".into()))?;
        if elements > 0 && depth == 0 {
            return Err(self.bad(FIELD, format!("lists nested deeper than {}", self.limits.depth_max)));
        }
        if elements > self.rest.len() as u64 {
            return Err(self.bad(FIELD, format!("{elements} elements, but only {} bytes are left", self.rest.len())));
        }
        for _ in 0..elements {
            self.skip(depth - 1)?;
        }
        Ok(())
    }

    fn big_endian(&mut self, bytes: usize) -> Result<u64> {
        let Some((head, tail)) = self.rest.split_at_checked(bytes) else {
            return Err(self.bad("unknown key", "the bytes end within a length".into()));
        };
        self.rest = tail;
        Ok(head.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }
}

fn value_error<E: rmp::decode::RmpReadErr>(error: ValueReadError<E>) -> String {
    match error {
        ValueReadError::TypeMismatch(marker) => format!("a value of another kind ({marker:?})"),
        ValueReadError::InvalidMarkerRead(_) | ValueReadError::InvalidDataRead(_) => "the bytes end too early".into(),
    }
}

fn number_error<E: rmp::decode::RmpReadErr>(error: NumValueReadError<E>, wanted: &str) -> String {
    match error {
        NumValueReadError::TypeMismatch(marker) => {
            format!("expected {wanted}, got a value of another kind ({marker:?})")
        }
        NumValueReadError::OutOfRange => format!("expected {wanted}, got a number out of range"),
        NumValueReadError::InvalidMarkerRead(_) | NumValueReadError::InvalidDataRead(_) => {
            "the bytes end too early".into()
        }
    }
}

#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    fn map(&mut self, keys: usize) {
        sure(encode::write_map_len(&mut self.bytes, length(keys)));
    }

    fn key(&mut self, key: &str) {
        self.text(key);
    }

    fn text(&mut self, text: &str) {
        sure(encode::write_str(&mut self.bytes, text));
    }

    fn list(&mut self, len: usize) {
        sure(encode::write_array_len(&mut self.bytes, length(len)));
    }

    fn rows<T: Copy>(&mut self, rows: &Rows<T>, mut value: impl FnMut(&mut Writer, T)) {
        self.list(rows.len());
        for row in rows.iter() {
            self.list(row.len());
            for item in row {
                value(self, *item);
            }
        }
    }

    fn token(&mut self, token: u32) {
        sure(encode::write_uint(&mut self.bytes, token.into()));
    }

    fn number(&mut self, number: f64) {
        sure(encode::write_f64(&mut self.bytes, number));
    }
}

/// Writing to a vector cannot fail; the library's signatures leave it open.
fn sure<T, E>(written: std::result::Result<T, E>) {
    debug_assert!(written.is_ok());
}

/// msgpack counts in 32 bits: more than 4 billion rows do not fit into memory as this crate holds them.
fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits() -> WireLimits {
        WireLimits::default()
    }

    fn rows() -> impl Strategy<Value = Rows<u32>> {
        proptest::collection::vec(proptest::collection::vec(any::<u32>(), 0..5), 0..6)
            .prop_map(|r| r.into_iter().collect())
    }

    fn requests() -> impl Strategy<Value = Request> {
        let completions = proptest::collection::vec((rows(), "[0-9a-f-]{0,40}"), 0..5);
        (any::<bool>(), any::<i64>(), completions, proptest::option::of(rows()), ".{0,12}").prop_map(
            |(is_end, prompt_idx, completions, prompt_token_ids, replica_name)| {
                let (completion_token_ids, teacher_result_uuid) = completions.into_iter().unzip();
                Request {
                    is_end,
                    prompt_idx,
                    completion_token_ids,
                    prompt_token_ids,
                    teacher_result_uuid,
                    replica_name,
                }
            },
        )
    }

    fn scores() -> impl Strategy<Value = Scores> {
        let logprobs = proptest::collection::vec(proptest::collection::vec(-1e9..0.0_f64, 0..5), 0..6);
        (logprobs, proptest::option::of(rows()), proptest::option::of(rows()), ".{0,40}").prop_map(
            |(logprobs, completion_token_ids, prompt_token_ids, timestamp)| Scores {
                teacher_logprobs: logprobs.into_iter().collect(),
                completion_token_ids,
                prompt_token_ids,
                timestamp,
                replica_name: "teacher-0".into(),
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(request in requests(), scores in scores()) {
            prop_assert_eq!(decode_request(&encode_request(&request), &limits()), Ok(request));
            prop_assert_eq!(decode_scores(&encode_scores(&scores), &limits()), Ok(scores));
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode_request(&bytes, &limits());
            let _ = decode_scores(&bytes, &limits());
        }

        #[test]
        fn damaged_messages_are_read_without_a_panic(request in requests(), at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let mut bytes = encode_request(&request);
            let whole = bytes.len();
            prop_assert!(decode_request(&bytes[..cut.index(whole)], &limits()).is_err());
            bytes[at.index(whole)] = byte;
            let _ = decode_request(&bytes, &limits());
        }
    }

    /// A message of one key with the given value.
    fn one_key(key: &str, value: &[u8]) -> Vec<u8> {
        let mut out = Writer::default();
        out.map(1);
        out.key(key);
        out.bytes.extend_from_slice(value);
        out.bytes
    }

    fn error_of(bytes: &[u8], limits: &WireLimits) -> String {
        decode_request(bytes, limits).unwrap_err().to_string()
    }

    #[test]
    fn lengths_that_lie_are_refused_before_anything_is_reserved() {
        // 4 billion completions in five bytes.
        let text = error_of(&one_key("completion_token_ids", &[0xdd, 0xff, 0xff, 0xff, 0xff]), &limits());
        assert!(text.ends_with("byte 27: `completion_token_ids`: 4294967295 elements, more than 4096"), "{text}");
        let text = error_of(&one_key("completion_token_ids", &[0xdc, 0x0f, 0x00]), &limits());
        assert!(text.ends_with("3840 elements, but only 0 bytes are left"), "{text}");
        let text = error_of(&one_key("replica_name", &[0xda, 0x0f, 0x00]), &limits());
        assert!(text.ends_with("3840 elements, but only 0 bytes are left"), "{text}");
        let small = WireLimits { bytes_max: 4, ..limits() };
        assert!(error_of(&[0x80; 5], &small).contains("5 bytes, more than 4"));
    }

    #[test]
    fn wrong_kinds_are_named() {
        let cases: [(&str, &[u8], &str); 6] = [
            ("completion_token_ids", &[0x91, 0x91, 0x91, 0xff], "out of range"),
            ("completion_token_ids", &[0x91, 0x91, 0x91, 0xa1, b'x'], "expected a token id"),
            ("completion_token_ids", &[0x91, 0x91, 0x05], "another kind"),
            ("prompt_idx", &[0xcb, 0, 0, 0, 0, 0, 0, 0, 0], "expected a whole number"),
            ("replica_name", &[0xa1, 0xff], "invalid utf-8"),
            ("teacher_result_uuid", &[0x91, 0xa1, b'x'], "1 result keys for 0 completions"),
        ];
        for (key, value, wanted) in cases {
            let text = error_of(&one_key(key, value), &limits());
            assert!(text.contains(wanted) && text.contains(&format!("`{key}`")), "{text}");
        }
        assert!(error_of(&[0x80, 0x00], &limits()).ends_with("bytes after its end"));
        assert!(decode_scores(&[0x80], &limits()).unwrap_err().to_string().ends_with("the key is missing"));
    }

    #[test]
    fn unknown_keys_are_skipped_to_a_limit() {
        let values: [&[u8]; 8] = [
            &[0xc0],
            &[0x93, 0x01, 0xc3, 0xa2, b'h', b'i'],
            &[0x81, 0xa1, b'k', 0xcb, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0xc4, 0x02, 1, 2],
            &[0xd4, 0x01, 0x02],
            &[0xc7, 0x01, 0x05, 0x02],
            &[0xdc, 0x00, 0x01, 0xd1, 0x01, 0x02],
            &[0xde, 0x00, 0x01, 0x01, 0xce, 0, 0, 0, 1],
        ];
        for value in values {
            assert_eq!(decode_request(&one_key("new", value), &limits()), Ok(Request::default()), "{value:x?}");
        }
        let mut deep = vec![0x91; 17];
        deep.push(0x01);
        assert!(error_of(&one_key("new", &deep), &limits()).contains("nested deeper than 16"));
        let mut twice = one_key("new", &[0xc0]);
        twice.extend_from_within(1..);
        twice[0] = 0x82;
        assert!(error_of(&twice, &limits()).contains("`new` comes twice"));
    }

    #[test]
    fn numbers_of_every_kind_are_log_probs() {
        let value = [0x91, 0x93, 0xff, 0xca, 0xbf, 0, 0, 0, 0xcb, 0xff, 0xf0, 0, 0, 0, 0, 0, 0];
        let scores = decode_scores(&one_key("teacher_logprobs", &value), &limits()).unwrap();
        assert_eq!(scores.teacher_logprobs.values(), [-1.0, -0.5, f64::NEG_INFINITY]);
    }
}
