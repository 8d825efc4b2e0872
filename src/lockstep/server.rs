//! The side that computes: waits until every run has asked, and answers together what can be.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender};

use super::messages::{Answer, Apart, Gradient, Message, Question, Rollout, Said, Scoring};
use super::{Lockstep, ended_by_another};
use crate::model::{Batch, BlockInputs, Coefficients, GradientPass, Keep, ScorePass, pack};
use crate::ops::head::Scores;
use crate::rollout::{Ask, NativeEngine};
use crate::{Error, Result};

pub(super) struct Server<'a> {
    shared: &'a Lockstep<'a>,
    messages: Receiver<Message>,
    /// Messages that came while another one was waited for.
    early: RefCell<VecDeque<Message>>,
    /// By seat.
    answers: Vec<Sender<Answer>>,
    /// By seat: what has been asked and not answered.
    open: Vec<Option<Question>>,
    /// Runs that have not left.
    seated: usize,
    /// A run has failed: nothing more is computed.
    over: bool,
}

/// Questions of one kind with their seats.
type Asked<T> = Vec<(usize, Box<T>)>;

impl<'a> Server<'a> {
    pub fn new(
        shared: &'a Lockstep<'a>,
        messages: Receiver<Message>,
        answers: Vec<Sender<Answer>>,
    ) -> Self {
        Self {
            shared,
            messages,
            early: RefCell::default(),
            open: answers.iter().map(|_| None).collect(),
            seated: answers.len(),
            answers,
            over: false,
        }
    }

    /// Answers until all runs have left.
    pub fn serve(&mut self) {
        while self.wait() {
            match self.over {
                true => self.dismiss(),
                false => self.answer(),
            }
        }
    }

    /// Until every run that is there has asked something; false when none is there any more.
    fn wait(&mut self) -> bool {
        while self.open.iter().flatten().count() < self.seated {
            let early = self.early.borrow_mut().pop_front();
            // Nobody goes without a word, so that there is somebody left to hear from.
            let Some(Message { seat, what }) = early.or_else(|| self.messages.recv().ok()) else {
                return false;
            };
            match what {
                Said::Question(question) => self.open[seat] = Some(question),
                Said::Left { failed } => {
                    self.seated -= 1;
                    self.over |= failed;
                }
                Said::Coefficients(_) => {}
            }
        }
        self.seated > 0
    }

    /// Lets every run that waits end.
    fn dismiss(&mut self) {
        for seat in 0..self.open.len() {
            let error = ended_by_another();
            let answer = match self.open[seat].take() {
                None => continue,
                Some(Question::Completions(_)) => Answer::Completions(Err(error)),
                Some(Question::Scores(_)) => Answer::Scores(Err(error)),
                Some(Question::Gradient(_)) => Answer::Gradient(Err(error)),
                Some(Question::Apart(_)) => Answer::Apart(Err(error)),
            };
            self.tell(seat, answer);
        }
    }

    /// Updates before rollouts: a run that has done its update waits until all have, so that rollouts,
    /// which gain most, take place together.
    fn answer(&mut self) {
        let is_rollout = |question: &Question| matches!(question, Question::Completions(_));
        let all_roll_out = self.open.iter().flatten().all(is_rollout);
        let (mut rollouts, mut scorings) = (Vec::new(), Vec::new());
        let (mut gradients, mut apart) = (Vec::new(), Vec::new());
        for (seat, open) in self.open.iter_mut().enumerate() {
            match open.take_if(|question| all_roll_out || !is_rollout(question)) {
                None => {}
                Some(Question::Completions(rollout)) => rollouts.push((seat, rollout)),
                Some(Question::Scores(scoring)) => scorings.push((seat, scoring)),
                Some(Question::Gradient(gradient)) => gradients.push((seat, gradient)),
                Some(Question::Apart(passes)) => apart.push((seat, passes)),
            }
        }
        self.complete(&rollouts);
        self.score(&scorings);
        let is_recorded =
            |(_, g): &(usize, Box<Gradient>)| matches!(g.inputs, BlockInputs::Recorded(_));
        let (recorded, computed) = gradients.into_iter().partition(is_recorded);
        self.accumulate(recorded);
        self.accumulate(computed);
        self.accumulate_apart(apart);
    }

    fn complete(&self, asked: &Asked<Rollout>) {
        if asked.is_empty() {
            return;
        }
        let asks: Vec<Ask<'_>> = asked
            .iter()
            .map(|(_, rollout)| Ask {
                adapter: rollout.adapter.as_ref(),
                requests: &rollout.requests,
                params: &rollout.params,
                budget: rollout.budget,
            })
            .collect();
        let Lockstep {
            decoder,
            tokenizer,
            max_batch_size,
            ..
        } = *self.shared;
        let engine = NativeEngine::new(decoder, tokenizer, max_batch_size);
        let answers = engine.answer(
            &asks,
            &mut |_, _, _| {},
            &mut |(ask, request), sample, completion| {
                let finished = Answer::Finished {
                    request,
                    sample,
                    completion: completion.clone(),
                };
                self.tell(asked[ask].0, finished);
            },
        );
        for ((seat, _), answer) in asked.iter().zip(each(answers, asks.len())) {
            self.tell(*seat, Answer::Completions(answer));
        }
    }

    fn score(&self, asked: &Asked<Scoring>) {
        let sizes: Vec<usize> = asked.iter().map(|(_, s)| rows(&s.batch)).collect();
        for run in pack(&sizes, self.shared.pass_tokens) {
            let own = &asked[run];
            let passes: Vec<ScorePass<'_>> = own
                .iter()
                .map(|(_, scoring)| ScorePass {
                    adapter: scoring.adapter.as_ref(),
                    batch: &scoring.batch,
                    temperature: scoring.temperature,
                })
                .collect();
            let scores = self.shared.decoder.score_together(&passes);
            for ((seat, _), scores) in own.iter().zip(each(scores, own.len())) {
                self.tell(*seat, Answer::Scores(scores));
            }
        }
    }

    /// Gradients whose inputs are all recorded, or all computed.
    fn accumulate(&self, mut asked: Asked<Gradient>) {
        let sizes: Vec<usize> = asked.iter().map(|(_, g)| rows(&g.batch)).collect();
        for run in pack(&sizes, self.shared.pass_tokens) {
            let own = &mut asked[run];
            let mut losses: Vec<_> = own
                .iter()
                .map(|&(seat, _)| move |scores: &Scores| self.ask_back(seat, scores))
                .collect();
            let passes = own
                .iter_mut()
                .zip(&mut losses)
                .map(|((_, gradient), loss)| {
                    let Gradient {
                        adapter,
                        batch,
                        temperature,
                        inputs,
                        coefficients,
                        gradients,
                    } = &mut **gradient;
                    GradientPass {
                        adapter,
                        batch,
                        temperature: *temperature,
                        inputs: std::mem::replace(inputs, Keep::Inputs.into()),
                        coefficients: match coefficients.take() {
                            Some(known) => Coefficients::Known(known),
                            None => Coefficients::OfScores(loss),
                        },
                        gradients,
                    }
                });
            let scores = self.shared.decoder.accumulate_together(passes.collect());
            let scores = each(scores, own.len());
            for ((seat, gradient), scores) in own.iter_mut().zip(scores) {
                let result = scores.map(|scores| (scores, gradient.gradients.take()));
                self.tell(*seat, Answer::Gradient(result));
            }
        }
    }

    fn accumulate_apart(&self, asked: Asked<Apart>) {
        let (mut seats, mut adapters, mut all) = (Vec::new(), Vec::new(), Vec::new());
        for (seat, own) in asked {
            seats.push((seat, own.passes.len()));
            adapters.push(own.adapter);
            all.push(own.passes);
        }
        let passes = adapters.iter().zip(all);
        let passes = passes.flat_map(|(adapter, own)| own.into_iter().map(move |p| (adapter, p)));
        let done = self
            .shared
            .decoder
            .accumulate_side_by_side(passes.collect());
        let mut done = done.map(Vec::into_iter);
        for (seat, count) in seats {
            let own = match &mut done {
                Ok(done) => Ok(done.take(count).collect()),
                Err(error) => Err(error.clone()),
            };
            self.tell(seat, Answer::Apart(own));
        }
    }

    /// What the run makes of the scores of its pass.
    fn ask_back(&self, asked: usize, scores: &Scores) -> Result<Vec<f64>> {
        self.tell(asked, Answer::Show(scores.clone()));
        loop {
            match self.messages.recv() {
                Ok(Message {
                    seat,
                    what: Said::Coefficients(values),
                }) if seat == asked => return Ok(values),
                Ok(message) => {
                    let has_left = message.seat == asked;
                    self.early.borrow_mut().push_back(message);
                    if has_left {
                        break;
                    }
                }
                Err(_) => break,
            }
        }
        Err(Error::Internal("a run has left its pass".into()))
    }

    fn tell(&self, seat: usize, answer: Answer) {
        // Who has ended meanwhile does not want to know.
        let _ = self.answers[seat].send(answer);
    }
}

fn rows(batch: &Batch) -> usize {
    batch.tokens.len()
}

/// One result for each of `count`.
fn each<T>(results: Result<Vec<T>>, count: usize) -> Vec<Result<T>> {
    match results {
        Ok(results) => results.into_iter().map(Ok).collect(),
        Err(error) => (0..count).map(|_| Err(error.clone())).collect(),
    }
}
