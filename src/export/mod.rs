//! Adapters and trained models in the formats that other programs read.

mod gguf;
mod lora;
mod merged;
mod peft;
mod stream;
#[cfg(test)]
mod tests;

pub use gguf::{write_gguf_lora, write_gguf_lora_of};
pub use lora::write_lora;
pub use merged::{MergeReport, write_merged};
pub use peft::write_peft;

use std::path::Path;

use candle_core::{DType, Tensor};

use crate::Result;
use crate::model::Dtype;
use crate::run::fs;

/// A named f32 tensor of an adapter file.
struct Named {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl Named {
    fn of(name: String, tensor: &Tensor) -> Result<Self> {
        Ok(Self {
            name,
            shape: tensor.dims().to_vec(),
            values: tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?,
        })
    }
}

/// Writes `adapter_model.safetensors` and `adapter_config.json` of a PEFT directory.
fn write_adapter_dir(dir: &Path, config: &serde_json::Value, tensors: &[Named]) -> Result<()> {
    fs::create_dir_all(dir)?;
    let entries = tensors.iter().map(|t| (t.name.clone(), t.shape.clone()));
    let path = dir.join("adapter_model.safetensors");
    let mut writer = stream::Writer::create(&path, Dtype::F32, entries.collect())?;
    for tensor in tensors {
        writer.write(&tensor.values)?;
    }
    writer.finish()?;
    let text = format!("{config:#}\n");
    fs::write_atomic(&dir.join("adapter_config.json"), text.as_bytes())
}
