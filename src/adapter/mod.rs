//! Adapters: what is trained on top of the frozen model.
//!
//! An adapted linear map computes `y = x Wᵀ + ((x Aᵀ) Mᵀ) Bᵀ` with a [`LowRank`] update of W.
//! `tinylora` and `lora-xs` freeze A and B (from the singular value decomposition of W) and train
//! what M is made of; `lora` trains A and B; `full` trains the weights themselves.

#[cfg(test)]
mod decoder_tests;
mod file;
#[cfg(test)]
mod file_tests;
mod full;
mod gradients;
mod lora;
mod lora_xs;
mod modules;
mod peft;
mod projection;
mod rows;
mod source;
mod spec;
mod svd;
#[cfg(test)]
mod tests;
mod text;
mod tinylora;
mod torch_normal;
mod tying;

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};

pub use file::SavedAdapter;
pub use gradients::{Gradients, LinearGrads};
pub use modules::{ModuleId, ModuleKind};
pub use peft::PeftAdapter;
pub use projection::projection;
pub use rows::{AdapterSet, RowAdapters, Side, SidePart, SideProducts};
pub use source::AdapterSource;
pub use spec::{AdapterKind, AdapterSpec, Projection, Sigma, StoredDtype, Tie};
pub use svd::{SVD_VERSION, Svd, SvdCache, SvdKey, decompose_all, truncated_svd, user_cache_dir};
pub use tying::Tying;

use crate::model::{Decoder, Weights};
use crate::{Error, Result};
use full::Full;
use lora::LoraModule;
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
    /// B·M `[out, r]` in the dtype of B, made when it is first asked for.
    scaled_b: OnceLock<Tensor>,
}

impl LowRank {
    pub fn new(a: Tensor, m: Tensor, b: Tensor) -> Self {
        Self {
            a,
            m,
            b,
            scaled_b: OnceLock::new(),
        }
    }

    /// B·M `[out, r]`, multiplied in the precision of M: one small product an update, where a device
    /// would otherwise start three kernels more for every linear map of every pass.
    pub fn scaled_b(&self) -> Result<&Tensor> {
        if let Some(scaled) = self.scaled_b.get() {
            return Ok(scaled);
        }
        let b = self.b.to_dtype(self.m.dtype())?;
        let scaled = b.matmul(&self.m)?.to_dtype(self.b.dtype())?;
        Ok(self.scaled_b.get_or_init(|| scaled))
    }

    fn set_m(&mut self, m: Tensor) {
        self.m = m;
        self.scaled_b = OnceLock::new();
    }
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
///
/// A clone is cheap but for kind `full`: tensors are shared.
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
    Lora(Vec<LoraModule>),
    Full(Box<Full>),
}

impl Adapter {
    /// An untrained adapter for `decoder`, which leaves its output unchanged (but for `lora-xs`
    /// with `init_std`).
    ///
    /// Decompositions come from `cache` when it has them; `progress` is told (done, total)
    /// otherwise.
    ///
    /// # Errors
    /// `Error::Config` when the spec is invalid or its rank too large for the model;
    /// `Error::Data` when the weights are not finite.
    pub fn new(
        spec: &AdapterSpec,
        base: BaseModel,
        decoder: &Decoder,
        cache: &SvdCache,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Self> {
        spec.validate()?;
        let placement = &decoder.placement;
        let dtype = placement.activation_dtype();
        let tying = Tying::new(spec, base.num_layers);
        let maps = tying
            .modules
            .iter()
            .map(|&id| (id, &decoder.weights.blocks[id.layer].linear(id.kind).weight));
        match spec.kind {
            AdapterKind::TinyLora | AdapterKind::LoraXs => {
                let maps: Vec<_> = maps.collect();
                let svds = svd::cached(cache, &base.hash, placement, &maps, spec.r, progress)?;
                Self::from_svds(spec, base, &svds, &placement.device, dtype)
            }
            AdapterKind::Lora => {
                let shapes = maps
                    .map(|(_, w)| w.dims().map(|(out, inner)| [out, inner]))
                    .collect::<Result<Vec<_>>>()?;
                Self::lora(spec, base, &shapes, &placement.device, dtype)
            }
            AdapterKind::Full => Self::full(spec, base, &decoder.weights),
        }
    }

    /// An untrained `tinylora` or `lora-xs` on the decompositions of [`Tying::modules`], in that
    /// order. A and B are made on `device` in `dtype`, M in f32 at least: it carries the trained
    /// numbers.
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
            AdapterKind::Lora | AdapterKind::Full => {
                let name = spec.kind.name();
                let message = format!("adapter kind {name} does not use decompositions");
                return Err(Error::Internal(message));
            }
        };
        let m = Tensor::zeros((spec.r, spec.r), core_dtype(dtype), device)?;
        let low_rank = svds
            .iter()
            .map(|svd| {
                let (a, b) = svd.factors(spec.sigma);
                let a = Tensor::from_vec(a, (spec.r, svd.in_features()), device)?;
                let b = Tensor::from_vec(b, (svd.out_features(), spec.r), device)?;
                let (a, b) = (a.to_dtype(dtype)?, b.to_dtype(dtype)?);
                Ok(LowRank::new(a, m.clone(), b))
            })
            .collect::<Result<Vec<_>>>()?;
        Self::assemble(spec, base, low_rank, core, &master)
    }

    /// An untrained `lora` on modules of these shapes `[out, in]`.
    fn lora(
        spec: &AdapterSpec,
        base: BaseModel,
        shapes: &[[usize; 2]],
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let modules = LoraModule::lay_out(spec.r, shapes);
        let master = lora::initial(spec, &modules);
        let m = (Tensor::eye(spec.r, core_dtype(dtype), device)? * spec.lora_factor())?;
        let empty = Tensor::zeros((0, 0), dtype, device)?;
        let low_rank = vec![LowRank::new(empty.clone(), m, empty); modules.len()];
        Self::assemble(spec, base, low_rank, Core::Lora(modules), &master)
    }

    /// Kind `full`: every weight of the model is trained, starting from where it is.
    ///
    /// # Errors
    /// `Error::Config` when the spec is invalid.
    pub fn full(spec: &AdapterSpec, base: BaseModel, weights: &Weights) -> Result<Self> {
        spec.validate()?;
        let (full, master) = Full::new(weights)?;
        Self::assemble(spec, base, Vec::new(), Core::Full(Box::new(full)), &master)
    }

    fn assemble(
        spec: &AdapterSpec,
        base: BaseModel,
        low_rank: Vec<LowRank>,
        core: Core,
        master: &[f32],
    ) -> Result<Self> {
        let tying = Tying::new(spec, base.num_layers);
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
            master: vec![0.0; master.len()],
        };
        adapter.set_parameters(master)?;
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

    /// The f32 master copy, flat: [`Self::tensors`] one after the other.
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
        let expected = self.master.len();
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
            Core::TinyLora(core) => {
                let slots = 0..self.low_rank.len();
                let cores = slots.flat_map(|slot| core.core(slot, &rounded)).collect();
                self.set_cores(cores)?;
            }
            Core::LoraXs(core) => {
                let cores = core.cores(&rounded);
                self.set_cores(cores)?;
            }
            Core::Lora(modules) => {
                for (low_rank, module) in self.low_rank.iter_mut().zip(modules) {
                    *low_rank = module.low_rank(&rounded, low_rank)?;
                }
            }
            Core::Full(full) => full.set(&rounded)?,
        }
        self.master.copy_from_slice(parameters);
        Ok(())
    }

    /// Replaces the M of all modules with one upload.
    fn set_cores(&mut self, cores: Vec<f64>) -> Result<()> {
        let Some(first) = self.low_rank.first() else {
            return Ok(());
        };
        let (r, n) = (self.spec.r, self.low_rank.len());
        let all = Tensor::from_vec(cores, (n, r, r), &Device::Cpu)?
            .to_dtype(first.m.dtype())?
            .to_device(first.m.device())?;
        for (slot, low_rank) in self.low_rank.iter_mut().enumerate() {
            low_rank.set_m(all.get(slot)?);
        }
        Ok(())
    }

    /// The update of one linear map; `None` when that map is not adapted.
    pub fn low_rank(&self, id: ModuleId) -> Option<&LowRank> {
        self.slot(id).and_then(|slot| self.low_rank.get(slot))
    }

    /// The first layer that has something to train: backward stops there.
    pub fn lowest_layer(&self) -> usize {
        let lowest = self.tying.modules.iter().map(|id| id.layer).min();
        lowest.unwrap_or(0)
    }

    fn slot(&self, id: ModuleId) -> Option<usize> {
        self.slots.get(id.index()).copied().flatten()
    }

    /// The trained copy of the model's weights, for kind `full`.
    pub fn full_weights(&self) -> Option<&Weights> {
        match &self.core {
            Core::Full(full) => Some(&full.weights),
            _ => None,
        }
    }

    /// Whether gradients of weights, norms and biases are wanted: kind `full`.
    pub fn trains_weights(&self) -> bool {
        matches!(self.core, Core::Full(_))
    }

    /// Zeroed sums of this adapter's gradient.
    pub fn gradients(&self) -> Gradients {
        match &self.core {
            Core::TinyLora(_) | Core::LoraXs(_) => Gradients::total(self.num_parameters()),
            Core::Lora(_) => Gradients::large(self.num_parameters(), None),
            Core::Full(full) => {
                Gradients::large(self.num_parameters(), Some(Arc::clone(&full.places)))
            }
        }
    }

    /// Whether [`Self::gradients_per_sequence`] is possible.
    pub fn has_sequence_gradients(&self) -> bool {
        matches!(self.core, Core::TinyLora(_) | Core::LoraXs(_))
    }

    /// Zeroed gradients, one row a sequence.
    ///
    /// # Errors
    /// `Error::Config` for `lora` and `full`, whose gradient is as large as their weights.
    pub fn gradients_per_sequence(&self, num_sequences: usize) -> Result<Gradients> {
        match self.core {
            Core::TinyLora(_) | Core::LoraXs(_) => Ok(Gradients::per_sequence(
                self.num_parameters(),
                num_sequences,
            )),
            Core::Lora(_) | Core::Full(_) => Err(Error::config(format!(
                "a gradient for every sequence needs an adapter of type tinylora or lora-xs, \
                 not {}",
                self.spec.kind.name()
            ))),
        }
    }

    /// Adds what one linear map of a micro-batch contributes to the gradient.
    ///
    /// `row_sequences[t]` is the sequence row `t` belongs to; it is read only for per-sequence
    /// gradients. Maps that are not adapted contribute nothing.
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
        let Some(slot) = self.slot(id) else {
            return Ok(());
        };
        match &self.core {
            Core::TinyLora(_) | Core::LoraXs(_) => match lin.x.device() {
                Device::Cpu => self.add_core(slot, lin, row_sequences, gradients),
                _ => gradients.defer(slot, lin),
            },
            Core::Lora(modules) => {
                modules[slot].add_gradient(self.spec.lora_factor(), lin, gradients)
            }
            Core::Full(_) => gradients.add_linear(id, lin),
        }
    }

    /// Ends a pass over a micro-batch, all of whose maps have been accumulated.
    ///
    /// # Errors
    /// As [`Self::accumulate`].
    pub fn end_pass(&self, row_sequences: &[u32], gradients: &mut Gradients) -> Result<()> {
        for (slot, xa, gb) in gradients.take_deferred()? {
            let lin = LinearGrads {
                x: &xa,
                g: &gb,
                low_rank: Some((&xa, &gb)),
            };
            self.add_core(slot, &lin, row_sequences, gradients)?;
        }
        gradients.end_pass();
        Ok(())
    }

    fn add_core(
        &self,
        slot: usize,
        lin: &LinearGrads<'_>,
        row_sequences: &[u32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        gradients.add_core(lin, row_sequences, |dm, sum| match &self.core {
            Core::TinyLora(core) => core.add_gradient(slot, dm, sum),
            Core::LoraXs(core) => core.add_gradient(slot, dm, sum),
            Core::Lora(_) | Core::Full(_) => {}
        })
    }

    /// Name and shape of every tensor of the flat parameters, in their order: `v`
    /// `[groups, u]`; `R` `[modules, r, r]`; `<module>.lora_A` and `.lora_B`; or the model's own.
    pub fn tensors(&self) -> Result<Vec<(String, Vec<usize>)>> {
        let r = self.spec.r;
        Ok(match &self.core {
            Core::TinyLora(_) => vec![("v".into(), vec![self.tying.num_groups, self.spec.u])],
            Core::LoraXs(_) => vec![("R".into(), vec![self.tying.modules.len(), r, r])],
            Core::Lora(modules) => {
                let named = self.tying.modules.iter().zip(modules);
                named.flat_map(|(id, module)| module.tensors(*id)).collect()
            }
            Core::Full(full) => full.tensors()?,
        })
    }
}

/// M is held in f32 at least.
fn core_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}
