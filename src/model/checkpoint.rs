//! A checkpoint as a whole: configuration, weights and tokenizer from one source.

use std::path::{Path, PathBuf};

use super::config::{Dtype, ModelConfig, expected_tensors};
use super::gguf;
use super::random_init::RandomTensor;
use super::safetensors_dir;
use super::tokenizer::Tokenizer;
use super::weights::{Entry, Location, RawWeights};
use crate::error::{Error, Result};

/// A model as it is on disk. The weights are mapped, not read.
pub struct Checkpoint {
    pub config: ModelConfig,
    /// Exactly the tensors [`expected_tensors`] names, in the shapes it names.
    pub weights: RawWeights,
    pub tokenizer: Tokenizer,
    /// The source as the user named it (directory, file or hub id).
    pub source: String,
    /// The directory or .gguf file that was read.
    pub path: PathBuf,
}

/// How [`Checkpoint::open`] may go about it.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Make the weights of a directory that has none, from this seed.
    pub random_init: Option<u64>,
    /// No progress bars.
    pub quiet: bool,
}

impl Checkpoint {
    /// Opens a Hugging Face directory.
    ///
    /// # Errors
    /// A clear refusal (exit code 3) when anything is missing, unknown, or not what the
    /// configuration says.
    pub fn open(source: &str, options: &OpenOptions) -> Result<Self> {
        let path = PathBuf::from(source);
        if path.is_dir() {
            Self::open_dir(source, &path, options)
        } else if path.is_file() {
            Self::open_gguf(source, &path)
        } else {
            Err(Error::data(format!("model {source}: no such directory")))
        }
    }

    fn open_gguf(source: &str, path: &Path) -> Result<Self> {
        let (config, mut weights, tokenizer) = gguf::open(path)?;
        weights.keep_expected(&config, source)?;
        Ok(Self {
            config,
            weights,
            tokenizer,
            source: source.to_string(),
            path: path.to_path_buf(),
        })
    }

    fn open_dir(source: &str, dir: &Path, options: &OpenOptions) -> Result<Self> {
        let config = ModelConfig::from_hf_dir(dir)?;
        let mut weights = match options.random_init {
            Some(seed) if !safetensors_dir::has_weights(dir) => random_weights(&config, seed),
            _ => safetensors_dir::open(dir)?,
        };
        weights.keep_expected(&config, source)?;
        let tokenizer = Tokenizer::from_hf_dir(dir, &config)?;
        Ok(Self {
            config,
            weights,
            tokenizer,
            source: source.to_string(),
            path: dir.to_path_buf(),
        })
    }
}

pub(super) fn random_weights(config: &ModelConfig, seed: u64) -> RawWeights {
    let dtype = config.dtype.unwrap_or(Dtype::F32);
    let entries = expected_tensors(config)
        .into_iter()
        .map(|(name, shape)| {
            let location = Location::Random(RandomTensor::new(seed, &name, dtype));
            (name, Entry { shape, location })
        })
        .collect();
    RawWeights::new(Vec::new(), entries)
}
