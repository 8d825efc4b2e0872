//! Drawing a token from a row of logits, with a random number fixed by a counter.

use super::SamplingParams;
use crate::ops::cpu;
use crate::ops::head::inverse_temperature;
use crate::ops::random::Stream;

/// Where a draw stands in a run. It alone fixes the random number, whatever the scheduling.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    pub seed: u64,
    pub step: u64,
    /// [`super::Request::id`]
    pub prompt: u64,
    pub sample: u64,
    /// Position in the completion.
    pub position: u64,
}

impl Draw {
    /// Uniform in [0, 1) with 53 bits. Steps, prompts, samples and positions beyond 2³² wrap.
    pub fn uniform(self) -> f64 {
        /// "rollout" in ASCII: keeps these draws apart from other users of the run's seed.
        const ROLLOUT: u64 = 0x72_6f6c_6c6f_7574;
        let stream = Stream {
            seed: self.seed ^ ROLLOUT,
            domain: self.step as u32,
            index: self.prompt as u32,
        };
        stream.uniform_pair(self.sample << 32 | self.position)[0]
    }
}

/// A drawn token and its log-probability under softmax(logits / temperature) over the whole
/// vocabulary (temperature 1 when greedy).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    pub token: u32,
    pub logprob: f32,
}

/// Draws a token from a row of logits `[vocab]`.
///
/// Filters apply in the order of transformers: temperature, top-k, top-p, min-p. Among equal logits
/// the lowest id comes first.
pub fn sample(logits: &[f32], params: &SamplingParams, draw: Draw) -> Sampled {
    let greedy = params.temperature == 0.0;
    let temperature = if greedy { 1.0 } else { params.temperature };
    let inverse = inverse_temperature(temperature);
    let whole = params.top_k == 0 && params.top_p >= 1.0 && params.min_p <= 0.0;
    let (token, scores) = if !greedy && whole {
        cpu::draw_token(logits, inverse, draw.uniform())
    } else {
        let token = match greedy {
            true => argmax(logits),
            false => filtered(logits, inverse, params, draw.uniform()),
        };
        (token, cpu::token_scores(logits, token, inverse))
    };
    Sampled {
        token: token as u32,
        logprob: scores.logprob,
    }
}

fn argmax(logits: &[f32]) -> usize {
    let max = largest(logits);
    logits.iter().position(|&l| l == max).unwrap_or(0)
}

/// The largest value that is a number, in lanes: what a compiler makes vectors of.
fn largest(logits: &[f32]) -> f32 {
    let (blocks, rest) = logits.as_chunks::<32>();
    let mut lanes = [f32::NEG_INFINITY; 32];
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    let all = lanes.iter().chain(rest).copied();
    all.fold(f32::NEG_INFINITY, |max, x| if x > max { x } else { max })
}

fn filtered(logits: &[f32], inverse: f32, params: &SamplingParams, uniform: f64) -> usize {
    let max = largest(logits);
    let mut kept: Vec<(f64, usize)> = logits
        .iter()
        .enumerate()
        .map(|(id, &l)| (f64::from((l - max) * inverse).exp(), id))
        .collect();
    let descending = |a: &(f64, usize), b: &(f64, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if params.top_k > 0 && params.top_k < kept.len() {
        kept.select_nth_unstable_by(params.top_k - 1, descending);
        kept.truncate(params.top_k);
    }
    kept.sort_unstable_by(descending);
    if params.top_p < 1.0 {
        let total: f64 = kept.iter().map(|k| k.0).sum();
        let mut mass = 0.0;
        let enough = kept.iter().position(|k| {
            mass += k.0;
            mass >= params.top_p * total
        });
        kept.truncate(enough.map_or(kept.len(), |index| index + 1));
    }
    let floor = params.min_p * kept[0].0;
    kept.retain(|k| k.0 >= floor);
    let mut rest = uniform * kept.iter().map(|k| k.0).sum::<f64>();
    for &(weight, id) in &kept {
        if rest < weight {
            return id;
        }
        rest -= weight;
    }
    kept[kept.len() - 1].1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(temperature: f64, top_k: usize, top_p: f64, min_p: f64) -> SamplingParams {
        SamplingParams {
            temperature,
            top_p,
            top_k,
            min_p,
            max_tokens: 1,
            stop: Vec::new(),
            eos: Vec::new(),
            seed: 7,
            step: 0,
        }
    }

    fn draw(position: u64) -> Draw {
        Draw {
            seed: 7,
            step: 3,
            prompt: 11,
            sample: 2,
            position,
        }
    }

    /// Fractions of 40,000 draws against the probabilities they are drawn from.
    fn check(params: &SamplingParams, logits: &[f32], expected: &[f64]) {
        let n = 40_000;
        let mut counts = vec![0.0; logits.len()];
        for position in 0..n {
            counts[sample(logits, params, draw(position)).token as usize] += 1.0 / n as f64;
        }
        for (id, (count, expected)) in counts.iter().zip(expected).enumerate() {
            let error = (expected * (1.0 - expected) / n as f64).sqrt();
            assert!(
                (count - expected).abs() <= 4.5 * error + 1e-9,
                "token {id}: {count} drawn, {expected} expected"
            );
        }
    }

    fn logits() -> [f32; 4] {
        [0.4f32, 0.1, 0.3, 0.2].map(f32::ln)
    }

    #[test]
    fn draws_follow_the_distribution() {
        check(&params(1.0, 0, 1.0, 0.0), &logits(), &[0.4, 0.1, 0.3, 0.2]);
        let squares = [0.16, 0.01, 0.09, 0.04].map(|p| p / 0.30);
        check(&params(0.5, 0, 1.0, 0.0), &logits(), &squares);
    }

    #[test]
    fn draws_follow_the_distribution_across_blocks() {
        let logits: Vec<f32> = (0..1000)
            .map(|i| if i % 250 == 249 { 0.0 } else { -30.0 })
            .collect();
        let expected: Vec<f64> = logits
            .iter()
            .map(|&l| if l == 0.0 { 0.25 } else { 0.0 })
            .collect();
        check(&params(1.0, 0, 1.0, 0.0), &logits, &expected);
    }

    #[test]
    fn filters_cut_the_tail() {
        let top2 = [4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0];
        check(&params(1.0, 2, 1.0, 0.0), &logits(), &top2);
        check(&params(1.0, 0, 0.65, 0.0), &logits(), &top2);
        check(&params(1.0, 0, 1.0, 0.6), &logits(), &top2);
        check(&params(1.0, 1, 1.0, 0.0), &logits(), &[1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest_and_reports_temperature_one() {
        let got = sample(&[0.0, 1.0, 1.0], &params(0.0, 0, 1.0, 0.0), draw(0));
        assert_eq!(got.token, 1);
        let expected = 1.0 - (1.0 + 2.0 * std::f32::consts::E).ln();
        assert!((got.logprob - expected).abs() < 1e-6);
    }

    #[test]
    fn every_word_of_the_counter_matters() {
        let base = draw(5);
        let others = [
            Draw { seed: 8, ..base },
            Draw { step: 4, ..base },
            Draw { prompt: 12, ..base },
            Draw { sample: 3, ..base },
            Draw {
                position: 6,
                ..base
            },
        ];
        for other in others {
            assert_ne!(base.uniform(), other.uniform());
        }
        let mean: f64 = (0..10_000).map(|p| draw(p).uniform()).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.012, "mean of uniforms is {mean}");
    }
}
