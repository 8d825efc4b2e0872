//! Floating-point operations of the decoder: what speed is measured against.

use super::config::ModelConfig;
use crate::ops::Layout;

/// Operations of products with frozen matrices and of attention; a multiply-add counts as two.
/// Norms, rotations and the adapter's side path (under one percent) do not count.
#[derive(Debug, Clone, Copy)]
pub struct Flops<'a> {
    config: &'a ModelConfig,
}

impl<'a> Flops<'a> {
    pub fn new(config: &'a ModelConfig) -> Self {
        Self { config }
    }

    /// The seven linear maps of every block for one token: 2 · weights.
    pub fn linear(&self) -> f64 {
        let c = self.config;
        let attention = c.hidden_size * 2 * (c.q_size() + c.kv_size());
        let mlp = 3 * c.hidden_size * c.intermediate_size;
        2.0 * (c.num_hidden_layers * (attention + mlp)) as f64
    }

    /// Whether the products of a decoding step are too small to share between threads, which then
    /// better work on different sequences: under ten million weights.
    pub fn is_small(&self) -> bool {
        const SMALL: f64 = 2e7;
        self.linear() < SMALL
    }

    /// The output head for one token.
    pub fn head(&self) -> f64 {
        2.0 * (self.config.vocab_size * self.config.hidden_size) as f64
    }

    /// Scores and values of one query over `keys` keys, in all layers.
    pub fn attention(&self, keys: f64) -> f64 {
        4.0 * (self.config.num_hidden_layers * self.config.q_size()) as f64 * keys
    }

    /// The blocks for `len` consecutive tokens, the first at position `pos`.
    pub fn tokens(&self, pos: usize, len: usize) -> f64 {
        let (pos, len) = (pos as f64, len as f64);
        len * self.linear() + self.attention(len * pos + len * (len + 1.0) / 2.0)
    }

    /// The blocks for a packed batch.
    pub fn batch(&self, layout: &Layout) -> f64 {
        let segments = layout.segments.iter().enumerate();
        segments
            .map(|(index, segment)| self.tokens(layout.offset(index), segment.len))
            .sum()
    }

    /// What backward computes again of a packed batch of which only inputs were kept: all but the
    /// last product of each block.
    pub fn batch_again(&self, layout: &Layout) -> f64 {
        let c = self.config;
        let down = 2.0 * (c.num_hidden_layers * c.hidden_size * c.intermediate_size) as f64;
        self.batch(layout) - layout.tokens() as f64 * down
    }

    /// The way back through a packed batch whose activations were kept: one product for each
    /// linear map, since frozen weights get no gradient, and five for two in attention (scores
    /// again, dV, dP, dQ, dK).
    pub fn batch_backward(&self, layout: &Layout) -> f64 {
        let linear = layout.tokens() as f64 * self.linear();
        linear + 2.5 * (self.batch(layout) - linear)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests as fixtures;

    #[test]
    fn operations_add_up() {
        let config = fixtures::config(true);
        let flops = Flops::new(&config);
        // A span costs what its tokens cost one by one.
        let one_by_one: f64 = (3..8).map(|pos| flops.tokens(pos, 1)).sum();
        assert!((flops.tokens(3, 5) - one_by_one).abs() < 1e-6 * one_by_one);
        let layout = Layout::from_lengths(&[4, 2]).unwrap();
        assert_eq!(
            flops.batch(&layout),
            flops.tokens(0, 4) + flops.tokens(0, 2)
        );
        assert!(flops.batch_backward(&layout) > flops.batch(&layout));
        assert!(flops.batch_again(&layout) < flops.batch(&layout));
    }
}
