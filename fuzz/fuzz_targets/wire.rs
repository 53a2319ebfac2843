//! Frames of the original decode or are refused; what decodes survives encoding.
#![no_main]

use cosmos_broker::wire::cosmos_rl::{decode_request, decode_scores, encode_request, encode_scores};
use cosmos_broker::wire::cosmos_rl::WireLimits;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let limits = WireLimits::default();
    if let Ok(request) = decode_request(bytes, &limits) {
        let written = encode_request(&request);
        let again = decode_request(&written, &limits).expect("what we wrote can be read");
        assert_eq!(written, encode_request(&again));
    }
    if let Ok(scores) = decode_scores(bytes, &limits) {
        let written = encode_scores(&scores);
        let again = decode_scores(&written, &limits).expect("what we wrote can be read");
        assert_eq!(written, encode_scores(&again));
    }
});
