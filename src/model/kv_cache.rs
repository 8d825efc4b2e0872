//! The keys and values of the sequences in flight, in all layers.

use super::config::ModelConfig;
use crate::Result;
use crate::ops::Backend;
use crate::ops::attention::{Heads, KvLayer};

/// A sequence in a [`KvCache`].
pub type SlotId = usize;

/// Keys and values by layer and slot. A slot may have a parent: the prompt of its group, computed
/// once and shared.
#[derive(Debug)]
pub struct KvCache {
    pub(super) layers: Vec<KvLayer>,
    slots: Vec<Option<Slot>>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
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
        for layer in &mut self.layers {
            layer.free(slot);
        }
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
