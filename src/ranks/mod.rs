//! Several processes that train one adapter: who does what, and what they tell each other.
//!
//! Every process (a *rank*, as MPI calls it) loads the model, holds the same trained numbers and makes
//! the same updates. The work of a step is divided by prompts; what comes of it is exchanged and added
//! up by everyone in the order of the prompts, so that the number of ranks changes no bit on a CPU. Only
//! rank 0, the *root*, writes.
//!
//! An exchange is all that ranks do together. Each gives bytes, or the error that it stopped with, and
//! gets those of all: no rank waits for one that has given up.

mod exchange;
mod launcher;
#[cfg(feature = "mpi")]
mod mpi;
mod session;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod threads;
#[cfg(feature = "mpi")]
mod watch;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

pub use exchange::Link;
pub use launcher::{Launched, local_gpu, local_size};
pub use session::run;

use crate::run::signals;
use crate::{Error, Result};

/// How long a rank waits for others that are alive, unless `train.ddp_timeout` says otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(1800);

/// This process among those of its run; alone by default.
#[derive(Clone, Default)]
pub struct Ranks {
    link: Option<Arc<dyn Link>>,
    /// The others know that this rank has failed, or cannot be told.
    ended: Arc<AtomicBool>,
}

impl std::fmt::Debug for Ranks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.size())
    }
}

impl Ranks {
    /// The only process.
    pub fn alone() -> Self {
        Self::default()
    }

    /// One of several.
    pub fn linked(link: Arc<dyn Link>) -> Self {
        Self {
            link: Some(link),
            ended: Arc::default(),
        }
    }

    /// From 0 to [`Self::size`].
    pub fn rank(&self) -> usize {
        self.link.as_ref().map_or(0, |link| link.rank())
    }

    pub fn size(&self) -> usize {
        self.link.as_ref().map_or(1, |link| link.size())
    }

    pub fn is_alone(&self) -> bool {
        self.size() == 1
    }

    /// Whether this is the rank that writes.
    pub fn is_root(&self) -> bool {
        self.rank() == 0
    }

    /// How long this rank waits for others that are alive.
    pub fn set_timeout(&self, timeout: Duration) {
        if let Some(link) = &self.link {
            link.set_timeout(timeout);
        }
    }

    /// Bytes that this rank has sent to others so far.
    pub fn bytes_sent(&self) -> u64 {
        self.link.as_ref().map_or(0, |link| link.bytes_sent())
    }

    /// The part of `count` things in order that is this rank's: neighbours, as many for each rank as for
    /// any other, up to one.
    pub fn share(&self, count: usize) -> Range<usize> {
        let bound = |rank: usize| rank * count / self.size();
        bound(self.rank())..bound(self.rank() + 1)
    }

    /// What every rank has, by rank.
    ///
    /// # Errors
    /// Where any rank comes with an error, all get it: the first one that is not an interruption.
    pub fn gather<T>(&self, own: Result<Vec<T>>) -> Result<Vec<Vec<T>>>
    where
        T: Serialize + DeserializeOwned,
    {
        let Some(link) = &self.link else {
            return Ok(vec![own?]);
        };
        let message = postcard::to_stdvec(&own).map_err(|e| unreadable("written", &e))?;
        let messages = self.exchange(&**link, message)?;
        let read = |message: &[u8]| -> Result<Result<Vec<T>>> {
            postcard::from_bytes(message).map_err(|e| unreadable("read", &e))
        };
        let mut all = Vec::with_capacity(messages.len());
        let mut own = Some(own);
        for (rank, message) in messages.iter().enumerate() {
            // One's own keep what is not sent.
            let said = match own.take_if(|_| rank == link.rank()) {
                Some(own) => own,
                None => read(message)?,
            };
            all.push(said.map_err(|error| of_rank(rank, error)));
        }
        self.first_error(all)
    }

    fn first_error<T>(&self, said: Vec<Result<T>>) -> Result<Vec<T>> {
        let (done, failed): (Vec<_>, Vec<_>) = said.into_iter().partition(Result::is_ok);
        let mut errors: Vec<Error> = failed.into_iter().filter_map(Result::err).collect();
        if errors.is_empty() {
            return Ok(done.into_iter().flatten().collect());
        }
        self.ended.store(true, Ordering::Relaxed);
        let worst = errors
            .iter()
            .position(|error| !matches!(error, Error::Interrupted(_)));
        Err(errors.swap_remove(worst.unwrap_or(0)))
    }

    /// The value that the root makes, on every rank.
    pub fn from_root<T>(&self, make: impl FnOnce() -> Result<T>) -> Result<T>
    where
        T: Serialize + DeserializeOwned,
    {
        let own = match self.is_root() {
            true => make().map(|value| vec![value]),
            false => Ok(Vec::new()),
        };
        let mut all = self.gather(own)?;
        let value = all.swap_remove(0).pop();
        value.ok_or_else(|| Error::Internal("the root sent nothing".to_owned()))
    }

    /// Does something on the root alone; all ranks learn whether it went well.
    pub fn on_root<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        let mut value = None;
        self.from_root(|| {
            value = Some(work()?);
            Ok(())
        })?;
        Ok(value)
    }

    /// Checks that all ranks are at the same place. `what` reads after "rank 2 has another".
    ///
    /// # Errors
    /// [`Error::Interrupted`] where a signal has asked any rank to stop; [`Error::Lost`] naming a rank
    /// that has come elsewhere than the root.
    pub fn agree(&self, what: &str, digest: &[u8]) -> Result<()> {
        let digest = Sha256::digest(digest).to_vec();
        let all = self.gather(signals::check().map(|()| vec![digest]))?;
        match all.iter().position(|digest| *digest != all[0]) {
            None => Ok(()),
            Some(rank) => Err(Error::Lost(format!(
                "rank {rank} has another {what} than rank 0"
            ))),
        }
    }

    fn exchange(&self, link: &dyn Link, message: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        link.exchange(message).inspect_err(|_| {
            self.ended.store(true, Ordering::Relaxed);
            link.give_up();
        })
    }

    /// Tells the others, who would wait, that this rank ends with an error.
    fn tell(&self, error: &Error) {
        let Some(link) = &self.link else { return };
        if self.ended.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Ok(message) = postcard::to_stdvec(&Err::<Vec<()>, _>(error)) {
            // Where they cannot be told they see that this rank has gone.
            let _ = self.exchange(&**link, message);
        }
    }
}

fn of_rank(rank: usize, error: Error) -> Error {
    match error {
        Error::Config(text) => Error::Config(format!("rank {rank}: {text}")),
        Error::Data(text) => Error::Data(format!("rank {rank}: {text}")),
        Error::Diverged(text) => Error::Diverged(format!("rank {rank}: {text}")),
        Error::Lost(text) => Error::Lost(format!("rank {rank}: {text}")),
        Error::Interrupted(text) => Error::Interrupted(text),
        Error::Internal(text) => Error::Internal(format!("rank {rank}: {text}")),
    }
}

fn unreadable(what: &str, error: &postcard::Error) -> Error {
    Error::Internal(format!(
        "a message between ranks could not be {what}: {error}; do all run the same program?"
    ))
}
