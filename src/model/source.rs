//! What the user names as a model: a directory, a `.gguf` file, an id of the hub, or `mini`.

use std::path::{Path, PathBuf};

use super::safetensors_dir::{INDEX, SINGLE, weight_map};
use crate::data::hub::{Hub, HubRepo};
use crate::data::mini;
use crate::error::{Error, Result};

/// Fetched first, where the repository has them, so that a snapshot with weights is a whole one.
const OPTIONAL: [&str; 3] = [
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
const MAX_ID_PART: usize = 96;

/// The directory or file that `source` names; what is not on disk is taken for a hub id.
pub(super) fn resolve(source: &str, quiet: bool) -> Result<PathBuf> {
    let path = PathBuf::from(source);
    if path.is_dir() {
        return match path.join("config.json").exists() {
            true => Ok(path),
            false => Err(no_config(&path)),
        };
    }
    if path.exists() {
        return Ok(path);
    }
    if source == mini::NAME {
        return mini::directory();
    }
    if path.extension().is_some_and(|e| e == "gguf") || HubId::parse(source).is_none() {
        return Err(Error::data(format!(
            "model {source}: no such file or directory, and not a hub id (owner/name)"
        )));
    }
    // A mistyped path looks like an id.
    fetch_model(&Hub::from_env()?, source, quiet).map_err(|error| match error {
        Error::Data(message) => Error::data(format!("{message}; nor is {source} a path here")),
        other => other,
    })
}

fn no_config(dir: &Path) -> Error {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let gguf = entries
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "gguf"));
    let advice = match gguf {
        Some(file) => format!("name the file in it: {}", file.display()),
        None => "is it a checkpoint directory?".to_string(),
    };
    Error::data(format!("{}: no config.json; {advice}", dir.display()))
}

/// `owner/name` or `owner/name@revision`.
struct HubId<'a> {
    id: &'a str,
    revision: &'a str,
}

impl<'a> HubId<'a> {
    /// `None` unless both parts are made of the characters the hub allows, so that neither can
    /// lead out of the cache folder or change the address asked.
    fn parse(source: &'a str) -> Option<Self> {
        let (id, revision) = source.split_once('@').unwrap_or((source, "main"));
        let (owner, name) = id.split_once('/')?;
        let plain = |part: &str, more: &[char]| {
            let allowed =
                |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c) || more.contains(&c);
            (1..=MAX_ID_PART).contains(&part.len())
                && part.chars().all(allowed)
                && !part.contains("..")
                && part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        };
        let valid = plain(owner, &[]) && plain(name, &[]) && plain(revision, &['/']);
        valid.then_some(Self { id, revision })
    }
}

/// The snapshot directory of `owner/name[@revision]`: from the cache when it is complete there,
/// without any request, else downloaded.
///
/// # Errors
/// Not an id; not reachable or refused; a repository without safetensors weights.
pub fn fetch_model(hub: &Hub, source: &str, quiet: bool) -> Result<PathBuf> {
    let Some(HubId { id, revision }) = HubId::parse(source) else {
        return Err(Error::config(format!(
            "{source:?} is not a hub id (owner/name)"
        )));
    };
    let repo = HubRepo {
        revision,
        ..HubRepo::model(id)
    };
    if let Some(dir) = cached_model(hub, &repo) {
        return Ok(dir);
    }
    // A second round is needed when the cache held an older commit of the branch.
    for _ in 0..2 {
        let dir = download(hub, &repo, quiet)?;
        if is_complete(&dir) {
            return Ok(dir);
        }
    }
    Err(Error::data(format!(
        "{id} changed on the hub while it was downloaded: try again"
    )))
}

/// The snapshot directory of a model that is complete in the cache.
pub fn cached_model(hub: &Hub, repo: &HubRepo) -> Option<PathBuf> {
    let dir = hub.cached(repo, REQUIRED[0])?.parent()?.to_path_buf();
    is_complete(&dir).then_some(dir)
}

fn is_complete(dir: &Path) -> bool {
    let required = REQUIRED.iter().all(|name| dir.join(name).exists());
    let weights = dir.join(SINGLE).exists()
        || weight_map(&dir.join(INDEX))
            .is_ok_and(|map| map.values().all(|file| dir.join(file).exists()));
    required && weights
}

fn download(hub: &Hub, repo: &HubRepo, quiet: bool) -> Result<PathBuf> {
    let files = hub.files(repo)?;
    let has = |name: &str| files.iter().any(|f| f == name);
    let refuse = |message: &str| Err(Error::data(format!("{}: {message}", repo.id)));
    for name in REQUIRED {
        if !has(name) {
            return refuse(&format!("the repository has no {name}"));
        }
    }
    for name in OPTIONAL
        .into_iter()
        .filter(|name| has(name))
        .chain(REQUIRED)
    {
        hub.fetch(repo, name, quiet)?;
    }
    let last = if has(SINGLE) {
        hub.fetch(repo, SINGLE, quiet)?
    } else if has(INDEX) {
        let index = hub.fetch(repo, INDEX, quiet)?;
        let mut shards: Vec<String> = weight_map(&index)?.into_values().collect();
        shards.sort();
        shards.dedup();
        for shard in &shards {
            hub.fetch(repo, shard, quiet)?;
        }
        index
    } else if files.iter().any(|f| f.ends_with(".gguf")) {
        return refuse("only GGUF files: download the one you want and give its path");
    } else {
        return refuse("no safetensors weights; convert the checkpoint first");
    };
    Ok(last.parent().map(Path::to_path_buf).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths_and_cannot_leave_the_cache() {
        let parsed = |source| HubId::parse(source).map(|id| (id.id, id.revision));
        let good = "Qwen/Qwen2.5-7B-Instruct";
        assert_eq!(parsed(good), Some((good, "main")));
        assert_eq!(parsed("a/b@refs/pr/1"), Some(("a/b", "refs/pr/1")));
        for bad in [
            "",
            "/",
            "a",
            "a/",
            "/b",
            "a/b/c",
            "../b",
            "a/..",
            "./b",
            "a/b@",
            "a/b@../c",
            "a/b@/c",
            "a b/c",
            "a/b?x",
            "a/b#x",
            "a/b%2f",
            "-a/b",
            "a/\u{e9}",
            "a/b\n",
            "a\\b/c",
            "a/b@main@x",
        ] {
            assert_eq!(parsed(bad), None, "{bad:?}");
        }
        assert_eq!(parsed(&format!("a/{}", "b".repeat(97))), None);
    }
}
