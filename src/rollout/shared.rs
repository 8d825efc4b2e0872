//! An engine on every rank: each samples its share of the requests, and all get everything.

use super::{Completion, Engine, Request, SamplingParams};
use crate::Result;
use crate::adapter::Adapter;
use crate::ranks::Ranks;

/// Divides requests between the engines of all ranks. What is drawn does not depend on it.
pub struct SharedEngine<'a> {
    own: Box<dyn Engine + 'a>,
    ranks: Ranks,
}

impl<'a> SharedEngine<'a> {
    /// With this rank's engine.
    pub fn new(own: Box<dyn Engine + 'a>, ranks: &Ranks) -> Self {
        Self {
            own,
            ranks: ranks.clone(),
        }
    }
}

impl Engine for SharedEngine<'_> {
    /// Completions of other ranks are reported when all have been sampled.
    fn generate(
        &mut self,
        adapter: Option<&Adapter>,
        requests: &[Request],
        params: &SamplingParams,
        on_token: &mut dyn FnMut(usize, usize, &[u32]),
        on_finished: &mut dyn FnMut(usize, usize, &Completion),
    ) -> Result<Vec<Vec<Completion>>> {
        let share = self.ranks.share(requests.len());
        let own = match share.is_empty() {
            true => Ok(Vec::new()),
            false => self.own.generate(
                adapter,
                &requests[share.clone()],
                params,
                &mut |request, sample, tokens| on_token(share.start + request, sample, tokens),
                &mut |request, sample, completion| {
                    on_finished(share.start + request, sample, completion);
                },
            ),
        };
        let all: Vec<Vec<Completion>> = self.ranks.gather(own)?.into_iter().flatten().collect();
        for (request, group) in all.iter().enumerate() {
            if !share.contains(&request) {
                for (sample, completion) in group.iter().enumerate() {
                    on_finished(request, sample, completion);
                }
            }
        }
        Ok(all)
    }

    fn bytes(&self) -> (u64, u64) {
        self.own.bytes()
    }

    fn exact(&self) -> bool {
        self.own.exact()
    }
}
