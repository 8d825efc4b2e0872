//! Full fine-tuning: the adapter carries its own trainable copy of the model's weights.

use candle_core::Tensor;

use super::{Adapter, Gradients};
use crate::model::Weights;
use crate::{Error, Result};

impl Adapter {
    /// The trained copy of the model's weights, for kind `full`.
    pub fn full_weights(&self) -> Option<&Weights> {
        None
    }

    /// Whether gradients of weights, norms and biases are wanted: kind `full`.
    pub fn trains_weights(&self) -> bool {
        self.full_weights().is_some()
    }
}

impl Gradients {
    /// Adds the gradient of the tensor called `name` in Hugging Face's naming.
    pub fn add_weight(&mut self, name: &str, _gradient: &Tensor) -> Result<()> {
        Err(not_trained(name))
    }

    /// Adds row `t` of `gradient` `[T, h]` to row `rows[t]` of the matrix called `name`.
    pub fn add_rows(&mut self, name: &str, _rows: &[u32], _gradient: &Tensor) -> Result<()> {
        Err(not_trained(name))
    }

    /// Adds dlogitsᵀ · hidden, for dlogits `[N, vocab]` and hidden `[N, h]`, to the output head (the
    /// embedding when it is tied).
    pub fn add_head(&mut self, _dlogits: &Tensor, _hidden: &Tensor) -> Result<()> {
        Err(not_trained("lm_head.weight"))
    }
}

fn not_trained(name: &str) -> Error {
    Error::Internal(format!("the adapter does not train {name}"))
}
