//! Files of the Hugging Face hub: the local cache first, the network second.
//!
//! `HF_HOME` (or `HF_HUB_CACHE`) says where the cache is, `HF_ENDPOINT` which server is asked,
//! `HF_TOKEN` opens gated repositories, `HF_HUB_OFFLINE=1` forbids the network.

use std::path::PathBuf;

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};

use crate::{Error, Result};

/// What kind of repository an id names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    Model,
    Dataset,
}

/// A repository at a branch, tag or commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubRepo<'a> {
    pub kind: RepoKind,
    /// "organisation/name".
    pub id: &'a str,
    /// "main", a tag, "refs/convert/parquet" or a commit hash.
    pub revision: &'a str,
}

impl<'a> HubRepo<'a> {
    /// The main branch of a model repository.
    pub fn model(id: &'a str) -> Self {
        Self {
            kind: RepoKind::Model,
            id,
            revision: "main",
        }
    }

    /// The main branch of a data set repository.
    pub fn dataset(id: &'a str) -> Self {
        Self {
            kind: RepoKind::Dataset,
            id,
            revision: "main",
        }
    }

    fn repo(&self) -> Repo {
        let kind = match self.kind {
            RepoKind::Model => RepoType::Model,
            RepoKind::Dataset => RepoType::Dataset,
        };
        Repo::with_revision(self.id.to_string(), kind, self.revision.to_string())
    }

    /// The file in the cache, without looking anywhere else.
    pub fn cached(&self, file: &str) -> Option<PathBuf> {
        let cache = cache();
        cache.repo(self.repo()).get(file).or_else(|| {
            // A commit hash as revision has no ref file, only a snapshot.
            let path = cache
                .repo(self.repo())
                .pointer_path(self.revision)
                .join(file);
            path.exists().then_some(path)
        })
    }

    /// The file from the cache, else downloaded into it, with a bar on a terminal unless `quiet`.
    ///
    /// # Errors
    /// The network is forbidden or fails, or the hub has no such file; the message names both.
    pub fn fetch(&self, file: &str, quiet: bool) -> Result<PathBuf> {
        if let Some(path) = self.cached(file) {
            return Ok(path);
        }
        let place = format!("{file} of {} (revision {})", self.id, self.revision);
        if offline() {
            return Err(Error::data(format!(
                "{place} is not in the hub cache {}, and HF_HUB_OFFLINE forbids to download it",
                cache().path().display()
            )));
        }
        let mut builder = ApiBuilder::from_cache(cache())
            .with_progress(!quiet)
            .with_retries(2);
        if let Some(endpoint) = variable("HF_ENDPOINT") {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_string());
        }
        if let Some(token) = variable("HF_TOKEN") {
            builder = builder.with_token(Some(token));
        }
        let download = builder
            .build()
            .and_then(|api| api.repo(self.repo()).download(file));
        download.map_err(|e| Error::data(format!("cannot download {place}: {e}")))
    }
}

/// Whether `HF_HUB_OFFLINE` forbids the network.
pub fn offline() -> bool {
    variable("HF_HUB_OFFLINE").is_some_and(|v| {
        !matches!(
            v.to_ascii_lowercase().as_str(),
            "0" | "false" | "no" | "off"
        )
    })
}

fn cache() -> Cache {
    match variable("HF_HUB_CACHE") {
        Some(path) => Cache::new(PathBuf::from(path)),
        None => match variable("HF_HOME") {
            Some(home) => Cache::new(PathBuf::from(home).join("hub")),
            None => Cache::default(),
        },
    }
}

/// An environment variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.trim().is_empty())
}
