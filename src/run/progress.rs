//! Progress of long work: a live bar on a terminal, plain lines elsewhere, nothing with `--quiet`.

use std::io::IsTerminal;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// All bars of the terminal, so that one within another has a line of its own.
static BARS: LazyLock<MultiProgress> =
    LazyLock::new(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8)));

/// Seconds between two plain lines of one piece of work.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// How progress is shown. Copied freely; everything goes to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// A bar that redraws itself.
    Terminal,
    /// A line now and then.
    Lines,
    Silent,
}

impl Progress {
    /// The way that suits stderr.
    pub fn new(quiet: bool) -> Self {
        if quiet {
            Self::Silent
        } else if std::io::stderr().is_terminal() {
            Self::Terminal
        } else {
            Self::Lines
        }
    }

    /// Starts a piece of work of `total` units, for instance ("evaluating svamp", 300).
    pub fn bar(self, label: &str, total: u64) -> Bar {
        let bar = match self {
            Self::Terminal => BARS.add(ProgressBar::new(total)),
            Self::Lines | Self::Silent => {
                ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden())
            }
        };
        let template = "{prefix} {bar:24} {pos}/{len} {msg} [{elapsed_precise} / {eta_precise} left, {per_sec}]";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_prefix(label.to_owned());
        if self == Self::Terminal {
            // Redraw while one unit takes long, so that the clock shows it is alive.
            bar.enable_steady_tick(Duration::from_millis(500));
        }
        Bar {
            mode: self,
            bar,
            last_line: Mutex::new(Instant::now()),
        }
    }

    /// A line the user should see whatever is in progress.
    pub fn line(self, text: &str) {
        match self {
            Self::Silent => {}
            _ if text.is_empty() => {}
            Self::Lines => eprintln!("{text}"),
            Self::Terminal => BARS.suspend(|| eprintln!("{text}")),
        }
    }
}

/// One piece of work in progress. Shared by reference between threads.
#[derive(Debug)]
pub struct Bar {
    mode: Progress,
    bar: ProgressBar,
    last_line: Mutex<Instant>,
}

impl Bar {
    /// More units are done.
    pub fn inc(&self, units: u64) {
        self.bar.inc(units);
        self.plain_line(false);
    }

    /// This many units are done.
    pub fn set_position(&self, units: u64) {
        self.bar.set_position(units);
        self.plain_line(false);
    }

    /// What is said beside the bar, for instance `reward 0.41 · 96 tokens · 830 tok/s`.
    pub fn set_message(&self, message: impl Into<String>) {
        self.bar.set_message(message.into());
    }

    /// What [`Self::set_message`] set last.
    pub fn message(&self) -> String {
        self.bar.message()
    }

    /// Prints a line above the bar.
    pub fn println(&self, text: &str) {
        match self.mode {
            Progress::Terminal => BARS.suspend(|| eprintln!("{text}")),
            Progress::Lines => eprintln!("{text}"),
            Progress::Silent => {}
        }
    }

    /// Removes the bar without a word.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }

    /// Ends the work and removes the bar; a plain log keeps a last line.
    pub fn finish(&self) {
        self.plain_line(true);
        self.bar.finish_and_clear();
    }

    fn plain_line(&self, last: bool) {
        if self.mode != Progress::Lines {
            return;
        }
        let Ok(mut previous) = self.last_line.lock() else {
            return;
        };
        if !last && previous.elapsed() < LINE_EVERY {
            return;
        }
        *previous = Instant::now();
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let left = match self.bar.eta().as_secs() {
            s if last || s == 0 => String::new(),
            s => format!(", {s} s left"),
        };
        let elapsed = self.bar.elapsed();
        let (label, message) = (self.bar.prefix(), self.bar.message());
        let rate = done as f64 / elapsed.as_secs_f64().max(1e-3);
        let elapsed = elapsed.as_secs();
        eprintln!("{label} {done}/{total} {message} [{elapsed} s{left}, {rate:.2}/s]");
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // An error on the way must not leave half a bar before its message.
        self.bar.finish_and_clear();
    }
}
