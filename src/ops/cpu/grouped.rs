//! Kernels over weights that become numbers in registers, sixteen inputs of a panel at a time:
//! quantised blocks, rows of a mapped file.

use std::ops::Range;

use super::gemm::blocks;
use super::isa::Isa;
use super::panels::Panels;
use super::simd::{LANES, Simd};
use super::tile::{Lhs, Mode, Out, store_columns};

/// Inputs of a panel that become numbers at once.
pub(super) const GROUP: usize = 16;
/// Rows up to which a product keeps to registers; more gain from panels widened once.
const FEW: usize = 8;

/// A matrix whose inputs are a multiple of sixteen.
pub(super) trait Groups: Sync {
    /// Inputs 16·`group`.. of a panel: one vector of outputs each, missing outputs zero.
    ///
    /// # Safety
    /// The matrix has this panel and group.
    unsafe fn load<S: Simd>(&self, s: S, panel: usize, group: usize) -> [S::V; GROUP];

    /// The same for one output each, one vector of inputs.
    ///
    /// # Safety
    /// As for [`Groups::load`].
    #[inline(always)]
    unsafe fn load_turned<S: Simd>(&self, s: S, panel: usize, group: usize) -> [S::V; GROUP] {
        // SAFETY: the caller's promise.
        let mut block = unsafe { self.load(s, panel, group) };
        s.transpose(&mut block);
        block
    }

    /// (panels, groups of a panel)
    fn size(&self) -> (usize, usize);
}

/// [`Panels`] of a matrix in groups.
pub(super) struct Grouped<'a, G>(pub &'a G);

impl<G: Groups> Grouped<'_, G> {
    /// The groups of `terms`.
    ///
    /// # Panics
    /// When the matrix does not have them or they are not whole.
    fn groups(&self, panel: usize, terms: Range<usize>) -> Range<usize> {
        let (panels, groups) = self.0.size();
        assert!(terms.start.is_multiple_of(GROUP) && terms.end.is_multiple_of(GROUP));
        assert!(panel < panels && terms.end <= groups * GROUP);
        terms.start / GROUP..terms.end / GROUP
    }
}

impl<G: Groups> Panels for Grouped<'_, G> {
    type Element = f32;

    fn in_place(&self, _rows: usize) -> Option<&[f32]> {
        None
    }

    fn widen(&self, isa: Isa, panel: usize, terms: Range<usize>, to: &mut [f32]) {
        let groups = self.groups(panel, terms);
        assert!(to.len() >= groups.len() * GROUP * LANES);
        // SAFETY: the group exists and has its place in `to` by the assertions.
        unsafe { widen(isa, self.0, panel, groups, to.as_mut_ptr(), false) }
    }

    fn turn(&self, isa: Isa, panel: usize, inputs: Range<usize>, to: &mut [f32]) {
        let groups = self.groups(panel, inputs);
        assert!(groups.len() <= 1 && to.len() >= GROUP * LANES);
        // SAFETY: as above.
        unsafe { widen(isa, self.0, panel, groups, to.as_mut_ptr(), true) }
    }

    unsafe fn few(&self, isa: Isa, columns: Range<usize>, rows: usize, lhs: Lhs, out: Out) -> bool {
        let (panels, _) = self.0.size();
        assert!(columns.start.is_multiple_of(LANES) && columns.end <= panels * LANES);
        debug_assert_ne!(out.mode, Mode::Chain);
        let task = Few {
            source: self.0,
            columns,
            lhs,
            out,
        };
        let kernel = match rows {
            1 => few::<G, 1, 2>,
            2 => few::<G, 2, 2>,
            3 => few::<G, 3, 2>,
            4 => few::<G, 4, 2>,
            5 => few::<G, 5, 1>,
            6 => few::<G, 6, 1>,
            7 => few::<G, 7, 1>,
            FEW => few::<G, FEW, 1>,
            _ => return false,
        };
        // SAFETY: the columns exist by the assertion, the rows by the caller's promise.
        unsafe { kernel(isa, &task) };
        true
    }
}

/// Groups of a panel as numbers, one after the other.
///
/// # Safety
/// The groups exist, and there is room for them at `to`.
#[inline(always)]
unsafe fn widen_generic<S: Simd, G: Groups>(
    s: S,
    source: &G,
    panel: usize,
    groups: Range<usize>,
    mut to: *mut f32,
    turned: bool,
) {
    for group in groups {
        // SAFETY: the caller's promise.
        unsafe {
            let block = match turned {
                false => source.load(s, panel, group),
                true => source.load_turned(s, panel, group),
            };
            for i in 0..GROUP {
                s.store_ptr(to.add(i * LANES), block[i]);
            }
            to = to.add(GROUP * LANES);
        }
    }
}

/// A product of few rows with some columns.
struct Few<'a, G> {
    source: &'a G,
    columns: Range<usize>,
    lhs: Lhs,
    out: Out,
}

/// `M` rows and `N` panels at a time: with few rows, the sums of one panel alone would wait for each
/// other. A panel is read from its beginning to its end.
///
/// # Safety
/// The columns exist, and `M` rows of both operands.
#[inline(always)]
unsafe fn few_generic<S: Simd, G: Groups, const M: usize, const N: usize>(s: S, task: &Few<'_, G>) {
    let mut panel = task.columns.start / LANES;
    let end = task.columns.end.div_ceil(LANES);
    // SAFETY: the caller's promise.
    unsafe {
        while panel + N <= end {
            few_panels::<S, G, M, N>(s, task, panel);
            panel += N;
        }
        while panel < end {
            few_panels::<S, G, M, 1>(s, task, panel);
            panel += 1;
        }
    }
}

/// # Safety
/// As for [`few_generic`], for the panels from `panel` on.
#[inline(always)]
unsafe fn few_panels<S: Simd, G: Groups, const M: usize, const N: usize>(
    s: S,
    task: &Few<'_, G>,
    panel: usize,
) {
    let (_, groups) = task.source.size();
    for (start, depth, mode) in blocks(groups * GROUP, task.out.mode) {
        // SAFETY: the loops stay inside of what the caller promised.
        unsafe {
            let mut sums = [[s.zero(); N]; M];
            let mut x = task.lhs.from(start).start;
            for group in start / GROUP..(start + depth) / GROUP {
                for n in 0..N {
                    let block = task.source.load(s, panel + n, group);
                    let mut x = x;
                    for i in 0..GROUP {
                        for m in 0..M {
                            let x = s.splat(*x.add(m * task.lhs.row));
                            sums[m][n] = s.fma(x, block[i], sums[m][n]);
                        }
                        x = x.wrapping_add(task.lhs.step);
                    }
                }
                x = x.wrapping_add(GROUP * task.lhs.step);
            }
            for m in 0..M {
                for n in 0..N {
                    let column = (panel + n) * LANES;
                    let at = m * task.out.row + column - task.columns.start;
                    let width = LANES.min(task.columns.end - column);
                    store_columns(s, task.out.start.add(at), width, mode, sums[m][n]);
                }
            }
        }
    }
}

/// Defines a function over any [`Groups`] that runs `$generic` with the vectors of an instruction set.
macro_rules! dispatch_groups {
    (unsafe fn $name:ident<G $(, const $m:ident: usize)*>($($arg:ident: $ty:ty),*) = $generic:path) => {
        /// # Safety
        /// As for the function it runs.
        unsafe fn $name<G: Groups $(, const $m: usize)*>(isa: Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                use super::x86::{Avx2, Avx512};

                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                unsafe fn avx512<G: Groups $(, const $m: usize)*>($($arg: $ty),*) {
                    // SAFETY: the features are enabled here; the rest is the caller's promise.
                    unsafe { $generic(Avx512::new(), $($arg),*) }
                }

                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn avx2<G: Groups $(, const $m: usize)*>($($arg: $ty),*) {
                    // SAFETY: the features are enabled here; the rest is the caller's promise.
                    unsafe { $generic(Avx2::new(), $($arg),*) }
                }

                debug_assert!(isa <= Isa::detected());
                match isa {
                    // SAFETY: kernels get their `Isa` from `Isa::current`: at most what was detected.
                    Isa::Avx512 => return unsafe { avx512::<G $(, $m)*>($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { avx2::<G $(, $m)*>($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            // SAFETY: the caller's promise.
            unsafe { $generic(super::simd::Portable, $($arg),*) }
        }
    };
}
dispatch_groups! { unsafe fn widen<G>(source: &G, panel: usize, groups: Range<usize>, to: *mut f32, turned: bool) = widen_generic }
dispatch_groups! { unsafe fn few<G, const M: usize, const N: usize>(task: &Few<'_, G>) = few_generic::<_, G, M, N> }
