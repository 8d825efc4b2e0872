//! The micro-kernel under every product: a few rows times a few panels of sixteen columns.
//!
//! `c[i, j] ⟵ Σ_p a[i, p] · b[p, j]`, one fused multiply-add an element, in the order of `p`.
//! The tile's shape decides speed only: an element's operations do not depend on its neighbours.

use super::buffer::Zeroable;
use super::isa::Isa;
use super::simd::{LANES, Simd};

/// Depth of a block of a reduction. Products start new accumulators at multiples of it and add
/// the blocks in order, so it is part of what defines a result's bits.
///
/// 192 × 3 panels × 64 bytes stay in a 48 KiB first-level cache beside the rows, and hidden sizes
/// are often multiples of 192 or much larger.
pub(crate) const DEPTH: usize = 192;

/// What a weight is stored as; all are widened to `f32` before they are used.
pub trait Element: Zeroable + Default + Send + Sync {
    /// # Safety
    /// Sixteen values can be read at `p`.
    #[doc(hidden)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_ptr(p) }
    }
}

impl Element for half::bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(p) }
    }
}

impl Element for half::f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(p) }
    }
}

/// What happens to the old contents of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Overwritten.
    Set,
    /// The new sum is added to it.
    Add,
    /// The sum goes on from it, as if the earlier terms had been part of the same call.
    Chain,
}

/// Rows of the left factor: element (i, p) lies at `start + i·row + p·step`.
#[derive(Clone, Copy)]
pub(crate) struct Lhs {
    pub start: *const f32,
    pub row: usize,
    pub step: usize,
}

impl Lhs {
    /// Row-major rows, `row` elements from one to the next.
    pub(crate) fn rows(x: &[f32], row: usize) -> Self {
        Self {
            start: x.as_ptr(),
            row,
            step: 1,
        }
    }

    /// The same rows without their first `terms` terms.
    pub(crate) fn from(self, terms: usize) -> Self {
        Self {
            start: self.start.wrapping_add(terms * self.step),
            ..self
        }
    }
}

/// Panels of the right factor: element (p, j) lies at `start + (j / 16)·panel + p·step + j % 16`.
#[derive(Clone, Copy)]
pub(crate) struct Rhs<E> {
    pub start: *const E,
    pub panel: usize,
    pub step: usize,
    /// Where panels begin which are needed after these, at the same distances: they are fetched
    /// from memory meanwhile. The address is never read.
    pub next: *const E,
}

impl<E> Rhs<E> {
    pub(crate) fn new(start: *const E, panel: usize, step: usize) -> Self {
        Self {
            start,
            panel,
            step,
            next: start,
        }
    }

    /// Panels of `depth` terms one after the other.
    pub(crate) fn panels(panels: &[E], depth: usize) -> Self {
        Self::new(panels.as_ptr(), depth * LANES, LANES)
    }
}

/// The result: element (i, j) lies at `start + i·row + j`.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    pub start: *mut f32,
    pub row: usize,
    pub mode: Mode,
}

/// One call of the micro-kernel.
struct Tile<E> {
    depth: usize,
    lhs: Lhs,
    rhs: Rhs<E>,
    out: Out,
    /// Columns of the last panel that exist in the result.
    last: usize,
}

type TileFn<E> = unsafe fn(&Tile<E>);

#[inline(always)]
unsafe fn tile<S: Simd, E: Element, const M: usize, const N: usize>(s: S, t: &Tile<E>) {
    // SAFETY: `product` was promised that all elements of its operands exist, and the loops stay
    // inside M rows, N panels and `depth` terms. Right-hand panels are always sixteen wide; only
    // the result may be narrower, which `last` takes care of.
    unsafe {
        let mut sums = [[s.zero(); N]; M];
        if t.out.mode == Mode::Chain {
            for i in 0..M {
                for j in 0..N {
                    let p = t.out.start.add(i * t.out.row + j * LANES);
                    sums[i][j] = load_columns(s, p, if j + 1 < N { LANES } else { t.last });
                }
            }
        }
        let (mut a, mut b, mut next) = (t.lhs.start, t.rhs.start, t.rhs.next);
        for _ in 0..t.depth {
            s.prefetch(next);
            next = next.wrapping_add(t.rhs.step);
            let mut columns = [s.zero(); N];
            for j in 0..N {
                columns[j] = E::load(s, b.add(j * t.rhs.panel));
            }
            for i in 0..M {
                let x = s.splat(*a.add(i * t.lhs.row));
                for j in 0..N {
                    sums[i][j] = s.fma(x, columns[j], sums[i][j]);
                }
            }
            a = a.wrapping_add(t.lhs.step);
            b = b.wrapping_add(t.rhs.step);
        }
        for i in 0..M {
            for j in 0..N {
                let p = t.out.start.add(i * t.out.row + j * LANES);
                let width = if j + 1 < N { LANES } else { t.last };
                store_columns(s, p, width, t.out.mode, sums[i][j]);
            }
        }
    }
}

/// # Safety
/// `width` floats can be read at `p`.
#[inline(always)]
unsafe fn load_columns<S: Simd>(s: S, p: *const f32, width: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        if width == LANES {
            s.load_ptr(p)
        } else {
            s.load_part(std::slice::from_raw_parts(p, width), 0.0)
        }
    }
}

/// Put a sum into the result, added to what is there with [`Mode::Add`].
///
/// # Safety
/// `width` floats can be read and written at `p`.
#[inline(always)]
pub(crate) unsafe fn store_columns<S: Simd>(
    s: S,
    p: *mut f32,
    width: usize,
    mode: Mode,
    mut sum: S::V,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if mode == Mode::Add {
            sum = s.add(load_columns(s, p, width), sum);
        }
        if width == LANES {
            s.store_ptr(p, sum);
        } else {
            s.store_part(std::slice::from_raw_parts_mut(p, width), sum);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn tile_avx512<E: Element, const M: usize, const N: usize>(t: &Tile<E>) {
    // SAFETY: the features are enabled here; the rest is the caller's promise.
    unsafe { tile::<_, E, M, N>(super::x86::Avx512::new(), t) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_avx2<E: Element, const M: usize, const N: usize>(t: &Tile<E>) {
    // SAFETY: the features are enabled here; the rest is the caller's promise.
    unsafe { tile::<_, E, M, N>(super::x86::Avx2::new(), t) }
}

unsafe fn tile_portable<E: Element, const M: usize, const N: usize>(t: &Tile<E>) {
    // SAFETY: the caller's promise.
    unsafe { tile::<_, E, M, N>(super::simd::Portable, t) }
}

/// Most rows of a tile, for results of `panels` panels.
fn max_rows(isa: Isa, panels: usize) -> usize {
    match isa {
        // Six rows go with four panels, eight with three: the fewer panels are left over.
        Isa::Avx512 if panels.is_multiple_of(4) && !panels.is_multiple_of(3) => 6,
        Isa::Avx512 => 8,
        Isa::Avx2 | Isa::Portable => 6,
    }
}

/// Panels beside each other for a tile of `rows` rows: as many as the registers hold, or, for few
/// rows, enough independent sums to hide the latency of a multiply-add.
fn max_panels(isa: Isa, rows: usize) -> usize {
    match isa {
        Isa::Avx512 => [8, 8, 8, 6, 4, 4, 3, 3][rows - 1],
        Isa::Avx2 => [4, 3, 2, 1, 1, 1][rows - 1],
        Isa::Portable => [4, 2, 1, 1, 1, 1][rows - 1],
    }
}

/// Columns which [`product`] takes at once for a block of `rows` rows and `columns` columns.
pub(crate) fn group_width(isa: Isa, rows: usize, columns: usize) -> usize {
    let tiles = rows.div_ceil(max_rows(isa, columns.div_ceil(LANES))).max(1);
    max_panels(isa, rows.div_ceil(tiles).max(1)) * LANES
}

macro_rules! pick {
    ($function:ident, $rows:expr, $panels:expr; $($n:literal: $($m:literal)+;)+) => {
        match $panels {
            $($n.. => match $rows {
                $($m => ($function::<E, $m, $n> as TileFn<E>, $n),)+
                _ => unreachable!("tile of {} rows and {} panels", $rows, $panels),
            },)+
            _ => unreachable!("tile without panels"),
        }
    };
}

/// The micro-kernel for `rows` rows and at most `panels` panels, and how many panels it takes.
fn pick<E: Element>(isa: Isa, rows: usize, panels: usize) -> (TileFn<E>, usize) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => pick! { tile_avx512, rows, panels;
            8: 1 2 3; 6: 1 2 3 4; 4: 1 2 3 4 5 6; 3: 1 2 3 4 5 6 7 8; 2: 1 2 3 4 5 6 7 8;
            1: 1 2 3 4 5 6 7 8;
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => pick! { tile_avx2, rows, panels;
            4: 1; 3: 1 2; 2: 1 2 3; 1: 1 2 3 4 5 6;
        },
        _ => pick! { tile_portable, rows, panels;
            4: 1; 3: 1; 2: 1 2; 1: 1 2 3 4 5 6;
        },
    }
}

/// One block of a product: `rows` × `columns` results, `depth` terms each.
///
/// The caller splits deep reductions at multiples of [`DEPTH`].
///
/// # Safety
/// All elements which the operands describe exist, the right-hand side in whole panels, no other
/// thread uses those of `out`, and the machine has the instruction set.
pub(crate) unsafe fn product<E: Element>(
    isa: Isa,
    rows: usize,
    columns: usize,
    depth: usize,
    lhs: Lhs,
    rhs: Rhs<E>,
    out: Out,
) {
    debug_assert!(isa <= Isa::detected());
    if rows == 0 || columns == 0 {
        return;
    }
    // Row tiles as equal as possible: 9 rows are 5 + 4, not 8 + 1.
    let panels = columns.div_ceil(LANES);
    let tiles = rows.div_ceil(max_rows(isa, panels));
    let (small, larger) = (rows / tiles, rows % tiles);
    let tallest = small + usize::from(larger > 0);
    let mut panel = 0;
    while panel < panels {
        let most = (panels - panel).min(max_panels(isa, tallest));
        let (tall, taken) = pick::<E>(isa, tallest, most);
        let (low, same) = pick::<E>(isa, small, most);
        debug_assert_eq!(taken, same);
        let last = (columns - (panel + taken - 1) * LANES).min(LANES);
        let mut row = 0;
        for index in 0..tiles {
            let height = small + usize::from(index < larger);
            let kernel = if height == tallest { tall } else { low };
            // SAFETY: the tile lies inside the operands by the loop bounds; the rest is the caller's
            // promise.
            unsafe {
                kernel(&Tile {
                    depth,
                    lhs: Lhs {
                        start: lhs.start.add(row * lhs.row),
                        ..lhs
                    },
                    rhs: Rhs {
                        start: rhs.start.add(panel * rhs.panel),
                        next: rhs.next.wrapping_add((panel + index % taken) * rhs.panel),
                        ..rhs
                    },
                    out: Out {
                        start: out.start.add(row * out.row + panel * LANES),
                        ..out
                    },
                    last,
                });
            }
            row += height;
        }
        panel += taken;
    }
}
