//! Files of the Hugging Face hub: the local cache first, the network second.
//!
//! `HF_HOME` (or `HF_HUB_CACHE`) says where the cache is, `HF_ENDPOINT` which server is asked,
//! `HF_TOKEN` opens gated repositories, `HF_HUB_OFFLINE=1` forbids the network. The cache is laid
//! out as Hugging Face's own tools do, so that what one has fetched the others find.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use crate::{Error, Result};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

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

    /// [`Hub::cached`] with the environment's settings.
    pub fn cached(&self, file: &str) -> Option<PathBuf> {
        Hub::from_env().ok()?.cached(self, file)
    }

    /// [`Hub::fetch`] with the environment's settings.
    pub fn fetch(&self, file: &str, quiet: bool) -> Result<PathBuf> {
        Hub::from_env()?.fetch(self, file, quiet)
    }
}

/// Where the cache is and how the hub is reached.
pub struct Hub {
    cache: PathBuf,
    endpoint: String,
    /// Sent to the hub, never shown.
    token: Option<String>,
    offline: bool,
}

impl Hub {
    /// The settings that the environment variables give.
    pub fn from_env() -> Result<Self> {
        let home = hf_home()?;
        let cache = match variable("HF_HUB_CACHE") {
            Some(path) => PathBuf::from(path),
            None => home.join("hub"),
        };
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_string());
        if !(endpoint.starts_with("https://") || endpoint.starts_with("http://")) {
            return Err(Error::config(format!(
                "HF_ENDPOINT = {endpoint:?} is not an http or https address"
            )));
        }
        let mut hub = Self::new(cache, &endpoint);
        hub.token = read_token(&home)?;
        hub.offline = offline();
        Ok(hub)
    }

    /// A hub without a token.
    pub fn new(cache: PathBuf, endpoint: &str) -> Self {
        Self {
            cache,
            endpoint: endpoint.trim_end_matches('/').to_string(),
            token: None,
            offline: false,
        }
    }

    /// The folder that holds `models--…` and `datasets--…`.
    pub fn cache_dir(&self) -> &Path {
        &self.cache
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    pub fn is_offline(&self) -> bool {
        self.offline
    }

    /// Ids of the models that have a folder in the cache, complete or not.
    pub fn cached_models(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.cache).into_iter().flatten();
        let names = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some(name.strip_prefix("models--")?.replacen("--", "/", 1))
        });
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    /// The file in the cache, without looking anywhere else.
    pub fn cached(&self, repo: &HubRepo, file: &str) -> Option<PathBuf> {
        let cache = Cache::new(self.cache.clone()).repo(repo.repo());
        cache.get(file).or_else(|| {
            // A commit hash as revision has no ref file, only a snapshot.
            let path = cache.pointer_path(repo.revision).join(file);
            path.exists().then_some(path)
        })
    }

    /// The file from the cache, else downloaded into it, with a bar on a terminal unless `quiet`.
    ///
    /// # Errors
    /// The network is forbidden or fails, or the hub has no such file; the message names both.
    pub fn fetch(&self, repo: &HubRepo, file: &str, quiet: bool) -> Result<PathBuf> {
        if let Some(path) = self.cached(repo, file) {
            return Ok(path);
        }
        let place = format!("{file} of {} (revision {})", repo.id, repo.revision);
        if self.offline {
            return Err(Error::data(format!(
                "{place} is not in the hub cache {}, and HF_HUB_OFFLINE forbids to download it",
                self.cache.display()
            )));
        }
        let download = self
            .api(quiet)
            .and_then(|api| api.repo(repo.repo()).download(file));
        download.map_err(|e| self.explain(&place, &e))
    }

    /// Names of the files in the repository, asked of the hub.
    pub fn files(&self, repo: &HubRepo) -> Result<Vec<String>> {
        if self.offline {
            return Err(Error::data(format!(
                "{} is not complete in the hub cache {}, and HF_HUB_OFFLINE forbids to download it",
                repo.id,
                self.cache.display()
            )));
        }
        let info = self
            .api(true)
            .and_then(|api| api.repo(repo.repo()).info())
            .map_err(|e| self.explain(repo.id, &e))?;
        Ok(info.siblings.into_iter().map(|s| s.rfilename).collect())
    }

    fn api(&self, quiet: bool) -> std::result::Result<Api, ApiError> {
        ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(!quiet)
            .with_retries(2)
            .build()
    }

    fn explain(&self, place: &str, error: &ApiError) -> Error {
        let shown = error.to_string();
        let status = shown.rsplit_once("http status: ").map(|(_, code)| code);
        let advice = match (status, error) {
            (Some("401" | "403"), _) => format!(
                "access is refused: accept the conditions on its page at {} and set HF_TOKEN",
                self.endpoint
            ),
            (Some("404"), _) => {
                "there is no such thing on the hub (a private one needs HF_TOKEN)".to_string()
            }
            (None, ApiError::RequestError(_)) => format!(
                "cannot reach {} ({shown}); without a network, give a directory or set HF_HOME \
                 to a cache that has it",
                self.endpoint
            ),
            _ => shown,
        };
        Error::data(format!("cannot download {place}: {advice}"))
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

/// `HF_HOME`, else `huggingface` in the user's cache folder.
fn hf_home() -> Result<PathBuf> {
    if let Some(home) = variable("HF_HOME") {
        return Ok(PathBuf::from(home));
    }
    let cache = match variable("XDG_CACHE_HOME") {
        Some(cache) => PathBuf::from(cache),
        None => match std::env::home_dir() {
            Some(home) => home.join(".cache"),
            None => return Err(Error::config("no home directory: set HF_HOME")),
        },
    };
    Ok(cache.join("huggingface"))
}

/// `HF_TOKEN`, else the file that Hugging Face's login writes.
fn read_token(home: &Path) -> Result<Option<String>> {
    let (token, origin) = match variable("HF_TOKEN") {
        Some(token) => (token, "HF_TOKEN".to_string()),
        None => {
            let path = match variable("HF_TOKEN_PATH") {
                Some(path) => PathBuf::from(path),
                None => home.join("token"),
            };
            match std::fs::read_to_string(&path) {
                Ok(token) => (token, path.display().to_string()),
                Err(_) => return Ok(None),
            }
        }
    };
    let token = token.trim();
    if !token.chars().all(|c| c.is_ascii_graphic()) {
        return Err(Error::config(format!(
            "{origin} holds characters that no token has"
        )));
    }
    Ok((!token.is_empty()).then(|| token.to_string()))
}

/// An environment variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.trim().is_empty())
}
