//! The gated activation silu(gate) ∘ up, forward and backward.

use super::buffer::Shared;
use super::isa::{Isa, dispatch};
use super::par;
use super::simd::{LANES, Simd};

/// Elements handed out together.
const PIECE: usize = 1024;

/// `out = silu(gate) ∘ up`, element by element.
///
/// # Panics
/// When the lengths differ.
pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (isa, len) = (Isa::current(), gate.len());
    assert!(up.len() == len && out.len() == len);
    let out = Shared::new(out);
    par::run_rows(len.div_ceil(PIECE), 16 * PIECE, |pieces| {
        let part = pieces.start * PIECE..(pieces.end * PIECE).min(len);
        // SAFETY: tasks own different pieces.
        let out = unsafe { out.range(part.clone()) };
        forward_part(isa, &gate[part.clone()], &up[part], out);
    });
}

/// Gradients of [`swiglu`] given `g = dL/dout`.
///
/// With σ = sigmoid(gate): dup = g ∘ gate σ, dgate = g ∘ up ∘ σ (1 + gate (1 − σ)).
///
/// # Panics
/// When the lengths differ.
pub fn swiglu_backward(gate: &[f32], up: &[f32], g: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    let (isa, len) = (Isa::current(), gate.len());
    assert!(up.len() == len && g.len() == len && dgate.len() == len && dup.len() == len);
    let (dgate, dup) = (Shared::new(dgate), Shared::new(dup));
    par::run_rows(len.div_ceil(PIECE), 24 * PIECE, |pieces| {
        let part = pieces.start * PIECE..(pieces.end * PIECE).min(len);
        // SAFETY: tasks own different pieces.
        let (dgate, dup) = unsafe { (dgate.range(part.clone()), dup.range(part.clone())) };
        backward_part(
            isa,
            &gate[part.clone()],
            &up[part.clone()],
            &g[part],
            dgate,
            dup,
        );
    });
}

/// 1 / (1 + e⁻ˣ)
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, s.exp(s.sub(s.zero(), x))))
}

#[inline(always)]
fn forward_generic<S: Simd>(s: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gate, gate_rest) = gate.as_chunks::<LANES>();
    let (up, up_rest) = up.as_chunks::<LANES>();
    let (out, out_rest) = out.as_chunks_mut::<LANES>();
    for ((gate, up), out) in gate.iter().zip(up).zip(out) {
        let gate = s.load(gate);
        s.store(out, s.mul(s.mul(gate, sigmoid(s, gate)), s.load(up)));
    }
    if !gate_rest.is_empty() {
        let gate = s.load_part(gate_rest, 0.0);
        let silu = s.mul(gate, sigmoid(s, gate));
        s.store_part(out_rest, s.mul(silu, s.load_part(up_rest, 0.0)));
    }
}

/// (dgate, dup) of one vector.
#[inline(always)]
fn gradients<S: Simd>(s: S, gate: S::V, up: S::V, g: S::V) -> (S::V, S::V) {
    let one = s.splat(1.0);
    let sigma = sigmoid(s, gate);
    let slope = s.mul(sigma, s.fma(gate, s.sub(one, sigma), one));
    (s.mul(s.mul(g, up), slope), s.mul(g, s.mul(gate, sigma)))
}

#[inline(always)]
fn backward_generic<S: Simd>(
    s: S,
    gate: &[f32],
    up: &[f32],
    g: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let (gate, gate_rest) = gate.as_chunks::<LANES>();
    let (up, up_rest) = up.as_chunks::<LANES>();
    let (g, g_rest) = g.as_chunks::<LANES>();
    let (dgate, dgate_rest) = dgate.as_chunks_mut::<LANES>();
    let (dup, dup_rest) = dup.as_chunks_mut::<LANES>();
    for i in 0..gate.len() {
        let (a, b) = gradients(s, s.load(&gate[i]), s.load(&up[i]), s.load(&g[i]));
        s.store(&mut dgate[i], a);
        s.store(&mut dup[i], b);
    }
    if !gate_rest.is_empty() {
        let load = |x: &[f32]| s.load_part(x, 0.0);
        let (a, b) = gradients(s, load(gate_rest), load(up_rest), load(g_rest));
        s.store_part(dgate_rest, a);
        s.store_part(dup_rest, b);
    }
}

dispatch! { fn forward_part(gate: &[f32], up: &[f32], out: &mut [f32]) = forward_generic }
dispatch! { fn backward_part(gate: &[f32], up: &[f32], g: &[f32], dgate: &mut [f32], dup: &mut [f32]) = backward_generic }

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_near, noise, on_threads, size};
    use super::*;

    #[test]
    fn matches_f64_with_the_same_bits_everywhere() {
        for len in [1, 16, 1000, size(100_003, 2 * PIECE + 3)] {
            let gate: Vec<f32> = noise(len, 1).iter().map(|x| 12.0 * x).collect();
            let (up, g) = (noise(len, 2), noise(len, 3));
            let run = || {
                let mut out = vec![f32::NAN; len];
                let (mut dgate, mut dup) = (out.clone(), out.clone());
                swiglu(&gate, &up, &mut out);
                swiglu_backward(&gate, &up, &g, &mut dgate, &mut dup);
                (out, dgate, dup)
            };
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            let (wgate, wup, wg) = (wide(&gate), wide(&up), wide(&g));
            let map = |f: &dyn Fn(usize) -> f64| (0..len).map(f).collect::<Vec<_>>();
            let (out, dgate, dup) = run();
            assert_near(&out, &map(&|i| silu(wgate[i]) * wup[i]), 1.0);
            assert_near(&dup, &map(&|i| silu(wgate[i]) * wg[i]), 1.0);
            let slope = |x: f64| (silu(x + 1e-5) - silu(x - 1e-5)) / 2e-5;
            assert_near(&dgate, &map(&|i| slope(wgate[i]) * wup[i] * wg[i]), 1.0);
            for isa in Isa::available() {
                assert_eq!(isa.with(run), (out.clone(), dgate.clone(), dup.clone()));
            }
            assert_eq!(on_threads(3, run), (out, dgate, dup));
        }
    }

    #[test]
    fn far_gates_are_shut_or_open() {
        let mut out = [0.0; 4];
        let far = [-1e4, 1e4, f32::NEG_INFINITY, f32::NAN];
        swiglu(&far, &[2.0; 4], &mut out);
        assert_eq!(out[..2], [0.0, 2e4]);
        assert!(out[3].is_nan());
    }
}
