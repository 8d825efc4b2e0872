//! A checkpoint as a whole: configuration, weights and tokenizer from one source.

use std::path::{Path, PathBuf};

use super::config::{Dtype, ModelConfig, expected_tensors};
use super::gguf;
use super::random_init::RandomTensor;
use super::safetensors_dir;
use super::source;
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
    /// Make the weights from this seed; those of the directory, if any, are not read.
    pub random_init: Option<u64>,
    /// No progress bars.
    pub quiet: bool,
}

impl Checkpoint {
    /// Opens a Hugging Face directory, a `.gguf` file, or a hub id (`owner/name[@revision]`), which
    /// is downloaded unless the hub cache has it.
    ///
    /// # Errors
    /// A clear refusal (exit code 3) when anything is missing, unknown, or not what the
    /// configuration says.
    pub fn open(source: &str, options: &OpenOptions) -> Result<Self> {
        let path = source::resolve(source, options.quiet)?;
        if path.is_dir() {
            Self::open_dir(source, &path, options)
        } else {
            Self::open_gguf(source, &path, options)
        }
    }

    fn open_gguf(source: &str, path: &Path, options: &OpenOptions) -> Result<Self> {
        if options.random_init.is_some() {
            return Err(Error::config(format!(
                "model {source}: random weights need a directory with config.json"
            )));
        }
        let (config, weights, tokenizer) = gguf::open(path)?;
        Self::assemble(source, path, config, weights, tokenizer)
    }

    fn open_dir(source: &str, dir: &Path, options: &OpenOptions) -> Result<Self> {
        let config = ModelConfig::from_hf_dir(dir)?;
        let weights = match options.random_init {
            Some(seed) => random_weights(&config, seed),
            None => safetensors_dir::open(dir)?,
        };
        let tokenizer = Tokenizer::from_hf_dir(dir, &config)?;
        Self::assemble(source, dir, config, weights, tokenizer)
    }

    fn assemble(
        source: &str,
        path: &Path,
        mut config: ModelConfig,
        mut weights: RawWeights,
        tokenizer: Tokenizer,
    ) -> Result<Self> {
        weights.keep_expected(&config, source)?;
        // What is stored counts, not what the configuration says is stored.
        let matrix = weights.info("model.layers.0.self_attn.q_proj.weight");
        config.dtype = matrix.map(|info| info.dtype);
        Ok(Self {
            config,
            weights,
            tokenizer,
            source: source.to_string(),
            path: path.to_path_buf(),
        })
    }
}

pub(crate) fn random_weights(config: &ModelConfig, seed: u64) -> RawWeights {
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
