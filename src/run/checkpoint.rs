//! Checkpoints: everything a run needs to go on as if it had never stopped.
//!
//! ```text
//! checkpoints/step-000020/
//!   adapter.safetensors  the adapter, as `--adapter` reads it
//!   state.safetensors    master parameters and optimizer state
//!   manifest.json        format version, step, counters, log lengths, what the run is defined by
//!   SHA256SUMS           of the three, as `sha256sum --check` reads it
//! ```
//! A checkpoint is written under another name, made durable, and renamed: it exists whole or not
//! at all. Randomness needs no state: every draw follows from (seed, step, …).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::fs;
use super::state::TrainState;
use super::tensors::{read_tensors, write_tensors};
use super::training::Evaluation;
use crate::optim::OptimizerState;
use crate::{Error, Result};

/// Raised when an older program could not read what a newer one writes.
const VERSION: u32 = 1;
const FORMAT: &str = "tinylora-checkpoint";

const ADAPTER: &str = "adapter.safetensors";
const STATE: &str = "state.safetensors";
const MANIFEST: &str = "manifest.json";
const SUMS: &str = "SHA256SUMS";

const PARAMETERS: &str = "parameters";
const FIRST_MOMENT: &str = "optimizer.first_moment";
const SECOND_MOMENT: &str = "optimizer.second_moment";

/// Step → score of its evaluation. Not part of a checkpoint: it only decides which one is kept.
const SCORES: &str = "scores.json";
/// No manifest comes near this; a larger one is not ours.
const MAX_MANIFEST: u64 = 64 << 20;

/// What a run is defined by; a checkpoint of another run must not be continued.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// Hash of the frozen model's weights.
    pub model: String,
    /// Hash of the training problems in order.
    pub data: String,
    /// Configuration keys that decide the result.
    pub config: Map<String, Value>,
}

impl Identity {
    /// What differs, in words: a line for the model, the data and each key.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.model != now.model {
            lines.push("the model's weights are others".to_owned());
        }
        if self.data != now.data {
            lines.push("the training problems are others".to_owned());
        }
        let show = |value: Option<&Value>| value.map_or("unset".to_owned(), Value::to_string);
        let mut keys: Vec<&String> = self.config.keys().chain(now.config.keys()).collect();
        keys.sort();
        keys.dedup();
        for key in keys {
            let (old, new) = (self.config.get(key), now.config.get(key));
            if old != new {
                lines.push(format!("{key} was {}, is {}", show(old), show(new)));
            }
        }
        lines
    }
}

/// A run at the end of a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Checkpoint {
    pub identity: Identity,
    pub state: TrainState,
    /// Bytes of each log file that belong to the finished steps.
    pub logs: BTreeMap<String, u64>,
    /// Every evaluation so far.
    pub evaluations: Vec<Evaluation>,
    /// Steps in a row, up to this one, from which nothing was learnt.
    pub dead_steps: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: String,
    version: u32,
    program: String,
    /// The numbers of [`TrainState`] that are not vectors.
    counters: Counters,
    logs: BTreeMap<String, u64>,
    identity: Identity,
    evaluations: Vec<Evaluation>,
    #[serde(default)]
    dead_steps: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Counters {
    step: u64,
    position: u64,
    num_tokens: u64,
    updates: u64,
}

/// The checkpoints of one run. Only the process that holds the run's lock writes here.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    /// Checkpoints kept besides the best; 0 keeps all.
    limit: usize,
    /// Steps on disk, ascending.
    present: Vec<u64>,
    /// Score by step, higher is better.
    scores: BTreeMap<u64, f64>,
}

impl Store {
    /// Opens the folder and removes what a killed process left half-made.
    pub fn open(folder: &Path, limit: usize) -> Result<Self> {
        fs::create_dir_all(folder)?;
        fs::remove_temporaries(folder)?;
        // Without its scores the store still works; it keeps no best one then.
        let scores = std::fs::read(folder.join(SCORES)).ok();
        Ok(Self {
            folder: folder.to_owned(),
            limit,
            present: steps(folder),
            scores: scores
                .and_then(|bytes| serde_json::from_slice(&bytes).ok())
                .unwrap_or_default(),
        })
    }

    /// Whether there is a checkpoint of that step.
    pub fn has(&self, step: u64) -> bool {
        self.present.contains(&step)
    }

    /// Remembers how the checkpoint of a step evaluates.
    pub fn set_score(&mut self, step: u64, score: Option<f64>) -> Result<()> {
        let Some(score) = score.filter(|s| s.is_finite()) else {
            return Ok(());
        };
        if self.scores.insert(step, score) == Some(score) {
            return self.prune();
        }
        let text = serde_json::to_vec(&self.scores)
            .map_err(|e| Error::Internal(format!("cannot write the scores: {e}")))?;
        fs::write_atomic(&self.folder.join(SCORES), &text)?;
        self.prune()
    }

    /// The last checkpoint that is whole and fits `usable`. Damaged ones behind it are set aside
    /// under the name `….damaged`; `report` hears of each.
    ///
    /// # Errors
    /// When there are checkpoints and none of them is good.
    pub fn latest(
        &mut self,
        usable: impl Fn(&Checkpoint) -> Result<()>,
        mut report: impl FnMut(&str),
    ) -> Result<Option<Checkpoint>> {
        let mut damage = Vec::new();
        while let Some(&step) = self.present.last() {
            let path = self.folder.join(name_of(step));
            match load(&path).and_then(|found| usable(&found).map(|()| found)) {
                Ok(found) => return Ok(Some(found)),
                Err(error) => {
                    report(&format!("stepping back: {error}"));
                    damage.push(error.to_string());
                    set_aside(&path)?;
                    self.present.pop();
                }
            }
        }
        match damage.first() {
            None => Ok(None),
            Some(first) => Err(Error::data(format!(
                "no good checkpoint in {}: {first}",
                self.folder.display()
            ))),
        }
    }

    /// Saves a checkpoint, then removes the ones the limit no longer allows.
    ///
    /// `write_adapter` writes the adapter's own file at the path it is given.
    ///
    /// # Errors
    /// When anything cannot be written; earlier checkpoints are untouched then.
    pub fn save(
        &mut self,
        checkpoint: &Checkpoint,
        write_adapter: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let step = checkpoint.state.step;
        let path = self.folder.join(name_of(step));
        let temporary = self.temporary(&name_of(step));
        fs::remove_dir_all(&temporary)?;
        let written = write_parts(&temporary, checkpoint, write_adapter)
            .and_then(|()| fs::rename(&temporary, &path))
            .and_then(|()| fs::sync_dir(&self.folder));
        if let Err(error) = written {
            // On a full disk the half-made one is in the way of everything that follows.
            let _ = std::fs::remove_dir_all(&temporary);
            return Err(error);
        }
        self.present.push(step);
        self.prune()
    }

    fn temporary(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{}{name}", fs::TEMPORARY))
    }

    /// Removes the checkpoints that the limit does not allow. What stays depends on what was saved
    /// and scored, not on where a run was interrupted in between.
    pub fn prune(&mut self) -> Result<()> {
        if self.limit == 0 || self.present.len() <= self.limit {
            return Ok(());
        }
        let scored = self.scores.iter().filter(|(step, _)| self.has(**step));
        let best = scored
            .max_by(|a, b| a.1.total_cmp(b.1))
            .map(|(step, _)| *step);
        let old = self.present.len() - self.limit;
        let mut kept = Vec::new();
        for (i, step) in self.present.clone().into_iter().enumerate() {
            if i >= old || Some(step) == best {
                kept.push(step);
                continue;
            }
            // Away from its name first, so that half a removal is never read as a checkpoint.
            let name = name_of(step);
            let doomed = self.temporary(&format!("old-{name}"));
            fs::rename(&self.folder.join(name), &doomed)?;
            fs::remove_dir_all(&doomed)?;
        }
        self.present = kept;
        Ok(())
    }
}

/// The last checkpoint of a run, for reading the adapter in it.
pub fn last_adapter(folder: &Path) -> Option<PathBuf> {
    let step = *steps(folder).last()?;
    Some(folder.join(name_of(step)).join(ADAPTER))
}

/// Steps that have a checkpoint, ascending.
pub fn steps(folder: &Path) -> Vec<u64> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut steps: Vec<u64> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let step = name.strip_prefix("step-")?.parse().ok()?;
            (name == name_of(step)).then_some(step)
        })
        .collect();
    steps.sort_unstable();
    steps
}

fn name_of(step: u64) -> String {
    format!("step-{step:06}")
}

fn write_parts(
    folder: &Path,
    checkpoint: &Checkpoint,
    write_adapter: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    fs::create_dir_all(folder)?;
    write_adapter(&folder.join(ADAPTER))?;
    let state = &checkpoint.state;
    let optimizer = &state.optimizer;
    write_tensors(
        &folder.join(STATE),
        &[
            (PARAMETERS, &state.parameters),
            (FIRST_MOMENT, &optimizer.first_moment),
            (SECOND_MOMENT, &optimizer.second_moment),
        ],
    )?;
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        version: VERSION,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        counters: Counters {
            step: state.step,
            position: state.position,
            num_tokens: state.num_tokens,
            updates: optimizer.updates,
        },
        logs: checkpoint.logs.clone(),
        identity: checkpoint.identity.clone(),
        evaluations: checkpoint.evaluations.clone(),
        dead_steps: checkpoint.dead_steps,
    };
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|e| Error::Internal(format!("cannot write a manifest: {e}")))?;
    fs::write_synced(&folder.join(MANIFEST), &text)?;
    let mut sums = String::new();
    for name in [ADAPTER, STATE, MANIFEST] {
        let path = folder.join(name);
        fs::sync_file(&path)?;
        sums.push_str(&format!("{}  {name}\n", sha256(&path)?));
    }
    fs::write_synced(&folder.join(SUMS), sums.as_bytes())?;
    fs::sync_dir(folder)
}

/// Reads and checks one checkpoint.
///
/// # Errors
/// [`Error::Data`] naming the file that is missing, damaged or of another version.
pub fn load(folder: &Path) -> Result<Checkpoint> {
    let sums = fs::read_to_string(&folder.join(SUMS))?;
    for name in [ADAPTER, STATE, MANIFEST] {
        let path = folder.join(name);
        let line = format!("{}  {name}", sha256(&path)?);
        if !sums.lines().any(|l| l == line) {
            let cause = format!("its checksum is not the one in {SUMS}");
            return Err(Error::file("use", &path, cause));
        }
    }
    let manifest = read_manifest(folder)?;
    let path = folder.join(STATE);
    let mut tensors = read_tensors(&path)?;
    let mut take = |name: &str| {
        let tensor = tensors.remove(name);
        tensor.ok_or_else(|| Error::file("use", &path, format!("it has no {name}")))
    };
    let Counters {
        step,
        position,
        num_tokens,
        updates,
    } = manifest.counters;
    Ok(Checkpoint {
        identity: manifest.identity,
        state: TrainState {
            step,
            position,
            num_tokens,
            parameters: take(PARAMETERS)?,
            optimizer: OptimizerState {
                updates,
                first_moment: take(FIRST_MOMENT)?,
                second_moment: take(SECOND_MOMENT)?,
            },
        },
        logs: manifest.logs,
        evaluations: manifest.evaluations,
        dead_steps: manifest.dead_steps,
    })
}

fn read_manifest(folder: &Path) -> Result<Manifest> {
    #[derive(Deserialize)]
    struct Head {
        format: String,
        version: u32,
    }
    let path = folder.join(MANIFEST);
    let length = std::fs::metadata(&path).map_err(|e| fs::error("read", &path, &e))?;
    if length.len() > MAX_MANIFEST {
        return Err(Error::file("use", &path, "too large for a manifest"));
    }
    let bytes = fs::read(&path)?;
    let invalid = |e: serde_json::Error| Error::file("use", &path, e);
    let head: Head = serde_json::from_slice(&bytes).map_err(invalid)?;
    if head.format != FORMAT || head.version != VERSION {
        let found = format!(
            "format {} version {}, this program reads {FORMAT} version {VERSION}",
            head.format, head.version
        );
        return Err(Error::file("use", &path, found));
    }
    serde_json::from_slice(&bytes).map_err(invalid)
}

fn sha256(path: &Path) -> Result<String> {
    let fail = |e: std::io::Error| fs::error("read", path, &e);
    let mut file = std::fs::File::open(path).map_err(fail)?;
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut hasher).map_err(fail)?;
    Ok(format!("{:x}", hasher.finalize()))
}

fn set_aside(path: &Path) -> Result<()> {
    let aside = path.with_extension("damaged");
    fs::remove_dir_all(&aside)?;
    fs::rename(path, &aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(step: u64) -> Checkpoint {
        let mut identity = Identity {
            model: "m".to_owned(),
            data: "d".to_owned(),
            ..Identity::default()
        };
        identity.config.insert("train.seed".to_owned(), 42.into());
        Checkpoint {
            identity,
            state: TrainState {
                step,
                position: 32 * step,
                num_tokens: 7,
                parameters: vec![f32::MIN_POSITIVE, -0.0, 0.1],
                optimizer: OptimizerState {
                    updates: 2 * step,
                    first_moment: vec![1e-30; 3],
                    second_moment: vec![0.3; 3],
                },
            },
            logs: BTreeMap::from([("metrics.jsonl".to_owned(), 100 * step)]),
            evaluations: vec![Evaluation {
                score: Some(0.25),
                ..Evaluation::default()
            }],
            dead_steps: 2,
        }
    }

    #[test]
    fn a_kill_before_the_removal_of_old_ones_leaves_none_for_good() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 0).unwrap();
        for step in 1..=4 {
            save(&mut store, step);
        }
        let mut store = Store::open(folder.path(), 2).unwrap();
        store.latest(|_| Ok(()), |_| ()).unwrap();
        store.prune().unwrap();
        assert_eq!(steps(folder.path()), [3, 4]);
    }

    fn save(store: &mut Store, step: u64) {
        let write = |path: &Path| fs::write_synced(path, b"adapter");
        store.save(&checkpoint(step), write).unwrap();
    }

    fn latest(folder: &Path) -> (Result<Option<Checkpoint>>, Vec<String>) {
        let mut heard = Vec::new();
        let mut store = Store::open(folder, 0).unwrap();
        let found = store.latest(|_| Ok(()), |line| heard.push(line.to_owned()));
        (found, heard)
    }

    #[test]
    fn what_is_saved_is_what_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 3).unwrap();
        save(&mut store, 7);
        let (found, heard) = latest(folder.path());
        assert_eq!(found.unwrap().unwrap(), checkpoint(7));
        assert!(heard.is_empty());
        let adapter = last_adapter(folder.path()).unwrap();
        assert_eq!(std::fs::read(adapter).unwrap(), b"adapter");
    }

    #[test]
    fn the_limit_keeps_the_latest_and_the_best() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 2).unwrap();
        for (step, score) in [
            (1, None),
            (2, Some(0.9)),
            (3, Some(0.5)),
            (4, None),
            (5, None),
        ] {
            save(&mut store, step);
            store.set_score(step, score).unwrap();
        }
        assert_eq!(steps(folder.path()), [2, 4, 5]);
        // A store opened later knows the scores.
        let mut store = Store::open(folder.path(), 2).unwrap();
        save(&mut store, 6);
        store.set_score(6, Some(0.95)).unwrap();
        save(&mut store, 7);
        assert_eq!(steps(folder.path()), [6, 7]);
    }

    #[test]
    fn any_damage_is_found_and_stepped_back_from() {
        for file in [ADAPTER, STATE, MANIFEST, SUMS] {
            for how in ["flip", "cut", "remove"] {
                let folder = tempfile::tempdir().unwrap();
                let mut store = Store::open(folder.path(), 0).unwrap();
                save(&mut store, 1);
                save(&mut store, 2);
                let path = folder.path().join("step-000002").join(file);
                let mut bytes = std::fs::read(&path).unwrap();
                match how {
                    "flip" => bytes[3] ^= 1,
                    "cut" => bytes.truncate(bytes.len() / 2),
                    _ => std::fs::remove_file(&path).unwrap(),
                }
                if how != "remove" {
                    std::fs::write(&path, bytes).unwrap();
                }
                let (found, heard) = latest(folder.path());
                assert_eq!(found.unwrap().unwrap().state.step, 1, "{file} {how}");
                assert_eq!(heard.len(), 1, "{file} {how}: {heard:?}");
                assert!(heard[0].contains("step-000002"), "{heard:?}");
                assert!(folder.path().join("step-000002.damaged").exists());
            }
        }
    }

    #[test]
    fn without_a_good_one_the_error_names_the_damage() {
        let folder = tempfile::tempdir().unwrap();
        assert!(latest(folder.path()).0.unwrap().is_none());
        let mut store = Store::open(folder.path(), 0).unwrap();
        save(&mut store, 1);
        std::fs::remove_file(folder.path().join("step-000001").join(STATE)).unwrap();
        let error = latest(folder.path()).0.unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains(STATE), "{error}");
    }

    #[test]
    fn a_newer_format_is_refused_by_version() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 0).unwrap();
        save(&mut store, 1);
        let path = folder.path().join("step-000001").join(MANIFEST);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
        let error = read_manifest(path.parent().unwrap()).err().unwrap();
        assert!(
            error.to_string().contains("version 2, this program reads"),
            "{error}"
        );
    }

    #[test]
    fn a_failed_save_leaves_nothing_and_the_last_one_good() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 0).unwrap();
        save(&mut store, 1);
        let full = |_: &Path| Err(Error::data("the disk is full"));
        store.save(&checkpoint(2), full).unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(latest(folder.path()).0.unwrap().unwrap().state.step, 1);
    }

    #[test]
    fn differences_are_named() {
        let old = checkpoint(1).identity;
        let mut new = old.clone();
        new.model = "other".to_owned();
        new.config.insert("train.seed".to_owned(), 7.into());
        new.config.insert("grpo.delta".to_owned(), 2.into());
        assert_eq!(
            old.differences(&new),
            [
                "the model's weights are others",
                "grpo.delta was unset, is 2",
                "train.seed was 42, is 7"
            ]
        );
    }
}
