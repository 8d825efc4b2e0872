//! Normal numbers as torch's CPU generator draws them, for what PEFT makes from a seed.
//!
//! The stream is MT19937 (Matsumoto and Nishimura 1998), seeded with the low 32 bits of the seed.
//! Fewer than 16 numbers are made one pair at a time from 53-bit uniforms; more are made from one
//! buffer of 24-bit uniforms in blocks of 16, and where the count is no multiple of 16 the last 16
//! are drawn again. torch evaluates the latter in f32, so that its numbers agree with these to
//! about 1e-6, not to the last bit.

use std::f64::consts::TAU;

/// Numbers of one block of torch's vectorised path.
const BLOCK: usize = 16;

/// The first `n` numbers of `torch.empty(n).normal_(generator=Generator().manual_seed(seed))`.
pub(super) fn torch_normals(seed: u64, n: usize) -> Vec<f64> {
    let mut engine = Mt19937::new(seed as u32);
    if n < BLOCK {
        return pairs(&mut engine, n);
    }
    let mut values: Vec<f64> = (0..n).map(|_| engine.uniform24()).collect();
    for block in values.as_chunks_mut::<BLOCK>().0 {
        box_muller(block);
    }
    if !n.is_multiple_of(BLOCK)
        && let Some(last) = values.last_chunk_mut::<BLOCK>()
    {
        last.fill_with(|| engine.uniform24());
        box_muller(last);
    }
    values
}

fn pairs(engine: &mut Mt19937, n: usize) -> Vec<f64> {
    let mut values = Vec::with_capacity(n + 1);
    while values.len() < n {
        let (angle, length) = (engine.uniform53(), engine.uniform53());
        let radius = (-2.0 * (-length).ln_1p()).sqrt();
        let (sin, cos) = (TAU * angle).sin_cos();
        values.extend([radius * cos, radius * sin]);
    }
    values.truncate(n);
    values
}

/// Turns 16 uniforms into normals: the first half gives the lengths, the second the angles.
fn box_muller(block: &mut [f64; BLOCK]) {
    for j in 0..BLOCK / 2 {
        let radius = (-2.0 * (-block[j]).ln_1p()).sqrt();
        let (sin, cos) = (TAU * block[j + BLOCK / 2]).sin_cos();
        block[j] = radius * cos;
        block[j + BLOCK / 2] = radius * sin;
    }
}

/// The Mersenne Twister with 32-bit words.
struct Mt19937 {
    state: [u32; Self::N],
    next: usize,
}

impl Mt19937 {
    const N: usize = 624;
    const M: usize = 397;

    fn new(seed: u32) -> Self {
        let mut state = [seed; Self::N];
        for i in 1..Self::N {
            let last = state[i - 1];
            state[i] = (last ^ (last >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(i as u32);
        }
        let next = Self::N;
        Self { state, next }
    }

    fn twist(&mut self) {
        for i in 0..Self::N {
            let bits =
                (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % Self::N] & 0x7fff_ffff);
            let odd = if bits & 1 == 0 { 0 } else { 0x9908_b0df };
            self.state[i] = self.state[(i + Self::M) % Self::N] ^ (bits >> 1) ^ odd;
        }
        self.next = 0;
    }

    fn word(&mut self) -> u32 {
        if self.next == Self::N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// In `[0, 1)`, from the low 24 bits of a word: torch's f32.
    fn uniform24(&mut self) -> f64 {
        f64::from(self.word() & 0xff_ffff) * 2f64.powi(-24)
    }

    /// In `[0, 1)`, from the low 53 bits of two words: torch's f64.
    fn uniform53(&mut self) -> f64 {
        let (high, low) = (self.word(), self.word());
        let bits = (u64::from(high) << 32 | u64::from(low)) & ((1 << 53) - 1);
        bits as f64 * 2f64.powi(-53)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Case {
        seed: u64,
        n: usize,
        /// The first and the last 20 numbers.
        first: Vec<f64>,
        last: Vec<f64>,
    }

    #[test]
    fn words_are_those_of_the_published_generator() {
        // The 10,000th word of the default seed, as the C++ standard states it.
        let mut engine = Mt19937::new(5489);
        let last = (0..10_000).map(|_| engine.word()).last();
        assert_eq!(last, Some(4_123_659_995));
    }

    #[test]
    fn normals_are_torchs() {
        let fixture = include_str!("../../tests/fixtures/peft/torch_normal.json");
        let cases: Vec<Case> = serde_json::from_str(fixture).unwrap();
        for case in cases {
            let ours = torch_normals(case.seed, case.n);
            assert_eq!(ours.len(), case.n);
            let last = &ours[case.n - case.last.len()..];
            let pairs = ours.iter().zip(&case.first);
            for (a, b) in pairs.chain(last.iter().zip(&case.last)) {
                let tolerance = 2e-6 * b.abs().max(1.0);
                assert!(
                    (a - b).abs() < tolerance,
                    "{} {}: {a} {b}",
                    case.seed,
                    case.n
                );
            }
        }
    }
}
