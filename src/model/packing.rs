//! How many tokens go into one forward/backward pass, and what it costs to keep their activations.

use std::ops::Range;

use super::config::ModelConfig;
use super::decoder::Keep;

/// Bytes that a pass may keep for its way back unless the user says otherwise.
pub const ACTIVATION_MEMORY: usize = 2_000_000_000;

/// Cuts a list of items with `rows[i]` rows each into consecutive runs of at most `limit` rows. An
/// item that is larger by itself gets a run of its own.
pub fn pack(rows: &[usize], limit: usize) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut filled) = (0, 0);
    for (i, &n) in rows.iter().enumerate() {
        if i > start && filled + n > limit {
            runs.push(start..i);
            (start, filled) = (i, 0);
        }
        filled += n;
    }
    if start < rows.len() {
        runs.push(start..rows.len());
    }
    runs
}

impl ModelConfig {
    /// Bytes of f32 activations that backward needs for `tokens` rows when nothing is recomputed.
    pub fn activation_bytes(&self, tokens: usize) -> usize {
        let query = self.num_attention_heads * self.head_dim;
        let key_value = self.num_key_value_heads * self.head_dim;
        // Per block: its input, both norms' outputs and the middle; q and the attention's output;
        // k, v; gate, up and their product.
        let row = 4 * self.hidden_size + 2 * query + 2 * key_value + 3 * self.intermediate_size;
        tokens * row * self.num_hidden_layers * size_of::<f32>()
    }
}

impl Keep {
    /// What the user asked for, else whatever fits into `memory` bytes for passes of `tokens`
    /// rows. The gradient is the same to the bit on the CPU.
    pub fn choose(
        gradient_checkpointing: Option<bool>,
        config: &ModelConfig,
        tokens: usize,
        memory: usize,
    ) -> Self {
        let recompute =
            gradient_checkpointing.unwrap_or_else(|| config.activation_bytes(tokens) > memory);
        match recompute {
            true => Self::Inputs,
            false => Self::Activations,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_consecutive_and_within_the_limit() {
        assert_eq!(pack(&[3, 4, 3, 11, 1, 9, 1], 10), [0..3, 3..4, 4..6, 6..7]);
        assert_eq!(pack(&[20, 1], 10), [0..1, 1..2]);
        assert!(pack(&[], 10).is_empty());
    }
}
