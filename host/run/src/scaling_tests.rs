//! What `docs/scaling.md` counts with, against the frames.

use cosmos_broker::wire::frame::FloatFormat;
use cosmos_broker::wire::native::{TokenBytes, WireFloats, bytes_per_token};

#[path = "../../controller/examples/scaling/frames.rs"]
mod frames;

#[test]
fn the_scaling_example_counts_the_bytes_of_the_real_frames() {
    let floats = WireFloats { logprobs: FloatFormat::F16, hidden: FloatFormat::F16 };
    for (bits, vocab) in [(18.0, 151_936_u32), (15.0, 32_000)] {
        for (top_k, hidden) in [(0, 0), (64, 0), (-1, 5120)] {
            let candidates = f64::from(top_k.max(0));
            let counted = TokenBytes {
                request: frames::request(bits, candidates),
                result: frames::result(bits, candidates, hidden as f64),
            };
            assert_eq!(counted, bytes_per_token(top_k, vocab, floats, hidden, true));
        }
    }
}
