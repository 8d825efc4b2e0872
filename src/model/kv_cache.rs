//! The keys and values of the sequences in flight, in all layers.

use super::config::ModelConfig;
use crate::Result;
use candle_core::Tensor;

use crate::ops::attention::{Heads, KvLayer};
use crate::ops::lanes::{LaneMap, LaneRow, Step};
use crate::ops::{Backend, Span};

/// A sequence in a [`KvCache`].
pub type SlotId = usize;

/// Keys and values by layer and slot. A slot may have a parent: the prompt of its group, computed
/// once and shared.
#[derive(Debug)]
pub struct KvCache {
    pub(super) layers: Vec<KvLayer>,
    slots: Vec<Option<Slot>>,
    /// On the portable path: who decodes in which lane.
    lanes: Option<LaneMap>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    parent: Option<SlotId>,
    /// Rows before its own: the parent's length.
    before: usize,
    capacity: usize,
}

impl KvCache {
    pub(super) fn new(config: &ModelConfig, backend: Backend) -> Self {
        let heads = heads(config);
        Self {
            layers: (0..config.num_hidden_layers)
                .map(|_| KvLayer::new(backend, heads))
                .collect(),
            slots: Vec::new(),
            lanes: (backend == Backend::Portable).then(LaneMap::default),
        }
    }

    /// Opens a slot for `capacity` own rows, behind all `len` rows of a parent `(slot, len)` whose
    /// keys and values have been computed.
    pub fn alloc(&mut self, parent: Option<(SlotId, usize)>, capacity: usize) -> SlotId {
        let slot = self
            .slots
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.slots.len());
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some(Slot {
            parent: parent.map(|(parent, _)| parent),
            before: parent.map_or(0, |(_, len)| len),
            capacity,
        });
        for layer in &mut self.layers {
            layer.alloc(slot, parent, capacity);
        }
        slot
    }

    /// Fills an empty slot without parent with the first `len` rows of another one.
    pub fn copy(&mut self, from: SlotId, to: SlotId, len: usize) -> Result<()> {
        self.layers
            .iter_mut()
            .try_for_each(|layer| layer.copy(from, to, len))
    }

    /// Gives a slot back. Its children must have been freed before.
    pub fn free(&mut self, slot: SlotId) {
        self.slots[slot] = None;
        if let Some(lanes) = &mut self.lanes {
            lanes.free(slot);
        }
        for layer in &mut self.layers {
            layer.free(slot);
        }
    }

    /// How to decode one more token of sequences behind prompts on the portable path, all of them with
    /// one product a layer; `None` for every other pass.
    ///
    /// `index` are the positions of the rows on the device, `triangle` gives a causal mask.
    pub(super) fn step(
        &mut self,
        spans: &[Span],
        index: Option<&Tensor>,
        triangle: impl FnOnce(usize) -> Result<Tensor>,
    ) -> Result<Option<Step>> {
        let (Some(lanes), Some(index)) = (&mut self.lanes, index) else {
            return Ok(None);
        };
        let mut rows = Vec::with_capacity(spans.len());
        for span in spans {
            match self.slots.get(span.slot).copied().flatten() {
                // A completion of several tokens, of which this is one.
                Some(Slot {
                    parent: Some(parent),
                    before,
                    capacity,
                }) if span.len == 1 && capacity > 1 => rows.push(LaneRow {
                    slot: span.slot,
                    parent,
                    before,
                    pos: span.pos,
                }),
                _ => return Ok(None),
            }
        }
        lanes.step(&rows, index, triangle).map(Some)
    }

    /// Whether rows `pos..pos + len` fit into a slot.
    pub(super) fn fits(&self, slot: SlotId, pos: usize, len: usize) -> bool {
        match self.slots.get(slot) {
            Some(Some(s)) => pos >= s.before && pos + len <= s.before + s.capacity,
            _ => false,
        }
    }
}

pub(super) fn heads(config: &ModelConfig) -> Heads {
    Heads {
        query: config.num_attention_heads,
        key_value: config.num_key_value_heads,
        dim: config.head_dim,
    }
}
