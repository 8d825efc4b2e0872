//! Whether a server answers with the policy that was asked for.
//!
//! After every update each server completes a fixed prompt greedily, and this side scores the same
//! tokens under the new policy. The two differ by roundings. Where the new policy differs from the last
//! one that was told apart by more than that, the answer must be nearer to the new one. Where it does
//! not, the difference is kept in mind and not forgotten: a server that is stuck is found as soon as it
//! matters.

use std::sync::Arc;

use super::pool::Ask;
use super::{Answer, Policy};
use crate::adapter::Adapter;
use crate::model::{Batch, Model};
use crate::rollout::SamplingParams;
use crate::{Error, Result};

/// Tokens of the completion that is compared.
const TOKENS: usize = 16;
/// Largest mean difference of log-probabilities between programs with the same weights, nats.
const LARGEST: f64 = 0.5;
/// A policy is told apart when it is this many times as far away as the servers' roundings.
const CLEAR: f64 = 4.0;

/// A fixed question, and what is known of earlier answers.
pub(super) struct Probe {
    prompt: Arc<[u32]>,
    /// The adapter that the servers were last seen to have, told apart from the one before.
    seen: Option<Option<Adapter>>,
}

/// Mean differences of log-probabilities, nats.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Distances {
    /// Of the answer from the policy that was asked for, by this side's scores.
    asked: f64,
    /// Of the answer from the last policy that was told apart.
    earlier: f64,
    /// Between the two policies, by this side's scores.
    apart: f64,
}

/// What an answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It is of the policy that was asked for.
    Asked,
    /// The two policies are too near to each other to tell.
    Either,
    /// It is of the earlier one.
    Stale,
    /// It is of neither: another model.
    Foreign,
}

impl Distances {
    fn verdict(self) -> Verdict {
        let nearest = self.asked.min(self.earlier);
        if self.asked > LARGEST && (self.earlier > LARGEST || self.asked <= self.earlier) {
            Verdict::Foreign
        } else if self.apart < CLEAR * nearest {
            Verdict::Either
        } else if self.asked <= self.earlier {
            Verdict::Asked
        } else {
            Verdict::Stale
        }
    }
}

impl Probe {
    pub fn new(prompt: &[u32]) -> Self {
        Self {
            prompt: prompt.into(),
            seen: None,
        }
    }

    /// What every server is asked.
    pub fn ask(&self) -> Ask {
        Ask::new(Arc::clone(&self.prompt), &greedy(), 0)
    }

    /// Checks the servers' answers.
    ///
    /// # Errors
    /// [`Error::Data`] naming a server that has another policy or another model.
    pub fn check(
        &mut self,
        model: &Model,
        adapter: Option<&Adapter>,
        policy: &Policy,
        answers: &[(&str, Answer)],
    ) -> Result<()> {
        let mut told_apart = true;
        for (url, answer) in answers {
            let distances = self.distances(model, adapter, answer)?;
            tracing::debug!("{url}: {} {distances:?}", policy.name);
            match distances.verdict() {
                Verdict::Asked => {}
                Verdict::Either => told_apart = false,
                Verdict::Stale => return Err(stale(url, policy, distances)),
                Verdict::Foreign => return Err(foreign(url, distances)),
            }
        }
        if told_apart || self.seen.is_none() {
            self.seen = Some(adapter.cloned());
        }
        Ok(())
    }

    fn distances(
        &self,
        model: &Model,
        adapter: Option<&Adapter>,
        answer: &Answer,
    ) -> Result<Distances> {
        if answer.tokens.is_empty() {
            return Err(Error::data("a server completed a probe with nothing"));
        }
        let vocab = model.decoder.config.vocab_size;
        if answer.tokens.iter().any(|&id| id as usize >= vocab) {
            return Err(Error::data(
                "a server answered with tokens that the model does not have",
            ));
        }
        let mut batch = Batch::default();
        batch.push_sequence(&self.prompt, &answer.tokens)?;
        let score = |adapter| Ok::<_, Error>(model.decoder.score(adapter, &batch, 1.0)?.logprobs);
        let theirs: Vec<f64> = answer.logprobs.iter().map(|&l| f64::from(l)).collect();
        let asked = score(adapter)?;
        let earlier = match &self.seen {
            Some(seen) => score(seen.as_ref())?,
            None => asked.clone(),
        };
        Ok(Distances {
            asked: mean_difference(&theirs, &asked),
            earlier: mean_difference(&theirs, &earlier),
            apart: mean_difference(&asked, &earlier),
        })
    }
}

/// Unknown log-probabilities (NaN) do not count.
fn mean_difference(a: &[f64], b: &[f64]) -> f64 {
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    let known: Vec<f64> = differences.filter(|d| !d.is_nan()).collect();
    known.iter().sum::<f64>() / known.len().max(1) as f64
}

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        max_tokens: TOKENS,
        stop: Vec::new(),
        eos: Vec::new(),
        seed: 0,
        step: 0,
    }
}

fn stale(url: &str, policy: &Policy, distances: Distances) -> Error {
    Error::data(format!(
        "{url} was asked for {} and answers with an earlier one: its log-probabilities are {:.4} nats from \
         the policy asked for and {:.4} from the earlier one",
        policy.name, distances.asked, distances.earlier
    ))
}

fn foreign(url: &str, distances: Distances) -> Error {
    Error::data(format!(
        "{url} answers with log-probabilities that are {:.2} nats from those of this model: it has another \
         model, or says those of another temperature (vLLM: --logprobs-mode processed_logprobs)",
        distances.asked
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_needs_policies_that_are_clearly_apart() {
        let verdict = |asked, earlier, apart| {
            let distances = Distances {
                asked,
                earlier,
                apart,
            };
            distances.verdict()
        };
        // At the start there is one policy.
        assert_eq!(verdict(0.01, 0.01, 0.0), Verdict::Either);
        assert_eq!(verdict(0.01, 0.02, 0.015), Verdict::Either);
        assert_eq!(verdict(0.01, 0.2, 0.2), Verdict::Asked);
        assert_eq!(verdict(0.2, 0.01, 0.2), Verdict::Stale);
        assert_eq!(verdict(0.9, 0.01, 0.9), Verdict::Stale);
        assert_eq!(verdict(0.9, 0.9, 0.0), Verdict::Foreign);
        assert_eq!(verdict(0.9, 1.2, 0.6), Verdict::Foreign);
        // The same to the bit: nothing is nearer, and nothing is stale.
        assert_eq!(verdict(0.0, 0.0, 0.0), Verdict::Asked);
    }
}
