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

/// Hugging Face's names of the weights outside of the blocks.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const NORM: &str = "model.norm.weight";
pub const HEAD: &str = "lm_head.weight";

/// Hugging Face's name of the norm before the attention of a block.
pub fn input_norm_name(layer: usize) -> String {
    format!("model.layers.{layer}.input_layernorm.weight")
}

/// Hugging Face's name of the norm before the feed-forward part of a block.
pub fn post_attention_norm_name(layer: usize) -> String {
    format!("model.layers.{layer}.post_attention_layernorm.weight")
}

/// One weight of a model: `[out, in]` or a norm or bias `[n]`.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a> {
    Matrix(&'a Matrix),
    Vector(&'a Tensor),
}

impl Weight<'_> {
    /// `[out, in]` or `[n]`
    pub fn shape(&self) -> Result<Vec<usize>> {
        match self {
            Self::Matrix(matrix) => matrix.dims().map(|(out, input)| vec![out, input]),
            Self::Vector(vector) => Ok(vector.dims().to_vec()),
        }
    }

    /// The values row-major in f32.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match self {
            Self::Matrix(matrix) => matrix.to_f32(),
            Self::Vector(vector) => Ok(vector.to_dtype(DType::F32)?.to_vec1()?),
        }
    }
}

fn replace_vector(vector: &mut Tensor, values: &[f32]) -> Result<()> {
    *vector = Tensor::new(values, vector.device())?.to_dtype(vector.dtype())?;
    Ok(())
}

/// How and where weights are held.
#[derive(Debug, Clone)]
pub struct Placement {
    pub backend: Backend,
    pub device: Device,
    /// Dtype of the matrices on the CPU backend; of everything on the portable one.
    pub dtype: DType,
    /// On the CPU backend, keep quantised blocks that products can read as they are; the numbers are those
    /// of the file.
    pub as_stored: bool,
    /// On the CPU backend, leave two-byte floats of this dtype in their file.
    pub mmap: bool,
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
                Ok(Block {
                    input_norm: vector(&input_norm_name(layer))?,
                    post_attention_norm: vector(&post_attention_norm_name(layer))?,
                    linears: ModuleKind::ALL
                        .into_iter()
                        .map(|kind| linear(ModuleId::new(layer, kind)))
                        .collect::<Result<_>>()?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            embedding: placement.matrix(raw, EMBEDDING)?,
            blocks,
            norm: vector(NORM)?,
            head: if config.tie_word_embeddings {
                None
            } else {
                Some(placement.matrix(raw, HEAD)?)
            },
        })
    }

    /// Every weight with Hugging Face's name, in a fixed order.
    pub fn named(&self) -> Vec<(String, Weight<'_>)> {
        let mut named = vec![(EMBEDDING.to_owned(), Weight::Matrix(&self.embedding))];
        for (layer, block) in self.blocks.iter().enumerate() {
            let (input, post) = (&block.input_norm, &block.post_attention_norm);
            named.push((input_norm_name(layer), Weight::Vector(input)));
            named.push((post_attention_norm_name(layer), Weight::Vector(post)));
            for (kind, linear) in ModuleKind::ALL.into_iter().zip(&block.linears) {
                let id = ModuleId::new(layer, kind);
                named.push((format!("{id}.weight"), Weight::Matrix(&linear.weight)));
                if let Some(bias) = &linear.bias {
                    named.push((format!("{id}.bias"), Weight::Vector(bias)));
                }
            }
        }
        named.push((NORM.to_owned(), Weight::Vector(&self.norm)));
        if let Some(head) = &self.head {
            named.push((HEAD.to_owned(), Weight::Matrix(head)));
        }
        named
    }

    /// A copy whose packed matrices are f32, for training.
    pub fn widened(&self) -> Result<Self> {
        let mut copy = self.clone();
        copy.embedding = self.embedding.widened()?;
        for block in &mut copy.blocks {
            for linear in &mut block.linears {
                linear.weight = linear.weight.widened()?;
            }
        }
        copy.head = self.head.as_ref().map(Matrix::widened).transpose()?;
        Ok(copy)
    }

    /// Replaces every weight by `values(name)`, row-major, in the order of [`Self::named`].
    pub fn replace<'a>(&mut self, mut values: impl FnMut(&str) -> Result<&'a [f32]>) -> Result<()> {
        self.embedding.replace(values(EMBEDDING)?)?;
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            replace_vector(&mut block.input_norm, values(&input_norm_name(layer))?)?;
            let post = &mut block.post_attention_norm;
            replace_vector(post, values(&post_attention_norm_name(layer))?)?;
            for (kind, linear) in ModuleKind::ALL.into_iter().zip(&mut block.linears) {
                let id = ModuleId::new(layer, kind);
                linear.weight.replace(values(&format!("{id}.weight"))?)?;
                if let Some(bias) = &mut linear.bias {
                    replace_vector(bias, values(&format!("{id}.bias"))?)?;
                }
            }
        }
        replace_vector(&mut self.norm, values(NORM)?)?;
        if let Some(head) = &mut self.head {
            head.replace(values(HEAD)?)?;
        }
        Ok(())
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
            as_stored: false,
            mmap: false,
        }
    }

    /// Number format of activations and of an adapter's factors: f32 on the CPU backend, whatever
    /// the matrices are held in.
    pub fn activation_dtype(&self) -> DType {
        match self.backend {
            Backend::Cpu => DType::F32,
            Backend::Portable => self.dtype,
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
        if self.as_stored
            && let Some(matrix) = raw.blocks(name)?
        {
            raw.release(name);
            return Ok(Matrix::Packed(matrix));
        }
        if self.mmap
            && let Some(matrix) = raw.mapped(name)?
            && (self.as_stored || matrix.dtype() == self.dtype)
        {
            return Ok(Matrix::Packed(matrix));
        }
        let packed = match (self.dtype, raw.get(name)?) {
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
        };
        raw.release(name);
        Ok(Matrix::Packed(packed))
    }
}
