//! PEFT directories as adapters: `adapter_config.json` and `adapter_model.safetensors` of a LoRA or
//! a TinyLoRA.
//!
//! Both become an adapter of kind `lora`, which is what a low-rank update with factors of its own
//! is: LoRA's A and B as they are, TinyLoRA's A and B·Σ v_i P_i. Modules that the directory leaves
//! out get zeros, ranks that differ are filled up with zeros.
//!
//! Nothing in a directory is trusted: what the configuration asks for and this program does not do
//! is refused by its key, and every tensor is compared with the model before memory is taken.

mod config;
mod lora;
mod targets;
mod tensors;
#[cfg(test)]
mod tests;
mod tinylora;

use std::path::{Path, PathBuf};

use super::modules::ModuleId;
use super::spec::{AdapterKind, AdapterSpec};
use super::tying::Tying;
use super::{Adapter, BaseModel};
use crate::model::Decoder;
use crate::{Error, Result};
use config::PeftConfig;
use tensors::TensorFile;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// More numbers than any adapter of use has.
const MAX_PARAMETERS: usize = 1 << 31;

/// Whether `dir` is meant to be a PEFT adapter.
pub(super) fn is_directory(dir: &Path) -> bool {
    dir.join(CONFIG).is_file() || dir.join(WEIGHTS).is_file()
}

/// A PEFT directory, read and checked as far as that goes without its model.
#[derive(Debug)]
pub struct PeftAdapter {
    dir: PathBuf,
    config: PeftConfig,
    file: TensorFile,
}

/// One adapted module.
struct Place {
    id: ModuleId,
    /// Its number among the `count` adapted ones.
    number: usize,
    count: usize,
    r: usize,
    /// `[out, in]`
    shape: [usize; 2],
}

impl PeftAdapter {
    /// Reads and checks the directory.
    ///
    /// # Errors
    /// `Error::Data` that names the file and what is wrong with it.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = PeftConfig::read(&dir.join(CONFIG))?;
        let weights = dir.join(WEIGHTS);
        if !weights.is_file() {
            let advice = if dir.join(format!("{WEIGHTS}.index.json")).exists() {
                "adapters in several files are not read: save it as one"
            } else if dir.join("adapter_model.bin").exists() {
                "pickled weights are not read: save it with safe_serialization=True"
            } else {
                "the directory is not complete"
            };
            return Err(Error::data(format!(
                "{}: no {WEIGHTS}; {advice}",
                dir.display()
            )));
        }
        Ok(Self {
            dir: dir.to_owned(),
            config,
            file: TensorFile::open(&weights)?,
        })
    }

    /// The adapter on `base`.
    ///
    /// # Errors
    /// `Error::Data` that names the tensor which is missing, too many or of another shape than the
    /// model's.
    pub fn onto(&self, base: BaseModel, decoder: &Decoder) -> Result<Adapter> {
        let modules = self.modules(base.num_layers)?;
        let shapes = |id: ModuleId| {
            let weight = &decoder.weights.blocks[id.layer].linear(id.kind).weight;
            weight.dims()
        };
        let ranks = modules
            .iter()
            .map(|&id| Ok(self.config.rank(id, shapes(id)?)))
            .collect::<Result<Vec<_>>>()?;
        let mut known = Vec::new();
        for (&id, &r) in modules.iter().zip(&ranks) {
            let (out, inner) = shapes(id)?;
            let [a, b] = self.config.names(id);
            self.file.check(&a, &[r, inner])?;
            self.file.check(&b, &[out, r])?;
            known.extend([a, b]);
        }
        known.extend(self.config.check_others(&self.file, &modules, &ranks)?);
        self.file.check_nothing_else(&known)?;

        let r = ranks.iter().copied().max().unwrap_or(0);
        let factor = self.config.common_factor(&modules);
        let mut kinds: Vec<_> = modules.iter().map(|id| id.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let spec = AdapterSpec {
            kind: AdapterKind::Lora,
            r,
            lora_alpha: factor.filter(|&f| f != 1.0).map(|f| f * r as f64),
            target_modules: kinds,
            ..AdapterSpec::default()
        };
        spec.validate()
            .map_err(|e| Error::data(format!("{}: {e}", self.dir.display())))?;
        let all = Tying::new(&spec, base.num_layers).modules;
        let all_shapes = all
            .iter()
            .map(|&id| shapes(id).map(|(out, inner)| [out, inner]))
            .collect::<Result<Vec<_>>>()?;
        let sizes = all_shapes.iter().map(|[out, inner]| r * (out + inner));
        let total: usize = sizes.sum();
        if total > MAX_PARAMETERS {
            return Err(Error::data(format!(
                "{}: {total} numbers, at most {MAX_PARAMETERS} are read",
                self.dir.display()
            )));
        }
        let mut numbers = Vec::with_capacity(total);
        let mut given = modules.iter().zip(&ranks).enumerate().peekable();
        for (&id, &[out, inner]) in all.iter().zip(&all_shapes) {
            let start = numbers.len();
            numbers.resize(start + r * (out + inner), 0.0);
            let Some((number, (_, &own))) = given.next_if(|(_, (other, _))| **other == id) else {
                continue;
            };
            let place = Place {
                id,
                number,
                count: modules.len(),
                r: own,
                shape: [out, inner],
            };
            let (a, b) = self.factors(&place, decoder)?;
            let fold = match factor {
                Some(_) => 1.0,
                None => self.config.factor(id) as f32,
            };
            let (target_a, target_b) = numbers[start..].split_at_mut(r * inner);
            target_a[..a.len()].copy_from_slice(&a);
            for (target, row) in target_b.chunks_exact_mut(r).zip(b.chunks_exact(own)) {
                target.iter_mut().zip(row).for_each(|(t, x)| *t = fold * x);
            }
        }
        let placement = &decoder.placement;
        let dtype = placement.activation_dtype();
        let mut adapter = Adapter::lora(&spec, base, &all_shapes, &placement.device, dtype)?;
        adapter.set_parameters(&numbers)?;
        Ok(adapter)
    }

    /// Adapted modules in model order.
    fn modules(&self, num_layers: usize) -> Result<Vec<ModuleId>> {
        let names = self.file.names();
        let in_file = |id: ModuleId| names.contains(&self.config.names(id)[0]);
        self.config
            .targets()
            .modules(num_layers, &in_file)
            .map_err(|cause| Error::data(format!("{}: {cause}", self.dir.join(CONFIG).display())))
    }

    /// A `[r, in]` and B `[out, r]` of one module, which multiply to its ΔW.
    fn factors(&self, place: &Place, decoder: &Decoder) -> Result<(Vec<f32>, Vec<f32>)> {
        let (r, [out, inner]) = (place.r, place.shape);
        let [a_name, b_name] = self.config.names(place.id);
        let a = self.file.get(&a_name, &[r, inner])?;
        let b = self.file.get(&b_name, &[out, r])?;
        match &self.config {
            PeftConfig::Lora(_) => Ok((a, b)),
            PeftConfig::TinyLora(config) => {
                let samples = place.count.div_ceil(tinylora::SAMPLES);
                if place.number.is_multiple_of(samples)
                    && !tinylora::belongs(place, &a, &b, decoder)?
                {
                    return self.file.refuse(
                        &a_name,
                        "holds no singular vectors of the model's weight: the adapter was made on \
                         another model",
                    );
                }
                let core = config.core(&self.file, place)?;
                Ok((a, tinylora::times(&b, &core, r)))
            }
        }
    }
}
