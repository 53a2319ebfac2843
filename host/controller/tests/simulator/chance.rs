//! Numbers that a seed fixes.

/// Mixes two numbers into one (splitmix64).
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A generator of random numbers.
#[derive(Debug, Clone)]
pub struct Chance {
    seed: u64,
    count: u64,
}

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self { seed: mix(seed, 1), count: 0 }
    }

    pub fn next(&mut self) -> u64 {
        self.count += 1;
        mix(self.seed, self.count)
    }

    /// Below `n`; 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        n > 0 && self.below(n) == 0
    }
}
