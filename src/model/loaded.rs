//! A model ready to run: decoder and tokenizer, with the name and hash that tell it from others.

use candle_core::{DType, Device};

use super::checkpoint::{Checkpoint, OpenOptions};
use super::config::Dtype;
use super::decoder::Decoder;
use super::decoder_weights::{Placement, Weights};
use super::tokenizer::Tokenizer;
use crate::adapter::BaseModel;
use crate::ops::Backend;
use crate::{Error, Result};

/// How [`Model::load`] places a checkpoint.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    pub device: Device,
    /// Dtype of the matrices in memory; `None` keeps the checkpoint's.
    pub dtype: Option<Dtype>,
    /// Leave two-byte matrices in their file where they are already of the dtype wanted.
    pub mmap: bool,
    /// Candle operations even on the CPU: what runs on a GPU, for tests.
    pub portable: bool,
    pub open: OpenOptions,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            dtype: None,
            mmap: false,
            portable: false,
            open: OpenOptions::default(),
        }
    }
}

/// A frozen model.
pub struct Model {
    pub decoder: Decoder,
    pub tokenizer: Tokenizer,
    /// As the user named it.
    pub name: String,
    /// SHA-256 over the checkpoint's weights.
    pub hash: String,
}

impl Model {
    /// Loads a directory, a `.gguf` file or a hub id.
    pub fn load(source: &str, options: &LoadOptions) -> Result<Self> {
        let checkpoint = Checkpoint::open(source, &options.open)?;
        Self::from_checkpoint(checkpoint, options)
    }

    pub fn from_checkpoint(checkpoint: Checkpoint, options: &LoadOptions) -> Result<Self> {
        let Checkpoint {
            config,
            weights: raw,
            tokenizer,
            source,
            ..
        } = checkpoint;
        let stored = config.dtype.unwrap_or(Dtype::F32);
        let placement = placement(options, stored)?;
        let hash = raw.hash()?.to_owned();
        let weights = Weights::load(&config, &raw, &placement)?;
        Ok(Self {
            decoder: Decoder::new(config, weights, placement),
            tokenizer,
            name: source,
            hash,
        })
    }

    /// What an adapter made on this model remembers of it.
    pub fn base(&self) -> BaseModel {
        BaseModel {
            name: self.name.clone(),
            hash: self.hash.clone(),
            num_layers: self.decoder.config.num_hidden_layers,
        }
    }
}

fn placement(options: &LoadOptions, stored: Dtype) -> Result<Placement> {
    let dtype = match options.dtype.unwrap_or(stored) {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::Bf16 => DType::BF16,
    };
    let cpu = matches!(options.device, Device::Cpu);
    if !cpu && dtype == DType::F16 {
        return Err(Error::config(
            "dtype f16 overflows in training on a GPU: use --dtype bf16 or f32",
        ));
    }
    if !cpu && options.mmap {
        return Err(Error::config(
            "mmap leaves the weights in a file on the CPU's side: leave it out, or use --device cpu",
        ));
    }
    let backend = if cpu && !options.portable {
        Backend::Cpu
    } else {
        Backend::Portable
    };
    // Candle's own CPU products in half precision widen the whole weight on every call.
    let dtype = match backend {
        Backend::Portable if cpu => DType::F32,
        _ => dtype,
    };
    Ok(Placement {
        backend,
        device: options.device.clone(),
        dtype,
        as_stored: options.dtype.is_none(),
        mmap: options.mmap,
    })
}
