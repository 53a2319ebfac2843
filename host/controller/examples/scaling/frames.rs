//! Bytes of one token in the frames between rollouts, teachers and policies. A test of `cosmos-run` holds them against what
//! the frames really take.

/// Bytes of a log-prob, an entropy and a hidden number: f16.
pub const NUMBER: f64 = 2.0;

/// Rollout to teacher: the token's id, and those of its candidates.
pub fn request(id_bits: f64, top_k: f64) -> f64 {
    id_bits / 8.0 * (1.0 + top_k)
}

/// Teacher to policy: log-probs of the token and the candidates; the entropy and the most likely token that are measured
/// beside; hidden numbers.
pub fn result(id_bits: f64, top_k: f64, hidden: f64) -> f64 {
    NUMBER * (1.0 + top_k) + NUMBER + id_bits / 8.0 + NUMBER * hidden
}
