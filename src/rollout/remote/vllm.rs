//! vLLM: an OpenAI-compatible server that loads LoRA adapters while it runs.
//!
//! `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 8
//! --generation-config vllm --logprobs-mode processed_logprobs`

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde_json::{Value, json};

use super::http::Server;
use super::pool::Ask;
use super::{Answer, Failure, Policy, Protocol};
use crate::adapter::Adapter;
use crate::export::write_lora;
use crate::run::fs;
use crate::{Error, Result};

/// Every policy is a LoRA directory in a folder that the servers can read.
pub(super) struct Vllm {
    folder: PathBuf,
    /// By the server's address: what it calls the model without an adapter.
    base_names: Mutex<Vec<(String, String)>>,
}

impl Vllm {
    pub fn new(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let folder = folder
            .canonicalize()
            .map_err(|e| Error::file("find", folder, e))?;
        Ok(Self {
            folder,
            base_names: Mutex::default(),
        })
    }

    fn path(&self, policy: &Policy) -> PathBuf {
        self.folder.join(&policy.name)
    }

    /// Writes an adapter where the servers read it.
    pub fn write(&self, adapter: &Adapter, policy: &Policy) -> Result<()> {
        write_lora(adapter, &self.path(policy))
    }

    /// Removes what [`Self::write`] wrote.
    pub fn remove(&self, policy: &Policy) {
        // A folder that stays costs some kilobytes.
        let _ = std::fs::remove_dir_all(self.path(policy));
    }

    /// The name to ask for.
    fn model(&self, server: &Server, policy: &Policy) -> Result<String, Failure> {
        if !policy.parameters.is_empty() {
            return Ok(policy.name.clone());
        }
        let mut known = self.base_names.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, name)) = known.iter().find(|(url, _)| *url == server.url) {
            return Ok(name.clone());
        }
        let models = server.get("/v1/models")?;
        let base = models["data"]
            .as_array()
            .and_then(|all| all.iter().find(|model| model["parent"].is_null()))
            .and_then(|model| model["id"].as_str());
        let name = base.ok_or_else(|| unexpected(server, "/v1/models", &models))?;
        known.push((server.url.clone(), name.to_owned()));
        Ok(name.to_owned())
    }
}

impl Protocol for Vllm {
    fn publish(&self, server: &Server, policy: &Policy) -> Result<(), Failure> {
        if policy.parameters.is_empty() {
            return self.model(server, policy).map(|_| ());
        }
        let body = json!({"lora_name": policy.name, "lora_path": self.path(policy)});
        match server.post("/v1/load_lora_adapter", &body) {
            // An answer that was lost on the way: the name belongs to these numbers alone.
            Err(Failure::Final(why)) if why.contains("already been loaded") => Ok(()),
            Err(Failure::UnknownPolicy(why)) => Err(Failure::Final(format!(
                "{why}: start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            ))),
            other => other.map(|_| ()),
        }
    }

    fn complete(&self, server: &Server, policy: &Policy, ask: &Ask) -> Result<Answer, Failure> {
        let model = self.model(server, policy)?;
        let body = json!({
            "model": model,
            "prompt": ask.prompt[..],
            "n": 1,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "top_k": if ask.top_k == 0 { -1 } else { ask.top_k as i64 },
            "min_p": ask.min_p,
            "seed": ask.seed,
            "stop": ask.stop[..],
            "stop_token_ids": ask.eos[..],
            "logprobs": 0,
            "return_token_ids": true,
            "stream": false,
        });
        let answer = server.post("/v1/completions", &body)?;
        if answer["model"].as_str() != Some(&model) {
            return Err(Failure::Final(format!(
                "{}: asked for {model}, answered by {}",
                server.url, answer["model"]
            )));
        }
        let choice = &answer["choices"][0];
        let read = || {
            let tokens = choice["token_ids"].as_array()?.iter();
            let logprobs = choice["logprobs"]["token_logprobs"].as_array()?.iter();
            Some(Answer {
                tokens: tokens
                    .map(|id| u32::try_from(id.as_u64()?).ok())
                    .collect::<Option<_>>()?,
                logprobs: logprobs.map(logprob).collect(),
                stopped: choice["finish_reason"] == "stop",
            })
        };
        read()
            .filter(|answer| answer.tokens.len() == answer.logprobs.len())
            .ok_or_else(|| unexpected(server, "/v1/completions", choice))
    }

    fn retire(&self, server: &Server, policy: &Policy) {
        if !policy.parameters.is_empty() {
            let body = json!({"lora_name": policy.name});
            let _ = server.post("/v1/unload_lora_adapter", &body);
        }
    }
}

/// A log-probability; NaN for one that is unknown.
pub(super) fn logprob(value: &Value) -> f32 {
    value.as_f64().map_or(f32::NAN, |x| x as f32)
}

/// An answer of another form than documented.
pub(super) fn unexpected(server: &Server, path: &str, answer: &Value) -> Failure {
    let text: String = answer.to_string().chars().take(300).collect();
    Failure::Final(format!(
        "{}{path}: an answer of an unknown form: {text}",
        server.url
    ))
}
