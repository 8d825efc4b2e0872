//! Causal grouped-query attention over a [`KvStore`]: prefill, decoding and scoring alike.
//!
//! A task takes the query heads of one key/value head for some rows. Scores of all their keys are
//! computed before the softmax, so that nothing depends on how keys are cut into tiles: scores
//! are sums over head_dim in order, the softmax sum goes through sixteen lanes by absolute key
//! position, and the sum over values runs in blocks at absolute key positions. A masked key has
//! probability exactly 0.

use super::buffer::{Shared, with_scratch};
use super::gemm::blocks;
use super::isa::{Isa, dispatch};
use super::kv::{KvStore, Run};
use super::par;
use super::simd::{LANES, Simd};
use super::tile::{Lhs, Mode, Out, Rhs, product};
use crate::ops::Span;

/// Keys of a block of the sum over values: 128 rows of 64 floats are two thirds of a first-level
/// cache. Part of what defines a result's bits.
const KEY_BLOCK: usize = 128;
/// Most rows (queries times heads) of a task.
const TASK_ROWS: usize = 48;

/// Consecutive queries of a span.
#[derive(Clone, Copy)]
struct Part {
    row: usize,
    len: usize,
    slot: usize,
    pos: usize,
}

/// Attention of q `[T, n_heads · dim]` (rotated) for the rows of `spans`, whose keys and values
/// are in the store: out `[T, n_heads · dim]`, lse `[T, n_heads]` the log-sum-exp of the scores.
///
/// # Panics
/// When a slice has the wrong length or a span reaches beyond what its slot holds.
pub fn attention_forward(
    q: &[f32],
    spans: &[Span],
    kv: &KvStore,
    n_heads: usize,
    scale: f32,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    let isa = Isa::current();
    let width = n_heads * kv.dim;
    assert!(q.len() == out.len() && q.len().is_multiple_of(width));
    assert!(n_heads.is_multiple_of(kv.heads), "query heads per kv head");
    if let Some(lse) = &lse {
        assert_eq!(lse.len() * kv.dim, q.len());
    }
    let group = n_heads / kv.heads;
    let units = units(spans, kv, group);
    let work: usize = spans
        .iter()
        .map(|span| {
            assert!(span.pos + span.len <= kv.len(span.slot), "keys are missing");
            assert!((span.row + span.len) * width <= q.len(), "rows are missing");
            4 * span.len * width * (span.pos + span.len.div_ceil(2))
        })
        .sum();
    let out = Shared::new(out);
    let lse = lse.map(Shared::new);
    par::run(units.len() * kv.heads, par::threads_for(work), |task| {
        let call = Call {
            isa,
            q,
            kv,
            head: task % kv.heads,
            group,
            scale,
        };
        // SAFETY: a task alone writes its rows of its heads.
        unsafe { call.run(&units[task / kv.heads], &out, lse.as_ref()) };
    });
}

/// Rows which are computed together: tiles of a long span, or short spans behind one parent.
fn units(spans: &[Span], kv: &KvStore, group: usize) -> Vec<Vec<Part>> {
    let most = (TASK_ROWS / group).max(1);
    let mut units: Vec<Vec<Part>> = Vec::with_capacity(spans.len());
    let mut open: Option<(usize, usize)> = None; // parent of the last unit, room left in it
    for span in spans {
        let parent = kv.shared(span.slot).map(|(parent, _)| parent);
        let part = Part {
            row: span.row,
            len: span.len,
            slot: span.slot,
            pos: span.pos,
        };
        if let (Some((last, room)), Some(parent)) = (open, parent)
            && last == parent
            && room >= span.len
            && let Some(unit) = units.last_mut()
            && kv.shared(unit[0].slot) == kv.shared(span.slot)
        {
            unit.push(part);
            open = Some((last, room - span.len));
            continue;
        }
        let tiles = span.len.div_ceil(most);
        for tile in 0..tiles {
            let rows = par::piece(span.len, tiles, tile);
            units.push(vec![Part {
                row: span.row + rows.start,
                len: rows.len(),
                pos: span.pos + rows.start,
                ..part
            }]);
        }
        open = match parent {
            Some(parent) if tiles == 1 => Some((parent, most - span.len)),
            _ => None,
        };
    }
    units
}

/// What the tasks of one call share, and the head of this one.
struct Call<'a> {
    isa: Isa,
    q: &'a [f32],
    kv: &'a KvStore,
    head: usize,
    group: usize,
    scale: f32,
}

impl Call<'_> {
    /// # Safety
    /// No other thread uses the rows of `parts` and this task's heads in `out` and `lse`.
    unsafe fn run(&self, parts: &[Part], out: &Shared, lse: Option<&Shared>) {
        let (dim, value_width) = (self.kv.dim, self.kv.value_width());
        let rows: usize = parts.iter().map(|part| part.len * self.group).sum();
        let keys = parts.iter().map(|part| part.pos + part.len).max();
        let stride = keys.unwrap_or(0).next_multiple_of(LANES);
        let sizes = [rows * dim, rows * stride, rows * value_width];
        let [q_size, score_size, out_size] = sizes.map(|size| size.next_multiple_of(LANES));
        with_scratch(q_size + score_size + 2 * out_size + rows, |scratch| {
            let (q, scratch) = scratch.split_at_mut(q_size);
            let (scores, scratch) = scratch.split_at_mut(score_size);
            let (sums, scratch) = scratch.split_at_mut(out_size);
            let (pieces, factors) = scratch.split_at_mut(out_size);
            self.gather(parts, q);
            self.scores(parts, q, scores, stride);
            let mut row = 0;
            for part in parts {
                for i in 0..part.len * self.group {
                    let limit = part.pos + i / self.group + 1;
                    let scores = &mut scores[row * stride..(row + 1) * stride];
                    let (max, sum) = softmax(self.isa, scores, limit);
                    factors[row] = 1.0 / sum;
                    if let Some(lse) = lse {
                        // SAFETY: the caller's promise.
                        unsafe {
                            let at = self.head_of(part, i);
                            lse.range(at..at + 1)[0] = max + sum.ln();
                        }
                    }
                    row += 1;
                }
            }
            self.values(parts, scores, stride, sums, pieces);
            let mut row = 0;
            for part in parts {
                for i in 0..part.len * self.group {
                    let at = self.head_of(part, i) * dim;
                    // SAFETY: the caller's promise.
                    let out = unsafe { out.range(at..at + dim) };
                    for (out, sum) in out.iter_mut().zip(&sums[row * value_width..]) {
                        *out = sum * factors[row];
                    }
                    row += 1;
                }
            }
        });
    }

    /// Index in `[T, n_heads]` of row `i` of a part's product.
    fn head_of(&self, part: &Part, i: usize) -> usize {
        let n_heads = self.kv.heads * self.group;
        (part.row + i / self.group) * n_heads + self.head * self.group + i % self.group
    }

    /// Scaled queries, one row after the other.
    fn gather(&self, parts: &[Part], q: &mut [f32]) {
        let mut rows = q.chunks_exact_mut(self.kv.dim);
        for part in parts {
            for i in 0..part.len * self.group {
                let from = &self.q[self.head_of(part, i) * self.kv.dim..][..self.kv.dim];
                if let Some(row) = rows.next() {
                    for (to, from) in row.iter_mut().zip(from) {
                        *to = from * self.scale;
                    }
                }
            }
        }
    }

    /// Scores of all keys: those of a shared parent for all rows at once.
    fn scores(&self, parts: &[Part], q: &[f32], scores: &mut [f32], stride: usize) {
        let dim = self.kv.dim;
        let multiply = |first: usize,
                        rows: usize,
                        keys: &[f32],
                        from: usize,
                        to: usize,
                        scores: &mut [f32]| {
            assert!(keys.len() >= (to - from).div_ceil(LANES) * dim * LANES);
            assert!(q.len() >= (first + rows) * dim);
            assert!(to <= stride && scores.len() >= (first + rows) * stride);
            for (start, depth, mode) in blocks(dim, Mode::Set) {
                // SAFETY: the operands lie inside their slices by the assertions.
                unsafe {
                    product(
                        self.isa,
                        rows,
                        to - from,
                        depth,
                        Lhs {
                            start: q.as_ptr().add(first * dim + start),
                            row: dim,
                            step: 1,
                        },
                        Rhs::panels(&keys[start * LANES..], dim),
                        Out {
                            start: scores.as_mut_ptr().add(first * stride + from),
                            row: stride,
                            mode,
                        },
                    );
                }
            }
        };
        let rows = parts.iter().map(|part| part.len * self.group).sum();
        let shared = self.kv.shared(parts[0].slot);
        if let Some((parent, keys)) = shared {
            multiply(
                0,
                rows,
                self.kv.run(parent, self.head).keys,
                0,
                keys,
                scores,
            );
        }
        let shared = shared.map_or(0, |(_, keys)| keys);
        let mut first = 0;
        for part in parts {
            let own = self.kv.run(part.slot, self.head);
            let rows = part.len * self.group;
            multiply(first, rows, own.keys, shared, part.pos + part.len, scores);
            first += rows;
        }
    }

    /// Probabilities times values, in blocks of [`KEY_BLOCK`] absolute positions.
    fn values(
        &self,
        parts: &[Part],
        scores: &[f32],
        stride: usize,
        sums: &mut [f32],
        pieces: &mut [f32],
    ) {
        let width = self.kv.value_width();
        let multiply = |first: usize,
                        rows: usize,
                        run: Run,
                        offset: usize,
                        from: usize,
                        to: usize,
                        mode: Mode,
                        out: &mut [f32]| {
            assert!(run.values.len() >= (to - offset) * width && from >= offset);
            assert!(to <= stride && scores.len() >= (first + rows) * stride);
            assert!(out.len() >= (first + rows) * width);
            // SAFETY: the operands lie inside their slices by the assertions.
            unsafe {
                product(
                    self.isa,
                    rows,
                    width,
                    to - from,
                    Lhs {
                        start: scores.as_ptr().add(first * stride + from),
                        row: stride,
                        step: 1,
                    },
                    Rhs::new(
                        run.values.as_ptr().add((from - offset) * width),
                        LANES,
                        width,
                    ),
                    Out {
                        start: out.as_mut_ptr().add(first * width),
                        row: width,
                        mode,
                    },
                );
            }
        };
        let mode_at = |block: usize| if block == 0 { Mode::Set } else { Mode::Add };
        let rows = parts.iter().map(|part| part.len * self.group).sum();
        let shared = self.kv.shared(parts[0].slot);
        let shared_keys = shared.map_or(0, |(_, keys)| keys);
        let whole = shared_keys / KEY_BLOCK * KEY_BLOCK;
        if let Some((parent, _)) = shared {
            let run = self.kv.run(parent, self.head);
            for block in (0..whole).step_by(KEY_BLOCK) {
                multiply(
                    0,
                    rows,
                    run,
                    0,
                    block,
                    block + KEY_BLOCK,
                    mode_at(block),
                    sums,
                );
            }
            if whole < shared_keys {
                // The block goes on with each part's own keys.
                multiply(0, rows, run, 0, whole, shared_keys, Mode::Set, pieces);
            }
        }
        let mut first = 0;
        for part in parts {
            let run = self.kv.run(part.slot, self.head);
            let (rows, end) = (part.len * self.group, part.pos + part.len);
            let mut block = whole;
            if whole < shared_keys {
                let to = (whole + KEY_BLOCK).min(end);
                multiply(
                    first,
                    rows,
                    run,
                    shared_keys,
                    shared_keys,
                    to,
                    Mode::Chain,
                    pieces,
                );
                let range = first * width..(first + rows) * width;
                for (sum, piece) in sums[range.clone()].iter_mut().zip(&pieces[range]) {
                    *sum = if whole == 0 { *piece } else { *sum + *piece };
                }
                block += KEY_BLOCK;
            }
            while block < end {
                let to = (block + KEY_BLOCK).min(end);
                multiply(
                    first,
                    rows,
                    run,
                    shared_keys,
                    block,
                    to,
                    mode_at(block),
                    sums,
                );
                block = to;
            }
            first += rows;
        }
    }
}

/// Turn the first `limit` scores into e^(score − max) and the rest into 0; the maximum and the sum.
#[inline(always)]
fn softmax_generic<S: Simd>(s: S, scores: &mut [f32], limit: usize) -> (f32, f32) {
    let (blocks, _) = scores.as_chunks_mut::<LANES>();
    let (whole, rest) = (limit / LANES, limit % LANES);
    if rest > 0 {
        // Exactly 0 after the exponential, and out of the way of the maximum.
        blocks[whole][rest..].fill(f32::NEG_INFINITY);
    }
    let used = limit.div_ceil(LANES);
    let mut max = s.splat(f32::NEG_INFINITY);
    for block in &blocks[..used] {
        max = s.max(max, s.load(block));
    }
    let max = s.max_lane(max);
    let (shift, mut sum) = (s.splat(max), s.zero());
    for block in &mut blocks[..used] {
        let e = s.exp(s.sub(s.load(block), shift));
        s.store(block, e);
        sum = s.add(sum, e);
    }
    for block in &mut blocks[used..] {
        block.fill(0.0);
    }
    (max, s.sum(sum))
}

dispatch! { fn softmax(scores: &mut [f32], limit: usize) -> (f32, f32) = softmax_generic }

#[cfg(test)]
pub(super) mod tests {
    use super::super::testing::{assert_near, noise, on_threads, size};
    use super::*;
    use crate::ops::{Layout, Segment};

    /// Output and log-sum-exp in f64, straight from the definition.
    pub(crate) fn reference(
        q: &[f32],
        k: &[f32],
        v: &[f32],
        layout: &Layout,
        (n_heads, n_kv, dim): (usize, usize, usize),
        scale: f64,
    ) -> (Vec<f64>, Vec<f64>) {
        let mut out = vec![0.0; q.len()];
        let mut lse = vec![0.0; q.len() / dim];
        for (index, segment) in layout.segments.iter().enumerate() {
            let before = segment.parent.map(|p| layout.segments[p]);
            for i in 0..segment.len {
                let mut keys: Vec<usize> =
                    before.map_or(vec![], |p| (p.start..p.start + p.len).collect());
                assert_eq!(keys.len(), layout.offset(index));
                keys.extend(segment.start..=segment.start + i);
                for head in 0..n_heads {
                    let at = (segment.start + i) * n_heads + head;
                    let kv = |row: usize| (row * n_kv + head / (n_heads / n_kv)) * dim;
                    let scores: Vec<f64> = keys
                        .iter()
                        .map(|&row| {
                            scale
                                * (0..dim)
                                    .map(|d| f64::from(q[at * dim + d]) * f64::from(k[kv(row) + d]))
                                    .sum::<f64>()
                        })
                        .collect();
                    lse[at] = scores.iter().map(|s| s.exp()).sum::<f64>().ln();
                    for (&row, score) in keys.iter().zip(&scores) {
                        for d in 0..dim {
                            out[at * dim + d] +=
                                (score - lse[at]).exp() * f64::from(v[kv(row) + d]);
                        }
                    }
                }
            }
        }
        (out, lse)
    }

    pub(crate) fn store(layout: &Layout, n_kv: usize, dim: usize) -> KvStore {
        let mut kv = KvStore::new(n_kv, dim);
        for (slot, segment) in layout.segments.iter().enumerate() {
            let parent = segment.parent.map(|p| (p, layout.segments[p].len));
            kv.alloc(slot, parent, segment.len);
        }
        kv
    }

    pub(crate) fn groups(shape: &[(usize, &[usize])]) -> Layout {
        let mut layout = Layout::default();
        let mut start = 0;
        let mut push = |len, parent| {
            layout.segments.push(Segment { start, len, parent });
            start += len;
            layout.segments.len() - 1
        };
        for (prompt, children) in shape {
            let parent = push(*prompt, None);
            for child in *children {
                push(*child, Some(parent));
            }
        }
        Layout::new(layout.segments).unwrap()
    }

    #[test]
    fn matches_f64_with_the_same_bits_in_prefill_and_decoding() {
        type Shape<'a> = &'a [(usize, &'a [usize])];
        let mixed: Shape = size(
            &[(5, &[1, 3]), (33, &[]), (16, &[2, 17, 40])],
            &[(5, &[1, 3]), (16, &[2, 17])],
        );
        let others: &[Shape] = size(
            &[
                &[(1, &[])],
                &[(150, &[60, 20, 1, 33])],
                &[(130, &[1, 1, 1, 1, 1, 1, 1, 1, 1])],
                &[(300, &[])],
            ],
            &[&[(1, &[])], &[(130, &[1])]],
        );
        for shape in others {
            check(&groups(shape), size((6, 2, 20), (1, 1, 5)));
        }
        for &heads in size(
            &[(6, 2, 20), (2, 2, 5), (9, 3, 64), (4, 1, 200)][..],
            &[(4, 2, 20), (2, 2, 5)],
        ) {
            check(&groups(mixed), heads);
        }
    }

    fn check(layout: &Layout, (n_heads, n_kv, dim): (usize, usize, usize)) {
        let t = layout.tokens();
        let q: Vec<f32> = noise(t * n_heads * dim, 1)
            .iter()
            .map(|x| 3.0 * x)
            .collect();
        let (k, v) = (noise(t * n_kv * dim, 2), noise(t * n_kv * dim, 3));
        let scale = (dim as f32).powf(-0.5);
        let run = || {
            let mut kv = store(layout, n_kv, dim);
            kv.append(&layout.spans(), &k, &v);
            let (mut out, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; t * n_heads]);
            attention_forward(
                &q,
                &layout.spans(),
                &kv,
                n_heads,
                scale,
                &mut out,
                Some(&mut lse),
            );
            (out, lse)
        };
        let (out, lse) = run();
        let heads = (n_heads, n_kv, dim);
        let (want_out, want_lse) = reference(&q, &k, &v, layout, heads, f64::from(scale));
        assert_near(&out, &want_out, 5.0);
        assert_near(&lse, &want_lse, 5.0);
        for isa in Isa::available() {
            assert_eq!(isa.with(run), (out.clone(), lse.clone()), "{isa:?}");
        }
        assert_eq!(on_threads(3, run), (out.clone(), lse.clone()));

        // Token by token: all sequences which have a token at this place are one batch.
        let mut kv = store(layout, n_kv, dim);
        let spans = layout.spans();
        let mut decode = |take: &dyn Fn(usize) -> bool| {
            let longest = spans.iter().map(|span| span.len).max().unwrap_or(0);
            for i in 0..longest {
                let one = |span: &Span| Span {
                    row: span.row + i,
                    len: 1,
                    pos: span.pos + i,
                    ..*span
                };
                let step: Vec<Span> = spans
                    .iter()
                    .filter(|span| take(span.slot) && i < span.len)
                    .map(one)
                    .collect();
                kv.append(&step, &k, &v);
                let mut got = vec![f32::NAN; q.len()];
                attention_forward(&q, &step, &kv, n_heads, scale, &mut got, None);
                for span in step {
                    let row = span.row * n_heads * dim..(span.row + 1) * n_heads * dim;
                    assert_eq!(got[row.clone()], out[row], "{span:?}");
                }
            }
        };
        decode(&|slot| layout.segments[slot].parent.is_none());
        decode(&|slot| layout.segments[slot].parent.is_some());
    }

    #[test]
    fn slots_are_used_again() {
        let mut kv = KvStore::new(1, 16);
        let span = |slot, pos, len| Span {
            row: 0,
            len,
            slot,
            pos,
        };
        let (k, v) = (noise(16 * 20, 1), noise(16 * 20, 2));
        kv.alloc(0, None, 20);
        kv.append(&[span(0, 0, 20)], &k, &v);
        let q = noise(16, 3);
        let mut first = vec![0.0; 16];
        attention_forward(&q, &[span(0, 3, 1)], &kv, 1, 0.25, &mut first, None);
        kv.free(0);
        kv.alloc(0, None, 20);
        kv.append(&[span(0, 0, 4)], &k, &v);
        let mut again = vec![0.0; 16];
        attention_forward(&q, &[span(0, 3, 1)], &kv, 1, 0.25, &mut again, None);
        assert_eq!(first, again);
    }
}
