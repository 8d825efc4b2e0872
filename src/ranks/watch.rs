//! Who is still there: how long each rank has been silent while this one listened.

use std::time::{Duration, Instant};

/// Time between two signs of life.
pub const BEAT: Duration = Duration::from_secs(1);
/// Silence after which a rank is lost.
pub const LONGEST_SILENCE: Duration = Duration::from_secs(15);
/// More time than this between two looks is time in which this process itself was stopped.
const LONGEST_LOOK: Duration = Duration::from_millis(500);

/// Counts silence in the time that this process was awake: one that is stopped and goes on (by a
/// debugger, a scheduler, a lid that closes) must not take the others for dead.
#[derive(Debug)]
pub struct Watch {
    silence: Vec<Duration>,
    looked: Instant,
}

impl Watch {
    pub fn new(count: usize, now: Instant) -> Self {
        Self {
            silence: vec![Duration::ZERO; count],
            looked: now,
        }
    }

    /// Something was heard of `which`.
    pub fn heard(&mut self, which: usize) {
        self.silence[which] = Duration::ZERO;
    }

    /// Time goes on; gives the first that has been silent for too long.
    pub fn look(&mut self, now: Instant) -> Option<usize> {
        let passed = now.duration_since(self.looked).min(LONGEST_LOOK);
        self.looked = now;
        self.silence.iter_mut().for_each(|s| *s += passed);
        self.silence.iter().position(|s| *s > LONGEST_SILENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_counted_while_awake_only() {
        let start = Instant::now();
        let mut watch = Watch::new(2, start);
        let minute = Duration::from_secs(60);
        // Stopped for a minute: nobody is dead for that.
        assert_eq!(watch.look(start + minute), None);
        let mut now = start + minute;
        let mut steps = 0;
        let lost = loop {
            now += Duration::from_millis(100);
            steps += 1;
            watch.heard(0);
            if let Some(lost) = watch.look(now) {
                break lost;
            }
        };
        assert_eq!(lost, 1);
        let seconds = steps as f64 / 10.0;
        assert!((14.0..16.0).contains(&seconds), "{seconds}");
    }
}
