//! Gradients of causal grouped-query attention over a whole packed batch.
//!
//! Probabilities are computed again from the log-sum-exp, a tile of queries and keys at a time, so
//! no array of queries × keys exists. A task takes one segment and one key/value head. What a
//! child adds to its parent's keys and values is kept apart and added in the order of children.

use super::buffer::{AlignedVec, Shared, with_scratch};
use super::gemm::blocks;
use super::isa::{Isa, dispatch};
use super::pack::pack_rows;
use super::par;
use super::rms_norm::dot;
use super::simd::{LANES, Simd};
use super::tile::{Lhs, Mode, Out, Rhs, product};
use crate::ops::Layout;
use std::ops::Range;

/// Keys of a tile.
const KEYS: usize = 128;
/// Rows (queries times heads) of a tile, or one query's heads if those are more.
const ROWS: usize = 64;
/// Floats of children's gradients for their parents that may exist at once.
const PENDING: usize = 8 << 20;

/// Gradients of `attention_forward` over a whole batch: q, o, dout `[T, n_heads · dim]` (q
/// rotated), k, v `[T, n_kv · dim]` (k rotated), lse `[T, n_heads]`; dq, dk, dv are overwritten.
///
/// With P the probabilities and δ = Σ_d dout·o: dS = P ∘ (dout·vᵀ − δ), dq = scale · dS·k,
/// dk = scale · dSᵀ·q, dv = Pᵀ·dout. A parent's keys and values sum over its children.
///
/// # Panics
/// When a slice has the wrong length.
#[allow(clippy::too_many_arguments)]
pub fn attention_backward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    o: &[f32],
    lse: &[f32],
    dout: &[f32],
    layout: &Layout,
    n_heads: usize,
    n_kv: usize,
    dim: usize,
    scale: f32,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let t = layout.tokens();
    let (wide, narrow) = (t * n_heads * dim, t * n_kv * dim);
    assert!([q.len(), o.len(), dout.len(), dq.len()] == [wide; 4]);
    assert!([k.len(), v.len(), dk.len(), dv.len()] == [narrow; 4]);
    assert!(lse.len() == t * n_heads && n_heads.is_multiple_of(n_kv));
    let batch = Batch {
        isa: Isa::current(),
        q,
        k,
        v,
        o,
        lse,
        dout,
        layout,
        heads: n_kv,
        group: n_heads / n_kv,
        dim,
        row: dim.next_multiple_of(LANES),
        scale,
    };
    let segments = &layout.segments;
    let mut start = 0;
    while start < segments.len() {
        // A wave of segments, bounded by the memory of what is pending for parents.
        let mut pending = vec![];
        let mut total = 0;
        while start + pending.len() < segments.len() && (total < PENDING || pending.len() < 8) {
            pending.push(total);
            total += 2 * layout.offset(start + pending.len() - 1) * n_kv * batch.row;
        }
        let wave = start..start + pending.len();
        let mut parents = AlignedVec::<f32>::zeroed(total);
        let outputs = Outputs {
            dq: Shared::new(dq),
            dk: Shared::new(dk),
            dv: Shared::new(dv),
            parents: Shared::new(&mut parents),
        };
        let work: usize = wave.clone().map(|index| batch.work(index)).sum();
        par::run(wave.len() * n_kv, par::threads_for(work), |task| {
            let index = start + task / n_kv;
            // SAFETY: a task alone writes the rows of its segment for its heads, and its place
            // among the pending gradients.
            unsafe { batch.segment(index, task % n_kv, pending[index - start], &outputs) };
        });
        for (index, at) in wave.clone().zip(pending) {
            if let Some(parent) = segments[index].parent {
                batch.add_to_parent(parent, &parents[at..], dk, dv);
            }
        }
        start = wave.end;
    }
}

struct Batch<'a> {
    isa: Isa,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    o: &'a [f32],
    lse: &'a [f32],
    dout: &'a [f32],
    layout: &'a Layout,
    heads: usize,
    /// Query heads of a key/value head.
    group: usize,
    dim: usize,
    /// `dim` in whole vectors: floats from row to row in compact copies.
    row: usize,
    scale: f32,
}

struct Outputs<'a> {
    dq: Shared<'a>,
    dk: Shared<'a>,
    dv: Shared<'a>,
    /// `[head][dk, dv][parent's rows][row]` for every child of the wave.
    parents: Shared<'a>,
}

/// The queries of a task: rows (query, head of the group).
struct Queries<'a> {
    count: usize,
    q: &'a [f32],
    dout: &'a [f32],
    lse: &'a [f32],
    delta: &'a [f32],
    dq: &'a mut [f32],
}

/// Cut a piece off the front of scratch memory.
fn take<'a>(scratch: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (piece, rest) = std::mem::take(scratch).split_at_mut(len.next_multiple_of(LANES));
    *scratch = rest;
    &mut piece[..len]
}

impl Batch<'_> {
    /// Floating-point operations of a segment.
    fn work(&self, index: usize) -> usize {
        let len = self.layout.segments[index].len;
        let keys = self.layout.offset(index) + len / 2 + 1;
        10 * len * keys * self.dim * self.group * self.heads
    }

    /// # Safety
    /// No other thread uses the rows of this segment in `outputs` for this head, nor what is
    /// pending for the parent from `pending` on for this head.
    unsafe fn segment(&self, index: usize, head: usize, pending: usize, outputs: &Outputs) {
        let segment = self.layout.segments[index];
        let before = self.layout.offset(index);
        let rows = segment.len * self.group;
        let keys = before.max(segment.len).next_multiple_of(LANES);
        let tile = ROWS.max(self.group) * KEYS;
        let floats = 3 * rows * self.row
            + 2 * rows
            + keys * (2 * self.dim + self.row)
            + 2 * segment.len * self.row
            + 2 * tile;
        with_scratch(floats + 12 * LANES, |mut scratch| {
            let q = take(&mut scratch, rows * self.row);
            let dout = take(&mut scratch, rows * self.row);
            let dq = take(&mut scratch, rows * self.row);
            let (lse, delta) = (take(&mut scratch, rows), take(&mut scratch, rows));
            for i in 0..rows {
                let at = self.query(segment.start, head, i);
                let from = at * self.dim..(at + 1) * self.dim;
                let to = i * self.row..(i + 1) * self.row;
                copy_row(&self.q[from.clone()], self.scale, &mut q[to.clone()]);
                copy_row(&self.dout[from.clone()], 1.0, &mut dout[to]);
                lse[i] = self.lse[at];
                delta[i] = row_dot(self.isa, &self.dout[from.clone()], &self.o[from]);
            }
            dq.fill(0.0);
            let mut queries = Queries {
                count: rows,
                q,
                dout,
                lse,
                delta,
                dq,
            };
            if let Some(parent) = segment.parent {
                let size = before * self.row;
                let at = pending + 2 * head * size;
                // SAFETY: the caller's promise.
                let (dk, dv) = unsafe {
                    let both = outputs.parents.range(at..at + 2 * size);
                    both.split_at_mut(size)
                };
                let start = self.layout.segments[parent].start;
                self.run(
                    start..start + before,
                    head,
                    false,
                    &mut queries,
                    dk,
                    dv,
                    scratch,
                );
            }
            let mut rest = scratch;
            let dk = take(&mut rest, segment.len * self.row);
            let dv = take(&mut rest, segment.len * self.row);
            dk.fill(0.0);
            dv.fill(0.0);
            let own = segment.start..segment.start + segment.len;
            self.run(own, head, true, &mut queries, dk, dv, rest);
            for i in 0..rows {
                let at = self.query(segment.start, head, i) * self.dim;
                // SAFETY: the caller's promise.
                let out = unsafe { outputs.dq.range(at..at + self.dim) };
                copy_row(&queries.dq[i * self.row..][..self.dim], self.scale, out);
            }
            for i in 0..segment.len {
                let at = ((segment.start + i) * self.heads + head) * self.dim;
                let from = i * self.row..i * self.row + self.dim;
                // SAFETY: the caller's promise.
                unsafe {
                    outputs
                        .dk
                        .range(at..at + self.dim)
                        .copy_from_slice(&dk[from.clone()]);
                    outputs
                        .dv
                        .range(at..at + self.dim)
                        .copy_from_slice(&dv[from]);
                }
            }
        });
    }

    /// Index in `[T, n_heads]` of row `i` of a segment's product.
    fn query(&self, start: usize, head: usize, i: usize) -> usize {
        let n_heads = self.heads * self.group;
        (start + i / self.group) * n_heads + head * self.group + i % self.group
    }

    /// All queries against the keys at `rows` of the batch: dq grows, dk and dv `[rows][row]` grow.
    /// In a causal run query `i` sees the keys up to `i`, otherwise all.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        rows: Range<usize>,
        head: usize,
        causal: bool,
        queries: &mut Queries,
        dk: &mut [f32],
        dv: &mut [f32],
        mut scratch: &mut [f32],
    ) {
        let (isa, dim, row, group) = (self.isa, self.dim, self.row, self.group);
        let count = rows.len();
        let stride = self.heads * dim;
        let from = rows.start * stride + head * dim;
        let padded = count.next_multiple_of(LANES);
        let keys = take(&mut scratch, padded * dim);
        let values = take(&mut scratch, padded * dim);
        let key_rows = take(&mut scratch, count * row);
        let most = (ROWS / group).max(1) * group;
        let (p, ds) = (
            take(&mut scratch, most * KEYS),
            take(&mut scratch, most * KEYS),
        );
        pack_rows(isa, &self.k[from..], stride, count, dim, keys);
        pack_rows(isa, &self.v[from..], stride, count, dim, values);
        for (i, to) in key_rows.chunks_exact_mut(row).enumerate() {
            copy_row(&self.k[from + i * stride..][..dim], 1.0, to);
        }
        assert!(dk.len() == count * row && dv.len() == count * row);
        assert!(queries.q.len() == queries.count * row && queries.dq.len() == queries.q.len());
        assert!(queries.dout.len() == queries.q.len());
        let compact = |slice: &[f32], at: usize| Rhs::new(slice[at * row..].as_ptr(), LANES, row);
        for key in (0..count).step_by(KEYS) {
            let mut first = if causal { key * group } else { 0 };
            while first < queries.count {
                let height = most.min(queries.count - first);
                let seen = |i: usize| match causal {
                    true => ((first + i) / group + 1).min(count) - key,
                    false => count - key,
                };
                let width = seen(height - 1).min(KEYS);
                let query_row = |slice: &[f32]| Lhs {
                    start: slice[first * row..].as_ptr(),
                    row,
                    step: 1,
                };
                let turned = |slice: &[f32]| Lhs {
                    start: slice.as_ptr(),
                    row: 1,
                    step: KEYS,
                };
                // SAFETY: all operands lie inside their slices: `height` rows from `first` on of
                // the queries, `width` keys from `key` on, tiles of at most `most` × KEYS.
                unsafe {
                    for (start, depth, mode) in blocks(dim, Mode::Set) {
                        for (lhs, panels, out) in [
                            (query_row(queries.q), &*keys, &mut *p),
                            (query_row(queries.dout), &*values, &mut *ds),
                        ] {
                            let lhs = Lhs {
                                start: lhs.start.add(start),
                                ..lhs
                            };
                            let rhs = Rhs::panels(&panels[key * dim + start * LANES..], dim);
                            let out = Out {
                                start: out.as_mut_ptr(),
                                row: KEYS,
                                mode,
                            };
                            product(isa, height, width, depth, lhs, rhs, out);
                        }
                    }
                    for i in 0..height {
                        let tile = i * KEYS..i * KEYS + width.next_multiple_of(LANES);
                        probabilities(
                            isa,
                            &mut p[tile.clone()],
                            &mut ds[tile],
                            seen(i).min(width),
                            queries.lse[first + i],
                            queries.delta[first + i],
                        );
                    }
                    let grow = |slice: &mut [f32], at: usize| Out {
                        start: slice[at * row..].as_mut_ptr(),
                        row,
                        mode: Mode::Add,
                    };
                    let tile = Lhs {
                        start: ds.as_ptr(),
                        row: KEYS,
                        step: 1,
                    };
                    let dq = grow(queries.dq, first);
                    product(isa, height, row, width, tile, compact(key_rows, key), dq);
                    let q = compact(queries.q, first);
                    product(isa, width, row, height, turned(ds), q, grow(dk, key));
                    let dout = compact(queries.dout, first);
                    product(isa, width, row, height, turned(p), dout, grow(dv, key));
                }
                first += height;
            }
        }
    }

    /// Add one child's `[head][dk, dv][rows][row]` to its parent's gradients.
    fn add_to_parent(&self, parent: usize, pending: &[f32], dk: &mut [f32], dv: &mut [f32]) {
        let parent = self.layout.segments[parent];
        let size = parent.len * self.row;
        for head in 0..self.heads {
            for (which, out) in [&mut *dk, &mut *dv].into_iter().enumerate() {
                let rows = &pending[(2 * head + which) * size..][..size];
                for (i, from) in rows.chunks_exact(self.row).enumerate() {
                    let at = ((parent.start + i) * self.heads + head) * self.dim;
                    for (to, from) in out[at..at + self.dim].iter_mut().zip(from) {
                        *to += from;
                    }
                }
            }
        }
    }
}

/// `to = factor · from`, zeros behind it.
fn copy_row(from: &[f32], factor: f32, to: &mut [f32]) {
    let (to, rest) = to.split_at_mut(from.len());
    for (to, from) in to.iter_mut().zip(from) {
        *to = from * factor;
    }
    rest.fill(0.0);
}

/// From scores and dout·vᵀ of one row to P and dS, both 0 from `limit` on.
#[inline(always)]
fn probabilities_generic<S: Simd>(
    s: S,
    p: &mut [f32],
    ds: &mut [f32],
    limit: usize,
    lse: f32,
    delta: f32,
) {
    let (lse, delta) = (s.splat(lse), s.splat(delta));
    let (p_blocks, _) = p.as_chunks_mut::<LANES>();
    let (ds_blocks, _) = ds.as_chunks_mut::<LANES>();
    for (p, ds) in p_blocks
        .iter_mut()
        .zip(ds_blocks)
        .take(limit.div_ceil(LANES))
    {
        let e = s.exp(s.sub(s.load(p), lse));
        s.store(p, e);
        s.store(ds, s.mul(e, s.sub(s.load(ds), delta)));
    }
    p[limit..].fill(0.0);
    ds[limit..].fill(0.0);
}

dispatch! { fn probabilities(p: &mut [f32], ds: &mut [f32], limit: usize, lse: f32, delta: f32) = probabilities_generic }
dispatch! { fn row_dot(a: &[f32], b: &[f32]) -> f32 = dot }

#[cfg(test)]
mod tests {
    use super::super::attention::tests::{groups, reference, store};
    use super::super::attention_forward;
    use super::super::testing::{assert_near, noise, on_threads, size};
    use super::*;

    /// dq, dk, dv in f64, straight from the definition.
    #[allow(clippy::too_many_arguments)]
    fn naive(
        [q, k, v, g]: [&[f32]; 4],
        out: &[f64],
        lse: &[f64],
        layout: &Layout,
        (n_heads, n_kv, dim): (usize, usize, usize),
        scale: f64,
    ) -> [Vec<f64>; 3] {
        let mut d = [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]];
        let wide = |x: &[f32], i: usize| f64::from(x[i]);
        for (index, segment) in layout.segments.iter().enumerate() {
            let before = layout.offset(index);
            for i in 0..segment.len {
                for head in 0..n_heads {
                    let at = (segment.start + i) * n_heads + head;
                    let delta: f64 = (at * dim..(at + 1) * dim)
                        .map(|x| wide(g, x) * out[x])
                        .sum();
                    for key in 0..=before + i {
                        let row = match segment.parent {
                            Some(parent) if key < before => layout.segments[parent].start + key,
                            _ => segment.start + key - before,
                        };
                        let kv = (row * n_kv + head / (n_heads / n_kv)) * dim;
                        let (mut score, mut dp) = (0.0, 0.0);
                        for x in 0..dim {
                            score += wide(q, at * dim + x) * wide(k, kv + x) * scale;
                            dp += wide(g, at * dim + x) * wide(v, kv + x);
                        }
                        let p = (score - lse[at]).exp();
                        let ds = p * (dp - delta) * scale;
                        for x in 0..dim {
                            d[0][at * dim + x] += ds * wide(k, kv + x);
                            d[1][kv + x] += ds * wide(q, at * dim + x);
                            d[2][kv + x] += p * wide(g, at * dim + x);
                        }
                    }
                }
            }
        }
        d
    }

    #[test]
    fn matches_f64_with_the_same_bits_everywhere() {
        type Shape<'a> = &'a [(usize, &'a [usize])];
        let mixed: Shape = size(
            &[(5, &[1, 3]), (33, &[]), (16, &[2, 17, 40])],
            &[(5, &[1, 3]), (16, &[2, 17])],
        );
        let long: Shape = size(&[(150, &[60, 1]), (1, &[])], &[(130, &[2])]);
        let deep: Shape = &[(34, &[])];
        for &((n_heads, n_kv, dim), shape) in size(
            &[
                ((2, 2, 5), mixed),
                ((6, 2, 20), mixed),
                ((6, 2, 20), long),
                ((9, 3, 64), mixed),
                ((4, 1, 200), deep),
            ][..],
            &[((4, 2, 20), mixed), ((2, 1, 5), long)],
        ) {
            {
                let layout = groups(shape);
                let t = layout.tokens();
                let (wide, narrow) = (t * n_heads * dim, t * n_kv * dim);
                let (q, g) = (noise(wide, 1), noise(wide, 4));
                let (k, v) = (noise(narrow, 2), noise(narrow, 3));
                let scale = (dim as f32).powf(-0.5);
                let heads = (n_heads, n_kv, dim);
                let (out, lse) = reference(&q, &k, &v, &layout, heads, f64::from(scale));
                let want = naive(
                    [&q, &k, &v, &g],
                    &out,
                    &lse,
                    &layout,
                    heads,
                    f64::from(scale),
                );
                let run = || {
                    let mut kv = store(&layout, n_kv, dim);
                    let spans = layout.spans();
                    kv.append(&spans, &k, &v);
                    let (mut o, mut lse) = (vec![0.0; wide], vec![0.0; t * n_heads]);
                    attention_forward(&q, &spans, &kv, n_heads, scale, &mut o, Some(&mut lse));
                    let mut dq = vec![f32::NAN; wide];
                    let (mut dk, mut dv) = (vec![f32::NAN; narrow], vec![f32::NAN; narrow]);
                    attention_backward(
                        &q, &k, &v, &o, &lse, &g, &layout, n_heads, n_kv, dim, scale, &mut dq,
                        &mut dk, &mut dv,
                    );
                    [dq, dk, dv]
                };
                let got = run();
                for (got, want) in got.iter().zip(&want) {
                    assert_near(got, want, 20.0);
                }
                for isa in Isa::available() {
                    assert_eq!(isa.with(run), got);
                }
                assert_eq!(on_threads(3, run), got);
            }
        }
    }
}
