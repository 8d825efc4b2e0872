//! The engine of a configuration, for all who sample in a run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Completion, Engine, NativeEngine, RemoteEngine, Request, SamplingParams, Site};
use crate::Result;
use crate::adapter::Adapter;
use crate::config::{RolloutConfig, RolloutEngine};
use crate::lockstep::Seat;
use crate::model::Model;

/// Makes engines on one model. Those that ask servers share them, and what is known of them.
pub enum Engines<'a> {
    /// In this process, with so many sequences at once.
    Native(&'a Model, usize),
    Remote(Arc<Mutex<RemoteEngine<'a>>>),
    /// In this process, together with other runs.
    Lockstep(&'a Seat<'a>),
}

impl<'a> Engines<'a> {
    /// The engine that `[rollout]` names. `adapter` is any of the kind that will be sampled from.
    ///
    /// # Errors
    /// As [`RemoteEngine::open`].
    pub fn open(
        config: &RolloutConfig,
        model: &'a Model,
        adapter: Option<&Adapter>,
        max_batch_size: usize,
        site: &Site<'_>,
    ) -> Result<Self> {
        Ok(match config.engine {
            RolloutEngine::Native => Self::Native(model, max_batch_size),
            _ => {
                let engine = RemoteEngine::open(config, model, adapter, site)?;
                Self::Remote(Arc::new(Mutex::new(engine)))
            }
        })
    }

    /// An engine; of those that ask servers, another hand on the same.
    pub fn engine(&self) -> Box<dyn Engine + 'a> {
        match self {
            Self::Native(model, batch) => {
                Box::new(NativeEngine::new(&model.decoder, &model.tokenizer, *batch))
            }
            Self::Remote(engine) => Box::new(Hand(Arc::clone(engine))),
            Self::Lockstep(seat) => Box::new(seat.engine()),
        }
    }
}

/// A hand on an engine that others use, too.
struct Hand<'a>(Arc<Mutex<RemoteEngine<'a>>>);

impl<'a> Hand<'a> {
    fn engine(&self) -> MutexGuard<'_, RemoteEngine<'a>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine for Hand<'_> {
    fn generate(
        &mut self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
        on_token: &mut dyn FnMut(usize, usize, &[u32]),
        on_finished: &mut dyn FnMut(usize, usize, &Completion),
    ) -> Result<Vec<Vec<Completion>>> {
        self.engine()
            .generate(adapter, requests, params, on_token, on_finished)
    }

    fn begin(
        &mut self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
    ) -> Result<()> {
        self.engine().begin(adapter, requests, params)
    }

    fn bytes(&self) -> (u64, u64) {
        self.engine().bytes()
    }
}
