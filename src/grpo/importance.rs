//! Weights that correct for rollouts sampled by another engine: its probabilities differ a little
//! from the trainer's for the same weights.

use crate::config::{GrpoConfig, ImportanceSamplingMode};

/// π_trainer / π_sampler at sampling time, within bounds: what a completion's policy loss is
/// multiplied with.
#[derive(Debug, Clone, PartialEq)]
pub enum SamplerRatio {
    /// The trainer sampled itself: 1.
    One,
    /// One factor a token.
    Token(Vec<f64>),
    /// One factor for the completion.
    Sequence(f64),
}

/// Bounds and granularity of the correction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerCorrection {
    pub mode: ImportanceSamplingMode,
    pub min: Option<f64>,
    pub max: Option<f64>,
}

impl SamplerCorrection {
    /// `None` when the configuration turns the correction off.
    pub fn new(config: &GrpoConfig) -> Option<Self> {
        config.importance_sampling_correction.then_some(Self {
            mode: config.importance_sampling_mode,
            min: config.importance_sampling_clip_min,
            max: config.importance_sampling_clip_max,
        })
    }

    /// The ratio of one completion from its log-probs under the trainer and under the sampler.
    /// A token whose sampler log-prob is NaN (unknown) is taken as agreeing.
    pub fn ratio(&self, trainer: &[f64], sampler: &[f64]) -> SamplerRatio {
        let difference = trainer.iter().zip(sampler).map(|(t, s)| match t - s {
            d if d.is_nan() => 0.0,
            d => d,
        });
        match self.mode {
            ImportanceSamplingMode::TokenTruncate | ImportanceSamplingMode::TokenMask => {
                SamplerRatio::Token(difference.map(|d| self.bound(d.exp())).collect())
            }
            ImportanceSamplingMode::SequenceTruncate | ImportanceSamplingMode::SequenceMask => {
                SamplerRatio::Sequence(self.bound(difference.sum::<f64>().exp()))
            }
        }
    }

    fn bound(&self, ratio: f64) -> f64 {
        let min = self.min.unwrap_or(f64::NEG_INFINITY);
        let max = self.max.unwrap_or(f64::INFINITY);
        match self.mode {
            ImportanceSamplingMode::TokenTruncate | ImportanceSamplingMode::SequenceTruncate => {
                ratio.max(min).min(max)
            }
            ImportanceSamplingMode::TokenMask | ImportanceSamplingMode::SequenceMask => {
                if (min..=max).contains(&ratio) {
                    ratio
                } else {
                    0.0
                }
            }
        }
    }
}

impl SamplerRatio {
    /// The factor of token `t`.
    pub fn at(&self, t: usize) -> f64 {
        match self {
            Self::One => 1.0,
            Self::Token(ratios) => ratios[t],
            Self::Sequence(ratio) => *ratio,
        }
    }

    /// The values the metrics `sampling/importance_sampling_ratio/*` are taken over.
    pub fn values(&self) -> &[f64] {
        match self {
            Self::One => &[],
            Self::Token(ratios) => ratios,
            Self::Sequence(ratio) => std::slice::from_ref(ratio),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpo::fixture::{assert_close, parse, rows};

    #[test]
    fn ratios_agree_with_trl() {
        let fixture = parse(include_str!("../../tests/fixtures/trl_advantages.json"));
        let (trainer, sampler) = (
            rows(&fixture["trainer_logps"]),
            rows(&fixture["sampler_logps"]),
        );
        let cases = fixture["ratios"].as_array().unwrap();
        assert_eq!(cases.len(), 8);
        for case in cases {
            let correction = SamplerCorrection {
                mode: serde_json::from_value(case["mode"].clone()).unwrap(),
                min: case["clip_min"].as_f64(),
                max: case["clip_max"].as_f64(),
            };
            let mut all = Vec::new();
            for (i, expected) in rows(&case["ratios"]).iter().enumerate() {
                let ratio = correction.ratio(&trainer[i], &sampler[i]);
                assert_close(&format!("{correction:?}"), ratio.values(), expected, 1e-6);
                all.extend_from_slice(ratio.values());
            }
            let metric = |name: &str| {
                case["metrics"][format!("sampling/importance_sampling_ratio/{name}")].as_f64()
            };
            let mean = all.iter().sum::<f64>() / all.len() as f64;
            assert!((mean - metric("mean").unwrap()).abs() < 1e-6);
        }
    }

    #[test]
    fn an_unknown_sampler_probability_changes_nothing() {
        let correction = SamplerCorrection {
            mode: ImportanceSamplingMode::TokenTruncate,
            min: None,
            max: Some(2.0),
        };
        assert_eq!(
            correction.ratio(&[-1.0, -1.0], &[f64::NAN, -9.0]),
            SamplerRatio::Token(vec![1.0, 2.0])
        );
    }
}
