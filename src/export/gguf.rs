//! llama.cpp's adapter file: GGUF with `general.type = adapter`, and for every adapted map
//! `<tensor>.lora_a` `[r, in]` and `<tensor>.lora_b` `[out, r]`, which multiply to ΔW times
//! `adapter.lora.alpha` / r.

use std::path::Path;

use super::Named;
use crate::adapter::{Adapter, ModuleId, ModuleKind};
use crate::model::{Arch, ModelConfig};
use crate::run::fs;
use crate::{Error, Result};

const VERSION: u32 = 3;
/// Tensor data begin at multiples of this: GGUF's default.
const ALIGNMENT: usize = 32;
/// GGUF's numbers of value types.
const TYPE_U32: u32 = 4;
const TYPE_F32: u32 = 6;
const TYPE_STRING: u32 = 8;
/// GGUF's number of the tensor type f32, and of a file made of it.
const F32: u32 = 0;

/// Writes an adapter as llama.cpp reads it: lora_a = A, lora_b = B·M in f32, alpha = r.
///
/// # Errors
/// `Error::Config` for kind `full`, which is no low-rank update.
pub fn write_gguf_lora(adapter: &Adapter, config: &ModelConfig, path: &Path) -> Result<()> {
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
        let name = |part: &str| format!("blk.{}.{}.weight.{part}", id.layer, gguf_name(id.kind));
        tensors.push(Named::of(name("lora_a"), &low_rank.a)?);
        let b = low_rank.b.matmul(&low_rank.m)?;
        let mut b = Named::of(name("lora_b"), &b)?;
        if let Some(heads) = interleaved_heads(id, config) {
            b.values = interleave(&b.values, heads, b.shape[0], b.shape[1]);
        }
        tensors.push(b);
    }
    let name = format!("{} adapter", adapter.spec().kind.name());
    let metadata: [(&str, MetadataValue<'_>); 6] = [
        (
            "general.architecture",
            MetadataValue::Text(config.arch.name()),
        ),
        ("general.type", MetadataValue::Text("adapter")),
        ("general.name", MetadataValue::Text(&name)),
        ("general.file_type", MetadataValue::Integer(F32)),
        ("adapter.type", MetadataValue::Text("lora")),
        (
            "adapter.lora.alpha",
            MetadataValue::Float(adapter.spec().r as f32),
        ),
    ];
    fs::write_atomic(path, &file(&metadata, &tensors))
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

enum MetadataValue<'a> {
    Text(&'a str),
    Integer(u32),
    Float(f32),
}

fn file(metadata: &[(&str, MetadataValue<'_>)], tensors: &[Named]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut bytes, key);
        match value {
            MetadataValue::Text(value) => {
                bytes.extend(TYPE_STRING.to_le_bytes());
                text(&mut bytes, value);
            }
            MetadataValue::Integer(value) => {
                bytes.extend(TYPE_U32.to_le_bytes());
                bytes.extend(value.to_le_bytes());
            }
            MetadataValue::Float(value) => {
                bytes.extend(TYPE_F32.to_le_bytes());
                bytes.extend(value.to_le_bytes());
            }
        }
    }
    let mut offset = 0;
    for tensor in tensors {
        text(&mut bytes, &tensor.name);
        bytes.extend((tensor.shape.len() as u32).to_le_bytes());
        // The fastest dimension comes first there.
        for &n in tensor.shape.iter().rev() {
            bytes.extend((n as u64).to_le_bytes());
        }
        bytes.extend(F32.to_le_bytes());
        bytes.extend((offset as u64).to_le_bytes());
        offset += (tensor.values.len() * 4).next_multiple_of(ALIGNMENT);
    }
    for tensor in tensors {
        pad(&mut bytes);
        bytes.extend(tensor.values.iter().flat_map(|x| x.to_le_bytes()));
    }
    pad(&mut bytes);
    bytes
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
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
