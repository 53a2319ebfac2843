//! A part of a blob in a store.

use super::frame::{FrameLimits, FrameReader, FrameWriter, HEADER_BYTES, Kind};
use crate::{Result, StoreLimits};

/// More than the fields before the data of a part take.
pub(crate) const PART_FIELDS_BYTES: usize = 64;

/// What every part says of its blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartHead {
    /// Bytes of the blob.
    pub total: u64,
    /// How many parts it has.
    pub parts: u64,
    /// Which one this is, counted from 0.
    pub index: u64,
    /// Checksum of the whole blob: parts of another blob of this key do not have it.
    pub sum: u32,
}

/// The frame of a part.
pub fn encode_part(head: PartHead, data: &[u8]) -> Vec<u8> {
    let mut out = FrameWriter::new(Kind::Part, 0, PART_FIELDS_BYTES + data.len());
    for number in [head.total, head.parts, head.index, head.sum.into()] {
        out.fixed(number);
    }
    out.raw(data);
    out.finish()
}

/// Reads a part of a blob of a [`RedisStore`].
///
/// # Errors
/// `BadBytes`.
pub fn decode_part(bytes: &[u8], limits: &StoreLimits) -> Result<(PartHead, Vec<u8>)> {
    let frame =
        FrameLimits { bytes_max: limits.part_bytes_max + HEADER_BYTES + PART_FIELDS_BYTES, ..FrameLimits::default() };
    let mut reader = FrameReader::open(bytes, Kind::Part, &frame)?;
    let head = PartHead {
        total: reader.fixed("total")?,
        parts: reader.fixed("parts")?,
        index: reader.fixed("index")?,
        sum: reader.fixed("sum")? as u32,
    };
    if head.total > limits.blob_bytes_max {
        return Err(reader.bad("total", format!("{} bytes, more than {}", head.total, limits.blob_bytes_max)));
    }
    // Each part but the first of an empty blob has at least a byte.
    if head.parts == 0 || head.parts > head.total.max(1) || head.index >= head.parts {
        return Err(reader.bad("parts", format!("part {} of {}", head.index, head.parts)));
    }
    Ok((head, reader.raw().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(total in 1..1000_u64, index in 0..9_u64, sum: u32, data in proptest::collection::vec(any::<u8>(), 0..50)) {
            let head = PartHead { total: total + 9, parts: 9, index, sum };
            prop_assert_eq!(decode_part(&encode_part(head, &data), &StoreLimits::default()), Ok((head, data)));
        }

        #[test]
        fn numbers_that_lie_are_refused(total: u64, parts: u64, index: u64) {
            let head = PartHead { total, parts, index, sum: 0 };
            let limits = StoreLimits::default();
            let sound = total <= limits.blob_bytes_max && parts > 0 && parts <= total.max(1) && index < parts;
            prop_assert_eq!(decode_part(&encode_part(head, b""), &limits).is_ok(), sound);
        }
    }
}
