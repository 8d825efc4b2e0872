//! The problems of a sweep's runs, read once for all that have the same.

use super::grid::Point;
use crate::adapter::AdapterSpec;
use crate::config::Config;
use crate::model::Tokenizer;
use crate::run::job::Job;
use crate::{Error, Result};

/// A job for every kind of run: what is learnt from, and how it is asked.
pub struct Jobs {
    kinds: Vec<(Config, Job)>,
}

impl Jobs {
    /// Reads the problems of all runs.
    ///
    /// # Errors
    /// Those of [`Job::new`].
    pub fn read(
        points: &[Point],
        tokenizer: &Tokenizer,
        context: usize,
        quiet: bool,
    ) -> Result<Self> {
        let mut kinds: Vec<(Config, Job)> = Vec::new();
        for point in points {
            let kind = kind_of(&point.config);
            if kinds.iter().all(|(known, _)| *known != kind) {
                let job = Job::new(point.config.clone(), tokenizer, context, quiet)?;
                kinds.push((kind, job));
            }
        }
        Ok(Self { kinds })
    }

    /// Hashes of the problems of every kind.
    pub fn hashes(&self) -> Vec<String> {
        self.kinds.iter().map(|(_, job)| job.data.hash()).collect()
    }

    /// The job of a run.
    ///
    /// # Errors
    /// [`Error::Internal`] for a run that was not among those read.
    pub fn of(&self, point: &Point) -> Result<Job> {
        let kind = kind_of(&point.config);
        let known = self.kinds.iter().find(|(known, _)| *known == kind);
        let (_, job) = known.ok_or_else(|| {
            Error::Internal(format!("{}: its problems were not read", point.name))
        })?;
        job.with_config(point.config.clone())
    }
}

/// A configuration without what has no part in the problems.
fn kind_of(config: &Config) -> Config {
    Config {
        adapter: AdapterSpec::default(),
        optim: Default::default(),
        train: Default::default(),
        ..config.clone()
    }
}
