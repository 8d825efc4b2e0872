//! `report.html`: one page, without network, on one or several runs.
//!
//! [`Run`] reads a run directory in whatever state it is, [`page::render`] makes the page,
//! [`summary`] the lines for the terminal. Memory does not depend on the size of the logs.

mod adapter;
mod catalog;
mod charts;
mod configuration;
mod health;
mod history;
mod lines;
mod numbers;
mod page;
mod reading;
mod samples;
mod series;
mod summary;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use reading::{Limits, Run, Status, find};
pub use summary::summary;

use crate::run::fs;
use crate::run::progress::Progress;
use crate::{Error, Result};

/// Name of the page in a run directory.
pub const FILE: &str = "report.html";

/// How every page begins, by which an old one is known.
const START: &[u8] = b"<!doctype html>\n<!-- tinylora report -->";

/// Problems and places shown in all: with many runs each has less.
const PAIRS: usize = 120;
const GROUPS: usize = 48;

/// Reads the runs for a page about all of them.
pub fn read(runs: &[PathBuf]) -> Result<Vec<Run>> {
    let share = |all: usize, most: usize| (all / runs.len().max(1)).clamp(4, most);
    let limits = Limits {
        pairs: share(PAIRS, 32),
        groups: share(GROUPS, 12),
    };
    let mut read = runs
        .iter()
        .map(|path| Run::read(path, limits))
        .collect::<Result<Vec<_>>>()?;
    tell_apart(&mut read);
    Ok(read)
}

/// Runs of the same folder name are numbered.
fn tell_apart(runs: &mut [Run]) {
    for i in 0..runs.len() {
        let name = runs[i].name.clone();
        let same = runs[..i].iter().filter(|run| run.name == name).count();
        let again = runs[i + 1..].iter().any(|run| run.name == name);
        if same == 0 && again {
            let alike = runs[i..].iter_mut().filter(|run| run.name == name);
            for (number, run) in (1..).zip(alike) {
                run.name = format!("{name} ({number})");
            }
        }
    }
}

/// Writes the page about the runs, replacing an old one in one step.
///
/// # Errors
/// The file cannot be written, or is there and is no report.
pub fn write(runs: &[Run], out: &Path) -> Result<()> {
    check_target(out)?;
    fs::write_atomic(out, page::render(runs)?.as_bytes())
}

/// Refuses to put a page where something else is.
pub fn check_target(out: &Path) -> Result<()> {
    use std::io::Read;
    let refuse = |what: &str| Err(Error::config(format!("--out {}: {what}", out.display())));
    if out.is_dir() {
        return refuse("is a directory, give the name of a file such as report.html");
    }
    let folder = fs::parent(out);
    if !folder.is_dir() {
        return refuse(&format!("there is no folder {}", folder.display()));
    }
    let Ok(file) = std::fs::File::open(out) else {
        return Ok(());
    };
    let mut start = Vec::new();
    let read = file.take(START.len() as u64).read_to_end(&mut start);
    if read.is_ok() && !start.is_empty() && start != START {
        return refuse("is there already and is no report; choose another name");
    }
    Ok(())
}

/// Writes the page of a run that has just ended into its directory and says where it is. A failure
/// is said and goes no further: the run itself is done and saved.
pub fn after_training(run: &Path, progress: Progress) {
    let out = run.join(FILE);
    let written = read(&[run.to_owned()]).and_then(|runs| write(&runs, &out));
    progress.line(&match written {
        Ok(()) => format!("report in {}", out.display()),
        Err(error) => format!(
            "no report was written ({error}); to make it: tinylora report {} --out report.html",
            run.display()
        ),
    });
}
