//! A reward from an external program, kept running for the whole training.
//!
//! Each completion is one line of JSON, `{"prompt": …, "completion": …, "gold": …}`, on the program's
//! standard input; its answer is one line with a finite number on standard output, in the same order.
//! Standard error is passed through. The program must flush its output.

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::{Duration, Instant};

use super::Sample;
use crate::{Error, Result};

/// Longest answer line in bytes; a number is shorter.
const MAX_LINE: u64 = 256;

/// A running reward program.
#[derive(Debug)]
pub struct CommandReward {
    /// The command as the user wrote it, for messages.
    command: String,
    timeout: Duration,
    child: Child,
    input: BufWriter<ChildStdin>,
    /// Lines of the program's output, read by a thread of their own.
    lines: Receiver<String>,
}

impl CommandReward {
    /// Starts the program. `timeout` is for one batch of completions.
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
            input: BufWriter::new(input),
            lines,
        })
    }

    /// One number for each completion, in order.
    ///
    /// Fails, and stops the program, when it ends, answers too slowly, too much, or with something
    /// that is not a finite number.
    pub fn score(&mut self, samples: &[Sample]) -> Result<Vec<f64>> {
        match self.lines.try_recv() {
            Ok(line) => {
                return Err(self.failure(format_args!("it answered a line too many: '{line}'")));
            }
            Err(TryRecvError::Disconnected) => return Err(self.ended(0, samples.len())),
            Err(TryRecvError::Empty) => {}
        }
        let requests: String = samples.iter().map(request).collect();
        let deadline = Instant::now() + self.timeout;
        let (input, lines) = (&mut self.input, &self.lines);
        let child = &mut self.child;
        let answers = std::thread::scope(|scope| {
            // Written from another thread: the program may answer before it has read everything.
            // A broken pipe shows as the end of its output.
            scope.spawn(move || {
                input
                    .write_all(requests.as_bytes())
                    .and_then(|()| input.flush())
            });
            let mut answers = Vec::with_capacity(samples.len());
            while answers.len() < samples.len() {
                let left = deadline.saturating_duration_since(Instant::now());
                match lines.recv_timeout(left) {
                    Ok(line) => answers.push(line),
                    Err(end) => {
                        // Also frees the writer, should it wait for the program to read.
                        let _ = child.kill();
                        return Err((end, answers.len()));
                    }
                }
            }
            Ok(answers)
        });
        let answers = match answers {
            Ok(answers) => answers,
            Err((RecvTimeoutError::Disconnected, got)) => {
                return Err(self.ended(got, samples.len()));
            }
            Err((RecvTimeoutError::Timeout, got)) => {
                return Err(self.failure(format_args!(
                    "{got} of {} answers within {} s: it must answer each line and flush its output, \
                     or reward.command_timeout is too short",
                    samples.len(),
                    self.timeout.as_secs_f64()
                )));
            }
        };
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

    fn ended(&mut self, got: usize, wanted: usize) -> Error {
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
    fn a_line_too_many_is_noticed() {
        let mut reward = start("while read -r line; do echo 1; echo 2; done", 10.0);
        assert_eq!(reward.score(&samples(1)).unwrap(), [1.0]);
        std::thread::sleep(Duration::from_millis(200));
        let message = reward.score(&samples(1)).unwrap_err().to_string();
        assert!(message.contains("a line too many: '2'"), "{message}");
    }
}
