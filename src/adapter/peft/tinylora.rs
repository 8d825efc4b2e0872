//! PEFT's TinyLoRA: ΔW = B (Σ_i v_i P_i) A with A, B, v and mostly P in the file.

use candle_core::Tensor;

use super::config::{Keys, tensor_name};
use super::targets::Targets;
use super::tensors::TensorFile;
use super::{ModuleId, Place};
use crate::Result;
use crate::adapter::projection::peft_projection;
use crate::adapter::tying::peft_groups;
use crate::model::Decoder;

/// Modules on which the base model is checked.
pub(super) const SAMPLES: usize = 8;
/// Most numbers of P in one module.
const MAX_PROJECTION: usize = 1 << 24;

#[derive(Debug)]
pub(super) struct TinyLoraConfig {
    pub targets: Targets,
    pub r: usize,
    u: usize,
    weight_tying: f64,
    seed: u64,
    /// P is to be drawn again; the file has none.
    drawn: bool,
}

impl TinyLoraConfig {
    pub fn parse(keys: &Keys) -> Result<Self, String> {
        keys.refuse(&["bias"], "the adapter would change biases, too")?;
        keys.refuse(
            &["modules_to_save"],
            "the adapter would change more than the seven maps of the blocks",
        )?;
        let (r, u) = (keys.size("r", 2)?, keys.size("u", 64)?);
        if u * r * r > MAX_PROJECTION {
            return Err(format!(
                "u = {u} with r = {r} needs more than {MAX_PROJECTION} numbers of P in every module"
            ));
        }
        let weight_tying = keys.number("weight_tying", 0.0)?;
        if !(0.0..=1.0).contains(&weight_tying) {
            return Err(format!(
                "weight_tying = {weight_tying} is not between 0 and 1"
            ));
        }
        let drawn = !keys.bool("save_projection", true)?;
        if drawn {
            can_draw(keys.string("peft_version")?)?;
        }
        let seed = keys.value("projection_seed");
        // torch takes negative seeds and wraps them around.
        let seed = match (seed.is_null(), seed.as_u64(), seed.as_i64()) {
            (true, ..) => 42,
            (_, Some(seed), _) => seed,
            (_, _, Some(seed)) => seed as u64,
            _ => return Err(format!("projection_seed = {seed} is no whole number")),
        };
        Ok(Self {
            targets: keys.targets()?,
            r,
            u,
            weight_tying,
            seed,
            drawn,
        })
    }

    /// Checks P and v, and names them.
    pub fn check(
        &self,
        file: &TensorFile,
        modules: &[ModuleId],
        ranks: &[usize],
    ) -> Result<Vec<String>> {
        let mut known = Vec::new();
        if !self.drawn {
            for (&id, &r) in modules.iter().zip(ranks) {
                let p = tensor_name(id, "tinylora_P");
                file.check(&p, &[self.u, r, r])?;
                known.push(p);
            }
        }
        for group in self.groups(modules.len()) {
            let v = v_name(group);
            file.check(&v, &[self.u])?;
            known.push(v);
        }
        Ok(known)
    }

    /// Σ_i v_i P_i of a module, row-major `[r, r]`.
    pub fn core(&self, file: &TensorFile, place: &Place) -> Result<Vec<f64>> {
        let r = place.r;
        let p = match self.drawn {
            true => peft_projection(self.seed, place.number, self.u, r),
            false => file.get(&tensor_name(place.id, "tinylora_P"), &[self.u, r, r])?,
        };
        let v = file.get(&v_name(self.groups(place.count)[place.number]), &[self.u])?;
        let mut core = vec![0.0; r * r];
        for (&v, p) in v.iter().zip(p.chunks_exact(r * r)) {
            for (sum, &p) in core.iter_mut().zip(p) {
                *sum += f64::from(v) * f64::from(p);
            }
        }
        Ok(core)
    }

    /// Group of each of `count` modules.
    fn groups(&self, count: usize) -> Vec<usize> {
        peft_groups(count, self.weight_tying)
    }
}

/// P can be drawn again for files of PEFT 0.20 and later; 0.19 gave all modules the same P.
fn can_draw(version: Option<&str>) -> Result<(), String> {
    let advice = "save it with save_projection=True";
    let Some(version) = version else {
        return Err(format!(
            "it holds no P and no peft_version, on which P depends: {advice}"
        ));
    };
    let mut parts = version.split('.').map(str::parse::<u32>);
    let parts = (parts.next(), parts.next());
    let (Some(Ok(major)), Some(Ok(minor))) = parts else {
        return Err(format!("peft_version {version:?} is no version"));
    };
    if (major, minor) < (0, 20) {
        return Err(format!(
            "it holds no P, and that of PEFT {version} is not drawn again (0.20 changed it): \
             {advice}"
        ));
    }
    Ok(())
}

fn v_name(group: usize) -> String {
    format!("base_model.tinylora_v.{group}")
}

/// B `[out, r]` times `core` `[r, r]`.
pub(super) fn times(b: &[f32], core: &[f64], r: usize) -> Vec<f32> {
    let row = |b: &[f32]| -> Vec<f32> {
        let entry = |j: usize| -> f64 { (0..r).map(|k| f64::from(b[k]) * core[k * r + j]).sum() };
        (0..r).map(|j| entry(j) as f32).collect()
    };
    b.chunks_exact(r).flat_map(row).collect()
}

/// Whether A's first row and B's first column are a pair of singular vectors of the model's weight,
/// as far as that can be told: W aᵀ must point the way of b, whatever either is scaled by. A weight
/// in fewer bits still passes.
pub(super) fn belongs(place: &Place, a: &[f32], b: &[f32], decoder: &Decoder) -> Result<bool> {
    let weight = &decoder.weights.blocks[place.id.layer]
        .linear(place.id.kind)
        .weight;
    let placement = &decoder.placement;
    let a = Tensor::from_slice(&a[..place.shape[1]], (1, place.shape[1]), &placement.device)?;
    let image = weight.forward(&a.to_dtype(placement.activation_dtype())?, None)?;
    let image = image
        .flatten_all()?
        .to_dtype(candle_core::DType::F32)?
        .to_vec1::<f32>()?;
    let (mut dot, mut image_norm, mut b_norm) = (0.0, 0.0, 0.0);
    for (&x, row) in image.iter().zip(b.chunks_exact(place.r)) {
        let (x, y) = (f64::from(x), f64::from(row[0]));
        dot += x * y;
        image_norm += x * x;
        b_norm += y * y;
    }
    // A vector of zeros says nothing.
    Ok(dot * dot >= 0.5 * image_norm * b_norm)
}
