//! PEFT's LoRA directory: ΔW = lora_B · lora_A exactly, which serves everywhere LoRA does.

use std::path::Path;

use serde_json::json;

use super::{Named, write_adapter_dir};
use crate::adapter::Adapter;
use crate::{Error, Result};

/// Writes an adapter as LoRA of rank r: lora_A = A, lora_B = B·M, lora_alpha = r.
///
/// # Errors
/// `Error::Config` for kind `full`, which is no low-rank update.
pub fn write_lora(adapter: &Adapter, dir: &Path) -> Result<()> {
    if adapter.trains_weights() {
        return Err(Error::config(
            "full fine-tuning is no low-rank update: export it with --format merged",
        ));
    }
    let mut tensors = Vec::new();
    for &id in &adapter.tying().modules {
        let Some(low_rank) = adapter.low_rank(id) else {
            continue;
        };
        let name = |part: &str| format!("base_model.model.{id}.{part}.weight");
        tensors.push(Named::of(name("lora_A"), &low_rank.a)?);
        let b = low_rank.b.matmul(&low_rank.m)?;
        tensors.push(Named::of(name("lora_B"), &b)?);
    }
    let spec = adapter.spec();
    let targets: Vec<&str> = spec.targets().into_iter().map(|kind| kind.name()).collect();
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base().name,
        "r": spec.r,
        "lora_alpha": spec.r,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "use_rslora": false,
        "inference_mode": true,
    });
    write_adapter_dir(dir, &config, &tensors)
}
