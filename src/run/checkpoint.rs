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
use super::tensors::{Numbers, read_tensors, write_tensors};
use crate::{Error, Result};

/// Raised when an older program could not read what a newer one writes.
const VERSION: u32 = 1;
const FORMAT: &str = "tinylora-checkpoint";

const ADAPTER: &str = "adapter.safetensors";
const STATE: &str = "state.safetensors";
const MANIFEST: &str = "manifest.json";
const SUMS: &str = "SHA256SUMS";
/// No manifest comes near this; a larger one is not ours.
const MAX_MANIFEST: u64 = 64 << 20;

/// What a trainer must remember.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainerState {
    /// Parameters, optimizer moments and the like, by name.
    pub tensors: BTreeMap<String, Numbers>,
    /// Update count, data position and other whole numbers. A fraction belongs into `tensors`,
    /// where its bits are kept.
    pub counters: BTreeMap<String, u64>,
}

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
    /// Finished steps.
    pub step: u64,
    pub identity: Identity,
    pub trainer: TrainerState,
    /// Bytes of each log file that belong to the finished steps.
    pub logs: BTreeMap<String, u64>,
    /// Every evaluation so far.
    pub evaluations: Vec<Value>,
    /// The evaluation at this step as one number, higher is better, if there was one.
    pub score: Option<f64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: String,
    version: u32,
    program: String,
    step: u64,
    score: Option<f64>,
    counters: BTreeMap<String, u64>,
    logs: BTreeMap<String, u64>,
    identity: Identity,
    evaluations: Vec<Value>,
}

/// The checkpoints of one run. Only the process that holds the run's lock writes here.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    /// Checkpoints kept besides the best; 0 keeps all.
    limit: usize,
    /// Step and score of those on disk, in order.
    present: Vec<(u64, Option<f64>)>,
}

impl Store {
    /// Opens the folder, removes what a killed process left half-made, and reads every manifest.
    pub fn open(folder: &Path, limit: usize) -> Result<Self> {
        fs::create_dir_all(folder)?;
        for entry in std::fs::read_dir(folder).map_err(|e| fs::error("read", folder, &e))? {
            let path = entry.map_err(|e| fs::error("read", folder, &e))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(".tmp-") {
                remove(&path)?;
            }
        }
        let present = steps(folder)
            .into_iter()
            .map(|step| {
                let manifest = read_manifest(&folder.join(name_of(step)));
                (step, manifest.ok().and_then(|m| m.score))
            })
            .collect();
        Ok(Self {
            folder: folder.to_owned(),
            limit,
            present,
        })
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
        while let Some(&(step, _)) = self.present.last() {
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
    ) -> Result<PathBuf> {
        let name = name_of(checkpoint.step);
        let path = self.folder.join(&name);
        if self
            .present
            .iter()
            .any(|(step, _)| *step == checkpoint.step)
        {
            return Ok(path);
        }
        let temporary = self.folder.join(format!(".tmp-{name}"));
        remove(&temporary)?;
        let written = write_parts(&temporary, checkpoint, write_adapter)
            .and_then(|()| rename(&temporary, &path))
            .and_then(|()| fs::sync_dir(&self.folder));
        if let Err(error) = written {
            // On a full disk the half-made one is in the way of everything that follows.
            let _ = std::fs::remove_dir_all(&temporary);
            return Err(error);
        }
        self.present.push((checkpoint.step, checkpoint.score));
        self.prune()?;
        Ok(path)
    }

    fn prune(&mut self) -> Result<()> {
        if self.limit == 0 || self.present.len() <= self.limit {
            return Ok(());
        }
        let best = best_of(&self.present);
        let old = self.present.len() - self.limit;
        let mut kept = Vec::new();
        for (i, entry) in std::mem::take(&mut self.present).into_iter().enumerate() {
            if i >= old || Some(entry.0) == best {
                kept.push(entry);
                continue;
            }
            // Away from its name first, so that half a removal is never read as a checkpoint.
            let name = name_of(entry.0);
            let doomed = self.folder.join(format!(".tmp-old-{name}"));
            rename(&self.folder.join(name), &doomed)?;
            remove(&doomed)?;
        }
        self.present = kept;
        Ok(())
    }
}

fn best_of(present: &[(u64, Option<f64>)]) -> Option<u64> {
    let scored = present.iter().filter_map(|(step, s)| s.map(|s| (*step, s)));
    scored
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(step, _)| step)
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
    write_tensors(&folder.join(STATE), &checkpoint.trainer.tensors)?;
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        version: VERSION,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        step: checkpoint.step,
        score: checkpoint.score,
        counters: checkpoint.trainer.counters.clone(),
        logs: checkpoint.logs.clone(),
        identity: checkpoint.identity.clone(),
        evaluations: checkpoint.evaluations.clone(),
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
    Ok(Checkpoint {
        step: manifest.step,
        identity: manifest.identity,
        trainer: TrainerState {
            tensors: read_tensors(&folder.join(STATE))?,
            counters: manifest.counters,
        },
        logs: manifest.logs,
        evaluations: manifest.evaluations,
        score: manifest.score,
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

fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|e| fs::error("rename", from, &e))
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(fs::error("remove", path, &e)),
        _ => Ok(()),
    }
}

fn set_aside(path: &Path) -> Result<()> {
    let aside = path.with_extension("damaged");
    remove(&aside)?;
    rename(path, &aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(step: u64, score: Option<f64>) -> Checkpoint {
        let mut identity = Identity {
            model: "m".to_owned(),
            data: "d".to_owned(),
            ..Identity::default()
        };
        identity.config.insert("train.seed".to_owned(), 42.into());
        Checkpoint {
            step,
            identity,
            trainer: TrainerState {
                tensors: BTreeMap::from([
                    (
                        "v".to_owned(),
                        Numbers::F32(vec![f32::MIN_POSITIVE, -0.0, 0.1]),
                    ),
                    ("fisher".to_owned(), Numbers::F64(vec![0.1 + 0.2])),
                ]),
                counters: BTreeMap::from([("updates".to_owned(), 2 * step)]),
            },
            logs: BTreeMap::from([("metrics.jsonl".to_owned(), 100 * step)]),
            evaluations: vec![serde_json::json!({"step": 0, "accuracy": 0.1})],
            score,
        }
    }

    fn save(store: &mut Store, step: u64, score: Option<f64>) {
        store
            .save(&checkpoint(step, score), |path| {
                fs::write_synced(path, b"adapter")
            })
            .unwrap();
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
        save(&mut store, 7, Some(0.25));
        let (found, heard) = latest(folder.path());
        assert_eq!(found.unwrap().unwrap(), checkpoint(7, Some(0.25)));
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
            save(&mut store, step, score);
        }
        assert_eq!(steps(folder.path()), [2, 4, 5]);
        // A store opened later knows the scores from the manifests.
        let mut store = Store::open(folder.path(), 2).unwrap();
        save(&mut store, 6, Some(0.95));
        save(&mut store, 7, None);
        assert_eq!(steps(folder.path()), [6, 7]);
    }

    #[test]
    fn any_damage_is_found_and_stepped_back_from() {
        for file in [ADAPTER, STATE, MANIFEST, SUMS] {
            for how in ["flip", "cut", "remove"] {
                let folder = tempfile::tempdir().unwrap();
                let mut store = Store::open(folder.path(), 0).unwrap();
                save(&mut store, 1, None);
                save(&mut store, 2, None);
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
                assert_eq!(found.unwrap().unwrap().step, 1, "{file} {how}");
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
        save(&mut store, 1, None);
        std::fs::remove_file(folder.path().join("step-000001").join(STATE)).unwrap();
        let error = latest(folder.path()).0.unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains(STATE), "{error}");
    }

    #[test]
    fn a_newer_format_is_refused_by_version() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), 0).unwrap();
        save(&mut store, 1, None);
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
        save(&mut store, 1, None);
        let full = |_: &Path| Err(Error::data("the disk is full"));
        store.save(&checkpoint(2, None), full).unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(latest(folder.path()).0.unwrap().unwrap().step, 1);
    }

    #[test]
    fn differences_are_named() {
        let old = checkpoint(1, None).identity;
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
