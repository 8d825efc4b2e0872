//! Which groups of a rollout keep the inputs of their blocks, and where these go.

use std::ops::Range;

use super::Request;
use crate::model::{GroupInputs, InputRows, ModelConfig, Recorder};

/// Records the groups of one rollout, each from its prompt on or not at all.
pub(super) struct Recording<'a> {
    config: &'a ModelConfig,
    /// By ask: bytes that have not been promised to a group.
    free: Vec<usize>,
    /// By ask.
    prefixes: Vec<Vec<InputRows>>,
    groups: Vec<Option<GroupInputs>>,
    /// The ask of each group.
    owners: Vec<usize>,
}

impl<'a> Recording<'a> {
    /// For groups of these asks, with so many bytes for each ask.
    pub(super) fn new(config: &'a ModelConfig, budgets: &[usize], owners: Vec<usize>) -> Self {
        Self {
            config,
            free: budgets.to_vec(),
            prefixes: vec![Vec::new(); budgets.len()],
            groups: vec![None; owners.len()],
            owners,
        }
    }

    /// Whether a pass over these rows of a beginning that all prompts of an ask share is to be recorded.
    pub(super) fn open_prefix(&mut self, ask: usize, rows: usize) -> bool {
        self.reserve(ask, rows)
    }

    /// Promises memory to a group, as if all of its completions became as long as they may, if
    /// there is enough. Its first `shared` rows are those of the common beginning.
    pub(super) fn open(
        &mut self,
        index: usize,
        request: &Request,
        shared: usize,
        max_tokens: usize,
    ) {
        let rows = request.prompt.len() - shared + request.n * (max_tokens - 1);
        let ask = self.owners[index];
        let known = shared == 0 || !self.prefixes[ask].is_empty();
        if known && self.reserve(ask, rows) {
            self.groups[index] = Some(GroupInputs {
                prompt: self.prefixes[ask].clone(),
                completions: vec![Vec::new(); request.n],
            });
        }
    }

    fn reserve(&mut self, ask: usize, rows: usize) -> bool {
        let free = &mut self.free[ask];
        let rest = free.checked_sub(rows * self.config.input_bytes());
        *free = rest.unwrap_or(*free);
        rest.is_some()
    }

    /// Takes back what was promised for `rows` of a completion that it did not need.
    pub(super) fn close(&mut self, index: usize, rows: usize) {
        if self.groups[index].is_some() {
            self.free[self.owners[index]] += rows * self.config.input_bytes();
        }
    }

    /// What takes the rows of a pass that are to be kept: `rows` of every request, in order.
    pub(super) fn recorder(
        &self,
        rows: impl IntoIterator<Item = (usize, Range<usize>)>,
    ) -> Option<Recorder> {
        let kept = rows
            .into_iter()
            .filter(|(index, _)| self.groups[*index].is_some());
        self.recorder_of(kept.map(|(_, rows)| rows))
    }

    /// What takes these rows of a pass.
    pub(super) fn recorder_of(
        &self,
        rows: impl IntoIterator<Item = Range<usize>>,
    ) -> Option<Recorder> {
        let rows: Vec<_> = rows.into_iter().collect();
        (!rows.is_empty()).then(|| Recorder::new(self.config, rows))
    }

    /// Takes the recorded beginnings of these asks.
    pub(super) fn set_prefixes(
        &mut self,
        recorder: Option<Recorder>,
        asks: impl Iterator<Item = usize>,
    ) {
        let pieces = recorder.map(Recorder::finish).unwrap_or_default();
        for (ask, rows) in asks.zip(pieces) {
            self.prefixes[ask] = vec![rows];
        }
    }

    /// Hands recorded rows out: one piece for every group named, where that is recorded;
    /// `sample` as well when they are of a completion.
    pub(super) fn add(
        &mut self,
        recorder: Option<Recorder>,
        owners: impl IntoIterator<Item = (usize, Option<usize>)>,
    ) {
        let mut pieces = recorder
            .map(Recorder::finish)
            .unwrap_or_default()
            .into_iter();
        for (index, sample) in owners {
            let Some(group) = &mut self.groups[index] else {
                continue;
            };
            let rows = match sample {
                Some(sample) => &mut group.completions[sample],
                None => &mut group.prompt,
            };
            rows.extend(pieces.next());
        }
    }

    /// What was recorded, by group, and the bytes left, by ask.
    pub(super) fn finish(self) -> (Vec<Option<GroupInputs>>, Vec<usize>) {
        (self.groups, self.free)
    }
}
