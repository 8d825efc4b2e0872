//! The weights of a decoder in the form that its operations use.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::config::ModelConfig;
use super::weights::{RawTensor, RawWeights};
use crate::adapter::{ModuleId, ModuleKind};
use crate::ops::Backend;
use crate::ops::cpu::PackedMatrix;
use crate::ops::linear::{Linear, Matrix};
use crate::{Error, Result};

/// How and where weights are held.
#[derive(Debug, Clone)]
pub struct Placement {
    pub backend: Backend,
    pub device: Device,
    /// Dtype of the matrices on the CPU backend; of everything on the portable one.
    pub dtype: DType,
}

/// One decoder block.
#[derive(Debug, Clone)]
pub struct Block {
    /// `[h]`
    pub input_norm: Tensor,
    /// `[h]`
    pub post_attention_norm: Tensor,
    /// By [`ModuleKind`] index.
    pub linears: Vec<Linear>,
}

impl Block {
    pub fn linear(&self, kind: ModuleKind) -> &Linear {
        &self.linears[kind.index()]
    }
}

/// All weights of a model.
#[derive(Debug, Clone)]
pub struct Weights {
    /// `[vocab, h]`
    pub embedding: Matrix,
    pub blocks: Vec<Block>,
    /// `[h]`
    pub norm: Tensor,
    /// `[vocab, h]`; `None` when tied to the embedding.
    pub head: Option<Matrix>,
}

impl Weights {
    /// Builds every weight from a checked checkpoint, matrices in parallel.
    pub fn load(config: &ModelConfig, raw: &RawWeights, placement: &Placement) -> Result<Self> {
        let vector = |name: &str| placement.vector(raw.get_f32(name)?);
        let linear = |id: ModuleId| -> Result<Linear> {
            let weight = placement.matrix(raw, &format!("{id}.weight"))?;
            let has_bias = config.attention_bias
                && matches!(id.kind, ModuleKind::Q | ModuleKind::K | ModuleKind::V);
            let bias = if has_bias {
                Some(vector(&format!("{id}.bias"))?)
            } else {
                None
            };
            Ok(Linear { weight, bias })
        };
        let blocks = (0..config.num_hidden_layers)
            .into_par_iter()
            .map(|layer| {
                let norm = |name: &str| vector(&format!("model.layers.{layer}.{name}.weight"));
                Ok(Block {
                    input_norm: norm("input_layernorm")?,
                    post_attention_norm: norm("post_attention_layernorm")?,
                    linears: ModuleKind::ALL
                        .into_iter()
                        .map(|kind| linear(ModuleId::new(layer, kind)))
                        .collect::<Result<_>>()?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            embedding: placement.matrix(raw, "model.embed_tokens.weight")?,
            blocks,
            norm: vector("model.norm.weight")?,
            head: if config.tie_word_embeddings {
                None
            } else {
                Some(placement.matrix(raw, "lm_head.weight")?)
            },
        })
    }

    /// The output head: its own matrix or the embedding.
    pub fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

impl Placement {
    /// The fast CPU path with matrices held as `dtype` (f32, bf16 or f16).
    pub fn cpu(dtype: DType) -> Self {
        Self {
            backend: Backend::Cpu,
            device: Device::Cpu,
            dtype,
        }
    }

    /// Norms and biases: f32 on the CPU backend, else the placement's dtype.
    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        let tensor = Tensor::new(values, &self.device)?;
        Ok(match self.backend {
            Backend::Cpu => tensor,
            Backend::Portable => tensor.to_dtype(self.dtype)?,
        })
    }

    fn matrix(&self, raw: &RawWeights, name: &str) -> Result<Matrix> {
        let shape = raw.info(name).map(|info| info.shape).unwrap_or_default();
        let [out, input] = shape[..] else {
            return Err(Error::data(format!(
                "tensor {name} has shape {shape:?}, a matrix was expected"
            )));
        };
        if self.backend == Backend::Portable {
            let dense = Tensor::from_vec(raw.get_f32(name)?, (out, input), &self.device)?;
            return Ok(Matrix::Dense(dense.to_dtype(self.dtype)?));
        }
        Ok(Matrix::Packed(match (self.dtype, raw.get(name)?) {
            (DType::F32, RawTensor::F32(values)) => PackedMatrix::pack(&values, out, input),
            (DType::BF16, RawTensor::Bf16(values)) => PackedMatrix::pack(&values, out, input),
            (DType::F16, RawTensor::F16(values)) => PackedMatrix::pack(&values, out, input),
            (DType::BF16, other) => {
                let values: Vec<half::bf16> = other
                    .into_f32()
                    .into_iter()
                    .map(half::bf16::from_f32)
                    .collect();
                PackedMatrix::pack(&values, out, input)
            }
            (DType::F16, other) => {
                let values: Vec<half::f16> = other
                    .into_f32()
                    .into_iter()
                    .map(half::f16::from_f32)
                    .collect();
                PackedMatrix::pack(&values, out, input)
            }
            (_, other) => PackedMatrix::pack(&other.into_f32(), out, input),
        }))
    }
}
