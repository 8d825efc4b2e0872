//! Full fine-tuning: the adapter carries its own trainable copy of the model's weights.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::gradients::{Gradients, LinearGrads, add_values, host_f32};
use super::modules::ModuleId;
use super::{Adapter, Core};
use crate::model::{EMBEDDING, HEAD, Weights};
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
    pub weights: Weights,
    pub places: Arc<Places>,
}

impl Full {
    /// A copy of `weights` with f32 matrices on the CPU, where small steps would be rounded away
    /// otherwise, and its values flat in the order of [`Weights::named`].
    pub fn new(weights: &Weights) -> Result<(Self, Vec<f32>)> {
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

    /// Replaces every weight.
    pub fn set(&mut self, parameters: &[f32]) -> Result<()> {
        let places = &self.places;
        self.weights
            .replace(|name| Ok(&parameters[places.range(name)?]))
    }

    /// Names and shapes of the weights in the order of the flat parameters.
    pub fn tensors(&self) -> Result<Vec<(String, Vec<usize>)>> {
        let named = self.weights.named().into_iter();
        named
            .map(|(name, weight)| Ok((name, weight.shape()?)))
            .collect()
    }
}

impl Places {
    fn range(&self, name: &str) -> Result<Range<usize>> {
        let range = self.ranges.get(name).cloned();
        range.ok_or_else(|| not_trained(name))
    }
}

impl Adapter {
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
        let place = self.trained()?.range(name)?;
        add_values(self.large_at(place)?, gradient)
    }

    /// Adds row `t` of `gradient` `[T, h]` to row `rows[t]` of the embedding.
    pub fn add_embedding(&mut self, rows: &[u32], gradient: &Tensor) -> Result<()> {
        let width = gradient.dim(1)?;
        let gradient = host_f32(gradient)?;
        let place = self.trained()?.range(EMBEDDING)?;
        let sum = self.large_at(place)?;
        for (&row, gradient) in rows.iter().zip(gradient.chunks_exact(width)) {
            let sum = &mut sum[row as usize * width..][..width];
            sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g);
        }
        Ok(())
    }

    /// Adds dlogitsᵀ · hidden, for dlogits `[N, vocab]` and hidden `[N, h]`, to the output head (the
    /// embedding when it is tied).
    pub fn add_head(&mut self, dlogits: &Tensor, hidden: &Tensor) -> Result<()> {
        let places = self.trained()?;
        let name = if places.tied { EMBEDDING } else { HEAD };
        self.add_product(places.range(name)?, dlogits, hidden)
    }

    /// Adds gᵀ · x to the weight of a linear map, and the column sums of g to its bias.
    pub(super) fn add_linear(&mut self, id: ModuleId, lin: &LinearGrads<'_>) -> Result<()> {
        let places = self.trained()?;
        self.add_product(places.range(&format!("{id}.weight"))?, lin.g, lin.x)?;
        match places.ranges.get(&format!("{id}.bias")) {
            Some(bias) => add_values(self.large_at(bias.clone())?, &lin.g.sum(0)?),
            None => Ok(()),
        }
    }

    fn trained(&self) -> Result<Arc<Places>> {
        self.places().ok_or_else(|| not_trained("weights"))
    }
}

fn not_trained(what: &str) -> Error {
    Error::Internal(format!("the adapter does not train {what}"))
}
