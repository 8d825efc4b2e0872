//! Full fine-tuning: the adapter carries its own trainable copy of the model's weights.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::{Adapter, AdapterSpec, BaseModel, Core, Gradients, LinearGrads, ModuleId, Tying};
use crate::model::{EMBEDDING, HEAD, Weights};
use crate::ops::cpu::weight_gradient;
use crate::ops::cpu_slice;
use crate::{Error, Result};

/// Where each weight stands in the flat parameters, by Hugging Face's name.
#[derive(Debug)]
pub(super) struct Places {
    ranges: HashMap<String, Range<usize>>,
    tied: bool,
}

/// The trained weights of kind `full`.
#[derive(Debug, Clone)]
pub(super) struct Full {
    weights: Weights,
    places: Arc<Places>,
}

impl Full {
    /// A copy of `weights` in f32, and its values flat in the order of [`Weights::named`].
    fn new(weights: &Weights) -> Result<(Self, Vec<f32>)> {
        let mut flat = Vec::new();
        let mut ranges = HashMap::new();
        for (name, weight) in weights.named() {
            let start = flat.len();
            flat.extend(weight.to_f32()?);
            ranges.insert(name, start..flat.len());
        }
        let tied = weights.head.is_none();
        let full = Self {
            weights: weights.widened()?,
            places: Arc::new(Places { ranges, tied }),
        };
        Ok((full, flat))
    }

    pub(super) fn set(&mut self, parameters: &[f32]) -> Result<()> {
        let places = &self.places;
        self.weights
            .replace(|name| Ok(&parameters[places.range(name)?]))
    }

    pub(super) fn num_parameters(&self) -> usize {
        let ends = self.places.ranges.values().map(|range| range.end);
        ends.max().unwrap_or(0)
    }

    pub(super) fn gradients(&self) -> Gradients {
        Gradients::of_weights(self.places.clone(), self.num_parameters())
    }
}

impl Places {
    pub(super) fn range(&self, name: &str) -> Result<Range<usize>> {
        let range = self.ranges.get(name).cloned();
        range.ok_or_else(|| not_trained(name))
    }
}

impl Adapter {
    /// Kind `full`: every weight of the model is trained, starting from where it is.
    ///
    /// # Errors
    /// `Error::Config` when the spec is invalid.
    pub fn full(spec: &AdapterSpec, base: BaseModel, weights: &Weights) -> Result<Self> {
        spec.validate()?;
        let (full, master) = Full::new(weights)?;
        let mut adapter = Self {
            spec: spec.clone(),
            slots: Vec::new(),
            low_rank: Vec::new(),
            tying: Tying::new(spec, 0),
            base,
            core: Core::Full(Box::new(full)),
            master: Vec::new(),
        };
        adapter.set_parameters(&master)?;
        Ok(adapter)
    }

    /// The trained copy of the model's weights, for kind `full`.
    pub fn full_weights(&self) -> Option<&Weights> {
        match &self.core {
            Core::Full(full) => Some(&full.weights),
            _ => None,
        }
    }

    /// Whether gradients of weights, norms and biases are wanted: kind `full`.
    pub fn trains_weights(&self) -> bool {
        self.full_weights().is_some()
    }

    /// Parameters that weight decay spares: the norms' weights and the biases of kind `full`.
    pub fn without_decay(&self) -> Vec<Range<usize>> {
        let Core::Full(full) = &self.core else {
            return Vec::new();
        };
        let spared = |name: &str| name.ends_with("norm.weight") || name.ends_with(".bias");
        let ranges = full.places.ranges.iter();
        ranges
            .filter(|(name, _)| spared(name))
            .map(|(_, range)| range.clone())
            .collect()
    }
}

impl Gradients {
    /// Adds the gradient of the tensor called `name` in Hugging Face's naming.
    pub fn add_weight(&mut self, name: &str, gradient: &Tensor) -> Result<()> {
        let gradient = host(gradient)?;
        let sum = self.weight(name)?;
        sum.iter_mut().zip(&gradient).for_each(|(s, g)| *s += g);
        Ok(())
    }

    /// Adds row `t` of `gradient` `[T, h]` to row `rows[t]` of the embedding.
    pub fn add_embedding(&mut self, rows: &[u32], gradient: &Tensor) -> Result<()> {
        let width = gradient.dim(1)?;
        let gradient = host(gradient)?;
        let sum = self.weight(EMBEDDING)?;
        for (&row, gradient) in rows.iter().zip(gradient.chunks_exact(width)) {
            let sum = &mut sum[row as usize * width..][..width];
            sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g);
        }
        Ok(())
    }

    /// Adds dlogitsᵀ · hidden, for dlogits `[N, vocab]` and hidden `[N, h]`, to the output head (the
    /// embedding when it is tied).
    pub fn add_head(&mut self, dlogits: &Tensor, hidden: &Tensor) -> Result<()> {
        let tied = self.places()?.tied;
        self.add_product(if tied { EMBEDDING } else { HEAD }, dlogits, hidden)
    }

    /// Adds gᵀ · x to the weight of a linear map, and the column sums of g to its bias.
    pub(super) fn add_linear(&mut self, id: ModuleId, lin: &LinearGrads<'_>) -> Result<()> {
        self.add_product(&format!("{id}.weight"), lin.g, lin.x)?;
        let bias = format!("{id}.bias");
        if self.places()?.ranges.contains_key(&bias) {
            self.add_weight(&bias, &lin.g.sum(0)?)?;
        }
        Ok(())
    }

    fn add_product(&mut self, name: &str, g: &Tensor, x: &Tensor) -> Result<()> {
        let (n, k) = (g.dim(1)?, x.dim(1)?);
        if let (Ok(g), Ok(x)) = (cpu_slice(g), cpu_slice(x)) {
            weight_gradient(&g, &x, n, k, self.weight(name)?, true);
            return Ok(());
        }
        self.add_weight(
            name,
            &g.t()?
                .contiguous()?
                .matmul(&x.contiguous()?)?
                .flatten_all()?,
        )
    }
}

fn host(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

pub(super) fn not_trained(name: &str) -> Error {
    Error::Internal(format!("the adapter does not train {name}"))
}
