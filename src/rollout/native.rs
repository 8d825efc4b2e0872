//! The native engine: continuous batching over the model's own decoder.
//!
//! Several runs may ask at once, each with its adapter and its sampling parameters: their rows share the
//! products with the frozen weights.

use super::batch::Batch;
use super::parallel::{Observers, Part};
use super::{Completion, Engine, Request, SamplingParams};
use crate::adapter::{Adapter, AdapterSet};
use crate::model::{Decoder, GroupInputs, Tokenizer};
use crate::ops::Backend;
use crate::{Error, Result};

/// Samples from a [`Decoder`] in this process.
pub struct NativeEngine<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) tokenizer: &'a Tokenizer,
    /// Largest number of completions decoded at one time.
    max_batch_size: usize,
    /// Bytes for recorded inputs.
    budget: usize,
    recorded: Vec<Option<GroupInputs>>,
}

/// What one run asks for: completions of prompts with its adapter.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    pub adapter: Option<&'a Adapter>,
    pub requests: &'a [Request],
    pub params: &'a SamplingParams,
    /// Bytes for the inputs of blocks, to be kept for an update.
    pub budget: usize,
}

/// What a run gets for an [`Ask`].
#[derive(Debug, Default)]
pub struct Answer {
    /// `n` of every request, in order.
    pub completions: Vec<Vec<Completion>>,
    /// By request.
    pub recorded: Vec<Option<GroupInputs>>,
    /// Bytes that are left for further records.
    pub budget: usize,
}

/// Number of an ask, and of a request in it.
pub type AskedRequest = (usize, usize);
/// Sees the tokens of a growing sample.
pub type OnToken<'a> = dyn FnMut(AskedRequest, usize, &[u32]) + 'a;
/// Sees a sample that has ended.
pub type OnFinished<'a> = dyn FnMut(AskedRequest, usize, &Completion) + 'a;

/// A prompt of one of the asks.
#[derive(Clone, Copy)]
pub(super) struct Item<'a> {
    /// Number of the ask.
    pub ask: usize,
    pub request: &'a Request,
    pub params: &'a SamplingParams,
}

impl<'a> NativeEngine<'a> {
    pub fn new(decoder: &'a Decoder, tokenizer: &'a Tokenizer, max_batch_size: usize) -> Self {
        Self {
            decoder,
            tokenizer,
            max_batch_size: max_batch_size.max(1),
            budget: 0,
            recorded: Vec::new(),
        }
    }

    /// Completions for several runs together. Each gets what it would get alone: on the CPU to the bit.
    ///
    /// The observers are those of [`Engine::generate`], with the number of the ask and of its request.
    ///
    /// # Errors
    /// [`Error::Interrupted`] after a signal; [`Error::Internal`] when a computation fails.
    pub fn answer(
        &self,
        asks: &[Ask<'_>],
        on_token: &mut OnToken<'_>,
        on_finished: &mut OnFinished<'_>,
    ) -> Result<Vec<Answer>> {
        let items: Vec<Item<'_>> = asks
            .iter()
            .enumerate()
            .flat_map(|(ask, own)| {
                own.requests.iter().map(move |request| Item {
                    ask,
                    request,
                    params: own.params,
                })
            })
            .collect();
        let set = AdapterSet::new(asks.iter().map(|ask| ask.adapter).collect())?;
        let mut firsts = Vec::with_capacity(asks.len());
        let mut next = 0;
        for ask in asks {
            firsts.push(next);
            next += ask.requests.len();
        }
        let place = |item: usize| (items[item].ask, item - firsts[items[item].ask]);
        let observers = Observers {
            on_token: &mut |item, sample, tokens| on_token(place(item), sample, tokens),
            on_finished: &mut |item, sample, done| on_finished(place(item), sample, done),
        };
        let parts = self.parts(&items, asks, self.max_batch_size);
        let run = |part: &Part, observers: Observers<'_>| {
            let batch = Batch::new(self, &set, &items[part.items.clone()], &part.budgets)?;
            batch.complete(self.max_batch_size, observers)
        };
        let outcomes = match &parts[..] {
            [only] => vec![run(only, observers)?],
            _ => self.in_parallel(&parts, observers, run)?,
        };
        let mut answers: Vec<Answer> = asks.iter().map(|_| Answer::default()).collect();
        let mut items = items.iter();
        for outcome in outcomes {
            for (answer, budget) in answers.iter_mut().zip(outcome.budgets) {
                answer.budget += budget;
            }
            let groups = outcome.completions.into_iter().zip(outcome.recorded);
            for ((completions, recorded), item) in groups.zip(&mut items) {
                answers[item.ask].completions.push(completions);
                answers[item.ask].recorded.push(recorded);
            }
        }
        Ok(answers)
    }
}

impl Engine for NativeEngine<'_> {
    fn generate(
        &mut self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
        on_token: &mut dyn FnMut(usize, usize, &[u32]),
        on_finished: &mut dyn FnMut(usize, usize, &Completion),
    ) -> Result<Vec<Vec<Completion>>> {
        check_prompts(requests, self.decoder)?;
        let ask = Ask {
            adapter,
            requests,
            params,
            budget: self.budget,
        };
        let answers = self.answer(
            &[ask],
            &mut |(_, request), sample, tokens| on_token(request, sample, tokens),
            &mut |(_, request), sample, completion| on_finished(request, sample, completion),
        )?;
        let answer = answers.into_iter().next().unwrap_or_default();
        self.budget = answer.budget;
        self.recorded = answer.recorded;
        Ok(answer.completions)
    }

    /// Only where scoring would give the same bits.
    fn record(&mut self, budget: usize) {
        self.budget = if self.exact() { budget } else { 0 };
    }

    fn take_recorded(&mut self) -> Vec<Option<GroupInputs>> {
        std::mem::take(&mut self.recorded)
    }

    /// On the CPU, decoding and scoring are the same arithmetic.
    fn exact(&self) -> bool {
        is_exact(self.decoder)
    }
}

/// Whether decoding with a model gives the bits of scoring with it.
pub fn is_exact(decoder: &Decoder) -> bool {
    decoder.placement.backend == Backend::Cpu
}

/// Refuses prompts that the model cannot read.
///
/// # Errors
/// [`Error::Data`] that names the prompt.
pub fn check_prompts(requests: &[Request], decoder: &Decoder) -> Result<()> {
    let vocab = decoder.config.vocab_size;
    for request in requests {
        if request.prompt.is_empty() {
            return Err(Error::data(format!("prompt {} has no tokens", request.id)));
        }
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::data(format!(
                "prompt {} has the token id {id}, the model's vocabulary ends at {vocab}; \
                 tokenizer and model do not belong together",
                request.id
            )));
        }
    }
    Ok(())
}
