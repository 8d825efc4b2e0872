//! llama.cpp's adapter file: GGUF with `general.type = adapter`, and for every adapted map
//! `<tensor>.lora_a` `[r, in]` and `<tensor>.lora_b` `[out, r]`, which multiply to ΔW times
//! `adapter.lora.alpha` / r.

use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::Named;
use crate::adapter::{Adapter, ModuleId, ModuleKind};
use crate::model::{Arch, ModelConfig};
use crate::run::fs;
use crate::{Error, Result};

/// GGUF's number of a file whose tensors are f32.
const ALL_F32: u32 = 0;

/// Writes an adapter as llama.cpp reads it: lora_a = A, lora_b = B·M in f32, alpha = r.
///
/// # Errors
/// `Error::Config` for kind `full`, which is no low-rank update.
pub fn write_gguf_lora(adapter: &Adapter, config: &ModelConfig, path: &Path) -> Result<()> {
    write_gguf_lora_of(adapter, &adapter.tying().modules, config, path)
}

/// As [`write_gguf_lora`], with the update of these modules alone.
pub fn write_gguf_lora_of(
    adapter: &Adapter,
    modules: &[ModuleId],
    config: &ModelConfig,
    path: &Path,
) -> Result<()> {
    if adapter.trains_weights() {
        return Err(Error::config(
            "full fine-tuning is no low-rank update: export it with --format merged",
        ));
    }
    let mut tensors = Vec::new();
    for &id in modules {
        let Some(low_rank) = adapter.low_rank(id) else {
            continue;
        };
        let name = |part: &str| format!("blk.{}.{}.weight.{part}", id.layer, gguf_name(id.kind));
        tensors.push(Named::of(name("lora_a"), &low_rank.a)?);
        let b = low_rank.b.matmul(&low_rank.m)?;
        let mut b = Named::of(name("lora_b"), &b)?;
        if let Some(heads) = interleaved_heads(id, config) {
            b.values = interleave(&b.values, heads, b.shape[0], b.shape[1]);
        }
        tensors.push(b);
    }
    let tensors = tensors
        .into_iter()
        .map(
            |Named {
                 name,
                 shape,
                 values,
             }| {
                let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
                Ok((name, QTensor::quantize(&tensor, GgmlDType::F32)?))
            },
        )
        .collect::<Result<Vec<_>>>()?;
    let text = |text: &str| Value::String(text.to_owned());
    let metadata = [
        ("general.architecture", text(config.arch.name())),
        ("general.type", text("adapter")),
        (
            "general.name",
            text(&format!("{} adapter", adapter.spec().kind.name())),
        ),
        ("general.file_type", Value::U32(ALL_F32)),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", Value::F32(adapter.spec().r as f32)),
    ];
    let metadata = metadata.each_ref().map(|(key, value)| (*key, value));
    let tensors: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &tensors)?;
    fs::write_atomic(path, &file.into_inner())
}

fn gguf_name(kind: ModuleKind) -> &'static str {
    match kind {
        ModuleKind::Q => "attn_q",
        ModuleKind::K => "attn_k",
        ModuleKind::V => "attn_v",
        ModuleKind::O => "attn_output",
        ModuleKind::Gate => "ffn_gate",
        ModuleKind::Up => "ffn_up",
        ModuleKind::Down => "ffn_down",
    }
}

/// llama.cpp rotates neighbouring rows in the Llama family, so q and k have another order there.
fn interleaved_heads(id: ModuleId, config: &ModelConfig) -> Option<usize> {
    match (config.arch, id.kind) {
        (Arch::Llama, ModuleKind::Q) => Some(config.num_attention_heads),
        (Arch::Llama, ModuleKind::K) => Some(config.num_key_value_heads),
        _ => None,
    }
}

/// Within each head, row j of the first half goes to 2j and row j of the second to 2j + 1.
fn interleave(values: &[f32], heads: usize, rows: usize, columns: usize) -> Vec<f32> {
    let head = rows / heads;
    let source = |row: usize| {
        let (start, place) = (row / head * head, row % head);
        start + place % 2 * (head / 2) + place / 2
    };
    (0..rows)
        .flat_map(|row| &values[source(row) * columns..][..columns])
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_heads_become_neighbours() {
        let rows: Vec<f32> = (0..8).flat_map(|row| [row as f32, -(row as f32)]).collect();
        let moved = interleave(&rows, 2, 8, 2);
        let order: Vec<f32> = moved.iter().step_by(2).copied().collect();
        assert_eq!(order, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert!(moved.chunks_exact(2).all(|row| row[0] == -row[1]));
    }
}
