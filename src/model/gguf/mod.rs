//! GGUF files: weights, configuration and tokenizer in one file, as llama.cpp writes them.

mod blocks;
mod file;
mod model;
mod tokenizer;

use std::path::Path;

pub(super) use blocks::BlockType;

use super::chat_template::ChatTemplate;
use super::config::ModelConfig;
use super::tokenizer::{SpecialTokens, Tokenizer};
use super::weights::RawWeights;
use crate::error::Result;

/// Opens a `.gguf` file; tensors are not yet compared with the configuration.
pub(super) fn open(path: &Path) -> Result<(ModelConfig, RawWeights, Tokenizer)> {
    let file = file::GgufFile::open(path)?;
    let config = model::read_config(&file)?;
    let special = SpecialTokens {
        eos: file.u32("tokenizer.ggml.eos_token_id")?,
        bos: file.u32("tokenizer.ggml.bos_token_id")?,
        pad: file.u32("tokenizer.ggml.padding_token_id")?,
        unk: file.u32("tokenizer.ggml.unknown_token_id")?,
    };
    let template = file.str("tokenizer.chat_template")?;
    let template = template.map(|source| ChatTemplate::new(source.to_string()));
    let origin = path.display().to_string();
    let tokenizer = Tokenizer::new(
        tokenizer::build(&file)?,
        special,
        template,
        &config,
        &origin,
    )?;
    let weights = model::into_weights(file, &config);
    Ok((config, weights, tokenizer))
}
