//! Sums of activations, element by element.

use super::buffer::Shared;
use super::par;

/// Elements handed out together.
const PIECE: usize = 4096;
/// A sum waits for memory: an element is worth this many operations of a product.
const COST: usize = 8;

/// `a += b`
///
/// # Panics
/// When the lengths differ.
pub fn add_assign(a: &mut [f32], b: &[f32]) {
    let len = a.len();
    assert_eq!(len, b.len(), "terms of a sum");
    let a = Shared::new(a);
    par::run_rows(len.div_ceil(PIECE), COST * PIECE, |pieces| {
        let part = pieces.start * PIECE..(pieces.end * PIECE).min(len);
        // SAFETY: tasks own different pieces.
        let a = unsafe { a.range(part.clone()) };
        for (a, b) in a.iter_mut().zip(&b[part]) {
            *a += b;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::{noise, on_threads, size};
    use super::*;

    #[test]
    fn adds_every_element_once() {
        for len in [0, 1, PIECE, size(100, 1) * PIECE + 7] {
            let (a, b) = (noise(len, 1), noise(len, 2));
            let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            let sum = on_threads(3, || {
                let mut sum = a.clone();
                add_assign(&mut sum, &b);
                sum
            });
            assert_eq!(sum, want);
        }
    }
}
