//! Where a product takes its weights from, sixteen outputs at a time.

use half::{bf16, f16};
use std::ops::Range;

use super::isa::{Isa, dispatch};
use super::simd::{LANES, Simd};
use super::tile::{Element, Lhs, Out};

/// A matrix W [out, in] as panels of sixteen outputs.
pub(super) trait Panels: Sync {
    /// What the micro-kernel reads in place.
    type Element: Element;

    /// All panels, `[ceil(out / 16)][in][16]`, if that is how they lie in memory and products of
    /// `rows` rows had better read them so.
    fn in_place(&self, rows: usize) -> Option<&[Self::Element]>;

    /// The inputs `terms` of a panel, `[terms][16]`.
    fn widen(&self, isa: Isa, panel: usize, terms: Range<usize>, to: &mut [f32]);

    /// Up to sixteen `inputs` of a panel as sixteen rows of inputs, missing inputs zero.
    fn turn(&self, isa: Isa, panel: usize, inputs: Range<usize>, to: &mut [f32]);

    /// `rows` × `columns` of x·Wᵀ for few rows, without a copy of panels in between; `false` when this
    /// storage has no such product of so many rows.
    ///
    /// # Safety
    /// `lhs` has `rows` rows; `out` has room for the columns, from the first of them on, and no other
    /// thread uses it.
    unsafe fn few(
        &self,
        _isa: Isa,
        _columns: Range<usize>,
        _rows: usize,
        _lhs: Lhs,
        _out: Out,
    ) -> bool {
        false
    }
}

/// Panels of plain numbers.
pub(super) struct Plain<'a, E> {
    pub panels: &'a [E],
    pub in_features: usize,
}

impl<E> Plain<'_, E> {
    fn terms(&self, panel: usize, terms: Range<usize>) -> &[E] {
        let start = panel * self.in_features;
        &self.panels[(start + terms.start) * LANES..(start + terms.end) * LANES]
    }
}

/// Widen whole vectors of sixteen.
#[inline(always)]
fn widen_generic<S: Simd, E: Element>(s: S, from: &[E], to: &mut [f32]) {
    assert!(from.len() == to.len() && to.len().is_multiple_of(LANES));
    for i in (0..to.len()).step_by(LANES) {
        // SAFETY: i + 16 ≤ both lengths by the assertion.
        unsafe {
            let v = E::load(s, from.as_ptr().add(i));
            s.store_ptr(to.as_mut_ptr().add(i), v);
        }
    }
}

/// From a panel, 16 outputs × `inputs` inputs, to its transpose: for up to 16 inputs one vector of
/// outputs each becomes for 16 outputs one vector of inputs each.
#[inline(always)]
fn turn_generic<S: Simd, E: Element>(s: S, from: &[E], inputs: usize, to: &mut [f32]) {
    assert!(inputs <= LANES && from.len() >= inputs * LANES && to.len() >= LANES * LANES);
    let mut block = [s.zero(); LANES];
    if inputs == LANES {
        for i in 0..LANES {
            // SAFETY: (i + 1)·16 ≤ 256 = inputs·16 ≤ from.len().
            block[i] = unsafe { E::load(s, from.as_ptr().add(i * LANES)) };
        }
    } else {
        for i in 0..LANES {
            if i < inputs {
                // SAFETY: (i + 1)·16 ≤ inputs·16 ≤ from.len().
                block[i] = unsafe { E::load(s, from.as_ptr().add(i * LANES)) };
            }
        }
    }
    s.transpose(&mut block);
    for (i, row) in block.iter().enumerate() {
        // SAFETY: (i + 1)·16 ≤ 256 ≤ to.len().
        unsafe { s.store_ptr(to.as_mut_ptr().add(i * LANES), *row) };
    }
}

macro_rules! plain {
    ($type:ty, $in_place:expr, $widen:ident, $turn:ident) => {
        dispatch! { fn $widen(from: &[$type], to: &mut [f32]) = widen_generic }
        dispatch! { fn $turn(from: &[$type], inputs: usize, to: &mut [f32]) = turn_generic }

        impl Panels for Plain<'_, $type> {
            type Element = $type;

            fn in_place(&self, rows: usize) -> Option<&[$type]> {
                let worth: fn(usize) -> bool = $in_place;
                worth(rows).then_some(self.panels)
            }

            fn widen(&self, isa: Isa, panel: usize, terms: Range<usize>, to: &mut [f32]) {
                $widen(isa, self.terms(panel, terms), to);
            }

            fn turn(&self, isa: Isa, panel: usize, inputs: Range<usize>, to: &mut [f32]) {
                let count = inputs.len();
                $turn(isa, self.terms(panel, inputs), count, to);
            }
        }
    };
}
plain!(f32, |_| true, widen_f32, turn_f32);
// More rows gain from panels that are widened once.
plain!(bf16, |rows| rows <= 8, widen_bf16, turn_bf16);
plain!(f16, |rows| rows <= 8, widen_f16, turn_f16);
