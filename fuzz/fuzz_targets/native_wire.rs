//! Our frames decode or are refused; what decodes survives encoding. The first byte chooses whether the bytes are a whole
//! frame, or a payload that gets a right header and checksum, without which chance would never come past them.
#![no_main]

use cosmos_broker::StoreLimits;
use cosmos_broker::wire::frame::{FrameLimits, FrameReader, FrameWriter, Kind};
use cosmos_broker::wire::native::{
    WireFloats, decode_failure, decode_request, decode_result, encode_failure, encode_request, encode_result,
};
use cosmos_broker::wire::part::{decode_part, encode_part};
use libfuzzer_sys::fuzz_target;

const KINDS: [Kind; 6] = [Kind::Request, Kind::Result, Kind::Failure, Kind::Completion, Kind::Part, Kind::Other];

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    let kind = KINDS[usize::from(choice >> 4) % KINDS.len()];
    let made = (choice & 1 == 1).then(|| {
        let mut out = FrameWriter::new(kind, u16::from(choice >> 1 & 7) << 1 | u16::from(choice >> 7), bytes.len());
        out.raw(bytes);
        out.finish()
    });
    let bytes = made.as_deref().unwrap_or(bytes);
    let limits = FrameLimits { positions_max: 1 << 16, values_max: 1 << 20, ..FrameLimits::default() };
    if let Ok(request) = decode_request(bytes, &limits) {
        let written = encode_request(&request);
        let again = decode_request(&written, &limits).expect("what we wrote can be read");
        assert_eq!(request, again);
    }
    if let Ok(result) = decode_result(bytes, &limits) {
        // Log-probs may be NaN, which equals nothing: the bytes are compared.
        let written = encode_result(&result, WireFloats::default());
        let again = decode_result(&written, &limits).expect("what we wrote can be read");
        assert_eq!(written, encode_result(&again, WireFloats::default()));
    }
    if let Ok((sample, reason)) = decode_failure(bytes, &limits) {
        decode_failure(&encode_failure(sample, &reason), &limits).expect("what we wrote can be read");
    }
    if let Ok((head, data)) = decode_part(bytes, &StoreLimits::default()) {
        assert_eq!(decode_part(&encode_part(head, &data), &StoreLimits::default()), Ok((head, data)));
    }
    if let Ok(mut reader) = FrameReader::open(bytes, kind, &limits) {
        while let Ok(which) = reader.varint("which") {
            let read = match which % 8 {
                0 => reader.ids("x").map(drop),
                1 => reader.floats("x").map(drop),
                2 => reader.id_rows("x").map(drop),
                3 => reader.float_rows("x").map(drop),
                4 => reader.text("x").map(drop),
                5 => reader.signed("x").map(drop),
                6 => reader.fixed("x").map(drop),
                _ => reader.blob("x", 100).map(drop),
            };
            if read.is_err() {
                break;
            }
        }
    }
});
