//! llama.cpp's server. It loads adapters only when it starts, but scales them for every request:
//! W' = W + Σ_i v_i (B P_i A), so that one fixed adapter for each trained number, made once, and their
//! scales are exactly the policy. A request carries its policy with it.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::http::Server;
use super::pool::Ask;
use super::vllm::{logprob, unexpected};
use super::{Answer, Failure, Policy, Protocol};
use crate::adapter::{Adapter, AdapterKind};
use crate::export::write_gguf_lora_of;
use crate::model::ModelConfig;
use crate::run::fs;
use crate::{Error, Result};

/// Each number is an adapter that the server walks through for every weight.
const MAX_NUMBERS: usize = 1024;

/// Speaks to servers that have loaded the adapters of a basis.
pub(super) struct LlamaServer {
    /// Names of the adapters' files, by trained number.
    files: Vec<String>,
}

impl LlamaServer {
    /// With the files that [`write_basis`] wrote.
    pub fn new(files: &[PathBuf]) -> Self {
        let name = |path: &PathBuf| path.file_name().map(|n| n.to_string_lossy().into_owned());
        Self {
            files: files.iter().filter_map(name).collect(),
        }
    }

    /// The server's numbers of the adapters, by trained number.
    fn ids(&self, server: &Server) -> Result<Vec<u64>, Failure> {
        let loaded = server.get("/lora-adapters")?;
        let id = |file: &String| {
            let all = loaded.as_array()?.iter();
            let mut found = all.filter(|adapter| {
                let path = adapter["path"].as_str().unwrap_or_default();
                Path::new(path)
                    .file_name()
                    .is_some_and(|name| name == file.as_str())
            });
            found.next()?["id"].as_u64()
        };
        self.files
            .iter()
            .map(|file| {
                id(file).ok_or_else(|| {
                    Failure::Final(format!(
                        "{} has not loaded the adapter {file}: start it with --lora-init-without-apply \
                         and --lora for each of the {} files in rollout.adapter_dir",
                        server.url,
                        self.files.len()
                    ))
                })
            })
            .collect()
    }
}

impl Protocol for LlamaServer {
    fn publish(&self, server: &Server, policy: &Policy) -> Result<(), Failure> {
        if policy.parameters.len() > self.files.len() {
            return Err(Failure::Final(
                "the servers were made ready for another adapter".to_owned(),
            ));
        }
        let ids = self.ids(server)?;
        match ids.iter().enumerate().all(|(at, id)| at as u64 == *id) {
            true => Ok(()),
            false => Err(Failure::Final(format!(
                "{} has loaded the adapters in another order than that of their numbers",
                server.url
            ))),
        }
    }

    fn complete(&self, server: &Server, policy: &Policy, ask: &Ask) -> Result<Answer, Failure> {
        // The server's own log-probabilities are those at temperature 1.
        let scaled = ask.temperature != 0.0 && ask.temperature != 1.0;
        let scales = policy.parameters.iter().enumerate();
        let body = json!({
            "prompt": ask.prompt[..],
            "lora": scales
                .map(|(id, scale)| json!({"id": id, "scale": scale}))
                .collect::<Vec<_>>(),
            "n_predict": ask.max_tokens,
            "samplers": ["top_k", "top_p", "min_p", "temperature"],
            "temperature": ask.temperature,
            "top_k": ask.top_k,
            "top_p": ask.top_p,
            "min_p": ask.min_p,
            "seed": ask.seed,
            "stop": ask.stop[..],
            "n_probs": 1,
            "post_sampling_probs": scaled,
            "return_tokens": true,
            "cache_prompt": true,
            "response_fields": ["tokens", "completion_probabilities", "stop_type"],
        });
        let answer = server.post("/completion", &body)?;
        let read = || {
            let tokens = answer["tokens"].as_array()?.iter();
            let tokens: Vec<u32> = tokens
                .map(|id| u32::try_from(id.as_u64()?).ok())
                .collect::<Option<_>>()?;
            let probabilities = answer["completion_probabilities"].as_array();
            let known = probabilities.into_iter().flatten().map(|token| {
                let logprob = match scaled {
                    true => logprob(&token["prob"]).ln(),
                    false => logprob(&token["logprob"]),
                };
                (token["id"].as_u64(), logprob)
            });
            let logprobs = aligned(&tokens, known)?;
            Some(Answer {
                tokens,
                logprobs,
                stopped: answer["stop_type"] == "word",
            })
        };
        read().ok_or_else(|| unexpected(server, "/completion", &answer))
    }

    fn retire(&self, _: &Server, _: &Policy) {}
}

/// The log-probability of every token. The server tells none of a token that ends within a character, nor
/// of those that complete a stop string: these are NaN.
fn aligned(tokens: &[u32], known: impl Iterator<Item = (Option<u64>, f32)>) -> Option<Vec<f32>> {
    let mut known = known.peekable();
    let logprobs = tokens.iter().map(|&token| {
        let own = known.next_if(|(id, _)| *id == Some(u64::from(token)));
        own.map_or(f32::NAN, |(_, logprob)| logprob)
    });
    let logprobs = logprobs.collect();
    // What belongs to none of the tokens is not understood.
    known.next().is_none().then_some(logprobs)
}

/// Writes an adapter for each trained number, in which that number is 1 and the others are 0. Files that
/// are there already with the same bytes stay.
///
/// # Errors
/// [`Error::Config`] for adapters that are no sum of fixed ones, or of too many.
pub(super) fn write_basis(
    adapter: &Adapter,
    config: &ModelConfig,
    folder: &Path,
) -> Result<Vec<PathBuf>> {
    let count = adapter.num_parameters();
    if adapter.spec().kind != AdapterKind::TinyLora || count > MAX_NUMBERS {
        return Err(Error::config(format!(
            "rollout.engine = \"llama-server\" takes adapters of type tinylora with at most \
             {MAX_NUMBERS} numbers; this one is {} with {count}",
            adapter.spec().kind.name()
        )));
    }
    fs::create_dir_all(folder)?;
    let tying = adapter.tying();
    let u = adapter.spec().u;
    let mut unit = adapter.clone();
    let mut files = Vec::with_capacity(count);
    for number in 0..count {
        let mut parameters = vec![0.0; count];
        parameters[number] = 1.0;
        unit.set_parameters(&parameters)?;
        let members = tying.modules.iter().zip(&tying.groups);
        let modules: Vec<_> = members
            .filter(|(_, group)| **group == number / u)
            .map(|(id, _)| *id)
            .collect();
        let path = folder.join(format!("number-{number:04}.gguf"));
        write_gguf_lora_of(&unit, &modules, config, &path)?;
        files.push(path);
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::aligned;

    fn of(tokens: &[u32], known: &[(u64, f32)]) -> Option<Vec<Option<f32>>> {
        let known = known.iter().map(|&(id, logprob)| (Some(id), logprob));
        let logprobs = aligned(tokens, known)?;
        let known = |l: f32| (!l.is_nan()).then_some(l);
        Some(logprobs.into_iter().map(known).collect())
    }

    #[test]
    fn log_probabilities_belong_to_the_token_with_their_id() {
        let all = of(&[5, 6], &[(5, -1.0), (6, -2.0)]);
        assert_eq!(all, Some(vec![Some(-1.0), Some(-2.0)]));
        // 🌳 in two tokens: of the first, whose text is no character yet, nothing is told.
        let within = of(&[5, 8, 9, 6], &[(5, -1.0), (9, -3.0), (6, -2.0)]);
        assert_eq!(within, Some(vec![Some(-1.0), None, Some(-3.0), Some(-2.0)]));
        // The end of a stop string.
        assert_eq!(of(&[5, 6], &[(5, -1.0)]), Some(vec![Some(-1.0), None]));
        assert_eq!(of(&[], &[]), Some(vec![]));
        // Another program, that says something else.
        assert_eq!(of(&[5], &[(7, -1.0)]), None);
        assert_eq!(of(&[5], &[(5, -1.0), (6, -1.0)]), None);
    }
}
