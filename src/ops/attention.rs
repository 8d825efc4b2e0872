//! Causal grouped-query attention over sequences that may share a prompt.
//!
//! Rows belong to sequences in slots of a [`KvLayer`]; a slot may have a parent slot (the prompt of
//! its group), whose keys precede its own. softmax(q kᵀ / √head_dim) v, head by head.

use candle_core::{D, Tensor};

use super::cpu::{self, KvStore};
use super::lanes::{Lanes, Step};
use super::rms_norm::wide;
use super::{Backend, Layout, Span, cpu_slice, from_cpu};
use crate::{Error, Result};

/// Head counts of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    pub query: usize,
    pub key_value: usize,
    pub dim: usize,
}

impl Heads {
    pub(super) fn scale(self) -> f64 {
        1.0 / (self.dim as f64).sqrt()
    }
}

/// Keys (rotated) and values of one layer, by slot.
#[derive(Debug)]
pub enum KvLayer {
    Cpu(KvStore),
    Portable {
        slots: Vec<Option<KvSlot>>,
        /// Sequences that grow token by token.
        lanes: Lanes,
    },
}

/// One sequence on the portable path: `[len, key_value heads, head_dim]` each, once it has rows.
#[derive(Debug, Default)]
pub struct KvSlot {
    parent: Option<(usize, usize)>,
    keys_values: Option<(Tensor, Tensor)>,
}

impl KvLayer {
    pub fn new(backend: Backend, heads: Heads) -> Self {
        match backend {
            Backend::Cpu => Self::Cpu(KvStore::new(heads.key_value, heads.dim)),
            Backend::Portable => Self::Portable {
                slots: Vec::new(),
                lanes: Lanes::default(),
            },
        }
    }

    /// Opens `slot` for up to `capacity` own rows, behind the first rows of a parent `(slot, len)`.
    pub fn alloc(&mut self, slot: usize, parent: Option<(usize, usize)>, capacity: usize) {
        match self {
            Self::Cpu(store) => store.alloc(slot, parent, capacity),
            Self::Portable { slots, .. } => {
                if slots.len() <= slot {
                    slots.resize_with(slot + 1, || None);
                }
                slots[slot] = Some(KvSlot {
                    parent,
                    keys_values: None,
                });
            }
        }
    }

    /// Fills an empty slot without parent with the first `len` rows of another one.
    pub fn copy(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        match self {
            Self::Cpu(store) => store.copy(from, to, len),
            Self::Portable { slots, .. } => {
                let source = slots[from].as_ref().and_then(|s| s.keys_values.as_ref());
                let (k, v) = source.ok_or_else(unallocated)?;
                let copy = (k.narrow(0, 0, len)?, v.narrow(0, 0, len)?);
                let target = slots[to].as_mut().ok_or_else(unallocated)?;
                target.keys_values = Some(copy);
            }
        }
        Ok(())
    }

    pub fn free(&mut self, slot: usize) {
        match self {
            Self::Cpu(store) => store.free(slot),
            Self::Portable { slots, .. } => slots[slot] = None,
        }
    }

    /// One token of every sequence of `step` on the portable path: its key and value are kept, and the
    /// attention of q `[T, query heads × head_dim]` comes back. All as in [`Self::append`] and
    /// [`forward`].
    pub fn decode(
        &mut self,
        step: &Step,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        heads: Heads,
    ) -> Result<Tensor> {
        let Self::Portable { slots, lanes } = self else {
            return Err(Error::Internal("the CPU path decodes by its own".into()));
        };
        for start in &step.starts {
            let parent = slots[start.parent].as_ref().ok_or_else(unallocated)?;
            let (keys, values) = parent.keys_values.as_ref().ok_or_else(unallocated)?;
            lanes.start(start, step, keys, values)?;
        }
        lanes.step(step, q, k, v, heads)
    }

    /// Appends k and v `[T, key_value heads × head_dim]` to the slots of `spans`.
    pub fn append(&mut self, spans: &[Span], k: &Tensor, v: &Tensor, heads: Heads) -> Result<()> {
        match self {
            Self::Cpu(store) => {
                store.append(spans, &cpu_slice(k)?, &cpu_slice(v)?);
                Ok(())
            }
            Self::Portable { slots, .. } => {
                for span in spans {
                    let slot = slots[span.slot].as_mut().ok_or_else(unallocated)?;
                    let shape = (span.len, heads.key_value, heads.dim);
                    let mut k = k.narrow(0, span.row, span.len)?.reshape(shape)?;
                    let mut v = v.narrow(0, span.row, span.len)?.reshape(shape)?;
                    if let Some((keys, values)) = &slot.keys_values {
                        k = Tensor::cat(&[keys, &k], 0)?;
                        v = Tensor::cat(&[values, &v], 0)?;
                    }
                    slot.keys_values = Some((k, v));
                }
                Ok(())
            }
        }
    }
}

fn unallocated() -> Error {
    Error::Internal("attention was asked for a slot that is not allocated".into())
}

/// Attention of q `[T, query heads × head_dim]` (rotated) over the slots of `spans`, whose own rows
/// have been appended: out `[T, query heads × head_dim]`, and the log-sum-exp of the scores
/// `[T, query heads]` on the CPU path when `keep` (its backward needs them).
///
/// `causal` is a triangle of [`CausalTable`](super::causal::CausalTable) for the portable path.
pub fn forward(
    q: &Tensor,
    spans: &[Span],
    layer: &KvLayer,
    heads: Heads,
    keep: bool,
    causal: Option<&Tensor>,
) -> Result<(Tensor, Option<Tensor>)> {
    match layer {
        KvLayer::Cpu(store) => {
            let (rows, width) = q.dims2()?;
            let mut out = vec![0.0; rows * width];
            let mut lse = keep.then(|| vec![0.0; rows * heads.query]);
            cpu::attention_forward(
                &cpu_slice(q)?,
                spans,
                store,
                heads.query,
                heads.scale() as f32,
                &mut out,
                lse.as_deref_mut(),
            );
            let lse = lse
                .map(|lse| from_cpu(lse, (rows, heads.query)))
                .transpose()?;
            Ok((from_cpu(out, (rows, width))?, lse))
        }
        KvLayer::Portable { slots, .. } => {
            let causal = causal.ok_or_else(|| {
                Error::Internal("attention was given no mask on the portable path".into())
            })?;
            let mut parts = Vec::with_capacity(spans.len());
            for span in spans {
                let slot = slots[span.slot].as_ref().ok_or_else(unallocated)?;
                let (mut k, mut v) = slot.keys_values.clone().ok_or_else(unallocated)?;
                if let Some((parent, len)) = slot.parent {
                    let parent = slots[parent].as_ref().ok_or_else(unallocated)?;
                    let (pk, pv) = parent.keys_values.as_ref().ok_or_else(unallocated)?;
                    k = Tensor::cat(&[&pk.narrow(0, 0, len)?, &k], 0)?;
                    v = Tensor::cat(&[&pv.narrow(0, 0, len)?, &v], 0)?;
                }
                let q = by_kv_head(&q.narrow(0, span.row, span.len)?, heads)?;
                let (k, v) = (k.transpose(0, 1)?, v.transpose(0, 1)?);
                let p = probabilities(&q, &k, span.len, span.pos, heads, causal)?;
                parts.push(from_kv_head(&p.matmul(&v.contiguous()?)?, span.len, heads)?);
            }
            Ok((Tensor::cat(&parts, 0)?, None))
        }
    }
}

/// What the forward pass of a whole batch left for [`backward`]: q, k (both rotated), v, out as
/// `[T, heads × head_dim]`, and the log-sum-exp on the CPU path.
#[derive(Debug, Clone)]
pub struct Saved {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub out: Tensor,
    pub lse: Option<Tensor>,
}

/// Gradients (dq, dk, dv) of [`forward`] over a whole batch, given dL/dout.
///
/// The keys and values of a parent segment get the gradients of all of its children.
pub fn backward(
    backend: Backend,
    saved: &Saved,
    g: &Tensor,
    layout: &Layout,
    heads: Heads,
    causal: Option<&Tensor>,
) -> Result<(Tensor, Tensor, Tensor)> {
    match (backend, &saved.lse) {
        (Backend::Cpu, Some(lse)) => {
            let mut dq = vec![0.0; saved.q.elem_count()];
            let mut dk = vec![0.0; saved.k.elem_count()];
            let mut dv = vec![0.0; saved.v.elem_count()];
            cpu::attention_backward(
                &cpu_slice(&saved.q)?,
                &cpu_slice(&saved.k)?,
                &cpu_slice(&saved.v)?,
                &cpu_slice(&saved.out)?,
                &cpu_slice(lse)?,
                &cpu_slice(g)?,
                layout,
                heads.query,
                heads.key_value,
                heads.dim,
                heads.scale() as f32,
                &mut dq,
                &mut dk,
                &mut dv,
            );
            Ok((
                from_cpu(dq, saved.q.shape())?,
                from_cpu(dk, saved.k.shape())?,
                from_cpu(dv, saved.v.shape())?,
            ))
        }
        _ => {
            let causal = causal.ok_or_else(|| {
                Error::Internal("attention was given no mask on the portable path".into())
            })?;
            portable_backward(saved, g, layout, heads, causal)
        }
    }
}

fn portable_backward(
    saved: &Saved,
    g: &Tensor,
    layout: &Layout,
    heads: Heads,
    causal: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let segments = &layout.segments;
    let rows = |t: &Tensor, index: usize| -> Result<Tensor> {
        Ok(t.narrow(0, segments[index].start, segments[index].len)?)
    };
    let kv = |t: &Tensor, index: usize| -> Result<Tensor> {
        let shape = (segments[index].len, heads.key_value, heads.dim);
        Ok(rows(t, index)?.reshape(shape)?.transpose(0, 1)?)
    };
    let mut dq = Vec::with_capacity(segments.len());
    let mut dk: Vec<Option<Tensor>> = vec![None; segments.len()];
    let mut dv: Vec<Option<Tensor>> = vec![None; segments.len()];
    for (index, segment) in segments.iter().enumerate() {
        let before = segment.parent.map_or(0, |parent| segments[parent].len);
        let (mut k, mut v) = (kv(&saved.k, index)?, kv(&saved.v, index)?);
        if let Some(parent) = segment.parent {
            k = Tensor::cat(&[&kv(&saved.k, parent)?, &k], 1)?;
            v = Tensor::cat(&[&kv(&saved.v, parent)?, &v], 1)?;
        }
        let q = by_kv_head(&rows(&saved.q, index)?, heads)?;
        let g = by_kv_head(&rows(g, index)?, heads)?;
        let out = by_kv_head(&rows(&saved.out, index)?, heads)?;
        let p = probabilities(&q, &k, segment.len, before, heads, causal)?;
        let dp = g.matmul(&v.transpose(1, 2)?.contiguous()?)?;
        let through = (&g * &out)?.sum_keepdim(D::Minus1)?;
        let ds = ((&p * dp.broadcast_sub(&through)?)? * heads.scale())?;
        dq.push(from_kv_head(
            &ds.matmul(&k.contiguous()?)?,
            segment.len,
            heads,
        )?);
        let all_dk = ds.transpose(1, 2)?.contiguous()?.matmul(&q)?;
        let all_dv = p.transpose(1, 2)?.contiguous()?.matmul(&g)?;
        for (all, sums) in [(all_dk, &mut dk), (all_dv, &mut dv)] {
            add(&mut sums[index], all.narrow(1, before, segment.len)?)?;
            if let Some(parent) = segment.parent {
                add(&mut sums[parent], all.narrow(1, 0, before)?)?;
            }
        }
    }
    let join = |parts: Vec<Option<Tensor>>| -> Result<Tensor> {
        let parts: Vec<Tensor> = parts
            .into_iter()
            .zip(segments)
            .map(|(part, segment)| {
                let part = part.ok_or_else(unallocated)?.transpose(0, 1)?;
                Ok(part
                    .contiguous()?
                    .reshape((segment.len, heads.key_value * heads.dim))?)
            })
            .collect::<Result<_>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    };
    Ok((Tensor::cat(&dq, 0)?, join(dk)?, join(dv)?))
}

fn add(sum: &mut Option<Tensor>, part: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => (sum + part)?,
        None => part,
    });
    Ok(())
}

/// `[len, query heads × dim]` → `[key_value heads, heads per kv × len, dim]`, contiguous.
fn by_kv_head(x: &Tensor, heads: Heads) -> Result<Tensor> {
    let len = x.dim(0)?;
    let group = heads.query / heads.key_value;
    Ok(x.reshape((len, heads.key_value, group, heads.dim))?
        .permute((1, 2, 0, 3))?
        .contiguous()?
        .reshape((heads.key_value, group * len, heads.dim))?)
}

/// The inverse of [`by_kv_head`].
fn from_kv_head(x: &Tensor, len: usize, heads: Heads) -> Result<Tensor> {
    let group = heads.query / heads.key_value;
    Ok(x.reshape((heads.key_value, group, len, heads.dim))?
        .permute((2, 0, 1, 3))?
        .contiguous()?
        .reshape((len, heads.query * heads.dim))?)
}

/// softmax(q kᵀ · scale) `[key_value heads, heads per kv × len, keys]`, masked causally: row `i` of
/// `len` stands at position `pos + i`. q and k as [`by_kv_head`] gives them, k `[.., keys, dim]`.
fn probabilities(
    q: &Tensor,
    k: &Tensor,
    len: usize,
    pos: usize,
    heads: Heads,
    causal: &Tensor,
) -> Result<Tensor> {
    let keys = k.dim(1)?;
    let group = heads.query / heads.key_value;
    let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * heads.scale())?;
    let dtype = scores.dtype();
    let mut scores = wide(&scores)?;
    if len > 1 {
        let mask = causal.narrow(0, pos, len)?.narrow(1, 0, keys)?;
        scores = scores
            .reshape((heads.key_value, group, len, keys))?
            .broadcast_add(&mask)?
            .reshape((heads.key_value, group * len, keys))?;
    }
    Ok(candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(dtype)?)
}
