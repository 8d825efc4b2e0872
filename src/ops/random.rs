//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
//! as 1, 2, 3", SC 2011). A draw is a pure function of (seed, stream, block), so that nothing
//! depends on scheduling, on the number of threads or on what was drawn before.

/// Identifies a family of draws: one seed, and three words that separate its users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    pub seed: u64,
    /// Who draws: keeps two users of one seed apart.
    pub domain: u32,
    /// Which of that user's objects (a module, a prompt, …).
    pub index: u32,
}

impl Stream {
    /// Four random words of block `block` of this stream.
    pub fn block(&self, block: u64) -> [u32; 4] {
        let counter = [block as u32, (block >> 32) as u32, self.index, self.domain];
        philox(counter, [self.seed as u32, (self.seed >> 32) as u32])
    }

    /// Two uniform numbers of `[0, 1)` with 53 random bits each.
    pub fn uniform_pair(&self, block: u64) -> [f64; 2] {
        let [a, b, c, d] = self.block(block);
        let unit = |high: u32, low: u32| {
            ((u64::from(high) << 32 | u64::from(low)) >> 11) as f64 * 2f64.powi(-53)
        };
        [unit(a, b), unit(c, d)]
    }

    /// Two independent standard normal numbers (Box–Muller on [`Stream::uniform_pair`]).
    pub fn normal_pair(&self, block: u64) -> [f64; 2] {
        let [u, w] = self.uniform_pair(block);
        let radius = (-2.0 * (-u).ln_1p()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * w).sin_cos();
        [radius * cos, radius * sin]
    }

    /// The first `n` standard normal numbers of the stream.
    pub fn normals(&self, n: usize) -> Vec<f64> {
        (0..n.div_ceil(2) as u64)
            .flat_map(|block| self.normal_pair(block))
            .take(n)
            .collect()
    }

    /// The first `n` uniform numbers of the stream, in `[0, 1)`.
    pub fn uniforms(&self, n: usize) -> Vec<f64> {
        (0..n.div_ceil(2) as u64)
            .flat_map(|block| self.uniform_pair(block))
            .take(n)
            .collect()
    }
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_published_vectors() {
        // Known answers of Random123's philox4x32 with 10 rounds.
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        assert_eq!(
            philox(
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0]
            ),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn normals_have_the_right_moments_and_streams_differ() {
        let stream = Stream {
            seed: 7,
            domain: 1,
            index: 3,
        };
        let draws = stream.normals(40_001);
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let moment = |p: i32| draws.iter().map(|z| z.powi(p)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.02, "mean {mean}");
        assert!((moment(2) - 1.0).abs() < 0.03, "variance {}", moment(2));
        assert!(
            (moment(4) - 3.0).abs() < 0.25,
            "fourth moment {}",
            moment(4)
        );
        assert_eq!(draws[..10], stream.normals(10));
        assert_ne!(draws[..4], Stream { index: 4, ..stream }.normals(4));
        assert_ne!(
            draws[..4],
            Stream {
                domain: 2,
                ..stream
            }
            .normals(4)
        );
        assert_ne!(draws[..4], Stream { seed: 8, ..stream }.normals(4));
    }
}
