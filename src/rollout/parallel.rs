//! A rollout of a small model, divided between threads by its prompts.
//!
//! The products of one decoding pass of such a model are too small to share between threads; whole
//! prompts are not. What is drawn does not depend on it, as it does not on batches.

use std::ops::Range;
use std::sync::mpsc;
use std::thread;

use super::Completion;
use super::native::{NativeEngine, Outcome};
use crate::Result;
use crate::ops::cpu;

/// What a thread tells the one that called the engine.
enum Event {
    Token {
        request: usize,
        sample: usize,
        token: u32,
    },
    Finished {
        request: usize,
        sample: usize,
        completion: Completion,
    },
}

/// What a part of a rollout reports to: as [`super::Engine::generate`] has them.
pub(super) struct Observers<'a> {
    pub on_token: &'a mut dyn FnMut(usize, usize, &[u32]),
    pub on_finished: &'a mut dyn FnMut(usize, usize, &Completion),
}

impl NativeEngine<'_> {
    /// How many threads a rollout of `requests` is worth.
    pub(super) fn parts(&self, requests: usize) -> usize {
        match self.decoder.is_small() && !cpu::is_alone() {
            true => rayon::current_num_threads().min(requests).max(1),
            false => 1,
        }
    }

    /// Runs `part` for every range of `count` requests, each on a thread of its own, and reports
    /// on the calling thread.
    pub(super) fn in_parallel(
        &self,
        count: usize,
        parts: usize,
        observers: Observers<'_>,
        part: impl Fn(Range<usize>, Observers<'_>) -> Result<Outcome> + Sync,
    ) -> Result<Vec<Outcome>> {
        let (send, receive) = mpsc::channel();
        thread::scope(|scope| {
            let threads: Vec<_> = (0..parts)
                .map(|index| {
                    let (send, part) = (send.clone(), &part);
                    scope.spawn(move || {
                        let own = cpu::piece(count, parts, index);
                        let first = own.start;
                        // Nobody listens any more only when the caller is being unwound.
                        let tell = |event| drop(send.send(event));
                        let observers = Observers {
                            on_token: &mut |request, sample, tokens| {
                                if let Some(&token) = tokens.last() {
                                    tell(Event::Token {
                                        request: first + request,
                                        sample,
                                        token,
                                    });
                                }
                            },
                            on_finished: &mut |request, sample, completion| {
                                tell(Event::Finished {
                                    request: first + request,
                                    sample,
                                    completion: completion.clone(),
                                });
                            },
                        };
                        cpu::alone(|| part(own, observers))
                    })
                })
                .collect();
            drop(send);
            report(receive, observers);
            threads
                .into_iter()
                .map(|thread| match thread.join() {
                    Ok(outcome) => outcome,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect()
        })
    }
}

/// Hands events on until all threads have ended.
fn report(events: mpsc::Receiver<Event>, observers: Observers<'_>) {
    let mut growing = std::collections::HashMap::<(usize, usize), Vec<u32>>::new();
    for event in events {
        match event {
            Event::Token {
                request,
                sample,
                token,
            } => {
                let tokens = growing.entry((request, sample)).or_default();
                tokens.push(token);
                (observers.on_token)(request, sample, tokens);
            }
            Event::Finished {
                request,
                sample,
                completion,
            } => {
                growing.remove(&(request, sample));
                (observers.on_finished)(request, sample, &completion);
            }
        }
    }
}
