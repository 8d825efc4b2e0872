//! Gradient clipping by the Euclidean norm of the whole gradient.

use rayon::prelude::*;

/// Blocks of fixed size are summed in order: the norm has the same bits for any thread count.
const BLOCK: usize = 16_384;

/// Scales `gradient` down to norm `max_norm` (0: no limit) and returns its norm before, as
/// torch.nn.utils.clip_grad_norm_ does: the factor is max_norm / (norm + 1e-6).
pub fn clip_grad_norm(gradient: &mut [f64], max_norm: f64) -> f64 {
    let blocks: Vec<f64> = gradient
        .par_chunks(BLOCK)
        .map(|block| block.iter().map(|g| g * g).sum())
        .collect();
    let norm = blocks.iter().sum::<f64>().sqrt();
    let factor = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && factor < 1.0 {
        gradient.par_iter_mut().for_each(|g| *g *= factor);
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_larger_gradients_are_scaled() {
        let mut gradient = [3.0, 4.0];
        assert_eq!(clip_grad_norm(&mut gradient, 6.0), 5.0);
        assert_eq!(gradient, [3.0, 4.0]);
        assert_eq!(clip_grad_norm(&mut gradient, 0.0), 5.0);
        assert_eq!(gradient, [3.0, 4.0]);
        clip_grad_norm(&mut gradient, 1.0);
        assert!((gradient[0].hypot(gradient[1]) - 1.0).abs() < 1e-6);
    }
}
