//! Ranks that are threads of one process, for tests.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Link, Ranks};
use crate::{Error, Result};

struct ThreadLink {
    rank: usize,
    /// By rank.
    to: Vec<Sender<Vec<u8>>>,
    from: Mutex<Vec<Receiver<Vec<u8>>>>,
    bytes_sent: AtomicU64,
}

impl Link for ThreadLink {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn exchange(&self, message: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let total = message.len() * (self.size() - 1);
        self.bytes_sent.fetch_add(total as u64, Ordering::Relaxed);
        for to in &self.to {
            // One that has gone is noticed below.
            let _ = to.send(message.clone());
        }
        let from = self.from.lock().expect("one thread");
        let receive = |(rank, from): (usize, &Receiver<Vec<u8>>)| {
            from.recv_timeout(Duration::from_secs(60))
                .map_err(|e| Error::Lost(format!("rank {rank}: {e}")))
        };
        from.iter().enumerate().map(receive).collect()
    }

    fn set_timeout(&self, _: Duration) {}

    fn bytes_sent(&self) -> u64 {
        self.bytes_sent.load(Ordering::Relaxed)
    }

    fn give_up(&self) {}

    fn finish(&self) {}

    fn abort(&self, _: u8) {}
}

fn links(count: usize) -> Vec<Ranks> {
    let mut to: Vec<Vec<_>> = (0..count).map(|_| Vec::new()).collect();
    let mut from: Vec<Vec<_>> = (0..count).map(|_| Vec::new()).collect();
    for sender in &mut to {
        for receiver in &mut from {
            let (send, receive) = mpsc::channel();
            sender.push(send);
            receiver.push(receive);
        }
    }
    to.into_iter()
        .zip(from)
        .enumerate()
        .map(|(rank, (to, from))| {
            Ranks::linked(Arc::new(ThreadLink {
                rank,
                to,
                from: Mutex::new(from),
                bytes_sent: AtomicU64::new(0),
            }))
        })
        .collect()
}

/// What `work` gives on each of `count` ranks.
pub(crate) fn on_ranks<T: Send>(count: usize, work: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = links(count)
            .into_iter()
            .map(|ranks| scope.spawn(|| work(ranks)))
            .collect();
        let joined = threads.into_iter().map(|t| t.join().expect("no panic"));
        joined.collect()
    })
}
