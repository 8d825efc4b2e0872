//! Softmax statistics over a row of logits: what sampling, scoring and the loss have in common.
//!
//! A row is read once, in blocks of [`BLOCK`] columns: each gives its maximum, Σ e and Σ e·z
//! relative to that maximum in sixteen lanes, and the blocks are joined in order in `f64`. The
//! same blocks come out of the fused head, so both give the same bits.

use super::isa::{Isa, dispatch};
use super::simd::{LANES, Simd};
use super::tile::DEPTH;

/// Columns of a block: whole blocks of the products' depth, and short enough for the first-level
/// cache. Part of what defines a result's bits.
pub(super) const BLOCK: usize = 4 * DEPTH;

/// Log-probability of a token, entropy of its distribution (both in nats), and the log-sum-exp of
/// the row, all of logits / temperature.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TokenScores {
    pub logprob: f32,
    pub entropy: f32,
    pub lse: f32,
}

/// Scores of `target` under softmax(`logits` · `inverse_temperature`).
///
/// # Panics
/// When `target` is not a column.
pub fn token_scores(logits: &[f32], target: usize, inverse_temperature: f32) -> TokenScores {
    let isa = Isa::current();
    let mut state = Softmax::default();
    for block in logits.chunks(BLOCK) {
        state.join(Softmax::of(isa, block, inverse_temperature));
    }
    state.scores(logits[target], inverse_temperature)
}

/// The token at which the cumulative probability under softmax(`logits` · `inverse_temperature`), in
/// order of ids, passes `uniform` of [0, 1), and its scores.
///
/// The row is read once; of its blocks, only the one that holds the token is read again.
///
/// # Panics
/// When there are no logits.
pub fn draw_token(logits: &[f32], inverse_temperature: f32, uniform: f64) -> (usize, TokenScores) {
    let isa = Isa::current();
    let mut state = Softmax::default();
    let blocks: Vec<Softmax> = logits
        .chunks(BLOCK)
        .map(|logits| {
            let block = Softmax::of(isa, logits, inverse_temperature);
            state.join(block);
            block
        })
        .collect();
    let token = state.find(&blocks, uniform, |index, weights| {
        let logits = &logits[index * BLOCK..];
        let logits = &logits[..BLOCK.min(logits.len())];
        let weights = &mut weights[..logits.len()];
        exp_shifted(logits, inverse_temperature, blocks[index].max, weights);
        logits.len()
    });
    (token, state.scores(logits[token], inverse_temperature))
}

/// Replace logits by the gradient of `coefficient · log-probability of target`:
/// coefficient · (onehot − softmax) · inverse_temperature. `lse` is that of [`token_scores`].
pub fn logits_gradient(
    logits: &mut [f32],
    target: usize,
    inverse_temperature: f32,
    lse: f32,
    coefficient: f32,
) {
    let factor = coefficient * inverse_temperature;
    gradient(Isa::current(), logits, inverse_temperature, lse, -factor);
    logits[target] += factor;
}

/// `out = e^(x · factor − shift)`, element by element.
pub(super) fn exp_shifted(x: &[f32], factor: f32, shift: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    out.copy_from_slice(x);
    gradient(Isa::current(), out, factor, shift, 1.0);
}

/// Statistics of the columns seen so far, relative to their maximum.
#[derive(Debug, Clone, Copy)]
pub(super) struct Softmax {
    max: f32,
    /// Σ e^(z − max)
    sum: f64,
    /// Σ e^(z − max) · (z − max)
    weighted: f64,
}

impl Default for Softmax {
    fn default() -> Self {
        Self {
            max: f32::NEG_INFINITY,
            sum: 0.0,
            weighted: 0.0,
        }
    }
}

impl Softmax {
    /// Those of one block of columns.
    fn of(isa: Isa, logits: &[f32], inverse_temperature: f32) -> Self {
        let (max, sum, weighted) = block_sums(isa, logits, inverse_temperature);
        Self {
            max,
            sum: f64::from(sum),
            weighted: f64::from(weighted),
        }
    }

    /// Go on with the next block of columns.
    fn join(&mut self, mut block: Self) {
        let max = block.max;
        if max == f32::NEG_INFINITY && block.sum == 0.0 {
            return; // all columns are impossible
        }
        let largest = if self.max > max { self.max } else { max };
        self.move_to(largest);
        block.move_to(largest);
        self.sum += block.sum;
        self.weighted += block.weighted;
    }

    /// Make the sums relative to a maximum which is not smaller.
    fn move_to(&mut self, max: f32) {
        if self.max != max {
            if self.sum > 0.0 {
                let difference = f64::from(self.max) - f64::from(max);
                let factor = difference.exp();
                self.weighted = factor * (self.weighted + difference * self.sum);
                self.sum *= factor;
            }
            self.max = max;
        }
    }

    /// The column at which the cumulative weight of these `blocks`, of which `self` is the whole, passes
    /// `uniform`. `weigh` writes the weights of a block relative to its maximum, and how many there are.
    fn find(
        &self,
        blocks: &[Self],
        uniform: f64,
        weigh: impl Fn(usize, &mut [f32; BLOCK]) -> usize,
    ) -> usize {
        let mut rest = uniform * self.sum;
        let mut likely = None;
        let mut weights = [0.0; BLOCK];
        for (index, block) in blocks.iter().enumerate() {
            let factor = (f64::from(block.max) - f64::from(self.max)).exp();
            let sum = factor * block.sum;
            // Not where it is NaN: what comes of that is the caller's to notice.
            if sum.is_nan() || sum <= 0.0 {
                continue;
            }
            likely = Some(index);
            if rest >= sum {
                rest -= sum;
                continue;
            }
            let count = weigh(index, &mut weights);
            let mut last = 0;
            for (offset, &weight) in weights[..count].iter().enumerate() {
                if weight > 0.0 {
                    last = offset;
                    let weight = factor * f64::from(weight);
                    if rest < weight {
                        break;
                    }
                    rest -= weight;
                }
            }
            return index * BLOCK + last;
        }
        // Rounding left a remainder past the end: the last token with any weight.
        let Some(index) = likely else { return 0 };
        let count = weigh(index, &mut weights);
        let last = weights[..count].iter().rposition(|&weight| weight > 0.0);
        index * BLOCK + last.unwrap_or(0)
    }

    /// Scores of the token with this logit.
    pub(super) fn scores(&self, logit: f32, inverse_temperature: f32) -> TokenScores {
        let log_sum = self.sum.ln();
        let scaled = f64::from(logit * inverse_temperature);
        TokenScores {
            logprob: (scaled - f64::from(self.max) - log_sum) as f32,
            entropy: (log_sum - self.weighted / self.sum) as f32,
            lse: (f64::from(self.max) + log_sum) as f32,
        }
    }
}

/// Maximum of z = logits · inverse, Σ e^(z − max), Σ e^(z − max) · (z − max).
#[inline(always)]
fn block_sums_generic<S: Simd>(s: S, logits: &[f32], inverse: f32) -> (f32, f32, f32) {
    let inverse = s.splat(inverse);
    let (blocks, rest) = logits.as_chunks::<LANES>();
    let mut max = s.splat(f32::NEG_INFINITY);
    for block in blocks {
        max = s.max(max, s.mul(s.load(block), inverse));
    }
    let last = s.mul(s.load_part(rest, f32::NEG_INFINITY), inverse);
    let max = s.max_lane(s.max(max, last));
    let shift = s.splat(if max == f32::NEG_INFINITY { 0.0 } else { max });
    let (mut sum, mut weighted) = (s.zero(), s.zero());
    // Far below the maximum e is 0: the bound keeps 0 · ∞ out of the second sum, NaN passes.
    let far = s.splat(-200.0);
    for block in blocks {
        let z = s.max(far, s.sub(s.mul(s.load(block), inverse), shift));
        let e = s.exp(z);
        sum = s.add(sum, e);
        weighted = s.fma(e, z, weighted);
    }
    let z = s.max(far, s.sub(last, shift));
    let e = s.exp(z);
    sum = s.add(sum, e);
    weighted = s.fma(e, z, weighted);
    (max, s.sum(sum), s.sum(weighted))
}

/// `x ⟵ factor · e^(x · inverse − shift)`
#[inline(always)]
fn gradient_generic<S: Simd>(s: S, x: &mut [f32], inverse: f32, shift: f32, factor: f32) {
    let (inverse, shift, factor) = (s.splat(inverse), s.splat(shift), s.splat(factor));
    let (blocks, rest) = x.as_chunks_mut::<LANES>();
    for block in blocks {
        let value = scaled_exp(s, s.load(block), inverse, shift, factor);
        s.store(block, value);
    }
    if !rest.is_empty() {
        let value = scaled_exp(s, s.load_part(rest, 0.0), inverse, shift, factor);
        s.store_part(rest, value);
    }
}

/// `factor · e^(x · inverse − shift)`. A function rather than a closure, which would not be
/// compiled for the instruction set of its caller.
#[inline(always)]
fn scaled_exp<S: Simd>(s: S, x: S::V, inverse: S::V, shift: S::V, factor: S::V) -> S::V {
    s.mul(s.exp(s.sub(s.mul(x, inverse), shift)), factor)
}

dispatch! { fn block_sums(logits: &[f32], inverse: f32) -> (f32, f32, f32) = block_sums_generic }
dispatch! { fn gradient(x: &mut [f32], inverse: f32, shift: f32, factor: f32) = gradient_generic }

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_near, noise, size};
    use super::*;

    #[test]
    fn matches_f64_with_the_same_bits_everywhere() {
        let long = size(2000, BLOCK + 20);
        for (columns, spread, inverse) in [(1, 1.0, 1.0), (17, 5.0, 0.7), (long, 30.0, 1.25)] {
            let logits: Vec<f32> = noise(columns, 1).iter().map(|x| spread * x).collect();
            let target = columns / 3;
            let z: Vec<f64> = logits
                .iter()
                .map(|&x| f64::from(x) * f64::from(inverse))
                .collect();
            let lse = z.iter().map(|z| z.exp()).sum::<f64>().ln();
            let entropy: f64 = z.iter().map(|z| (z - lse).exp() * (lse - z)).sum();
            let run = || token_scores(&logits, target, inverse);
            let scores = run();
            let got = [scores.logprob, scores.entropy, scores.lse];
            assert_near(&got, &[z[target] - lse, entropy, lse], 1.0);
            let derive = || {
                let mut gradient = logits.clone();
                logits_gradient(&mut gradient, target, inverse, scores.lse, -2.5);
                let mut p = vec![0.0; columns];
                exp_shifted(&logits, inverse, scores.lse, &mut p);
                (gradient, p)
            };
            let (gradient, p) = derive();
            let want: Vec<f64> = z.iter().map(|z| (z - lse).exp()).collect();
            assert_near(&p, &want, 5.0);
            let factor = -2.5 * f64::from(inverse);
            let want: Vec<f64> = (0..columns)
                .map(|i| factor * (f64::from(u8::from(i == target)) - want[i]))
                .collect();
            assert_near(&gradient, &want, 10.0);
            for isa in Isa::available() {
                assert_eq!(isa.with(run), scores);
                assert_eq!(isa.with(derive), (gradient.clone(), p.clone()));
            }
        }
    }

    #[test]
    fn a_draw_inverts_the_cumulative_distribution() {
        for columns in [1, 20, BLOCK, 3 * BLOCK + 5] {
            let logits: Vec<f32> = noise(columns, 2).iter().map(|x| 8.0 * x).collect();
            let weights: Vec<f64> = logits.iter().map(|&x| (f64::from(x) * 0.7).exp()).collect();
            let total: f64 = weights.iter().sum();
            for step in 0..=50 {
                let uniform = (f64::from(step) / 50.0).min(1.0 - 1e-16);
                let draw = || draw_token(&logits, 0.7, uniform);
                let (token, scores) = draw();
                let before: f64 = weights[..token].iter().sum();
                assert!(before <= total * uniform * (1.0 + 1e-5));
                assert!(before + weights[token] >= total * uniform * (1.0 - 1e-5));
                assert_eq!(scores, token_scores(&logits, token, 0.7));
                for isa in Isa::available() {
                    assert_eq!(isa.with(draw), (token, scores));
                }
            }
        }
        let nan = [f32::NAN; 3];
        assert!(draw_token(&nan, 1.0, 0.5).1.logprob.is_nan());
        let only = [f32::NEG_INFINITY, 3.0, f32::NEG_INFINITY];
        assert_eq!(draw_token(&only, 1.0, 1.0 - 1e-16).0, 1);
    }

    #[test]
    fn impossible_columns_count_nothing_and_nan_shows() {
        let mut logits = vec![f32::NEG_INFINITY; 3 * BLOCK];
        logits[2 * BLOCK + 5] = 2.0;
        logits[2 * BLOCK + 7] = 2.0;
        let scores = token_scores(&logits, 2 * BLOCK + 5, 1.0);
        assert_eq!(scores.logprob, 0.5f32.ln());
        assert_eq!(scores.entropy, 2.0f32.ln());
        assert_eq!(token_scores(&logits, 0, 1.0).logprob, f32::NEG_INFINITY);
        logits[1] = f32::NAN;
        assert!(token_scores(&logits, 2 * BLOCK + 5, 1.0).logprob.is_nan());
    }
}
