//! A run's side of the lockstep: an engine and passes that are computed elsewhere.

use std::cell::Cell;
use std::sync::mpsc::{Receiver, Sender};

use super::messages::{Answer, Apart, Gradient, Message, Question, Rollout, Said, Scoring};
use crate::adapter::Adapter;
use crate::model::{
    ApartPass, ApartScores, Coefficients, Decoder, GradientPass, GroupInputs, Passes, ScorePass,
};
use crate::ops::head::Scores;
use crate::rollout::{self, Completion, Engine, Request, SamplingParams};
use crate::{Error, Result};

/// The place of one run at a model that several share.
pub struct Seat<'a> {
    number: usize,
    decoder: &'a Decoder,
    ask: Sender<Message>,
    answers: Receiver<Answer>,
    left: Cell<bool>,
}

impl<'a> Seat<'a> {
    pub(super) fn new(
        number: usize,
        decoder: &'a Decoder,
        ask: Sender<Message>,
        answers: Receiver<Answer>,
    ) -> Self {
        Self {
            number,
            decoder,
            ask,
            answers,
            left: Cell::new(false),
        }
    }

    /// An engine whose completions are sampled together with those of the other runs.
    pub fn engine(&self) -> SeatEngine<'_> {
        SeatEngine {
            seat: self,
            budget: 0,
            recorded: Vec::new(),
        }
    }

    /// Says that nothing more will be asked.
    pub(super) fn leave(&self, failed: bool) {
        if !self.left.replace(true) {
            // The other side may be gone when it panicked.
            let _ = self.say(Said::Left { failed });
        }
    }

    fn say(&self, what: Said) -> Result<()> {
        let seat = self.number;
        let sent = self.ask.send(Message { seat, what });
        sent.map_err(|_| gone())
    }

    fn ask(&self, question: Question) -> Result<()> {
        self.say(Said::Question(question))
    }

    fn answer(&self) -> Result<Answer> {
        self.answers.recv().map_err(|_| gone())
    }
}

/// Also when the run panics: the others do not wait for it.
impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.leave(true);
    }
}

fn gone() -> Error {
    Error::Internal("the thread that computes for all runs has ended".into())
}

fn unexpected() -> Error {
    Error::Internal("a run was given the answer to another question".into())
}

impl Passes for Seat<'_> {
    fn score(&self, pass: ScorePass<'_>) -> Result<Scores> {
        self.ask(Question::Scores(Box::new(Scoring {
            adapter: pass.adapter.cloned(),
            batch: pass.batch.clone(),
            temperature: pass.temperature,
        })))?;
        match self.answer()? {
            Answer::Scores(scores) => scores,
            _ => Err(unexpected()),
        }
    }

    fn accumulate(&self, pass: GradientPass<'_>) -> Result<Scores> {
        let (coefficients, mut loss) = match pass.coefficients {
            Coefficients::Known(values) => (Some(values), None),
            Coefficients::OfScores(loss) => (None, Some(loss)),
        };
        let mut failure = None;
        self.ask(Question::Gradient(Box::new(Gradient {
            adapter: pass.adapter.clone(),
            batch: pass.batch.clone(),
            temperature: pass.temperature,
            inputs: pass.inputs,
            coefficients,
            gradients: pass.gradients.take(),
        })))?;
        loop {
            match (self.answer()?, &mut loss) {
                (Answer::Show(scores), Some(loss)) => {
                    // A failure is this run's own: the pass goes on for the others.
                    let coefficients = loss(&scores).unwrap_or_else(|error| {
                        failure = Some(error);
                        vec![0.0; scores.logprobs.len()]
                    });
                    self.say(Said::Coefficients(coefficients))?;
                }
                (Answer::Gradient(result), _) => {
                    let (scores, gradients) = result?;
                    *pass.gradients = gradients;
                    return failure.map_or(Ok(scores), Err);
                }
                _ => return Err(unexpected()),
            }
        }
    }

    fn accumulate_apart(
        &self,
        adapter: &Adapter,
        passes: Vec<ApartPass>,
    ) -> Result<Vec<ApartScores>> {
        let adapter = adapter.clone();
        self.ask(Question::Apart(Box::new(Apart { adapter, passes })))?;
        match self.answer()? {
            Answer::Apart(scores) => scores,
            _ => Err(unexpected()),
        }
    }
}

/// See [`Seat::engine`]. Completions are not seen while they grow, only when they end.
pub struct SeatEngine<'a> {
    seat: &'a Seat<'a>,
    budget: usize,
    recorded: Vec<Option<GroupInputs>>,
}

impl Engine for SeatEngine<'_> {
    fn generate(
        &mut self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
        on_token: &mut dyn FnMut(usize, usize, &[u32]),
        on_finished: &mut dyn FnMut(usize, usize, &Completion),
    ) -> Result<Vec<Vec<Completion>>> {
        rollout::check_prompts(requests, self.seat.decoder)?;
        self.seat.ask(Question::Completions(Box::new(Rollout {
            adapter: adapter.cloned(),
            requests: requests.to_vec(),
            params: params.clone(),
            budget: self.budget,
        })))?;
        loop {
            match self.seat.answer()? {
                Answer::Finished {
                    request,
                    sample,
                    completion,
                } => {
                    on_token(request, sample, &completion.tokens);
                    on_finished(request, sample, &completion);
                }
                Answer::Completions(result) => {
                    let answer = result?;
                    self.budget = answer.budget;
                    self.recorded = answer.recorded;
                    return Ok(answer.completions);
                }
                _ => return Err(unexpected()),
            }
        }
    }

    fn record(&mut self, budget: usize) {
        self.budget = if self.exact() { budget } else { 0 };
    }

    fn take_recorded(&mut self) -> Vec<Option<GroupInputs>> {
        std::mem::take(&mut self.recorded)
    }

    fn exact(&self) -> bool {
        rollout::is_exact(self.seat.decoder)
    }
}
