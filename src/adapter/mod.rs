//! Adapters: what is trained on top of the frozen model.
//!
//! An adapted linear map computes `y = x Wᵀ + ((x Aᵀ) Mᵀ) Bᵀ` with a [`LowRank`] update of W.
//! `tinylora` and `lora-xs` freeze A and B (from the singular value decomposition of W) and train
//! what M is made of; `lora` trains A and B; `full` trains the weights themselves.

mod full;
mod gradients;
mod lora_xs;
mod modules;
mod projection;
mod spec;
mod svd;
#[cfg(test)]
mod tests;
mod tinylora;
mod tying;

use candle_core::{DType, Device, Tensor};

pub use gradients::{Gradients, LinearGrads, SHARED_ROW};
pub use modules::{ModuleId, ModuleKind};
pub use projection::projection;
pub use spec::{AdapterKind, AdapterSpec, Sigma, StoredDtype, Tie};
pub use svd::{SVD_VERSION, Svd, decompose_all, truncated_svd};
pub use tying::Tying;

use crate::{Error, Result};
use full::Full;
use lora_xs::LoraXs;
use tinylora::TinyLora;

/// The update ΔW = B·M·A of one linear map, as three factors: it is never multiplied out, since
/// adding it to bf16 weights would round most of it away.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[r, r]`, scaling included.
    pub m: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
}

/// The model an adapter belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseModel {
    /// As the user named it; only for messages.
    pub name: String,
    /// SHA-256 over the weights.
    pub hash: String,
    pub num_layers: usize,
}

/// Trained parameters, and the updates they make to the model's linear maps.
#[derive(Debug, Clone)]
pub struct Adapter {
    spec: AdapterSpec,
    base: BaseModel,
    tying: Tying,
    /// Position in `low_rank` by [`ModuleId::index`].
    slots: Vec<Option<usize>>,
    low_rank: Vec<LowRank>,
    core: Core,
    master: Vec<f32>,
}

/// What the kinds do differently.
#[derive(Debug, Clone)]
enum Core {
    TinyLora(TinyLora),
    LoraXs(LoraXs),
    Full(Box<Full>),
}

impl Adapter {
    /// An untrained adapter (`tinylora`: v = 0) on the decompositions of the adapted maps.
    ///
    /// `svds` are those of [`Tying::modules`], in that order. Tensors are made on `device` in
    /// `dtype`, which should not be narrower than f32: M carries the trained numbers.
    ///
    /// # Errors
    /// `Error::Config` when the spec is invalid; `Error::Internal` when `svds` do not fit it.
    pub fn from_svds(
        spec: &AdapterSpec,
        base: BaseModel,
        svds: &[Svd],
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        spec.validate()?;
        let tying = Tying::new(spec, base.num_layers);
        if svds.len() != tying.modules.len() || svds.iter().any(|svd| svd.rank() != spec.r) {
            return Err(Error::Internal(format!(
                "an adapter of rank {} on {} modules was given {} decompositions",
                spec.r,
                tying.modules.len(),
                svds.len()
            )));
        }
        let (core, master) = match spec.kind {
            AdapterKind::TinyLora => {
                let master = vec![0.0; tying.num_groups * spec.u];
                (Core::TinyLora(TinyLora::new(spec, &tying)), master)
            }
            AdapterKind::LoraXs => {
                let master = LoraXs::initial(spec, tying.modules.len());
                (Core::LoraXs(LoraXs::new(spec)), master)
            }
            kind => {
                return Err(Error::Internal(format!(
                    "adapter kind {} does not use decompositions",
                    kind.name()
                )));
            }
        };
        let zero = Tensor::zeros((spec.r, spec.r), dtype, device)?;
        let low_rank = svds
            .iter()
            .map(|svd| {
                let (a, b) = svd.factors(spec.sigma);
                Ok(LowRank {
                    a: Tensor::from_vec(a, (spec.r, svd.in_features()), device)?.to_dtype(dtype)?,
                    m: zero.clone(),
                    b: Tensor::from_vec(b, (svd.out_features(), spec.r), device)?
                        .to_dtype(dtype)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let mut slots = vec![None; base.num_layers * ModuleKind::ALL.len()];
        for (slot, id) in tying.modules.iter().enumerate() {
            slots[id.index()] = Some(slot);
        }
        let mut adapter = Self {
            spec: spec.clone(),
            base,
            tying,
            slots,
            low_rank,
            core,
            master: Vec::new(),
        };
        adapter.set_parameters(&master)?;
        Ok(adapter)
    }

    pub fn spec(&self) -> &AdapterSpec {
        &self.spec
    }

    pub fn base(&self) -> &BaseModel {
        &self.base
    }

    /// Adapted modules and their groups.
    pub fn tying(&self) -> &Tying {
        &self.tying
    }

    pub fn num_parameters(&self) -> usize {
        self.master.len()
    }

    /// The f32 master copy, flat: v of group 0, v of group 1, … (`lora-xs`: R of each module,
    /// row-major, in model order).
    pub fn parameters(&self) -> &[f32] {
        &self.master
    }

    /// The parameters as the policy uses them: rounded to the spec's dtype.
    pub fn rounded_parameters(&self) -> Vec<f32> {
        self.master
            .iter()
            .map(|&x| self.spec.dtype.round(x))
            .collect()
    }

    /// Replaces the master copy and rebuilds every module's update from its rounded values.
    ///
    /// # Errors
    /// `Error::Diverged` when a value is not finite in the spec's dtype, `Error::Internal` when
    /// the count is wrong. The adapter is unchanged then.
    pub fn set_parameters(&mut self, parameters: &[f32]) -> Result<()> {
        let expected = match &self.core {
            Core::Full(full) => full.num_parameters(),
            Core::TinyLora(_) => self.tying.num_groups * self.spec.u,
            Core::LoraXs(_) => self.tying.modules.len() * self.spec.r * self.spec.r,
        };
        if parameters.len() != expected {
            return Err(Error::Internal(format!(
                "the adapter has {expected} parameters, not {}",
                parameters.len()
            )));
        }
        let rounded: Vec<f32> = parameters
            .iter()
            .map(|&x| self.spec.dtype.round(x))
            .collect();
        if let Some(i) = rounded.iter().position(|x| !x.is_finite()) {
            return Err(Error::Diverged(format!(
                "trained parameter {i} became {} (learning rate too high?)",
                parameters[i]
            )));
        }
        match &mut self.core {
            Core::Full(full) => full.set(&rounded)?,
            _ => self.rebuild_cores(&rounded)?,
        }
        self.master = parameters.to_vec();
        Ok(())
    }

    /// One upload for the M of all modules.
    fn rebuild_cores(&mut self, rounded: &[f32]) -> Result<()> {
        let Some(first) = self.low_rank.first() else {
            return Ok(());
        };
        let (r, n) = (self.spec.r, self.low_rank.len());
        let cores: Vec<f64> = (0..n)
            .flat_map(|slot| match &self.core {
                Core::TinyLora(core) => core.core(slot, rounded),
                Core::LoraXs(core) => core.core(slot, rounded),
                Core::Full(_) => Vec::new(),
            })
            .collect();
        let all = Tensor::from_vec(cores, (n, r, r), &Device::Cpu)?
            .to_dtype(first.m.dtype())?
            .to_device(first.m.device())?;
        for (slot, low_rank) in self.low_rank.iter_mut().enumerate() {
            low_rank.m = all.get(slot)?;
        }
        Ok(())
    }

    /// The update of one linear map; `None` when that map is not adapted.
    pub fn low_rank(&self, id: ModuleId) -> Option<&LowRank> {
        self.slot(id).map(|slot| &self.low_rank[slot])
    }

    /// The first layer that has something to train: backward stops there.
    pub fn lowest_layer(&self) -> usize {
        let lowest = self.tying.modules.iter().map(|id| id.layer).min();
        lowest.unwrap_or(0)
    }

    fn slot(&self, id: ModuleId) -> Option<usize> {
        self.slots.get(id.index()).copied().flatten()
    }

    /// Zeroed sums of this adapter's gradient.
    pub fn gradients(&self) -> Gradients {
        match &self.core {
            Core::Full(full) => full.gradients(),
            _ => Gradients::total(self.num_parameters()),
        }
    }

    /// Zeroed gradients, one row a sequence. Micro-batches must not share prompts then.
    pub fn gradients_per_sequence(&self, num_sequences: usize) -> Gradients {
        Gradients::per_sequence(self.num_parameters(), num_sequences)
    }

    /// Adds what one linear map of a micro-batch contributes to the gradient.
    ///
    /// `row_sequences[t]` is the sequence row `t` belongs to ([`SHARED_ROW`]: a shared prompt); it
    /// is read only for per-sequence gradients. Maps that are not adapted contribute nothing.
    ///
    /// # Errors
    /// `Error::Internal` when shapes or sequence numbers do not fit.
    pub fn accumulate(
        &self,
        id: ModuleId,
        lin: &LinearGrads<'_>,
        row_sequences: &[u32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        if self.trains_weights() {
            return gradients.add_linear(id, lin);
        }
        let Some(slot) = self.slot(id) else {
            return Ok(());
        };
        gradients.add_core(lin, row_sequences, |dm, sum| match &self.core {
            Core::TinyLora(core) => core.add_gradient(slot, dm, sum),
            Core::LoraXs(core) => core.add_gradient(slot, dm, sum),
            Core::Full(_) => {}
        })
    }
}
