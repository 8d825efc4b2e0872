//! Decoding on the portable path: keys and values of all sequences in one tensor a layer, so that a
//! token of every sequence takes the same few kernels as a token of one.
//!
//! A lane holds the keys and values of one sequence, prompt included: `[lanes, heads, room, dim]`. A new
//! sequence takes the first free lane; a lane without a sequence computes along and is not looked at.
//! Lengths are rounded up, so that the sizes of one step are those of many others.

use candle_core::Tensor;

use super::attention::Heads;
use super::rms_norm::wide;
use crate::{Error, Result};

/// Keys by which the length that attention looks at grows.
const KEYS: usize = 64;
/// Keys by which memory grows, at least.
const ROOM: usize = 256;

/// A sequence of which a token is decoded.
#[derive(Debug, Clone, Copy)]
pub struct LaneRow {
    pub slot: usize,
    /// Slot of its prompt.
    pub parent: usize,
    /// Tokens of the prompt.
    pub before: usize,
    /// Position of the token.
    pub pos: usize,
}

/// Which slot decodes in which lane, the same in all layers.
#[derive(Debug, Default)]
pub struct LaneMap {
    slots: Vec<Option<usize>>,
    lanes: usize,
}

/// A sequence's first token: its prompt goes into the lane.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    pub lane: usize,
    pub parent: usize,
    pub before: usize,
}

/// One token of several sequences: what is the same in every layer.
#[derive(Debug)]
pub struct Step {
    pub starts: Vec<Start>,
    /// Lanes that take part, in use or not.
    lanes: usize,
    /// Keys that attention looks at.
    keys: usize,
    /// Row of the batch that each lane computes `[lanes]`, and the lane of each row `[T]`; `None` where
    /// both are the same.
    order: Option<(Tensor, Tensor)>,
    /// Position of each lane's token, `[lanes, 1, 1, 1]`.
    positions: Tensor,
    /// What each lane may look at, `[lanes, 1, keys]`.
    mask: Tensor,
}

impl LaneMap {
    /// A slot has ended.
    pub fn free(&mut self, slot: usize) {
        let lane = self.slots.iter_mut().find(|lane| **lane == Some(slot));
        if let Some(lane) = lane {
            *lane = None;
        }
    }

    /// What the layers need to know of a token of these sequences. `index` are their positions `[T]`.
    pub fn step(
        &mut self,
        rows: &[LaneRow],
        index: &Tensor,
        triangle: impl FnOnce(usize) -> Result<Tensor>,
    ) -> Result<Step> {
        let mut starts = Vec::new();
        let mut lane_of_row = Vec::with_capacity(rows.len());
        for row in rows {
            let known = self.slots.iter().position(|slot| *slot == Some(row.slot));
            lane_of_row.push(known.unwrap_or_else(|| {
                let free = self.slots.iter().position(Option::is_none);
                let lane = free.unwrap_or(self.slots.len());
                if lane == self.slots.len() {
                    self.slots.push(None);
                }
                self.slots[lane] = Some(row.slot);
                starts.push(Start {
                    lane,
                    parent: row.parent,
                    before: row.before,
                });
                lane
            }));
        }
        while self.slots.last() == Some(&None) {
            self.slots.pop();
        }
        self.lanes = self.slots.len();
        let keys = rows.iter().map(|row| row.pos + 1).max().unwrap_or(1);
        let keys = keys.next_multiple_of(KEYS);

        let in_order = lane_of_row
            .iter()
            .enumerate()
            .all(|(row, &lane)| row == lane);
        let (order, index) = match in_order && self.lanes == rows.len() {
            true => (None, index.clone()),
            false => {
                // A lane without a sequence does what the first row does, into its own memory.
                let mut row_of_lane = vec![0u32; self.lanes];
                for (row, &lane) in lane_of_row.iter().enumerate() {
                    row_of_lane[lane] = row as u32;
                }
                let lane_of_row: Vec<u32> = lane_of_row.iter().map(|&lane| lane as u32).collect();
                let row_of_lane = Tensor::new(row_of_lane, index.device())?;
                let lane_of_row = Tensor::new(lane_of_row, index.device())?;
                let index = index.index_select(&row_of_lane, 0)?;
                (Some((row_of_lane, lane_of_row)), index)
            }
        };
        let mask = triangle(keys)?.index_select(&index, 0)?;
        let mask = mask.narrow(1, 0, keys)?.contiguous()?;
        Ok(Step {
            starts,
            lanes: self.lanes,
            keys,
            order,
            mask: mask.unsqueeze(1)?,
            positions: index.reshape((self.lanes, 1, 1, 1))?,
        })
    }
}

/// The keys (rotated) and values of one layer, `[lanes, heads, room, dim]` each.
#[derive(Debug, Default)]
pub struct Lanes {
    keys_values: Option<(Tensor, Tensor)>,
}

impl Lanes {
    /// Puts the first rows of a prompt, keys and values `[len, heads, dim]`, into a lane.
    pub(super) fn start(
        &mut self,
        start: &Start,
        step: &Step,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<()> {
        let own = self.reserve(step, keys)?;
        for (memory, rows) in [(&own.0, keys), (&own.1, values)] {
            let rows = rows.narrow(0, 0, start.before)?.transpose(0, 1)?;
            let rows = rows.unsqueeze(0)?.contiguous()?;
            memory.narrow(0, start.lane, 1)?.slice_set(&rows, 2, 0)?;
        }
        Ok(())
    }

    /// Memory for the step, with what was in it before. `like` is `[.., heads, dim]`.
    fn reserve(&mut self, step: &Step, like: &Tensor) -> Result<(Tensor, Tensor)> {
        let (_, heads, dim) = like.dims3()?;
        let (lanes, room) = match &self.keys_values {
            Some((keys, _)) => (keys.dim(0)?, keys.dim(2)?),
            None => (0, 0),
        };
        if let Some((keys, values)) = &self.keys_values
            && lanes >= step.lanes
            && room >= step.keys
        {
            return Ok((keys.clone(), values.clone()));
        }
        let grown = |have: usize, want: usize| match have >= want {
            true => have,
            false => want.max(have + have / 2),
        };
        let lanes = grown(lanes, step.lanes);
        let room = grown(room, step.keys).next_multiple_of(ROOM);
        let fresh = |old: Option<&Tensor>| -> Result<Tensor> {
            // Zeros: what is masked is multiplied with 0, and must not be NaN.
            let new = Tensor::zeros((lanes, heads, room, dim), like.dtype(), like.device())?;
            if let Some(old) = old {
                let part = new.narrow(0, 0, old.dim(0)?)?;
                part.slice_set(old, 2, 0)?;
            }
            Ok(new)
        };
        let keys = fresh(self.keys_values.as_ref().map(|(keys, _)| keys))?;
        let values = fresh(self.keys_values.as_ref().map(|(_, values)| values))?;
        self.keys_values = Some((keys.clone(), values.clone()));
        Ok((keys, values))
    }

    /// Keeps k and v `[T, heads × dim]` and gives the attention of q `[T, query heads × dim]`.
    pub(super) fn step(
        &mut self,
        step: &Step,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        heads: Heads,
    ) -> Result<Tensor> {
        let lanes = step.lanes;
        let rows = q.dim(0)?;
        let by_lane = |x: &Tensor| match &step.order {
            Some((row_of_lane, _)) => x.index_select(row_of_lane, 0),
            None => Ok(x.clone()),
        };
        let one = (lanes, heads.key_value, 1, heads.dim);
        let (k, v) = (by_lane(k)?.reshape(one)?, by_lane(v)?.reshape(one)?);
        let (keys, values) = self.reserve(step, &k.squeeze(2)?)?;
        let positions = step.positions.broadcast_as(one)?.contiguous()?;
        for (memory, new) in [(&keys, &k), (&values, &v)] {
            memory
                .narrow(0, 0, lanes)?
                .scatter_set(&positions, new, 2)?;
        }
        let (all, room) = (lanes * heads.key_value, keys.dim(2)?);
        let view = |memory: &Tensor| -> Result<Tensor> {
            let memory = memory.narrow(0, 0, lanes)?;
            let memory = memory.reshape((all, room, heads.dim))?;
            Ok(memory.narrow(1, 0, step.keys)?)
        };
        let group = heads.query / heads.key_value;
        let q = (by_lane(q)? * heads.scale())?.reshape((all, group, heads.dim))?;
        let scores = q.matmul(&view(&keys)?.transpose(1, 2)?)?;
        let dtype = scores.dtype();
        let scores = wide(&scores)?
            .reshape((lanes, heads.query, step.keys))?
            .broadcast_add(&step.mask)?;
        let p = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(dtype)?;
        let p = p.reshape((all, group, step.keys))?;
        let out = p.matmul(&view(&values)?)?;
        let out = out.reshape((lanes, heads.query * heads.dim))?;
        match &step.order {
            Some((_, lane_of_row)) => Ok(out.index_select(lane_of_row, 0)?),
            None if lanes == rows => Ok(out),
            None => Err(Error::Internal(format!(
                "{rows} rows decoded in {lanes} lanes"
            ))),
        }
    }
}
