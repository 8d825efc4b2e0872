//! What runs and the thread that computes for them say to each other. Everything is handed over: a run
//! waits for its answer, but may end before it comes.

use crate::Result;
use crate::adapter::{Adapter, Gradients};
use crate::model::{ApartPass, ApartScores, Batch, BlockInputs};
use crate::ops::head::Scores;
use crate::rollout::{Answer as Completed, Completion, Request, SamplingParams};

/// From the run of this number.
pub(super) struct Message {
    pub seat: usize,
    pub what: Said,
}

pub(super) enum Said {
    Question(Question),
    /// dL/dlogp at the scores that it was shown.
    Coefficients(Vec<f64>),
    /// It asks nothing more.
    Left {
        failed: bool,
    },
}

/// What a run wants to know.
pub(super) enum Question {
    Completions(Box<Rollout>),
    Scores(Box<Scoring>),
    Gradient(Box<Gradient>),
    Apart(Box<Apart>),
}

/// A [`crate::rollout::Ask`].
pub(super) struct Rollout {
    pub adapter: Option<Adapter>,
    pub requests: Vec<Request>,
    pub params: SamplingParams,
    pub budget: usize,
}

/// A [`crate::model::ScorePass`].
pub(super) struct Scoring {
    pub adapter: Option<Adapter>,
    pub batch: Batch,
    pub temperature: f64,
}

/// Several [`ApartPass`]es.
pub(super) struct Apart {
    pub adapter: Adapter,
    pub passes: Vec<ApartPass>,
}

/// A [`crate::model::GradientPass`].
pub(super) struct Gradient {
    pub adapter: Adapter,
    pub batch: Batch,
    pub temperature: f64,
    pub inputs: BlockInputs,
    /// `None` where they follow from the scores, which the run is shown then.
    pub coefficients: Option<Vec<f64>>,
    pub gradients: Gradients,
}

/// To a run.
pub(super) enum Answer {
    /// A completion has ended; others may not have.
    Finished {
        request: usize,
        sample: usize,
        completion: Completion,
    },
    Completions(Result<Completed>),
    Scores(Result<Scores>),
    /// What the coefficients of its gradient follow from.
    Show(Scores),
    Gradient(Result<(Scores, Gradients)>),
    Apart(Result<Vec<ApartScores>>),
}
