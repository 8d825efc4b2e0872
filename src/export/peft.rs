//! PEFT's own TinyLoRA directory (peft ≥ 0.20).
//!
//! PEFT takes A, B, P and v from the file, whatever law they follow, so every placement of Σ and
//! every P can be written. Only groups of its own rule (`tie` = peft) are groups there, too; others,
//! such as a shorter last one, it cannot express: v is then written once for every module
//! (`weight_tying = 0`), with the values of its group.

use std::path::Path;

use serde_json::json;

use super::{Named, write_adapter_dir};
use crate::adapter::{Adapter, AdapterKind, Tie, projection};
use crate::{Error, Result};

/// Writes a `tinylora` adapter as PEFT reads it. `scaling` is folded into B.
///
/// # Errors
/// `Error::Config` for other kinds.
pub fn write_peft(adapter: &Adapter, dir: &Path) -> Result<()> {
    let spec = adapter.spec();
    if spec.kind != AdapterKind::TinyLora {
        return Err(Error::config(format!(
            "--format peft writes TinyLoRA adapters; this one is {}: use --format lora",
            spec.kind.name()
        )));
    }
    let tying = adapter.tying();
    let values = adapter.rounded_parameters();
    let shares = spec.tie == Tie::Peft;
    let mut tensors = Vec::new();
    for (index, (&id, &group)) in tying.modules.iter().zip(&tying.groups).enumerate() {
        let Some(low_rank) = adapter.low_rank(id) else {
            continue;
        };
        let name = |part: &str| format!("base_model.model.{id}.{part}");
        tensors.push(Named::of(name("tinylora_A"), &low_rank.a)?);
        let b = (&low_rank.b * spec.scaling)?;
        tensors.push(Named::of(name("tinylora_B"), &b)?);
        tensors.push(Named {
            name: name("tinylora_P"),
            shape: vec![spec.u, spec.r, spec.r],
            values: projection(spec, id),
        });
        if shares && tying.groups[..index].contains(&group) {
            continue;
        }
        tensors.push(Named {
            name: format!(
                "base_model.tinylora_v.{}",
                if shares { group } else { index }
            ),
            shape: vec![spec.u],
            values: values[group * spec.u..][..spec.u].to_vec(),
        });
    }
    let targets: Vec<&str> = spec.targets().into_iter().map(|kind| kind.name()).collect();
    let config = json!({
        "peft_type": "TINYLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base().name,
        "r": spec.r,
        "u": spec.u,
        "weight_tying": spec.weight_tying,
        "projection_seed": spec.projection_seed,
        "save_projection": true,
        "init_weights": true,
        "init_v_bound": 0.02,
        "target_modules": targets,
        "tinylora_dropout": 0.0,
        "fan_in_fan_out": false,
        "bias": "none",
        "inference_mode": true,
    });
    write_adapter_dir(dir, &config, &tensors)
}
