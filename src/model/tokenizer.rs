//! Text to token ids and back, special tokens, and the chat format of a checkpoint.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::byte_level::TokenBytes;
use super::chat_date::Date;
use super::chat_template::{ChatMessage, ChatTemplate, SpecialTexts};
use super::config::ModelConfig;
use super::config_json::{read_bounded, read_json_object};
use super::tokenizer_json;
use crate::error::{Error, Result};

/// Llama 3's tokenizer.json has 17 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// A tokenizer with what the checkpoint says about its special tokens and chat format.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    eos_ids: Vec<u32>,
    chat_template: Option<ChatTemplate>,
    /// What the chat template takes for today: the same for as long as the model is open.
    today: Date,
    /// The file it was read from, for messages.
    origin: String,
    /// For byte-level tokenizers, which is nearly all of them.
    token_bytes: Option<TokenBytes>,
}

/// The tokens a checkpoint names for a role.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct SpecialTokens {
    pub eos: Option<u32>,
    pub bos: Option<u32>,
    pub pad: Option<u32>,
    pub unk: Option<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where they exist, `tokenizer_config.json` and
    /// `chat_template.jinja`.
    pub fn from_hf_dir(dir: &Path, config: &ModelConfig) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = read_bounded(&path, MAX_TOKENIZER_BYTES)?;
        let mut inner =
            tokenizer_json::parse(&bytes).map_err(|e| Error::file("parse", &path, e))?;
        let settings_path = dir.join("tokenizer_config.json");
        let settings = match settings_path.exists() {
            true => read_json_object(&settings_path)?,
            false => Map::new(),
        };
        add_listed_tokens(&mut inner, &settings)
            .map_err(|cause| Error::file("use", &settings_path, cause))?;
        let id = |key: &str| special_token(&settings, key).and_then(|t| inner.token_to_id(t));
        let special = SpecialTokens {
            eos: id("eos_token"),
            bos: id("bos_token"),
            pad: id("pad_token"),
            unk: id("unk_token"),
        };
        let template = read_chat_template(dir, &settings)?;
        Self::new(
            inner,
            special,
            template,
            config,
            &path.display().to_string(),
        )
    }

    pub(super) fn new(
        mut inner: tokenizers::Tokenizer,
        special: SpecialTokens,
        chat_template: Option<ChatTemplate>,
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
        if let Some(id) = special.eos.filter(|id| !eos_ids.contains(id)) {
            eos_ids.push(id);
        }
        Ok(Self {
            token_bytes: TokenBytes::new(&inner),
            inner,
            special,
            eos_ids,
            chat_template,
            today: Date::today(),
            origin: origin.to_owned(),
        })
    }

    /// Ids of `text`. With `add_special`, what the tokenizer puts around a text by itself (Llama
    /// 3's begin-of-text) is added; special tokens spelt out in `text` are recognised either way.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special)
            .map_err(|e| Error::data(format!("cannot tokenize: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`; unknown ids give nothing, broken UTF-8 gives U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).unwrap_or_default()
    }

    /// Ids that end a completion: those of the configuration, then the tokenizer's own.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// Id to fill rows with, where the checkpoint names one.
    pub fn pad_id(&self) -> Option<u32> {
        self.special.pad
    }

    /// Number of ids, added tokens included; the model's vocabulary may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token as the vocabulary spells it (`Ġthe`, not ` the`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    pub fn has_chat_template(&self) -> bool {
        self.chat_template.is_some()
    }

    /// The day that prompts may name as today's, if the chat template names one.
    pub fn today(&self) -> Option<Date> {
        let template = self.chat_template.as_ref();
        template.filter(|t| t.names_the_day()).map(|_| self.today)
    }

    /// Makes it another day for the chat template.
    pub fn set_today(&mut self, today: Date) {
        self.today = today;
    }

    /// The prompt text for `messages`, to be encoded without adding special tokens.
    ///
    /// # Errors
    /// There is no template, or it refuses the messages.
    pub fn apply_chat_template(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let Some(template) = &self.chat_template else {
            return Err(Error::data(
                "the checkpoint has no chat template (chat_template.jinja or \
                 tokenizer_config.json): use a plain prompt, or an instruction-tuned checkpoint",
            ));
        };
        let text = |id: Option<u32>| id.and_then(|id| self.id_to_token(id));
        let special = SpecialTexts {
            bos_token: text(self.special.bos),
            eos_token: text(self.special.eos),
            pad_token: text(self.special.pad),
            unk_token: text(self.special.unk),
        };
        let rendered = template.render(messages, add_generation_prompt, &special, self.today);
        rendered.map_err(|error| Error::data(format!("{error} (it goes with {})", self.origin)))
    }

    /// Bytes of one token (nothing for a special one if those are skipped); `None` when the
    /// tokenizer is not byte-level, so that a token's text depends on its neighbours.
    pub fn token_bytes(&self, id: u32, skip_special: bool) -> Option<&[u8]> {
        let table = self.token_bytes.as_ref()?;
        Some(table.get(id, skip_special))
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and, if there is a template,
    /// `chat_template.jinja` into `dir`, so that Hugging Face's tools read the same tokenizer.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            std::fs::write(&path, text).map_err(|e| Error::file("write", &path, e))
        };
        let json = self
            .inner
            .to_string(false)
            .map_err(|e| Error::Internal(format!("cannot serialise the tokenizer: {e}")))?;
        write("tokenizer.json", &json)?;
        let mut settings = Map::new();
        settings.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        settings.insert("clean_up_tokenization_spaces".into(), false.into());
        for (key, id) in [
            ("bos_token", self.special.bos),
            ("eos_token", self.special.eos),
            ("pad_token", self.special.pad),
            ("unk_token", self.special.unk),
        ] {
            if let Some(token) = id.and_then(|id| self.id_to_token(id)) {
                settings.insert(key.into(), token.into());
            }
        }
        if let Some(template) = &self.chat_template {
            settings.insert("chat_template".into(), template.source().into());
            write("chat_template.jinja", template.source())?;
        }
        let settings =
            serde_json::to_string_pretty(&settings).map_err(|e| Error::Internal(e.to_string()))?;
        write("tokenizer_config.json", &settings)
    }
}

/// Adds the tokens of `added_tokens_decoder` that tokenizer.json lacks, as transformers does: some
/// fine-tuned checkpoints have tokens there only.
fn add_listed_tokens(
    tokenizer: &mut tokenizers::Tokenizer,
    settings: &Map<String, Value>,
) -> std::result::Result<(), String> {
    let Some(Value::Object(listed)) = settings.get("added_tokens_decoder") else {
        return Ok(());
    };
    let known = tokenizer.get_added_tokens_decoder();
    let mut missing: Vec<(u32, AddedToken)> = Vec::new();
    for (id, token) in listed {
        let parsed = id.parse().ok().zip(AddedToken::deserialize(token).ok());
        let Some((id, token)) = parsed else {
            return Err(format!("added_tokens_decoder entry {id} makes no sense"));
        };
        if known.get(&id).is_none_or(|k| k.content != token.content) {
            missing.push((id, token));
        }
    }
    missing.sort_by_key(|(id, _)| *id);
    for (id, token) in missing {
        let content = token.content.clone();
        tokenizer.add_tokens([token]).map_err(|e| e.to_string())?;
        if tokenizer.token_to_id(&content) != Some(id) {
            return Err(format!(
                "token {content:?} is said to have the id {id}, which contradicts tokenizer.json"
            ));
        }
    }
    Ok(())
}

/// A special token in tokenizer_config.json: a string, or an object with its `content`.
fn special_token<'a>(settings: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    match settings.get(key)? {
        Value::String(token) => Some(token),
        Value::Object(token) => token.get("content")?.as_str(),
        _ => None,
    }
}

/// `chat_template.jinja` wins over the key in tokenizer_config.json, which is one template or a
/// list of named ones.
fn read_chat_template(dir: &Path, settings: &Map<String, Value>) -> Result<Option<ChatTemplate>> {
    let path = dir.join("chat_template.jinja");
    if path.exists() {
        let bytes = read_bounded(&path, 1 << 20)?;
        let source = String::from_utf8(bytes).map_err(|e| Error::file("read", &path, e))?;
        return Ok(Some(ChatTemplate::new(source)));
    }
    let source = match settings.get("chat_template") {
        Some(Value::String(source)) => Some(source.as_str()),
        Some(Value::Array(named)) => named
            .iter()
            .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|t| t.get("template")?.as_str()),
        _ => None,
    };
    Ok(source.map(|source| ChatTemplate::new(source.to_string())))
}
