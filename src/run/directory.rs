//! The folder of a run: where everything lies, how a new one is named, which one is the newest.
//!
//! ```text
//! runs/20260131-184502-qwen7b-13p/
//!   config.toml         resolved configuration
//!   metrics.jsonl       one line a step, the same bytes after an interruption as without one
//!   timings.jsonl       what the clock says of each step (seconds, tokens/s)
//!   completions.jsonl   prompt, completion, extracted answer, reward, advantage
//!   tensorboard/        the three logs above for TensorBoard
//!   environment.json    what it is computed with, see `environment`
//!   evaluations/        problems and completions of each evaluation
//!   checkpoints/step-N/ see `checkpoint`
//!   adapter.safetensors the trained adapter, written at the end
//!   report.html         the page about it, written at the end
//! ```

use std::path::{Path, PathBuf};

use super::checkpoint;
use super::clock;
use super::fs;
use super::lock::Lock;
use crate::config::{Config, Source};
use crate::{Error, Result};

/// Where runs are kept unless `--run-dir` says otherwise.
pub const RUNS: &str = "runs";

/// File of the resolved configuration, which makes a folder a run directory.
pub const CONFIG: &str = "config.toml";

/// File of a run's place among those beside it, see [`newest`].
const NUMBER: &str = ".number";

/// A run directory held by this process.
#[derive(Debug)]
pub struct RunDirectory {
    path: PathBuf,
    _lock: Lock,
}

impl RunDirectory {
    /// Makes `runs/<UTC time>-<name>`, with a number behind it when that exists.
    pub fn create_new(name: &str) -> Result<Self> {
        let runs = Path::new(RUNS);
        fs::create_dir_all(runs)?;
        let base = format!("{}-{name}", timestamp(clock::seconds()));
        for attempt in 1..1000 {
            let path = match attempt {
                1 => runs.join(&base),
                n => runs.join(format!("{base}-{n}")),
            };
            let made = fs::change("create", &path, || match std::fs::create_dir(&path) {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
                result => result.map(|()| true),
            })?;
            if made {
                let held = Self::hold(path)?;
                held.take_number()?;
                return Ok(held);
            }
        }
        Err(Error::data(format!(
            "runs/{base} and 999 more exist already"
        )))
    }

    /// Makes the folder the user named; one that holds anything is refused.
    pub fn create_at(path: &Path) -> Result<Self> {
        if path.exists() {
            refuse_used(path)?;
        }
        fs::create_dir_all(path)?;
        let held = Self::hold(path.to_owned())?;
        // Again under the lock: another process may have begun a run since.
        refuse_used(path)?;
        held.take_number()?;
        Ok(held)
    }

    /// Opens the folder of an earlier run to go on with it.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.join(CONFIG).is_file() {
            return Err(Error::config(format!(
                "{} is no run directory: it has no {CONFIG}",
                path.display()
            )));
        }
        Self::hold(path.to_owned())
    }

    fn hold(path: PathBuf) -> Result<Self> {
        let lock = Lock::acquire(&path)?;
        fs::remove_temporaries(&path)?;
        Ok(Self { path, _lock: lock })
    }

    /// Remembers that this run began after all those beside it under `runs/`, whatever the clock says.
    fn take_number(&self) -> Result<()> {
        let parent = fs::parent(&self.path);
        let among_runs = match (parent.canonicalize(), Path::new(RUNS).canonicalize()) {
            (Ok(parent), Ok(runs)) => parent == runs,
            _ => false,
        };
        if !among_runs {
            return Ok(());
        }
        let last = runs_in(parent).filter_map(|run| number_of(&run)).max();
        let number = last.unwrap_or(0).saturating_add(1);
        fs::write_atomic(&self.path.join(NUMBER), format!("{number}\n").as_bytes())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    pub fn timings(&self) -> PathBuf {
        self.path.join("timings.jsonl")
    }

    pub fn completions(&self) -> PathBuf {
        self.path.join("completions.jsonl")
    }

    pub fn checkpoints(&self) -> PathBuf {
        checkpoints(&self.path)
    }

    pub fn adapter(&self) -> PathBuf {
        self.path.join("adapter.safetensors")
    }

    /// Writes the resolved configuration.
    pub fn write_config(&self, config: &Config) -> Result<()> {
        fs::write_atomic(&self.path.join(CONFIG), config.to_toml()?.as_bytes())
    }
}

fn refuse_used(path: &Path) -> Result<()> {
    let entries = std::fs::read_dir(path).map_err(|e| fs::error("read", path, &e))?;
    for entry in entries {
        let name = entry.map_err(|e| fs::error("read", path, &e))?.file_name();
        // What a process leaves that is killed before the run has begun is nobody's.
        if name != ".lock" && name != NUMBER && !fs::is_temporary(&name) {
            return Err(Error::config(format!(
                "{} is not empty; choose another --run-dir, or go on with it by --resume",
                path.display()
            )));
        }
    }
    Ok(())
}

/// The checkpoints of a run.
pub fn checkpoints(run: &Path) -> PathBuf {
    run.join("checkpoints")
}

/// The configuration file of a run.
pub fn config_source(run: &Path) -> Result<Source> {
    Source::read(&run.join(CONFIG))
}

/// The configuration a run was made with.
pub fn config_of(run: &Path) -> Result<Config> {
    Config::load(&config_source(run)?, &[])
}

/// The run the user means: a folder, else a folder of that name under `runs/`.
pub fn find(name: &Path) -> Result<PathBuf> {
    let in_runs = Path::new(RUNS).join(name);
    for candidate in [name, &in_runs] {
        if candidate.join(CONFIG).is_file() {
            return Ok(candidate.to_owned());
        }
    }
    Err(Error::config(format!(
        "no run {}: neither it nor {} has a {CONFIG}",
        name.display(),
        in_runs.display()
    )))
}

/// The run under `runs/` that began last and has a checkpoint.
pub fn newest() -> Result<PathBuf> {
    newest_in(Path::new(RUNS))
}

fn newest_in(runs: &Path) -> Result<PathBuf> {
    // Runs without a number, copied here or of an older program, are older than those with one; their
    // names begin with their time.
    let begun = runs_in(runs)
        .filter(|run| run.join(CONFIG).is_file())
        .filter(|run| !checkpoint::steps(&checkpoints(run)).is_empty());
    let newest = begun.max_by_key(|run| (number_of(run), run.clone()));
    newest.ok_or_else(|| {
        Error::config(format!(
            "no run with a checkpoint under {}/: train first, or name a run or a model",
            runs.display()
        ))
    })
}

fn runs_in(runs: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(runs).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

/// A run's place in the order in which the runs under `runs/` began.
fn number_of(run: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(run.join(NUMBER)).ok()?;
    text.trim().parse().ok()
}

/// `YYYYMMDD-HHMMSS` in UTC.
fn timestamp(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let second = second % 60;
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

/// Date of a day counted from 1970-01-01, by whole 400-year cycles of years that begin in March.
pub(crate) fn civil_date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 0000-03-01
    let (cycle, day_of_cycle) = (days / 146_097, days % 146_097);
    let year_of_cycle =
        (day_of_cycle - day_of_cycle / 1460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
    let day_of_year =
        day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = cycle * 400 + year_of_cycle + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stamps_are_utc_dates() {
        for (seconds, expected) in [
            (0, "19700101-000000"),
            (951_782_400, "20000229-000000"),
            (1_767_225_599, "20251231-235959"),
            (4_107_542_400, "21000301-000000"),
        ] {
            assert_eq!(timestamp(seconds), expected);
        }
    }

    #[test]
    fn a_used_folder_is_refused_and_an_empty_one_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let held = RunDirectory::create_at(&path).unwrap();
        let error = RunDirectory::create_at(&path).unwrap_err().to_string();
        assert!(error.contains("in use by another process"), "{error}");
        drop(held);
        RunDirectory::create_at(&path).unwrap();
        std::fs::write(path.join("metrics.jsonl"), "").unwrap();
        let error = RunDirectory::create_at(&path).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("is not empty"), "{error}");
        let error = RunDirectory::open(&path).unwrap_err().to_string();
        assert!(error.contains("is no run directory"), "{error}");
    }

    #[test]
    fn the_newest_run_is_the_one_that_began_last_whatever_files_and_names_say() {
        let folder = tempfile::tempdir().unwrap();
        let day = |n: u64| std::time::UNIX_EPOCH + std::time::Duration::from_secs(n * 86_400);
        let make = |name: &str, number: Option<u64>, modified| {
            let run = folder.path().join(name);
            std::fs::create_dir_all(checkpoints(&run).join("step-000001")).unwrap();
            if let Some(number) = number {
                std::fs::write(run.join(NUMBER), number.to_string()).unwrap();
            }
            let config = std::fs::File::create(run.join(CONFIG)).unwrap();
            config.set_modified(day(modified)).unwrap();
        };
        let newest = || newest_in(folder.path()).unwrap();
        make("20250101-000000-a", None, 900);
        make("20260101-000000-a", None, 800);
        assert_eq!(newest(), folder.path().join("20260101-000000-a"));
        make("20250601-000000-b", Some(1), 700);
        // The clock was set back.
        make("19700101-000000-c", Some(2), 0);
        assert_eq!(newest(), folder.path().join("19700101-000000-c"));
        // Begun last, but with nothing to go on from.
        std::fs::create_dir(folder.path().join("d")).unwrap();
        std::fs::write(folder.path().join("d").join(NUMBER), "3").unwrap();
        assert_eq!(newest(), folder.path().join("19700101-000000-c"));
    }

    #[test]
    fn without_runs_the_newest_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error = newest_in(folder.path()).unwrap_err();
        assert!(error.to_string().contains("train first"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
