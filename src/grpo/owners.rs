//! What each rank computed of the groups that it sampled, taken in the order of the batch.

use super::rollouts::Rollouts;
use crate::ranks::Ranks;
use crate::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Results of all ranks, each rank's in the order of the batch.
pub(super) struct ByOwner<T>(Vec<std::vec::IntoIter<T>>);

impl<T: Serialize + DeserializeOwned> ByOwner<T> {
    /// Exchanges what this rank has, or the error that it stopped with.
    pub fn gather(ranks: &Ranks, own: Result<Vec<T>>) -> Result<Self> {
        let all = ranks.gather(own)?;
        Ok(Self(all.into_iter().map(Vec::into_iter).collect()))
    }

    /// The next result of the rank that sampled a group.
    ///
    /// # Errors
    /// [`Error::Internal`] when that rank has given fewer.
    pub fn next_of(&mut self, rollouts: &Rollouts, group: usize) -> Result<T> {
        let owner = rollouts.groups[group].owner;
        let next = self.0.get_mut(owner).and_then(Iterator::next);
        next.ok_or_else(|| Error::Internal(format!("rank {owner} left out a part of an update")))
    }
}
