//! The keys and values of one layer, by sequence.

use super::buffer::AlignedVec;
use super::simd::LANES;
use crate::ops::Span;

/// Keys and values of one layer for sequences in slots, which may share a prompt.
///
/// Keys lie in panels `[ceil(keys / 16)][head_dim][16]` for each head, so that scores are products
/// with panels; values lie row by row, so that a row of probabilities times values is one too.
/// Panels start at absolute positions divisible by 16. A child reads its parent's whole panels
/// and has a copy of the rest of the parent's keys in front of its own.
#[derive(Debug)]
pub struct KvStore {
    pub(super) heads: usize,
    pub(super) dim: usize,
    slots: Vec<Option<Slot>>,
    /// Memory of freed slots.
    spare: Vec<AlignedVec<f32>>,
}

#[derive(Debug)]
struct Slot {
    parent: Option<(usize, usize)>,
    /// Keys read from the parent's panels.
    shared: usize,
    /// Positions filled, those of the parent included.
    len: usize,
    /// Own keys there is room for, a multiple of 16.
    room: usize,
    keys: AlignedVec<f32>,
    values: AlignedVec<f32>,
}

/// Consecutive keys of one head which lie together.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    /// Panels `[..][head_dim][16]`.
    pub keys: &'a [f32],
    /// Rows of [`KvStore::value_width`] floats.
    pub values: &'a [f32],
}

impl KvStore {
    /// An empty store for `heads` key/value heads of `dim` elements.
    pub fn new(heads: usize, dim: usize) -> Self {
        Self {
            heads,
            dim,
            slots: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// Open `slot` for `capacity` own positions, behind the first positions of a parent
    /// `(slot, len)` which has no parent itself.
    ///
    /// The parent's positions must be appended before the child's first ones are.
    ///
    /// # Panics
    /// When the slot is in use or the parent is not.
    pub fn alloc(&mut self, slot: usize, parent: Option<(usize, usize)>, capacity: usize) {
        if self.slots.len() <= slot {
            self.slots.resize_with(slot + 1, || None);
        }
        assert!(self.slots[slot].is_none(), "slot {slot} is in use");
        let before = parent.map_or(0, |(parent, len)| {
            assert!(self.slot(parent).parent.is_none(), "grandparents");
            len
        });
        let shared = before / LANES * LANES;
        let room = (before - shared + capacity).next_multiple_of(LANES);
        let keys = self.memory(self.heads * room * self.dim);
        let values = self.memory(self.heads * room * self.value_width());
        self.slots[slot] = Some(Slot {
            parent,
            shared,
            len: 0,
            room,
            keys,
            values,
        });
    }

    /// Fill an empty slot without parent with the first `len` positions of another one, which
    /// computing them again would give as well.
    ///
    /// # Panics
    /// When `from` has fewer positions or a parent, or `to` is not empty or too small.
    pub fn copy(&mut self, from: usize, to: usize, len: usize) {
        let (heads, dim, value_width) = (self.heads, self.dim, self.value_width());
        let mut target = self.slots[to].take().expect("an open slot");
        let source = self.slot(from);
        assert!(source.parent.is_none() && len <= source.len, "no such keys");
        assert!(target.parent.is_none() && target.len == 0 && len <= target.room);
        let panels = len.next_multiple_of(LANES);
        for head in 0..heads {
            for (width, rows, source_memory, target_memory) in [
                (dim, panels, &source.keys, &mut target.keys),
                (value_width, len, &source.values, &mut target.values),
            ] {
                let from = head * source.room * width;
                let to = head * target.room * width;
                target_memory[to..to + rows * width]
                    .copy_from_slice(&source_memory[from..from + rows * width]);
            }
        }
        target.len = len;
        self.slots[to] = Some(target);
    }

    /// Close a slot. Its children must have been closed before.
    pub fn free(&mut self, slot: usize) {
        if let Some(Slot { keys, values, .. }) = self.slots[slot].take() {
            self.spare.extend([keys, values]);
        }
    }

    /// Store the keys and values of the rows of `spans`: k and v `[T, heads · dim]`.
    ///
    /// # Panics
    /// When a slot is not open, positions are left out, or it is full.
    pub fn append(&mut self, spans: &[Span], k: &[f32], v: &[f32]) {
        let (heads, dim, value_width) = (self.heads, self.dim, self.value_width());
        let width = heads * dim;
        for span in spans {
            self.copy_from_parent(span.slot);
            let slot = self.slot_mut(span.slot);
            let rows = span.row * width..(span.row + span.len) * width;
            let first = span.pos - slot.shared;
            assert!(
                span.pos <= slot.len && first + span.len <= slot.room,
                "{} rows at position {} of slot {} with {} of {} positions",
                span.len,
                span.pos,
                span.slot,
                slot.len,
                slot.shared + slot.room
            );
            for (index, (k, v)) in k[rows.clone()]
                .chunks_exact(width)
                .zip(v[rows].chunks_exact(width))
                .enumerate()
            {
                let key = first + index;
                for head in 0..heads {
                    let own = head * dim..(head + 1) * dim;
                    let start = head * slot.room * dim + key / LANES * dim * LANES + key % LANES;
                    let lane = slot.keys[start..].iter_mut().step_by(LANES);
                    for (lane, k) in lane.zip(&k[own.clone()]) {
                        *lane = *k;
                    }
                    let start = (head * slot.room + key) * value_width;
                    slot.values[start..start + dim].copy_from_slice(&v[own]);
                }
            }
            slot.len = span.pos + span.len;
        }
    }

    /// Give a child, before its first own position, the parent's keys beyond whole panels.
    fn copy_from_parent(&mut self, index: usize) {
        let slot = self.slot(index);
        let Some((parent, before)) = slot.parent else {
            return;
        };
        if slot.len > 0 {
            return;
        }
        let (heads, dim, value_width) = (self.heads, self.dim, self.value_width());
        let mut child = self.slots[index].take().expect("looked at above");
        let parent = self.slot(parent);
        assert!(before <= parent.len, "a parent's keys come first");
        let rest = before - child.shared;
        if rest > 0 {
            for head in 0..heads {
                let from = (head * parent.room + child.shared) * dim;
                let to = head * child.room * dim;
                child.keys[to..to + dim * LANES]
                    .copy_from_slice(&parent.keys[from..from + dim * LANES]);
                let from = (head * parent.room + child.shared) * value_width;
                let to = head * child.room * value_width;
                child.values[to..to + rest * value_width]
                    .copy_from_slice(&parent.values[from..from + rest * value_width]);
            }
        }
        child.len = before;
        self.slots[index] = Some(child);
    }

    /// Floats from one value row to the next: whole vectors.
    pub(super) fn value_width(&self) -> usize {
        self.dim.next_multiple_of(LANES)
    }

    /// Positions filled in a slot.
    pub(super) fn len(&self, slot: usize) -> usize {
        self.slot(slot).len
    }

    /// The parent of a slot whose panels it reads, and how many keys they hold.
    pub(super) fn shared(&self, slot: usize) -> Option<(usize, usize)> {
        let slot = self.slot(slot);
        slot.parent
            .filter(|_| slot.shared > 0)
            .map(|(parent, _)| (parent, slot.shared))
    }

    /// A slot's own keys and values of one head.
    pub(super) fn run(&self, slot: usize, head: usize) -> Run<'_> {
        let slot = self.slot(slot);
        let (keys, values) = (slot.room * self.dim, slot.room * self.value_width());
        Run {
            keys: &slot.keys[head * keys..(head + 1) * keys],
            values: &slot.values[head * values..(head + 1) * values],
        }
    }

    fn slot(&self, slot: usize) -> &Slot {
        match self.slots.get(slot) {
            Some(Some(slot)) => slot,
            _ => panic!("slot {slot} of the key/value store is not open"),
        }
    }

    fn slot_mut(&mut self, slot: usize) -> &mut Slot {
        match self.slots.get_mut(slot) {
            Some(Some(slot)) => slot,
            _ => panic!("slot {slot} of the key/value store is not open"),
        }
    }

    /// Memory for a slot, from a freed one of the same size if there is one.
    fn memory(&mut self, len: usize) -> AlignedVec<f32> {
        match self.spare.iter().position(|spare| spare.len() == len) {
            Some(index) => self.spare.swap_remove(index),
            None => {
                self.spare.clear();
                AlignedVec::zeroed(len)
            }
        }
    }
}
