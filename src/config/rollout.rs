//! `[rollout]`: how the engine that samples completions works. What it samples is in `[grpo]`.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::check;
use crate::Result;

/// What samples completions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RolloutEngine {
    /// This program.
    #[default]
    Native,
    Vllm,
    LlamaServer,
}

impl RolloutEngine {
    /// Name as written in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Vllm => "vllm",
            Self::LlamaServer => "llama-server",
        }
    }
}

/// The `[rollout]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutConfig {
    /// What samples completions, in training and evaluation: `native` (this program), or a server, `vllm` or
    /// `llama-server` (llama.cpp); see docs/scale.md.
    pub engine: RolloutEngine,
    /// Most sequences decoded at once; unset: 64, fewer where memory is short. It changes memory and
    /// speed; on the CPU never the result. (`native`)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_batch_size: Option<usize>,
    /// Addresses of servers, such as `http://host:8000`, which share the work. `llama-server` may have none:
    /// then the run starts one.
    pub base_url: Vec<String>,
    /// `llama-server` without `base_url`: program and arguments to start it with. Model, adapters, port, slots
    /// and context are added.
    pub server: Vec<String>,
    /// Folder with adapters for the servers, which they must see under the same path; unset: `adapters/` in
    /// the run directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_dir: Option<PathBuf>,
    /// Completions asked of one server at once; the slots of one that the run starts.
    pub max_concurrency: usize,
    /// Seconds that a completion may take.
    pub request_timeout: f64,
    /// How often a request that failed is made again, after 1/4, 1/2, 1, … up to 20 seconds.
    pub max_retries: u32,
    /// Have servers sample the completions of the next step while this one is learnt from. They are then of
    /// the policy one update ago, which truncated importance sampling corrects for.
    pub one_step_off_policy: bool,
}

impl Default for RolloutConfig {
    fn default() -> Self {
        Self {
            engine: RolloutEngine::Native,
            max_batch_size: None,
            base_url: Vec::new(),
            server: vec!["llama-server".to_owned()],
            adapter_dir: None,
            max_concurrency: 32,
            request_timeout: 600.0,
            max_retries: 10,
            one_step_off_policy: false,
        }
    }
}

impl RolloutConfig {
    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<()> {
        let size = self.max_batch_size.unwrap_or(1);
        let least_one = || "must be at least 1".to_owned();
        check(size >= 1, "rollout.max_batch_size", size, least_one)?;
        let concurrency = self.max_concurrency;
        check(
            concurrency >= 1,
            "rollout.max_concurrency",
            concurrency,
            least_one,
        )?;
        let timeout = self.request_timeout;
        check(
            timeout > 0.0 && timeout <= 1e6,
            "rollout.request_timeout",
            timeout,
            || "must be above 0 and at most 1000000".into(),
        )?;
        for url in &self.base_url {
            let known = url.starts_with("http://") || url.starts_with("https://");
            check(known, "rollout.base_url", format_args!("{url:?}"), || {
                "must begin with http:// or https://".into()
            })?;
        }
        self.validate_engine()
    }

    fn validate_engine(&self) -> Result<()> {
        let apart = self.engine != RolloutEngine::Native;
        check(
            apart || !self.one_step_off_policy,
            "rollout.one_step_off_policy",
            true,
            || "the native engine samples with what learns: set rollout.engine".into(),
        )?;
        let engine = self.engine.name();
        let addresses = self.base_url.len();
        match self.engine {
            RolloutEngine::Native => check(addresses == 0, "rollout.base_url", addresses, || {
                "the native engine has no servers: set rollout.engine".into()
            }),
            RolloutEngine::Vllm => check(addresses > 0, "rollout.base_url", "[]", || {
                format!("rollout.engine = \"{engine}\" needs the address of a server")
            }),
            RolloutEngine::LlamaServer => check(
                addresses > 0 || !self.server.is_empty(),
                "rollout.server",
                "[]",
                || format!("rollout.engine = \"{engine}\" needs a program or rollout.base_url"),
            ),
        }
    }
}
