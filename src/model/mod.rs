//! From a checkpoint on disk to a decoder: configuration, weights, tokenizer, chat template.

mod checkpoint;
mod config;
mod config_json;
mod gguf;
mod random_init;
mod safetensors_dir;
mod tokenizer;
mod weights;

pub use checkpoint::{Checkpoint, OpenOptions};
pub use config::{Arch, Dtype, ModelConfig, RopeConfig, RopeScaling, expected_tensors};
pub use tokenizer::Tokenizer;
pub use weights::{RawTensor, RawWeights, TensorInfo};

pub use crate::adapter::{ModuleId, ModuleKind};
