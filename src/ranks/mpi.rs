//! Messages between ranks by MPI.
//!
//! One thread owns MPI and never blocks on a single rank: it sends, looks for what has come, and tells the
//! others every second that this process lives. The thread that computes waits for its answers, with
//! limits. So a rank that dies, stops or is cut off is noticed by all, whatever it was doing.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::environment::Universe;
use mpi::point_to_point::Status;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, MatchedReceiveVec, Source};

use super::Link;
use super::watch::{BEAT, LONGEST_SILENCE, Watch};
use crate::run::signals;
use crate::{Error, Result};

const DATA: i32 = 1;
const ALIVE: i32 = 2;
/// How often the owner of MPI looks around when there is nothing to exchange.
const IDLE: Duration = Duration::from_millis(20);
/// Longest time between two looks during an exchange.
const BUSY: Duration = Duration::from_millis(2);
/// How long the computing thread waits for the end of MPI.
const FAREWELL: Duration = Duration::from_secs(30);

/// What the computing thread wants of the owner of MPI.
enum Job {
    Exchange(Vec<u8>),
    GiveUp,
    Finish,
    Abort(u8),
}

type Answer = Result<Vec<Vec<u8>>>;

/// This process in MPI's world.
pub struct MpiLink {
    rank: usize,
    size: usize,
    jobs: Mutex<Sender<Job>>,
    answers: Mutex<Receiver<Answer>>,
    shared: Arc<Shared>,
    /// Seconds that an exchange may take.
    timeout: AtomicU64,
}

/// What the owner of MPI shows of itself.
#[derive(Default)]
struct Shared {
    bytes_sent: AtomicU64,
    /// Looks around so far.
    looks: AtomicU64,
}

impl MpiLink {
    /// Starts MPI in a thread of its own.
    ///
    /// # Errors
    /// [`Error::Internal`] when MPI does not start.
    pub fn start() -> Result<Self> {
        let (jobs, incoming) = mpsc::channel();
        let (outgoing, answers) = mpsc::channel();
        let (started, place) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let failed = |why: &str| Error::Internal(format!("MPI does not start: {why}"));
        thread::Builder::new()
            .name("mpi".to_owned())
            .spawn(move || own_mpi(&incoming, &outgoing, &own, &started))
            .map_err(|e| failed(&e.to_string()))?;
        let (rank, size) = place
            .recv()
            .map_err(|_| failed("it has been started already, or knows no threads"))?;
        Ok(Self {
            rank,
            size,
            jobs: Mutex::new(jobs),
            answers: Mutex::new(answers),
            shared,
            timeout: AtomicU64::new(super::TIMEOUT.as_secs()),
        })
    }

    fn ask(&self, job: Job) {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody takes it any more only when MPI has ended.
        let _ = jobs.send(job);
    }
}

impl Link for MpiLink {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&self, message: Vec<u8>) -> Answer {
        self.ask(Job::Exchange(message));
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let started = Instant::now();
        // The owner of MPI, watched like a rank.
        let mut owner = Watch::new(1, started);
        let mut looks = 0;
        loop {
            match answers.recv_timeout(Duration::from_millis(50)) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Lost("MPI has ended".to_owned()));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = Instant::now();
            // The root has a checkpoint to save, and the others nothing to do without it.
            signals::check()?;
            let seen = self.shared.looks.load(Ordering::Relaxed);
            if seen != looks {
                (looks, _) = (seen, owner.heard(0));
            }
            if owner.look(now).is_some() {
                return Err(Error::Lost("MPI does not answer any more".to_owned()));
            }
            let timeout = self.timeout.load(Ordering::Relaxed);
            if now.duration_since(started).as_secs() > timeout {
                return Err(Error::Lost(format!(
                    "the other ranks have not come as far in {timeout} seconds (train.ddp_timeout)"
                )));
            }
        }
    }

    fn set_timeout(&self, timeout: Duration) {
        self.timeout.store(timeout.as_secs(), Ordering::Relaxed);
    }

    fn bytes_sent(&self) -> u64 {
        self.shared.bytes_sent.load(Ordering::Relaxed)
    }

    fn give_up(&self) {
        self.ask(Job::GiveUp);
    }

    fn finish(&self) {
        self.ask(Job::Finish);
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        // It ends by hanging up. The adapter is written: that is not worth an error.
        let _ = answers.recv_timeout(FAREWELL);
    }

    fn abort(&self, exit_code: u8) {
        self.ask(Job::Abort(exit_code));
        thread::sleep(Duration::from_secs(5));
    }
}

/// The life of the thread that owns MPI.
fn own_mpi(
    jobs: &Receiver<Job>,
    answers: &Sender<Answer>,
    shared: &Shared,
    started: &Sender<(usize, usize)>,
) {
    let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Funneled) else {
        return;
    };
    if threading < Threading::Funneled {
        return;
    }
    let world = universe.world();
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    if started.send((rank, size)).is_err() {
        return;
    }
    let now = Instant::now();
    let mut owner = Owner {
        jobs,
        answers,
        shared,
        peers: (0..size).filter(|&peer| peer != rank).collect(),
        rank,
        universe: &universe,
        world,
        inbox: vec![VecDeque::new(); size],
        watch: Watch::new(size, now),
        next_beat: now,
        beats: true,
    };
    let end = owner.serve();
    match end {
        End::Finish => drop(universe),
        // The end of the process is the end of MPI: waiting for ranks that are gone would hang.
        End::Leave => std::mem::forget(universe),
    }
}

/// How the thread ends.
enum End {
    Finish,
    Leave,
}

/// The only one who calls MPI.
struct Owner<'a> {
    jobs: &'a Receiver<Job>,
    answers: &'a Sender<Answer>,
    shared: &'a Shared,
    universe: &'a Universe,
    world: SimpleCommunicator,
    rank: usize,
    peers: Vec<usize>,
    /// By rank: messages of exchanges to come.
    inbox: Vec<VecDeque<Vec<u8>>>,
    watch: Watch,
    next_beat: Instant,
    beats: bool,
}

impl Owner<'_> {
    fn serve(&mut self) -> End {
        loop {
            match self.jobs.recv_timeout(IDLE) {
                Ok(Job::Exchange(message)) => {
                    let answer = self.exchange(message);
                    if self.answers.send(answer).is_err() {
                        return End::Leave;
                    }
                }
                Ok(Job::GiveUp) => self.beats = false,
                Ok(Job::Finish) => return End::Finish,
                Ok(Job::Abort(code)) => self.world.abort(code.into()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return End::Leave,
            }
            self.look_around();
        }
    }

    fn exchange(&mut self, message: Vec<u8>) -> Answer {
        if i32::try_from(message.len()).is_err() {
            return Err(Error::Internal(format!(
                "a message between ranks of {} bytes is more than MPI takes",
                message.len()
            )));
        }
        let total = message.len() * self.peers.len();
        let bytes_sent = &self.shared.bytes_sent;
        bytes_sent.fetch_add(total as u64, Ordering::Relaxed);
        let started = Instant::now();
        mpi::request::scope(|scope| {
            let world = self.universe.world();
            let mut sending: Vec<_> = self
                .peers
                .iter()
                .map(|&peer| {
                    world.process_at_rank(peer as i32).immediate_send_with_tag(
                        scope,
                        &message[..],
                        DATA,
                    )
                })
                .collect();
            loop {
                let lost = self.look_around();
                sending = sending
                    .into_iter()
                    .filter_map(|request| request.test().err())
                    .collect();
                let complete = self.peers.iter().all(|&peer| !self.inbox[peer].is_empty());
                if sending.is_empty() && complete {
                    break;
                }
                if let Some(rank) = lost {
                    self.mourn(rank);
                }
                match self.jobs.try_recv() {
                    Ok(Job::Abort(code)) => self.world.abort(code.into()),
                    Ok(Job::GiveUp) => self.beats = false,
                    Ok(_) | Err(TryRecvError::Empty) => {}
                    Err(TryRecvError::Disconnected) => self.mourn(self.rank),
                }
                thread::sleep((started.elapsed() / 20).min(BUSY));
            }
        });
        self.inbox[self.rank].push_back(message);
        Ok(self
            .inbox
            .iter_mut()
            .filter_map(VecDeque::pop_front)
            .collect())
    }

    /// A rank is lost in the middle of an exchange. What was begun with it cannot be ended, so that this
    /// thread does nothing more than to end the process when it is told to.
    fn mourn(&self, rank: usize) -> ! {
        let seconds = LONGEST_SILENCE.as_secs();
        let lost = format!("rank {rank} has not been heard of for {seconds} seconds");
        let _ = self.answers.send(Err(Error::Lost(lost)));
        loop {
            match self.jobs.recv() {
                Ok(Job::Abort(code)) => self.world.abort(code.into()),
                Ok(_) => {}
                Err(_) => thread::park(),
            }
        }
    }

    /// Takes what has come, gives a sign of life when it is time, and names a rank that gives none.
    fn look_around(&mut self) -> Option<usize> {
        self.shared.looks.fetch_add(1, Ordering::Relaxed);
        while let Some(found) = self.world.any_process().immediate_matched_probe() {
            let (message, status): (Vec<u8>, Status) = found.matched_receive_vec();
            let source = status.source_rank() as usize;
            self.watch.heard(source);
            if status.tag() == DATA {
                self.inbox[source].push_back(message);
            }
        }
        let now = Instant::now();
        if self.beats && now >= self.next_beat {
            for &peer in &self.peers {
                let nothing: [u8; 0] = [];
                let peer = self.world.process_at_rank(peer as i32);
                peer.send_with_tag(&nothing[..], ALIVE);
            }
            self.next_beat = now + BEAT;
        }
        self.watch.heard(self.rank);
        self.watch.look(now)
    }
}
