//! LoRA: ΔW = lora_alpha / r · B A with A and B trained.

use candle_core::Tensor;

use super::gradients::LinearGrads;
use super::modules::ModuleId;
use super::spec::AdapterSpec;
use super::{Gradients, LowRank};
use crate::ops::random::Stream;
use crate::{Error, Result};

/// Keeps the start of A apart from other users of the same seed.
const DOMAIN: u32 = 4;

/// Where the matrices of one module lie among the flat parameters: A `[r, in]`, then B `[out, r]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LoraModule {
    start: usize,
    r: usize,
    out: usize,
    inner: usize,
}

impl LoraModule {
    /// Lays the modules of shapes `[out, in]` out one after the other.
    pub fn lay_out(r: usize, shapes: &[[usize; 2]]) -> Vec<Self> {
        let mut start = 0;
        shapes
            .iter()
            .map(|&[out, inner]| {
                let module = Self {
                    start,
                    r,
                    out,
                    inner,
                };
                start = module.end();
                module
            })
            .collect()
    }

    /// End of its parameters.
    pub fn end(&self) -> usize {
        self.start + self.r * (self.inner + self.out)
    }

    /// A `[r, in]` of the flat parameters.
    fn a<'a>(&self, parameters: &'a [f32]) -> &'a [f32] {
        &parameters[self.start..][..self.r * self.inner]
    }

    /// B `[out, r]` of the flat parameters.
    fn b<'a>(&self, parameters: &'a [f32]) -> &'a [f32] {
        &parameters[self.start + self.r * self.inner..self.end()]
    }

    /// A and B of the parameters, on the device and in the dtype of `old`.
    pub fn low_rank(&self, parameters: &[f32], old: &LowRank) -> Result<LowRank> {
        let place = |values: &[f32], shape: (usize, usize)| {
            Tensor::from_slice(values, shape, old.a.device())?.to_dtype(old.a.dtype())
        };
        let a = place(self.a(parameters), (self.r, self.inner))?;
        let b = place(self.b(parameters), (self.out, self.r))?;
        Ok(LowRank::new(a, old.m.clone(), b))
    }

    /// Names and shapes of its two matrices.
    pub fn tensors(&self, id: ModuleId) -> [(String, Vec<usize>); 2] {
        [
            (format!("{id}.lora_A"), vec![self.r, self.inner]),
            (format!("{id}.lora_B"), vec![self.out, self.r]),
        ]
    }

    /// Adds dA = factor · gbᵀ x and dB = factor · gᵀ xa.
    pub fn add_gradient(
        &self,
        factor: f64,
        lin: &LinearGrads<'_>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (xa, gb) = lin
            .low_rank
            .ok_or_else(|| Error::Internal("the gradient of lora needs x·Aᵀ and g·B".into()))?;
        let middle = self.start + self.r * self.inner;
        gradients.add_product(self.start..middle, &(gb * factor)?, lin.x)?;
        gradients.add_product(middle..self.end(), lin.g, &(xa * factor)?)
    }
}

/// The start: A uniform in ±1/√in (Kaiming's bound with a = √5, as PEFT has it), B zero.
pub(super) fn initial(spec: &AdapterSpec, modules: &[LoraModule]) -> Vec<f32> {
    let mut parameters = Vec::with_capacity(modules.last().map_or(0, LoraModule::end));
    for (index, module) in modules.iter().enumerate() {
        let stream = Stream {
            seed: spec.projection_seed,
            domain: DOMAIN,
            index: index as u32,
        };
        let bound = 1.0 / (module.inner as f64).sqrt();
        let draws = stream.uniforms(module.r * module.inner);
        parameters.extend(draws.into_iter().map(|x| ((2.0 * x - 1.0) * bound) as f32));
        parameters.resize(module.end(), 0.0);
    }
    parameters
}
