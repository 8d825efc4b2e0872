//! Several runs on one frozen model, in step: what they ask of it is computed together.
//!
//! Every run is an ordinary one on a thread of its own. It holds a [`Seat`], which it uses as its engine
//! ([`crate::rollout::Engine`]) and for the passes of its updates ([`crate::model::Passes`]), and which
//! hands its questions on to the thread that called [`Lockstep::run`]. That one waits until every run
//! has asked, and answers all of them with passes in which each row goes through its own run's adapter:
//! the weights are read once for all runs. A run that ends, or diverges, leaves the others to go on.
//!
//! On the CPU a row's bits do not depend on what it is computed with, so that every run gives what it gives
//! alone, to the bit.

mod messages;
mod seat;
mod server;
#[cfg(test)]
mod tests;

use std::sync::mpsc;
use std::thread;

pub use seat::{Seat, SeatEngine};

use self::server::Server;
use crate::model::{Decoder, Tokenizer};
use crate::{Error, Result};

/// Stack of a run's thread, as large as that of the program's own.
const STACK: usize = 8 << 20;

/// A model that several runs share.
#[derive(Clone, Copy)]
pub struct Lockstep<'a> {
    pub decoder: &'a Decoder,
    pub tokenizer: &'a Tokenizer,
    /// Most completions decoded at one time, of all runs together.
    pub max_batch_size: usize,
    /// Rows up to which the passes of different runs are put into one.
    pub pass_tokens: usize,
}

impl Lockstep<'_> {
    /// Calls `run(number, seat)` for `count` runs, each on a thread of its own, and computes what they ask
    /// for on the calling thread until the last of them has ended.
    ///
    /// When one ends with an error the others are interrupted at their next question, so that they save
    /// and end as after a signal. A run whose failure is no reason for that gives it as its result.
    pub fn run<T: Send>(
        &self,
        count: usize,
        run: impl Fn(usize, &Seat<'_>) -> Result<T> + Sync,
    ) -> Vec<Result<T>> {
        let (ask, questions) = mpsc::channel();
        let mut answers = Vec::with_capacity(count);
        let seats: Vec<Seat<'_>> = (0..count)
            .map(|number| {
                let (answer, answered) = mpsc::channel();
                answers.push(answer);
                Seat::new(number, self.decoder, ask.clone(), answered)
            })
            .collect();
        drop(ask);
        let run = &run;
        thread::scope(|scope| {
            let threads: Vec<_> = seats
                .into_iter()
                .enumerate()
                .map(|(number, seat)| {
                    let work = move || {
                        let result = run(number, &seat);
                        seat.leave(result.is_err());
                        result
                    };
                    let name = format!("run {number}");
                    let builder = thread::Builder::new().name(name).stack_size(STACK);
                    builder.spawn_scoped(scope, work)
                })
                .collect();
            Server::new(self, questions, answers).serve();
            let join = |thread: std::io::Result<thread::ScopedJoinHandle<'_, Result<T>>>| {
                let thread = thread
                    .map_err(|e| Error::Internal(format!("cannot start a run's thread: {e}")))?;
                match thread.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            };
            threads.into_iter().map(join).collect()
        })
    }
}

/// All results, or the failure that ended the other runs.
///
/// # Errors
/// The first one that is not an interruption, else the first.
pub fn all<T>(results: Vec<Result<T>>) -> Result<Vec<T>> {
    let failures = results.iter().filter_map(|result| result.as_ref().err());
    let own = |error: &&Error| !matches!(error, Error::Interrupted(_));
    match failures.clone().find(own) {
        Some(error) => Err(error.clone()),
        None => results.into_iter().collect(),
    }
}

/// What a run that was interrupted because of another one says.
fn ended_by_another() -> Error {
    Error::Interrupted("another run of the same sweep failed".to_owned())
}
