//! A reward from an external program, kept running for the whole training.
//!
//! Each completion is one line of JSON, `{"prompt": …, "completion": …, "gold": …}`, on the program's
//! standard input; its answer is one line with a finite number on standard output, in the same order.
//! Standard error is passed through. The program must flush its output.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use super::Sample;
use crate::run::signals;
use crate::{Error, Result};

/// How long a signal may go unnoticed while the program has not answered.
const PATIENCE: Duration = Duration::from_millis(100);
/// Longest answer line in bytes; a number is shorter.
const MAX_LINE: u64 = 256;

/// A running reward program.
#[derive(Debug)]
pub struct CommandReward {
    /// The command as the user wrote it, for messages.
    command: String,
    timeout: Duration,
    child: Child,
    /// Requests for the program's input, written by a thread of their own: the program may answer
    /// before it has read everything, and may stop reading.
    requests: Sender<String>,
    /// Lines of the program's output, read by a thread of their own.
    lines: Receiver<String>,
    /// Completions of the next batch that the program has already.
    announced: usize,
    /// A line that nobody had asked for.
    surplus: Option<String>,
}

impl CommandReward {
    /// Starts the program. `timeout` is for one batch of completions, from the last of them on.
    ///
    /// Fails if the command is empty or cannot be started.
    pub fn start(command: &[String], timeout: Duration) -> Result<Self> {
        let words = command.join(" ");
        let Some((program, arguments)) = command.split_first() else {
            return Err(Error::config(
                "reward.command is empty: name the program and its arguments as a list",
            ));
        };
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|cause| {
                Error::config(format!("cannot start reward.command '{words}': {cause}"))
            })?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::Internal("reward command without pipes".to_owned()));
        };
        let (requests, waiting) = channel::<String>();
        std::thread::spawn(move || {
            let mut input = input;
            // A broken pipe shows as the end of the program's output.
            while let Ok(lines) = waiting.recv()
                && input.write_all(lines.as_bytes()).is_ok()
            {}
        });
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            loop {
                let mut line = Vec::new();
                let read = output.by_ref().take(MAX_LINE).read_until(b'\n', &mut line);
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if !matches!(read, Ok(1..)) || sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            command: words,
            timeout,
            child,
            requests,
            lines,
            announced: 0,
            surplus: None,
        })
    }

    /// Gives the program a completion of the next batch, which it may work on while others are sampled.
    pub fn announce(&mut self, sample: &Sample) {
        if self.announced == 0 {
            self.surplus = self.surplus.take().or_else(|| self.lines.try_recv().ok());
        }
        // A thread that has ended shows as the end of the program's output.
        let _ = self.requests.send(request(sample));
        self.announced += 1;
    }

    /// One number for each completion, in order; the first of them may have been announced.
    ///
    /// Fails, and stops the program, when it ends, answers too slowly, too much, or with something
    /// that is not a finite number; and when a signal asks this program to stop.
    pub fn score(&mut self, samples: &[Sample]) -> Result<Vec<f64>> {
        let announced = std::mem::take(&mut self.announced).min(samples.len());
        if announced == 0 && self.surplus.is_none() {
            match self.lines.try_recv() {
                Ok(line) => self.surplus = Some(line),
                Err(TryRecvError::Disconnected) => return Err(self.ended(0, samples.len())),
                Err(TryRecvError::Empty) => {}
            }
        }
        if let Some(line) = &self.surplus {
            return Err(self.failure(format_args!("it answered a line too many: '{line}'")));
        }
        let requests: String = samples[announced..].iter().map(request).collect();
        let deadline = Instant::now() + self.timeout;
        let _ = self.requests.send(requests);
        let mut answers = Vec::with_capacity(samples.len());
        while answers.len() < samples.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left.min(PATIENCE)) {
                Ok(line) => answers.push(line),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.ended(answers.len(), samples.len()));
                }
                Err(RecvTimeoutError::Timeout) => {
                    signals::check()?;
                    if left <= PATIENCE {
                        let _ = self.child.kill();
                        return Err(self.failure(format_args!(
                            "{} of {} answers within {} s: it must answer each line and flush its \
                             output, or reward.command_timeout is too short",
                            answers.len(),
                            samples.len(),
                            self.timeout.as_secs_f64()
                        )));
                    }
                }
            }
        }
        answers
            .iter()
            .enumerate()
            .map(|(at, line)| match line.parse::<f64>() {
                Ok(value) if value.is_finite() => Ok(value),
                _ => Err(self.failure(format_args!(
                    "answer {} is no finite number: '{line}'",
                    at + 1
                ))),
            })
            .collect()
    }

    fn failure(&self, what: std::fmt::Arguments) -> Error {
        Error::config(format!("reward.command '{}' failed: {what}", self.command))
    }

    /// The program has closed its output: with it mostly itself, which gets a moment to do so.
    fn ended(&mut self, got: usize, wanted: usize) -> Error {
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let status = match self.child.wait() {
            Ok(status) => status.to_string(),
            Err(cause) => cause.to_string(),
        };
        self.failure(format_args!(
            "it ended ({status}) after {got} of {wanted} answers"
        ))
    }
}

impl Drop for CommandReward {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn request(sample: &Sample) -> String {
    let line = serde_json::json!({
        "prompt": sample.prompt,
        "completion": sample.completion,
        "gold": sample.gold,
    });
    format!("{line}\n")
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn start(script: &str, seconds: f64) -> CommandReward {
        let command = ["sh", "-c", script].map(str::to_owned);
        CommandReward::start(&command, Duration::from_secs_f64(seconds)).unwrap()
    }

    fn samples(n: usize) -> Vec<Sample<'static>> {
        let sample = |_| Sample {
            prompt: "p \"q\"\n",
            completion: "c\0",
            gold: "4",
            tokens: 1,
        };
        (0..n).map(sample).collect()
    }

    #[test]
    fn one_number_a_line_over_several_batches() {
        let mut reward = start(
            r#"n=0; while read -r line; do n=$((n+1)); echo "$n.5"; done"#,
            10.0,
        );
        assert_eq!(reward.score(&samples(2)).unwrap(), [1.5, 2.5]);
        assert_eq!(reward.score(&samples(1)).unwrap(), [3.5]);
        assert!(reward.score(&[]).unwrap().is_empty());
    }

    #[test]
    fn announced_completions_are_worked_on_before_they_are_asked_for() {
        let place = tempfile::tempdir().unwrap();
        let log = place.path().join("log");
        let script = format!(
            "n=0; while read -r line; do n=$((n+1)); echo $n >>'{}'; echo $n; done",
            log.display()
        );
        let mut reward = start(&script, 10.0);
        let batch = samples(3);
        for first in [0, 3] {
            reward.announce(&batch[0]);
            reward.announce(&batch[1]);
            let deadline = Instant::now() + Duration::from_secs(20);
            let seen = || {
                std::fs::read_to_string(&log)
                    .unwrap_or_default()
                    .lines()
                    .count()
            };
            while seen() < first + 2 {
                assert!(Instant::now() < deadline, "the program saw {}", seen());
                std::thread::sleep(Duration::from_millis(5));
            }
            let expected = [1, 2, 3].map(|n| f64::from(n) + first as f64);
            assert_eq!(reward.score(&batch).unwrap(), expected);
        }
    }

    #[test]
    fn the_program_sees_one_json_object_a_line() {
        let expected = r#"{"prompt":"p \"q\"\n","completion":"c\u0000","gold":"4"}"#;
        let script =
            format!("read -r line; [ \"$line\" = '{expected}' ] && echo 1 || echo 0; sleep 5");
        assert_eq!(start(&script, 10.0).score(&samples(1)).unwrap(), [1.0]);
    }

    #[test]
    fn more_completions_than_a_pipe_holds() {
        let mut reward = start("while read -r line; do echo 0; done", 30.0);
        assert_eq!(reward.score(&samples(5_000)).unwrap().len(), 5_000);
    }

    #[test]
    fn failures_say_what_went_wrong() {
        for (script, seconds, cause) in [
            (
                "read -r line; echo 1; exit 3",
                10.0,
                "exit status: 3) after 1 of 2 answers",
            ),
            (
                "while read -r line; do echo yes; done",
                10.0,
                "answer 1 is no finite number: 'yes'",
            ),
            (
                "while read -r line; do echo nan; done",
                10.0,
                "is no finite number",
            ),
            ("cat > /dev/null", 0.2, "0 of 2 answers within 0.2 s"),
            ("sleep 10", 0.2, "0 of 2 answers"),
            // Closes its output and lives on.
            ("exec >&-; cat >/dev/null", 10.0, "after 0 of 2 answers"),
        ] {
            let message = start(script, seconds)
                .score(&samples(2))
                .unwrap_err()
                .to_string();
            assert!(
                message.contains(cause) && message.contains("reward.command"),
                "{message}"
            );
        }
        let missing = CommandReward::start(&["/no/such/program".to_owned()], Duration::ZERO);
        assert!(missing.unwrap_err().to_string().contains("cannot start"));
    }

    #[test]
    fn a_program_that_never_reads_nor_ends_is_left() {
        // What the shell starts holds the pipes when the shell has been killed.
        for script in ["sleep 60; true", "exec >&-; sleep 60; true"] {
            let began = Instant::now();
            let mut reward = start(script, 0.2);
            // More than a pipe holds.
            reward.score(&samples(20_000)).unwrap_err();
            drop(reward);
            assert!(began.elapsed() < Duration::from_secs(30), "{script}");
        }
    }

    #[test]
    fn a_line_too_many_is_noticed() {
        let mut reward = start("while read -r line; do echo 1; echo 2; done", 10.0);
        assert_eq!(reward.score(&samples(1)).unwrap(), [1.0]);
        std::thread::sleep(Duration::from_millis(200));
        let message = reward.score(&samples(1)).unwrap_err().to_string();
        assert!(message.contains("a line too many: '2'"), "{message}");
        let mut reward = start("while read -r line; do echo 1; echo 2; done", 10.0);
        assert_eq!(reward.score(&samples(1)).unwrap(), [1.0]);
        std::thread::sleep(Duration::from_millis(200));
        reward.announce(&samples(1)[0]);
        let message = reward.score(&samples(1)).unwrap_err().to_string();
        assert!(message.contains("a line too many: '2'"), "{message}");
    }
}
