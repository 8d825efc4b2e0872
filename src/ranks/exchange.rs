//! What carries messages between ranks.

use std::time::Duration;

use crate::Result;

/// A link to the other ranks. Its calls come from one thread at a time.
pub trait Link: Send + Sync {
    fn rank(&self) -> usize;

    fn size(&self) -> usize;

    /// Sends `message` to every other rank and waits for theirs: all of them, by rank.
    ///
    /// # Errors
    /// [`crate::Error::Lost`] when a rank has gone or is silent for too long;
    /// [`crate::Error::Interrupted`] when a signal came while waiting. Nothing can be exchanged after.
    fn exchange(&self, message: Vec<u8>) -> Result<Vec<Vec<u8>>>;

    /// How long an exchange may wait for ranks that are alive.
    fn set_timeout(&self, timeout: Duration);

    /// Bytes sent to others so far.
    fn bytes_sent(&self) -> u64;

    /// Takes no part in exchanges any more.
    fn give_up(&self);

    /// Ends the link, when all ranks have done what they had to do.
    fn finish(&self);

    /// Ends this process and those of all other ranks. Gives up waiting for that after a while.
    fn abort(&self, exit_code: u8);
}
