//! The output head over selected rows: log-probabilities of given tokens, the entropy of their
//! distributions, and the gradient of both, a chunk of rows at a time so that the logits of a whole
//! batch never exist.

use candle_core::{D, DType, Tensor};

use super::cpu::{self, PackedMatrix, TokenScores};
use super::linear::Matrix;
use super::rms_norm::wide;
use super::{cpu_slice, from_cpu};
use crate::Result;

/// Rows whose logits exist at one time: 128 rows of a 150k vocabulary are 77 MB.
const CHUNK: usize = 128;

/// Natural log-probabilities and entropies of softmax(logits / temperature), one per row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores {
    pub logprobs: Vec<f64>,
    pub entropies: Vec<f64>,
}

/// Logits `[N, vocab]` in f32 (f64 for f64 models) of hidden `[N, h]`.
pub fn logits(hidden: &Tensor, head: &Matrix) -> Result<Tensor> {
    wide(&head.forward(hidden, None)?)
}

/// Scores of `targets[n]` under the distribution of row `n` of hidden `[N, h]`.
pub fn forward(
    hidden: &Tensor,
    head: &Matrix,
    targets: &[u32],
    temperature: f64,
) -> Result<Scores> {
    let Matrix::Packed(packed) = head else {
        let ids = Tensor::new(targets, hidden.device())?;
        let mut rows = OnDevice::default();
        for (start, chunk) in chunks(hidden, targets)? {
            let ids = ids.narrow(0, start, chunk.dim(0)?)?;
            rows.push(
                &Distribution::of(&logits(&chunk, head)?, temperature)?,
                &ids,
            )?;
        }
        return rows.scores();
    };
    let mut scores = Scores::default();
    let mut memory = Vec::new();
    for (start, chunk) in chunks(hidden, targets)? {
        let targets = &targets[start..start + chunk.dim(0)?];
        let logits = packed_logits(&chunk, packed, &mut memory)?;
        scores.extend(cpu_scores(logits, targets, temperature));
    }
    Ok(scores)
}

/// Sees the gradient of a chunk of logits and the hidden states it belongs to: a trained head's.
pub type OnLogits<'a> = &'a mut dyn FnMut(&Tensor, &Tensor) -> Result<()>;

/// Gradient of L with respect to hidden, given `coefficients[n]` = dL/dlogp of target `n`; the
/// scores of [`forward`] come with it.
///
/// dL/dlogits = coefficient · (onehot(target) − softmax) / temperature.
pub fn backward(
    hidden: &Tensor,
    head: &Matrix,
    targets: &[u32],
    temperature: f64,
    coefficients: &[f64],
    mut on_logits: Option<OnLogits<'_>>,
) -> Result<(Tensor, Scores)> {
    let mut parts = Vec::new();
    let scores = match head {
        Matrix::Packed(w) => {
            let mut scores = Scores::default();
            let mut memory = Vec::new();
            for (start, chunk) in chunks(hidden, targets)? {
                let end = start + chunk.dim(0)?;
                let (targets, coefficients) = (&targets[start..end], &coefficients[start..end]);
                let logits = packed_logits(&chunk, w, &mut memory)?;
                scores.extend(cpu_gradient(logits, targets, temperature, coefficients));
                if let Some(on_logits) = &mut on_logits {
                    let dlogits = from_cpu(logits.to_vec(), (end - start, w.out_features()))?;
                    on_logits(&dlogits, &chunk)?;
                }
                let mut dhidden = vec![0.0; (end - start) * w.in_features()];
                w.backward(logits, end - start, &mut dhidden, false);
                parts.push(from_cpu(dhidden, (end - start, w.in_features()))?);
            }
            scores
        }
        Matrix::Dense(_) => {
            let device = hidden.device();
            let ids = Tensor::new(targets, device)?;
            let scaled: Vec<f64> = coefficients.iter().map(|c| c / temperature).collect();
            let scaled = Tensor::new(scaled, device)?;
            let mut rows = OnDevice::default();
            for (start, chunk) in chunks(hidden, targets)? {
                let len = chunk.dim(0)?;
                let (ids, scaled) = (ids.narrow(0, start, len)?, scaled.narrow(0, start, len)?);
                let distribution = Distribution::of(&logits(&chunk, head)?, temperature)?;
                rows.push(&distribution, &ids)?;
                let dlogits = distribution
                    .gradient(&ids, &scaled)?
                    .to_dtype(hidden.dtype())?;
                if let Some(on_logits) = &mut on_logits {
                    on_logits(&dlogits, &chunk)?;
                }
                parts.push(head.backward(&dlogits)?);
            }
            rows.scores()?
        }
    };
    let dhidden = if parts.is_empty() {
        hidden.zeros_like()?
    } else {
        Tensor::cat(&parts, 0)?
    };
    Ok((dhidden, scores))
}

/// Logits `[rows, vocab]` of a chunk, in memory that serves one chunk after the other.
fn packed_logits<'a>(
    chunk: &Tensor,
    head: &PackedMatrix,
    memory: &'a mut Vec<f32>,
) -> Result<&'a mut [f32]> {
    let rows = chunk.dim(0)?;
    let len = rows * head.out_features();
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
    head.forward(&cpu_slice(chunk)?, rows, None, &mut memory[..len]);
    Ok(&mut memory[..len])
}

impl FromIterator<TokenScores> for Scores {
    fn from_iter<I: IntoIterator<Item = TokenScores>>(scores: I) -> Self {
        let (logprobs, entropies) = scores
            .into_iter()
            .map(|s| (f64::from(s.logprob), f64::from(s.entropy)))
            .unzip();
        Self {
            logprobs,
            entropies,
        }
    }
}

impl Scores {
    /// Those of consecutive runs of targets.
    pub fn split(mut self, lengths: impl IntoIterator<Item = usize>) -> Vec<Self> {
        let lengths = lengths.into_iter();
        let runs = lengths.map(|len| {
            let (logprobs, entropies) =
                (self.logprobs.split_off(len), self.entropies.split_off(len));
            Self {
                logprobs: std::mem::replace(&mut self.logprobs, logprobs),
                entropies: std::mem::replace(&mut self.entropies, entropies),
            }
        });
        runs.collect()
    }

    fn extend(&mut self, other: Self) {
        self.logprobs.extend(other.logprobs);
        self.entropies.extend(other.entropies);
    }
}

/// Chunks of rows of `hidden` with their first row.
fn chunks(hidden: &Tensor, targets: &[u32]) -> Result<Vec<(usize, Tensor)>> {
    (0..targets.len())
        .step_by(CHUNK)
        .map(|start| {
            let len = CHUNK.min(targets.len() - start);
            Ok((start, hidden.narrow(0, start, len)?))
        })
        .collect()
}

/// Operations for one logit, in the kernels' currency.
const LOGIT: usize = 16;

fn cpu_scores(logits: &[f32], targets: &[u32], temperature: f64) -> Scores {
    let vocab = logits.len() / targets.len();
    let inverse = inverse_temperature(temperature);
    let scores = cpu::map(targets.len(), LOGIT * vocab, |row| {
        let logits = &logits[row * vocab..][..vocab];
        cpu::token_scores(logits, targets[row] as usize, inverse)
    });
    scores.into_iter().collect()
}

/// Turns logits into their gradient, in place.
fn cpu_gradient(
    logits: &mut [f32],
    targets: &[u32],
    temperature: f64,
    coefficients: &[f64],
) -> Scores {
    let vocab = logits.len() / targets.len();
    let inverse = inverse_temperature(temperature);
    let scores = cpu::map_rows(logits, vocab, 2 * LOGIT, |row, logits| {
        let (target, coefficient) = (targets[row] as usize, coefficients[row] as f32);
        let scores = cpu::token_scores(logits, target, inverse);
        cpu::logits_gradient(logits, target, inverse, scores.lse, coefficient);
        scores
    });
    scores.into_iter().collect()
}

/// The factor that the CPU sampler and scorer both multiply logits with.
pub fn inverse_temperature(temperature: f64) -> f32 {
    (1.0 / temperature) as f32
}

/// softmax(logits / temperature) on the portable path, `[N, vocab]`.
struct Distribution {
    log_probabilities: Tensor,
    probabilities: Tensor,
}

impl Distribution {
    fn of(logits: &Tensor, temperature: f64) -> Result<Self> {
        let scaled = (logits * (1.0 / temperature))?;
        let shifted = scaled.broadcast_sub(&scaled.max_keepdim(D::Minus1)?)?;
        let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let log_probabilities = shifted.broadcast_sub(&log_sum)?;
        Ok(Self {
            probabilities: log_probabilities.exp()?,
            log_probabilities,
        })
    }

    /// dL/dlogits for `scaled[n]` = dL/dlogp of target `n` / temperature; both `[N]`.
    fn gradient(&self, targets: &Tensor, scaled: &Tensor) -> Result<Tensor> {
        let scaled = scaled.to_dtype(self.probabilities.dtype())?.unsqueeze(1)?;
        let index = targets.unsqueeze(1)?;
        let spread = self.probabilities.neg()?.broadcast_mul(&scaled)?;
        Ok(spread.scatter_add(&index, &scaled, 1)?)
    }
}

/// Scores that stay on the device until those of all chunks are there, so that it is waited for once.
#[derive(Default)]
struct OnDevice {
    logprobs: Vec<Tensor>,
    entropies: Vec<Tensor>,
}

impl OnDevice {
    /// Adds those of the targets `[N]` of a chunk.
    fn push(&mut self, distribution: &Distribution, targets: &Tensor) -> Result<()> {
        let Distribution {
            log_probabilities,
            probabilities,
        } = distribution;
        let chosen = log_probabilities.gather(&targets.unsqueeze(1)?, 1)?;
        self.logprobs.push(chosen.squeeze(1)?);
        let entropy = (probabilities * log_probabilities)?.sum(D::Minus1)?;
        self.entropies.push(entropy.neg()?);
        Ok(())
    }

    fn scores(self) -> Result<Scores> {
        if self.logprobs.is_empty() {
            return Ok(Scores::default());
        }
        let all: Vec<Tensor> = self.logprobs.into_iter().chain(self.entropies).collect();
        let mut values: Vec<f64> = Tensor::cat(&all, 0)?.to_dtype(DType::F64)?.to_vec1()?;
        let entropies = values.split_off(values.len() / 2);
        Ok(Scores {
            logprobs: values,
            entropies,
        })
    }
}
