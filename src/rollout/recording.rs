//! Which groups of a rollout keep the inputs of their blocks, and where these go.

use std::ops::Range;

use super::Request;
use crate::model::{GroupInputs, InputRows, ModelConfig, Recorder};

/// Records the groups of one rollout, each from its prompt on or not at all.
pub(super) struct Recording<'a> {
    config: &'a ModelConfig,
    /// Bytes that have not been promised to a group.
    free: usize,
    prefix: Vec<InputRows>,
    groups: Vec<Option<GroupInputs>>,
}

impl<'a> Recording<'a> {
    pub(super) fn new(config: &'a ModelConfig, budget: usize, requests: usize) -> Self {
        Self {
            config,
            free: budget,
            prefix: Vec::new(),
            groups: vec![None; requests],
        }
    }

    /// Whether a pass over these rows of a beginning that all prompts share is to be recorded.
    pub(super) fn open_prefix(&mut self, rows: usize) -> bool {
        self.reserve(rows)
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
        let known = shared == 0 || !self.prefix.is_empty();
        if known && self.reserve(rows) {
            self.groups[index] = Some(GroupInputs {
                prompt: self.prefix.clone(),
                completions: vec![Vec::new(); request.n],
            });
        }
    }

    fn reserve(&mut self, rows: usize) -> bool {
        let rest = self.free.checked_sub(rows * self.config.input_bytes());
        self.free = rest.unwrap_or(self.free);
        rest.is_some()
    }

    /// Takes back what was promised for `rows` of a completion that it did not need.
    pub(super) fn close(&mut self, index: usize, rows: usize) {
        if self.groups[index].is_some() {
            self.free += rows * self.config.input_bytes();
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

    pub(super) fn set_prefix(&mut self, recorder: Option<Recorder>) {
        self.prefix = recorder.map(Recorder::finish).unwrap_or_default();
    }

    /// Hands recorded rows out: one piece for every request named, where that is recorded;
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

    /// What was recorded, by request, and the bytes left.
    pub(super) fn finish(self) -> (Vec<Option<GroupInputs>>, usize) {
        (self.groups, self.free)
    }
}
