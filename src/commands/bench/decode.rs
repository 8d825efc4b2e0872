//! Decoding of several sequences at once, as llama.cpp's `llama-batched-bench` measures it.

use std::time::Instant;

use serde::Serialize;

use super::phases::Bench;
use crate::Result;
use crate::model::Model;
use crate::rollout::{Engine, NativeEngine, Request, SamplingParams};

/// Tokens of a prompt; every sequence has its own.
const PROMPT: usize = 100;
/// Tokens that are decoded for every sequence, sampled at temperature 1.
const NEW: usize = 64;

/// Rates with a number of sequences.
#[derive(Debug, Serialize)]
pub(super) struct Decode {
    sequences: usize,
    prompt_tokens: usize,
    new_tokens: usize,
    prefill_tokens_per_s: f64,
    tokens_per_s: f64,
}

impl Decode {
    /// The second of two runs, each on `sequences` prompts cut out of the data's.
    pub fn measure(bench: &Bench<'_>, sequences: usize) -> Result<Self> {
        let text: Vec<u32> = bench.prompts.iter().flatten().copied().collect();
        let requests: Vec<Request> = (0..sequences)
            .map(|id| Request {
                id: id as u64,
                prompt: text
                    .iter()
                    .cycle()
                    .skip(17 * id)
                    .take(PROMPT)
                    .copied()
                    .collect(),
                n: 1,
            })
            .collect();
        // The first token comes out of the prefill; none ends a completion.
        let params = SamplingParams {
            eos: Vec::new(),
            ..bench.sampling(NEW + 1, 0)
        };
        let Model {
            decoder, tokenizer, ..
        } = bench.model;
        let (mut prefill, mut decode) = (0.0, 0.0);
        for _ in 0..2 {
            let mut engine = NativeEngine::new(decoder, tokenizer, sequences);
            let started = Instant::now();
            let mut first = None;
            engine.generate(
                Some(bench.adapter),
                &requests,
                &params,
                &mut |_, _, _| {
                    first.get_or_insert_with(|| started.elapsed().as_secs_f64());
                },
                &mut |_, _, _| {},
            )?;
            let all = started.elapsed().as_secs_f64();
            let first = first.unwrap_or(all);
            prefill = (sequences * PROMPT) as f64 / first;
            decode = (sequences * NEW) as f64 / (all - first);
        }
        Ok(Self {
            sequences,
            prompt_tokens: PROMPT,
            new_tokens: NEW,
            prefill_tokens_per_s: prefill,
            tokens_per_s: decode,
        })
    }
}

impl std::fmt::Display for Decode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} sequences at once: prompts {:.0} tok/s, decoding {:.0} tok/s",
            self.sequences, self.prefill_tokens_per_s, self.tokens_per_s
        )
    }
}
