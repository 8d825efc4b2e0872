//! From a checkpoint on disk to a decoder: configuration, weights, tokenizer, chat template.

mod batch;
mod byte_level;
mod chat_date;
mod chat_template;
mod checkpoint;
mod config;
mod config_json;
mod decoder;
mod decoder_weights;
mod flops;
mod gguf;
mod kv_cache;
mod layer_inputs;
mod loaded;
mod packing;
mod passes;
mod random_init;
mod receiver;
mod safetensors_dir;
mod source;
mod text_stream;
mod tokenizer;
mod tokenizer_json;
mod way_back;
mod weights;

pub use batch::Batch;
pub use chat_date::Date;
pub use chat_template::ChatMessage;
#[cfg(test)]
pub(crate) use checkpoint::random_weights;
pub use checkpoint::{Checkpoint, OpenOptions};
pub use config::{Arch, Dtype, ModelConfig, RopeConfig, RopeScaling, expected_tensors};
pub use decoder::{Decoder, Keep, Tape};
pub use decoder_weights::{Block, EMBEDDING, HEAD, Placement, Weight, Weights};
pub use flops::Flops;
pub use kv_cache::{KvCache, SlotId};
pub use layer_inputs::{BatchInputs, GroupInputs, InputRows, Recorder};
pub use loaded::{LoadOptions, Model};
pub use packing::{ACTIVATION_MEMORY, pack};
pub use passes::{
    ApartPass, ApartScores, BlockInputs, Coefficients, GradientPass, Passes, ScorePass,
};
pub use source::{cached_model, fetch_model};
pub use text_stream::TextStream;
pub use tokenizer::Tokenizer;
pub use weights::{RawTensor, RawWeights, TensorInfo};

pub use crate::adapter::{ModuleId, ModuleKind};

#[cfg(test)]
pub(crate) mod tests;
