//! Several adapters in one pass: which of them each row has.
//!
//! The frozen products are the same for every row; only the side path differs. Adapters that have A and
//! B in common differ in M alone, so that all of their rows go through A and B together.

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

use super::{Adapter, LowRank, ModuleId};
use crate::model::Weights;
use crate::{Error, Result};

/// Adapters whose rows may share passes; `None` is the frozen model.
#[derive(Debug)]
pub struct AdapterSet<'a> {
    adapters: Vec<Option<&'a Adapter>>,
    /// By adapter: the first one that has the same A and B, and its place among those that do.
    families: Vec<(usize, usize)>,
    /// By first of a family: M of all its modules, `[modules, members, r, r]`, once it is asked for.
    cores: Vec<OnceLock<Tensor>>,
}

impl<'a> AdapterSet<'a> {
    /// # Errors
    /// [`Error::Internal`] when one of several trains the weights themselves: its rows have no product
    /// in common with others.
    pub fn new(adapters: Vec<Option<&'a Adapter>>) -> Result<Self> {
        let trains_weights = |a: &Option<&Adapter>| a.is_some_and(Adapter::trains_weights);
        if adapters.len() > 1 && adapters.iter().any(trains_weights) {
            return Err(Error::Internal(
                "an adapter of type full was to share a pass with another one".into(),
            ));
        }
        let mut families: Vec<(usize, usize)> = Vec::with_capacity(adapters.len());
        for (i, adapter) in adapters.iter().enumerate() {
            let same = |&first: &usize| match (adapter, adapters[first]) {
                (Some(a), Some(b)) => a.shares_factors(b),
                (None, None) => true,
                _ => false,
            };
            let first = (0..i).find(same).unwrap_or(i);
            let members = families.iter().filter(|(f, _)| *f == first).count();
            families.push((first, members));
        }
        let cores = adapters.iter().map(|_| OnceLock::new()).collect();
        Ok(Self {
            adapters,
            families,
            cores,
        })
    }

    /// The rows of a pass, from (number of the adapter, rows) in their order.
    pub fn rows(&'a self, counts: impl IntoIterator<Item = (usize, usize)>) -> RowAdapters<'a> {
        if let [only] = self.adapters[..] {
            return RowAdapters::Same(only);
        }
        let mut runs: Vec<(usize, Range<usize>)> = Vec::new();
        let mut end = 0;
        for (adapter, count) in counts {
            let rows = end..end + count;
            end = rows.end;
            match runs.last_mut() {
                Some((last, before)) if *last == adapter => before.end = end,
                _ => runs.push((adapter, rows)),
            }
        }
        RowAdapters::Several(Runs {
            set: self,
            runs,
            places: OnceLock::new(),
        })
    }

    /// M `[members, r, r]` of the module at `slot`, of all adapters of a family.
    fn cores(&self, first: usize, slot: usize) -> Result<Tensor> {
        if let Some(cores) = self.cores[first].get() {
            return Ok(cores.get(slot)?);
        }
        let members = self.families.iter().zip(&self.adapters);
        let members = members.filter(|((f, _), _)| *f == first);
        let own = members
            .filter_map(|(_, adapter)| *adapter)
            .map(|adapter| {
                let cores: Vec<&Tensor> = adapter.low_rank.iter().map(|l| &l.m).collect();
                Tensor::stack(&cores, 0)
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        let cores = Tensor::stack(&own, 1)?.contiguous()?;
        Ok(self.cores[first].get_or_init(|| cores).get(slot)?)
    }
}

/// The adapter of every row of a pass.
#[derive(Debug)]
pub enum RowAdapters<'a> {
    /// One for all of them, or none.
    Same(Option<&'a Adapter>),
    Several(Runs<'a>),
}

/// Runs of rows with one adapter each.
#[derive(Debug)]
pub struct Runs<'a> {
    set: &'a AdapterSet<'a>,
    runs: Vec<(usize, Range<usize>)>,
    /// Of every row: its adapter's place in the family, on the device once it is asked for.
    places: OnceLock<Tensor>,
}

impl<'a> From<Option<&'a Adapter>> for RowAdapters<'a> {
    fn from(adapter: Option<&'a Adapter>) -> Self {
        Self::Same(adapter)
    }
}

impl<'a> RowAdapters<'a> {
    /// The weights that take the place of the frozen ones, for kind `full`.
    pub fn full_weights(&self) -> Option<&'a Weights> {
        match self {
            Self::Same(adapter) => adapter.and_then(Adapter::full_weights),
            Self::Several(_) => None,
        }
    }

    /// The side paths of one linear map in a pass of `rows` rows.
    pub fn side(&self, id: ModuleId, rows: usize) -> Side<'_> {
        let parts = match self {
            Self::Same(adapter) => {
                let low_rank = adapter.and_then(|adapter| adapter.low_rank(id));
                let part = |low_rank| SidePart {
                    rows: 0..rows,
                    runs: vec![(0..rows, low_rank)],
                    several: None,
                };
                low_rank.map(part).into_iter().collect()
            }
            Self::Several(runs) => runs.side(id),
        };
        Side { parts }
    }
}

impl Runs<'_> {
    fn side(&self, id: ModuleId) -> Vec<SidePart<'_>> {
        let mut parts: Vec<(usize, SidePart<'_>)> = Vec::new();
        for (adapter, rows) in &self.runs {
            let Some(adapted) = self.set.adapters[*adapter] else {
                continue;
            };
            let (Some(low_rank), Some(slot)) = (adapted.low_rank(id), adapted.slot(id)) else {
                continue;
            };
            let (first, _) = self.set.families[*adapter];
            match parts.last_mut() {
                Some((family, part)) if *family == first && part.rows.end == rows.start => {
                    part.rows.end = rows.end;
                    part.runs.push((rows.clone(), low_rank));
                    part.several = Some((self, first, slot));
                }
                _ => parts.push((
                    first,
                    SidePart {
                        rows: rows.clone(),
                        runs: vec![(rows.clone(), low_rank)],
                        several: None,
                    },
                )),
            }
        }
        parts.into_iter().map(|(_, part)| part).collect()
    }

    fn places(&self, device: &Device) -> Result<&Tensor> {
        if let Some(places) = self.places.get() {
            return Ok(places);
        }
        let places: Vec<u32> = self
            .runs
            .iter()
            .flat_map(|(adapter, rows)| {
                let (_, place) = self.set.families[*adapter];
                std::iter::repeat_n(place as u32, rows.len())
            })
            .collect();
        let places = Tensor::new(places, device)?;
        Ok(self.places.get_or_init(|| places))
    }
}

/// The side paths of one linear map in a pass. Rows that no part covers have none.
#[derive(Debug)]
pub struct Side<'a> {
    pub parts: Vec<SidePart<'a>>,
}

/// Consecutive rows whose adapters have A and B in common.
#[derive(Debug)]
pub struct SidePart<'a> {
    pub rows: Range<usize>,
    /// Runs that cover these rows, each with its own M.
    pub runs: Vec<(Range<usize>, &'a LowRank)>,
    /// Where there are several: whose M they are, by family and module.
    several: Option<(&'a Runs<'a>, usize, usize)>,
}

impl SidePart<'_> {
    /// The side path of the first run: that of all rows where there is one run.
    pub fn first(&self) -> &LowRank {
        self.runs[0].1
    }

    /// What `f` makes of the M of every run.
    pub fn cores(
        &self,
        f: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Vec<(Range<usize>, Tensor)>> {
        let runs = self.runs.iter();
        runs.map(|(rows, side)| Ok((rows.clone(), f(&side.m)?)))
            .collect()
    }

    /// A `[r, in]` of all rows.
    pub fn a(&self) -> &Tensor {
        &self.first().a
    }

    /// B `[out, r]` of all rows.
    pub fn b(&self) -> &Tensor {
        &self.first().b
    }

    /// M of every row `[rows, r, r]` on the device, `None` where all rows have the same.
    pub fn row_cores(&self) -> Result<Option<Tensor>> {
        let Some((runs, first, slot)) = self.several else {
            return Ok(None);
        };
        let cores = runs.set.cores(first, slot)?;
        let places = runs.places(cores.device())?;
        let own = places.narrow(0, self.rows.start, self.rows.len())?;
        Ok(Some(cores.index_select(&own, 0)?))
    }
}

/// x·Aᵀ or g·B `[rows, r]` of the rows of a pass that have a side path, part by part.
#[derive(Debug, Clone, Default)]
pub struct SideProducts {
    parts: Vec<(Range<usize>, Tensor)>,
}

impl SideProducts {
    pub fn push(&mut self, rows: Range<usize>, product: Tensor) {
        self.parts.push((rows, product));
    }

    /// Those of `rows`, which have one adapter; `None` where that leaves the map alone.
    pub fn of(&self, rows: &Range<usize>) -> Result<Option<Tensor>> {
        let covers = |part: &&(Range<usize>, Tensor)| {
            part.0.start <= rows.start && rows.end <= part.0.end && !rows.is_empty()
        };
        let Some((part, product)) = self.parts.iter().find(covers) else {
            return Ok(None);
        };
        if part == rows {
            return Ok(Some(product.clone()));
        }
        let own = product.narrow(0, rows.start - part.start, rows.len())?;
        Ok(Some(own))
    }
}

impl Adapter {
    /// Whether A and B of all maps are the very tensors of `other`, so that the two differ in M alone.
    pub fn shares_factors(&self, other: &Self) -> bool {
        let same = |(a, b): (&LowRank, &LowRank)| a.a.id() == b.a.id() && a.b.id() == b.b.id();
        !self.low_rank.is_empty()
            && self.tying.modules == other.tying.modules
            && self.low_rank.iter().zip(&other.low_rank).all(same)
    }

    /// Takes the A and B of `other` in place of its own where they have the same values, so that both
    /// hold them once and rows of both go through them together.
    pub fn share_factors(&mut self, other: &Self) -> Result<()> {
        if self.tying.modules != other.tying.modules || self.shares_factors(other) {
            return Ok(());
        }
        for (own, theirs) in self.low_rank.iter().zip(&other.low_rank) {
            if !(equal(&own.a, &theirs.a)? && equal(&own.b, &theirs.b)?) {
                return Ok(());
            }
        }
        for (own, theirs) in self.low_rank.iter_mut().zip(&other.low_rank) {
            *own = LowRank::new(theirs.a.clone(), own.m.clone(), theirs.b.clone());
        }
        Ok(())
    }
}

fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    if a.shape() != b.shape() || a.dtype() != b.dtype() {
        return Ok(false);
    }
    // f64 holds every value of the narrower formats.
    let host = |t: &Tensor| -> Result<Vec<f64>> {
        let t = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        Ok(t.flatten_all()?.to_vec1()?)
    };
    Ok(host(a)? == host(b)?)
}
