//! The embedded laboratory: the repository's `data/mini` inside the binary, unpacked on first use.
//!
//! As files on disk it is opened like any other checkpoint and data set, and other programs can
//! read it too.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// What the embedded checkpoint and data set are called on the command line.
pub const NAME: &str = "mini";

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../data/mini/", $name)).as_slice())),*]
    };
}

const FILES: &[(&str, &[u8])] = files![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "train.jsonl",
    "test.jsonl",
];

/// The directory that holds the embedded files, made when it is not there yet or not complete.
///
/// It lies in `$XDG_CACHE_HOME/tinylora` or `~/.cache/tinylora`, else in the system's temporary
/// directory, under a name that depends on the content.
///
/// # Errors
/// None of these places can be written to.
pub fn directory() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
    let cache = set("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .unwrap_or_else(std::env::temp_dir);
    unpack(&cache.join("tinylora")).or_else(|_| unpack(&std::env::temp_dir().join("tinylora")))
}

fn unpack(parent: &Path) -> Result<PathBuf> {
    let dir = parent.join(format!("{NAME}-{}", fingerprint()));
    if is_complete(&dir) {
        return Ok(dir);
    }
    let fail = |e: std::io::Error| Error::file("unpack the embedded model to", &dir, e);
    fs::create_dir_all(parent).map_err(fail)?;
    // Another process may be doing the same: whoever renames first wins, and both agree.
    let fresh = tempfile::Builder::new()
        .prefix(".mini-")
        .tempdir_in(parent)
        .map_err(fail)?;
    for (name, bytes) in FILES {
        fs::write(fresh.path().join(name), bytes).map_err(fail)?;
    }
    if dir.exists() {
        let damaged = fresh.path().join("damaged");
        fs::rename(&dir, &damaged).map_err(fail)?;
        fs::remove_dir_all(&damaged).map_err(fail)?;
    }
    let fresh = fresh.keep();
    match fs::rename(&fresh, &dir) {
        Err(cause) => {
            // Best effort: what counts is whether the other process finished the job.
            let _ = fs::remove_dir_all(&fresh);
            match is_complete(&dir) {
                true => Ok(dir),
                false => Err(fail(cause)),
            }
        }
        Ok(()) => Ok(dir),
    }
}

/// Whether every file is there with its bytes; a cut or changed copy would train another model.
fn is_complete(dir: &Path) -> bool {
    FILES
        .iter()
        .all(|(name, bytes)| fs::read(dir.join(name)).is_ok_and(|found| found == *bytes))
}

/// A short name for the content of all files.
fn fingerprint() -> String {
    let mut hash = Sha256::new();
    for (name, bytes) in FILES {
        hash.update(name.as_bytes());
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    hash.finalize()[..6]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn unpacking_again_changes_nothing_and_repairs_damage() {
        let cache = tempfile::tempdir().unwrap();
        let dir = unpack(cache.path()).unwrap();
        assert_eq!(unpack(cache.path()).unwrap(), dir);
        fs::write(dir.join("config.json"), "{").unwrap();
        assert_eq!(unpack(cache.path()).unwrap(), dir);
        assert!(is_complete(&dir));
        assert_eq!(
            fs::read_dir(cache.path()).unwrap().count(),
            1,
            "no leftovers"
        );
    }

    #[test]
    fn no_test_problem_is_in_train_and_answers_are_the_solutions_last_numbers() {
        let rows = |name: &str| -> Vec<crate::data::Problem> {
            let bytes = FILES.iter().find(|(n, _)| *n == name).unwrap().1;
            let lines = bytes.split(|&b| b == b'\n').filter(|line| !line.is_empty());
            lines
                .map(|line| serde_json::from_slice(line).unwrap())
                .collect()
        };
        let calculation = |problem: &crate::data::Problem| -> Vec<String> {
            let solution = problem.solution.as_deref().unwrap();
            let words = solution.split([' ', '\n']);
            words
                .filter(|word| word.contains('='))
                .map(str::to_string)
                .collect()
        };
        let (train, test) = (rows("train.jsonl"), rows("test.jsonl"));
        assert!(train.len() >= 4000 && test.len() >= 500);
        let seen: HashSet<_> = train.iter().map(calculation).collect();
        for problem in &test {
            assert!(!seen.contains(&calculation(problem)), "{}", problem.problem);
        }
        for problem in train.iter().chain(&test) {
            let solution = problem.solution.as_deref().unwrap();
            assert!(solution.ends_with(&format!("\n#### {}", problem.answer)));
            assert!((1..=4).contains(&calculation(problem).len()));
        }
    }
}
