//! The envelope of everything that we send or store, and the packing of numbers inside it.
//!
//! | bytes | what |
//! |---|---|
//! | 0..4 | `CHF` and a line feed, which text modes damage first |
//! | 4 | version of the format, 1 |
//! | 5 | [`Kind`] |
//! | 6..8 | flags of the kind, little endian |
//! | 8..16 | length of the payload, little endian |
//! | 16..20 | CRC-32C of bytes 0..16 and the payload, little endian |
//! | 20.. | payload |
//!
//! Inside a payload whole numbers are LEB128, token ids are bit-packed by the largest of a list, floats are f32, f16 or bf16.
//! Everything that a payload claims is checked against [`FrameLimits`] and against the bytes that are left before anything
//! is reserved.

use half::{bf16, f16};

use crate::{BrokerError, Result, Rows};

/// The first bytes of every frame.
pub const MAGIC: [u8; 4] = *b"CHF\n";
/// The version that is written and read.
pub const VERSION: u8 = 1;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 20;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A [`crate::TeacherRequest`].
    Request = 1,
    /// A [`crate::TeacherResult`].
    Result = 2,
    /// Why a request has no result.
    Failure = 3,
    /// A finished completion between a rollout and a policy; its payload is that of the roles.
    Completion = 4,
    /// A part of a blob in a [`crate::Store`].
    Part = 5,
    /// Anything else of the roles: a teacher's head, a table of routing.
    Other = 6,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Request => "teacher request frame",
            Kind::Result => "teacher result frame",
            Kind::Failure => "failure frame",
            Kind::Completion => "completion frame",
            Kind::Part => "store part frame",
            Kind::Other => "frame",
        }
    }
}

/// How floats travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FloatFormat {
    /// 4 bytes, exact.
    #[default]
    F32,
    /// 2 bytes, rounded by at most 2⁻¹¹ of the value (a log-prob between -16 and -8 moves by at most 0.004, one between -2 and
    /// -1 by 0.0005). Finite numbers beyond ±65504 become ±65504.
    F16,
    /// 2 bytes with the range of f32, rounded by at most 2⁻⁸ of the value.
    Bf16,
}

impl FloatFormat {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            FloatFormat::F32 => 4,
            FloatFormat::F16 | FloatFormat::Bf16 => 2,
        }
    }

    fn tag(self) -> u8 {
        match self {
            FloatFormat::F32 => 0,
            FloatFormat::F16 => 1,
            FloatFormat::Bf16 => 2,
        }
    }
}

/// The largest frame that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameLimits {
    /// Bytes of a whole frame. Redis takes no value beyond 512 MiB.
    pub bytes_max: usize,
    /// Positions of a list or rows of a table.
    pub positions_max: usize,
    /// Numbers of a table.
    pub values_max: usize,
    /// Bytes of a text.
    pub text_bytes_max: usize,
}

impl Default for FrameLimits {
    fn default() -> FrameLimits {
        FrameLimits { bytes_max: 448 << 20, positions_max: 1 << 21, values_max: 1 << 28, text_bytes_max: 64 << 10 }
    }
}

/// Bits for one id of a list whose largest is `largest`; at least one, so that no count comes without bytes.
pub fn id_bits(largest: u32) -> u32 {
    (32 - largest.leading_zeros()).max(1)
}

/// Writes a frame.
#[derive(Debug)]
pub struct FrameWriter {
    bytes: Vec<u8>,
}

impl FrameWriter {
    /// An empty frame of a kind, with room for a payload.
    pub fn new(kind: Kind, flags: u16, payload_bytes: usize) -> FrameWriter {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload_bytes);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[VERSION, kind as u8]);
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&[0; 12]);
        FrameWriter { bytes }
    }

    /// The finished frame.
    pub fn finish(mut self) -> Vec<u8> {
        let payload = (self.bytes.len() - HEADER_BYTES) as u64;
        self.bytes[8..16].copy_from_slice(&payload.to_le_bytes());
        let sum = checksum(&self.bytes[..16], &self.bytes[HEADER_BYTES..]);
        self.bytes[16..20].copy_from_slice(&sum.to_le_bytes());
        self.bytes
    }

    /// A whole number: 7 bits a byte.
    pub fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    /// A whole number that may be negative.
    pub fn signed(&mut self, value: i64) {
        self.varint(((value << 1) ^ (value >> 63)) as u64);
    }

    /// 64 bits as they are.
    pub fn fixed(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Bytes with their length.
    pub fn blob(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.raw(bytes);
    }

    /// Bytes without their length: the rest of the payload.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// A text.
    pub fn text(&mut self, text: &str) {
        self.blob(text.as_bytes());
    }

    /// Ids, packed by the largest.
    pub fn ids(&mut self, ids: &[u32]) {
        self.varint(ids.len() as u64);
        if ids.is_empty() {
            return;
        }
        let bits = id_bits(ids.iter().copied().max().unwrap_or(0));
        self.bytes.push(bits as u8);
        let (mut held, mut held_bits) = (0_u64, 0_u32);
        for id in ids {
            held |= u64::from(*id) << held_bits;
            held_bits += bits;
            while held_bits >= 8 {
                self.bytes.push(held as u8);
                held >>= 8;
                held_bits -= 8;
            }
        }
        if held_bits > 0 {
            self.bytes.push(held as u8);
        }
    }

    /// Floats in a format.
    pub fn floats(&mut self, values: &[f32], format: FloatFormat) {
        self.varint(values.len() as u64);
        self.bytes.push(format.tag());
        self.bytes.reserve(values.len() * format.bytes());
        match format {
            FloatFormat::F32 => values.iter().for_each(|v| self.bytes.extend_from_slice(&v.to_le_bytes())),
            FloatFormat::F16 => values.iter().for_each(|v| self.bytes.extend_from_slice(&to_f16(*v).to_le_bytes())),
            FloatFormat::Bf16 => {
                values.iter().for_each(|v| self.bytes.extend_from_slice(&bf16::from_f32(*v).to_le_bytes()));
            }
        }
    }

    /// Rows of ids.
    pub fn id_rows(&mut self, rows: &Rows<u32>) {
        self.row_lengths(rows);
        self.ids(rows.values());
    }

    /// Rows of floats.
    pub fn float_rows(&mut self, rows: &Rows<f32>, format: FloatFormat) {
        self.row_lengths(rows);
        self.floats(rows.values(), format);
    }

    /// The common length of the rows plus one, or 0 and then each length.
    fn row_lengths<T>(&mut self, rows: &Rows<T>) {
        self.varint(rows.len() as u64);
        match rows.width() {
            Some(width) => self.varint(width as u64 + 1),
            None => {
                self.varint(0);
                // A row is a candidate list: no longer than a vocabulary, which has 32-bit ids.
                let lengths: Vec<u32> = rows.iter().map(|row| row.len() as u32).collect();
                self.ids(&lengths);
            }
        }
    }
}

/// Rounded to the nearest; a finite number stays finite.
fn to_f16(value: f32) -> f16 {
    let rounded = f16::from_f32(value);
    if rounded.is_infinite() && value.is_finite() {
        return if value > 0.0 { f16::MAX } else { f16::MIN };
    }
    rounded
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(header), payload)
}

/// Reads a frame.
#[derive(Debug)]
pub struct FrameReader<'a> {
    kind: Kind,
    flags: u16,
    rest: &'a [u8],
    total: usize,
    limits: FrameLimits,
}

impl<'a> FrameReader<'a> {
    /// Checks magic, version, kind, length and checksum.
    ///
    /// # Errors
    /// [`BrokerError::BadBytes`] that says what is wrong.
    pub fn open(bytes: &'a [u8], kind: Kind, limits: &FrameLimits) -> Result<FrameReader<'a>> {
        let bad = |at: usize, field: &'static str, reason: String| {
            Err(BrokerError::BadBytes { format: kind.name(), at, field, reason })
        };
        if bytes.len() > limits.bytes_max {
            return bad(0, "frame", format!("{} bytes, more than {}", bytes.len(), limits.bytes_max));
        }
        let Some((header, payload)) = bytes.split_at_checked(HEADER_BYTES) else {
            return bad(bytes.len(), "header", format!("{} bytes, less than {HEADER_BYTES}", bytes.len()));
        };
        if header[..4] != MAGIC {
            return bad(0, "magic", "not one of our frames".into());
        }
        if header[4] != VERSION {
            return bad(4, "version", format!("version {} of the frame, this program reads {VERSION}", header[4]));
        }
        let word = |at: usize| header[at..at + 4].iter().rev().fold(0_u32, |sum, byte| sum << 8 | u32::from(*byte));
        let length = u64::from(word(8)) | u64::from(word(12)) << 32;
        if length != payload.len() as u64 {
            return bad(8, "length", format!("a payload of {length} bytes, but {} are there", payload.len()));
        }
        if word(16) != checksum(&header[..16], payload) {
            return bad(16, "checksum", "the bytes were damaged on their way".into());
        }
        if header[5] != kind as u8 {
            return bad(5, "kind", format!("kind {}, expected {}", header[5], kind as u8));
        }
        let flags = u16::from_le_bytes([header[6], header[7]]);
        Ok(FrameReader { kind, flags, rest: payload, total: bytes.len(), limits: *limits })
    }

    /// The flags of the header.
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// An error at the byte that is read next.
    pub fn bad(&self, field: &'static str, reason: impl Into<String>) -> BrokerError {
        let at = self.total - self.rest.len();
        BrokerError::BadBytes { format: self.kind.name(), at, field, reason: reason.into() }
    }

    /// # Errors
    /// [`BrokerError::BadBytes`] when bytes are left.
    pub fn end(&self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.bad("payload", "bytes after its end")) }
    }

    fn take(&mut self, field: &'static str, bytes: usize) -> Result<&'a [u8]> {
        let Some((head, tail)) = self.rest.split_at_checked(bytes) else {
            return Err(self.bad(field, format!("{bytes} bytes, but only {} are left", self.rest.len())));
        };
        self.rest = tail;
        Ok(head)
    }

    fn byte(&mut self, field: &'static str) -> Result<u8> {
        Ok(self.take(field, 1)?[0])
    }

    /// What [`FrameWriter::varint`] wrote.
    ///
    /// # Errors
    /// [`BrokerError::BadBytes`], as of every reader below.
    pub fn varint(&mut self, field: &'static str) -> Result<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte(field)?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(self.bad(field, "a number beyond 64 bits"));
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.bad(field, "a number beyond 64 bits"))
    }

    /// A whole number of a smaller kind.
    pub fn number<T: TryFrom<u64>>(&mut self, field: &'static str) -> Result<T> {
        let value = self.varint(field)?;
        T::try_from(value).map_err(|_| self.bad(field, format!("{value} is too large")))
    }

    /// What [`FrameWriter::signed`] wrote.
    pub fn signed(&mut self, field: &'static str) -> Result<i64> {
        let value = self.varint(field)?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// What [`FrameWriter::fixed`] wrote.
    pub fn fixed(&mut self, field: &'static str) -> Result<u64> {
        Ok(self.take(field, 8)?.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    /// What [`FrameWriter::blob`] wrote.
    pub fn blob(&mut self, field: &'static str, max: usize) -> Result<&'a [u8]> {
        let bytes = self.count(field, max)?;
        self.take(field, bytes)
    }

    /// The rest of the payload.
    pub fn raw(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// What [`FrameWriter::text`] wrote.
    pub fn text(&mut self, field: &'static str) -> Result<&'a str> {
        let bytes = self.blob(field, self.limits.text_bytes_max)?;
        std::str::from_utf8(bytes).map_err(|e| self.bad(field, e.to_string()))
    }

    fn count(&mut self, field: &'static str, max: usize) -> Result<usize> {
        let count = self.varint(field)?;
        usize::try_from(count)
            .ok()
            .filter(|count| *count <= max)
            .ok_or_else(|| self.bad(field, format!("{count} elements, more than {max}")))
    }

    /// What [`FrameWriter::ids`] wrote.
    pub fn ids(&mut self, field: &'static str) -> Result<Vec<u32>> {
        self.ids_to(field, self.limits.positions_max)
    }

    fn ids_to(&mut self, field: &'static str, max: usize) -> Result<Vec<u32>> {
        let count = self.count(field, max)?;
        if count == 0 {
            return Ok(Vec::new());
        }
        let bits = u32::from(self.byte(field)?);
        if !(1..=32).contains(&bits) {
            return Err(self.bad(field, format!("ids of {bits} bits")));
        }
        let bytes = (count as u64 * u64::from(bits)).div_ceil(8);
        let packed = self.take(field, usize::try_from(bytes).unwrap_or(usize::MAX))?;
        let mask = u64::MAX >> (64 - bits);
        let (mut held, mut held_bits, mut next) = (0_u64, 0_u32, packed.iter());
        let mut ids = Vec::with_capacity(count);
        for _ in 0..count {
            while held_bits < bits {
                held |= u64::from(next.next().copied().unwrap_or(0)) << held_bits;
                held_bits += 8;
            }
            ids.push((held & mask) as u32);
            held >>= bits;
            held_bits -= bits;
        }
        if held != 0 {
            return Err(self.bad(field, "bits after the last id"));
        }
        Ok(ids)
    }

    /// What [`FrameWriter::floats`] wrote.
    pub fn floats(&mut self, field: &'static str) -> Result<Vec<f32>> {
        self.floats_to(field, self.limits.values_max)
    }

    fn floats_to(&mut self, field: &'static str, max: usize) -> Result<Vec<f32>> {
        let count = self.count(field, max)?;
        let tag = self.byte(field)?;
        let formats = [FloatFormat::F32, FloatFormat::F16, FloatFormat::Bf16];
        let Some(format) = formats.into_iter().find(|format| format.tag() == tag) else {
            return Err(self.bad(field, format!("floats of format {tag}")));
        };
        let bytes = self.take(field, count.saturating_mul(format.bytes()))?;
        Ok(match format {
            FloatFormat::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            FloatFormat::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            FloatFormat::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        })
    }

    /// What [`FrameWriter::id_rows`] wrote.
    pub fn id_rows(&mut self, field: &'static str) -> Result<Rows<u32>> {
        let lengths = self.row_lengths(field)?;
        let values = self.ids_to(field, self.limits.values_max)?;
        self.rows(field, lengths, values)
    }

    /// What [`FrameWriter::float_rows`] wrote.
    pub fn float_rows(&mut self, field: &'static str) -> Result<Rows<f32>> {
        let lengths = self.row_lengths(field)?;
        let values = self.floats(field)?;
        self.rows(field, lengths, values)
    }

    fn row_lengths(&mut self, field: &'static str) -> Result<RowLengths> {
        let rows = self.count(field, self.limits.positions_max)?;
        let width = self.count(field, self.limits.values_max)?;
        if width > 0 {
            return Ok(RowLengths::Same(rows, width - 1));
        }
        let lengths = self.ids(field)?;
        if lengths.len() != rows {
            return Err(self.bad(field, format!("{} lengths for {rows} rows", lengths.len())));
        }
        Ok(RowLengths::Each(lengths))
    }

    fn rows<T: Copy>(&self, field: &'static str, lengths: RowLengths, values: Vec<T>) -> Result<Rows<T>> {
        let (rows, total) = match &lengths {
            RowLengths::Same(rows, width) => (*rows, (*rows as u64).saturating_mul(*width as u64)),
            RowLengths::Each(lengths) => (lengths.len(), lengths.iter().map(|n| u64::from(*n)).sum()),
        };
        if total != values.len() as u64 {
            return Err(self.bad(field, format!("{} values, but the rows have {total}", values.len())));
        }
        let mut table = Rows::with_capacity(rows, values.len());
        let mut rest = values.as_slice();
        for row in 0..rows {
            let length = match &lengths {
                RowLengths::Same(_, width) => *width,
                RowLengths::Each(lengths) => lengths[row] as usize,
            };
            let (head, tail) = rest.split_at(length);
            table.push(head.iter().copied());
            rest = tail;
        }
        Ok(table)
    }
}

enum RowLengths {
    /// How many rows, and how long each is.
    Same(usize, usize),
    Each(Vec<u32>),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits() -> FrameLimits {
        FrameLimits::default()
    }

    #[test]
    fn the_layout_is_fixed() {
        let mut out = FrameWriter::new(Kind::Other, 0x0201, 0);
        out.varint(300);
        out.ids(&[5, 0, 7]);
        let bytes = out.finish();
        assert_eq!(bytes[..16], *b"CHF\n\x01\x06\x01\x02\x06\0\0\0\0\0\0\0");
        // 300 in two bytes; three ids of three bits: 5 | 0 << 3 | 7 << 6.
        assert_eq!(bytes[20..], [0xac, 0x02, 3, 3, 0b1100_0101, 0b1]);
    }

    #[test]
    fn what_is_wrong_with_a_frame_is_named() {
        let good = FrameWriter::new(Kind::Request, 0, 0).finish();
        let changed = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            FrameReader::open(&bytes, Kind::Request, &limits()).unwrap_err().to_string()
        };
        assert!(changed(0, b'X').ends_with("`magic`: not one of our frames"));
        assert!(changed(4, 2).ends_with("`version`: version 2 of the frame, this program reads 1"));
        assert!(changed(8, 1).ends_with("`length`: a payload of 1 bytes, but 0 are there"));
        assert!(changed(17, good[17] ^ 1).contains("`checksum`"));
        let kind = FrameReader::open(&good, Kind::Result, &limits()).unwrap_err().to_string();
        assert!(kind.ends_with("`kind`: kind 1, expected 2"), "{kind}");
        assert!(FrameReader::open(&good[..19], Kind::Request, &limits()).unwrap_err().to_string().contains("`header`"));
        let small = FrameLimits { bytes_max: 10, ..limits() };
        assert!(FrameReader::open(&good, Kind::Request, &small).unwrap_err().to_string().contains("more than 10"));
    }

    #[test]
    fn counts_that_lie_are_refused_before_anything_is_reserved() {
        let read = |write: fn(&mut FrameWriter)| {
            let mut out = FrameWriter::new(Kind::Other, 0, 0);
            write(&mut out);
            let bytes = out.finish();
            let mut reader = FrameReader::open(&bytes, Kind::Other, &limits()).unwrap();
            reader.id_rows("x").unwrap_err().to_string()
        };
        assert!(read(|out| out.varint(u64::MAX)).contains("more than 2097152"));
        let huge = read(|out| {
            out.varint(1 << 21);
            out.varint(129);
            out.varint(1 << 28);
            out.raw(&[1]);
        });
        assert!(huge.contains("bytes, but only 0 are left"), "{huge}");
    }

    #[test]
    fn halves_round_and_never_overflow() {
        let values = [-1.000_3, -12.345_6, -70_000.0, f32::NEG_INFINITY, 0.0];
        let mut out = FrameWriter::new(Kind::Other, 0, 0);
        out.floats(&values, FloatFormat::F16);
        let bytes = out.finish();
        let read = FrameReader::open(&bytes, Kind::Other, &limits()).unwrap().floats("x").unwrap();
        for (a, b) in values[..2].iter().zip(&read) {
            assert!((a - b).abs() <= a.abs() / 2048.0, "{a} {b}");
        }
        assert_eq!(read[2..], [-65504.0, f32::NEG_INFINITY, 0.0]);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            ids in proptest::collection::vec(any::<u32>(), 0..40), shift in 0..32_u32, number: u64, signed: i64, text in ".{0,20}",
            rows in proptest::collection::vec(proptest::collection::vec(-50.0..0.0_f32, 0..4), 0..6), flags: u16,
        ) {
            let ids: Vec<u32> = ids.into_iter().map(|id| id >> shift).collect();
            let rows: Rows<f32> = rows.into_iter().collect();
            let mut out = FrameWriter::new(Kind::Other, flags, 0);
            out.ids(&ids);
            out.varint(number);
            out.signed(signed);
            out.text(&text);
            out.float_rows(&rows, FloatFormat::F32);
            out.fixed(number);
            let bytes = out.finish();
            let mut reader = FrameReader::open(&bytes, Kind::Other, &limits()).unwrap();
            prop_assert_eq!(reader.flags(), flags);
            prop_assert_eq!(reader.ids("x").unwrap(), ids);
            prop_assert_eq!(reader.varint("x").unwrap(), number);
            prop_assert_eq!(reader.signed("x").unwrap(), signed);
            prop_assert_eq!(reader.text("x").unwrap(), text);
            prop_assert_eq!(reader.float_rows("x").unwrap(), rows);
            prop_assert_eq!(reader.fixed("x").unwrap(), number);
            reader.end().unwrap();
        }

        #[test]
        fn every_flipped_bit_is_noticed(payload in proptest::collection::vec(any::<u8>(), 0..50), bit: prop::sample::Index) {
            let mut out = FrameWriter::new(Kind::Part, 3, 0);
            out.raw(&payload);
            let mut bytes = out.finish();
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(FrameReader::open(&bytes, Kind::Part, &limits()).is_err());
        }

        #[test]
        fn any_payload_is_read_without_a_panic(payload in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut out = FrameWriter::new(Kind::Other, 0, 0);
            out.raw(&payload);
            let bytes = out.finish();
            let open = || FrameReader::open(&bytes, Kind::Other, &limits()).unwrap();
            let _ = open().ids("x");
            let _ = open().floats("x");
            let _ = open().id_rows("x");
            let _ = open().float_rows("x");
            let _ = open().text("x");
            let _ = open().signed("x");
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = FrameReader::open(&bytes, Kind::Other, &limits());
        }
    }
}
