//! Drawing tokens on the device: from logits that never leave it, one small download for a token of
//! every sequence.
//!
//! The same draw as [`sample`](super::sampler::sample) without filters: the token at which the
//! cumulative probability passes the random number, in order of ids. Sums are taken block by block, as
//! products with a triangle of ones, since there is no kernel for cumulative sums.

use candle_core::{D, DType, Device, Tensor};

use super::SamplingParams;
use super::sampler::Sampled;
use crate::Result;

/// Tokens of a block.
const BLOCK: usize = 256;

/// Whether [`DeviceSampler::sample`] draws what is asked for.
pub fn is_supported(params: &SamplingParams) -> bool {
    let unfiltered = params.top_k == 0 && params.top_p >= 1.0 && params.min_p <= 0.0;
    params.temperature == 0.0 || unfiltered
}

/// Triangles of ones on the device for one size of vocabulary.
#[derive(Debug)]
pub struct DeviceSampler {
    vocab: usize,
    /// `[blocks, blocks]`
    over_blocks: Tensor,
    /// `[BLOCK, BLOCK]`
    within: Tensor,
}

impl DeviceSampler {
    pub fn new(vocab: usize, device: &Device) -> Result<Self> {
        let ones = |n: usize| -> Result<Tensor> {
            let numbers = Tensor::arange(0, n as u32, device)?;
            let upto = numbers.unsqueeze(1)?.broadcast_le(&numbers.unsqueeze(0)?)?;
            Ok(upto.to_dtype(DType::F32)?)
        };
        Ok(Self {
            vocab,
            over_blocks: ones(vocab.div_ceil(BLOCK))?,
            within: ones(BLOCK)?,
        })
    }

    /// A token for every row of logits `[B, vocab]` in f32, with its log-probability; `uniforms[b]` in
    /// [0, 1) decides at a temperature above 0.
    pub fn sample(
        &self,
        logits: &Tensor,
        temperature: f64,
        uniforms: &[f64],
    ) -> Result<Vec<Sampled>> {
        let (tokens, scaled) = match temperature {
            0.0 => (logits.argmax_keepdim(D::Minus1)?, logits.clone()),
            _ => {
                let scaled = (logits * (1.0 / temperature))?;
                (self.invert(&scaled, uniforms)?, scaled)
            }
        };
        let largest = scaled.max_keepdim(D::Minus1)?;
        let total = scaled
            .broadcast_sub(&largest)?
            .exp()?
            .sum_keepdim(D::Minus1)?;
        let logprobs = ((scaled.gather(&tokens, 1)? - largest)? - total.log()?)?;
        // Ids are exact in f32: vocabularies end long before 2²⁴.
        let both = Tensor::cat(&[tokens.to_dtype(DType::F32)?, logprobs], 1)?;
        let rows: Vec<Vec<f32>> = both.to_vec2()?;
        Ok(rows
            .into_iter()
            .map(|row| Sampled {
                token: row[0] as u32,
                logprob: row[1],
            })
            .collect())
    }

    /// Ids `[B, 1]` of scaled logits `[B, vocab]`.
    fn invert(&self, scaled: &Tensor, uniforms: &[f64]) -> Result<Tensor> {
        let (rows, device) = (scaled.dim(0)?, scaled.device());
        let blocks = self.vocab.div_ceil(BLOCK);
        let largest = scaled.max_keepdim(D::Minus1)?;
        let weights = scaled.broadcast_sub(&largest)?.exp()?;
        let weights = match blocks * BLOCK - self.vocab {
            0 => weights,
            missing => weights.pad_with_zeros(1, 0, missing)?,
        };
        let weights = weights.reshape((rows, blocks, BLOCK))?;
        let sums = weights.sum(D::Minus1)?;
        let upto = sums.matmul(&self.over_blocks)?;
        // Below 1 in f32 as well, so that there is a token to find.
        let below_one = |&u: &f64| (u as f32).min(1.0 - f32::EPSILON);
        let uniforms: Vec<f32> = uniforms.iter().map(below_one).collect();
        let uniforms = Tensor::from_vec(uniforms, (rows, 1), device)?;
        let target = (uniforms * upto.narrow(1, blocks - 1, 1)?)?;
        let block = count(&upto, &target, blocks)?;
        let before = (&upto - &sums)?.gather(&block, 1)?;
        let rest = (target - before)?;

        let first = Tensor::arange(0, rows as u32, device)?.unsqueeze(1)?;
        let at = ((first * blocks as f64)? + &block)?.flatten_all()?;
        let own = weights.reshape((rows * blocks, BLOCK))?;
        let own = own.index_select(&at, 0)?;
        let within = own.matmul(&self.within)?;
        // The same sum in another order may be a little less than what was chosen by.
        let end = (within.narrow(1, BLOCK - 1, 1)? * f64::from(1.0 - f32::EPSILON))?;
        let within = count(&within, &rest.minimum(&end)?, BLOCK)?;
        Ok(((block * BLOCK as f64)? + within)?)
    }
}

/// How many of the sums `[B, n]`, which ascend, are at most the target `[B, 1]`; less than `n` in spite
/// of rounding. Ids `[B, 1]`.
fn count(sums: &Tensor, target: &Tensor, n: usize) -> Result<Tensor> {
    let passed = sums.broadcast_le(target)?.to_dtype(DType::F32)?;
    let passed = passed.sum_keepdim(D::Minus1)?;
    Ok(passed.clamp(0.0, (n - 1) as f64)?.to_dtype(DType::U32)?)
}

#[cfg(test)]
mod tests {
    use super::super::sampler::{Draw, sample};
    use super::*;

    fn params(temperature: f64) -> SamplingParams {
        SamplingParams {
            temperature,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            max_tokens: 1,
            stop: Vec::new(),
            eos: Vec::new(),
            seed: 7,
            step: 0,
        }
    }

    #[test]
    fn draws_are_those_of_the_host() {
        for (vocab, temperature) in [(1000, 1.0), (768, 0.7), (37, 1.5), (1000, 0.0)] {
            let rows = 400;
            let logits: Vec<f32> = (0..rows * vocab)
                .map(|i| ((i * 2_654_435_761) % 1_000_003) as f32 / 1e5 - 5.0)
                .collect();
            let draws: Vec<Draw> = (0..rows as u64)
                .map(|position| Draw {
                    seed: 1,
                    step: 2,
                    prompt: 3,
                    sample: 4,
                    position,
                })
                .collect();
            let tensor = Tensor::from_slice(&logits, (rows, vocab), &Device::Cpu).unwrap();
            let uniforms: Vec<f64> = draws.iter().map(|draw| draw.uniform()).collect();
            let sampler = DeviceSampler::new(vocab, &Device::Cpu).unwrap();
            let got = sampler.sample(&tensor, temperature, &uniforms).unwrap();
            let params = params(temperature);
            assert!(is_supported(&params));
            let mut different = 0;
            for ((row, draw), got) in logits.chunks(vocab).zip(draws).zip(got) {
                let expected = sample(row, &params, draw);
                // A number that lies on the border of two tokens may go either way in f32.
                different += usize::from(got.token != expected.token);
                if got.token == expected.token {
                    assert!((got.logprob - expected.logprob).abs() < 1e-4);
                }
            }
            assert!(different <= 2, "{different} of {rows} differ");
        }
    }
}
