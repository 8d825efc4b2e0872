//! Text to token ids and back, special tokens, and pieces of text while tokens arrive.

use std::path::Path;

use serde_json::{Map, Value};

use super::config::ModelConfig;
use super::config_json::{read_bounded, read_json_object};
use crate::error::{Error, Result};

/// Llama 3's tokenizer.json has 17 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// A tokenizer with what the checkpoint says about its special tokens.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    eos_ids: Vec<u32>,
    bos_id: Option<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where there is one, `tokenizer_config.json`.
    pub fn from_hf_dir(dir: &Path, config: &ModelConfig) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = read_bounded(&path, MAX_TOKENIZER_BYTES)?;
        let inner =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::file("parse", &path, e))?;
        let config_path = dir.join("tokenizer_config.json");
        let settings = match config_path.exists() {
            true => read_json_object(&config_path)?,
            false => Map::new(),
        };
        let special = |key: &str| special_token(&settings, key).and_then(|t| inner.token_to_id(t));
        let (eos, bos) = (special("eos_token"), special("bos_token"));
        Self::new(inner, eos, bos, config, &path.display().to_string())
    }

    /// `eos` and `bos` are the tokenizer's own; those of the configuration are added.
    pub(super) fn new(
        mut inner: tokenizers::Tokenizer,
        eos: Option<u32>,
        bos: Option<u32>,
        config: &ModelConfig,
        origin: &str,
    ) -> Result<Self> {
        // Both may be left over in tokenizer.json from training; Hugging Face ignores them too.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| Error::data(format!("{origin}: {e}")))?;
        let largest = inner.get_vocab(true).into_values().max();
        if let Some(id) = largest.filter(|&id| id as usize >= config.vocab_size) {
            return Err(Error::data(format!(
                "{origin}: token id {id} has no embedding, the model has {}",
                config.vocab_size
            )));
        }
        let mut eos_ids = config.eos_token_ids.clone();
        if let Some(id) = eos.filter(|id| !eos_ids.contains(id)) {
            eos_ids.push(id);
        }
        Ok(Self {
            inner,
            eos_ids,
            bos_id: bos.or(config.bos_token_id),
        })
    }

    /// Ids of `text`. With `add_special`, what the tokenizer puts around a text by itself (Llama's
    /// begin-of-text) is added; special tokens spelt out in `text` are recognised either way.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special)
            .map_err(|e| Error::data(format!("cannot tokenize: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`; unknown ids and broken UTF-8 become U+FFFD or nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).unwrap_or_default()
    }

    /// Ids that end a completion: those of the configuration, then the tokenizer's own.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Number of ids, added tokens included; the model's vocabulary may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }
}

/// A special token in tokenizer_config.json: a string, or an object with its `content`.
fn special_token<'a>(settings: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    match settings.get(key)? {
        Value::String(token) => Some(token),
        Value::Object(token) => token.get("content")?.as_str(),
        _ => None,
    }
}
