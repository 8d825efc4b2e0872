//! The model with the adapter folded into its weights: a Hugging Face directory of its own.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::stream::Writer;
use crate::adapter::{Adapter, ModuleId};
use crate::model::{Dtype, Model, Weight};
use crate::run::fs;
use crate::{Error, Result};

/// Largest file of a checkpoint, as transformers cuts them.
const SHARD_BYTES: usize = 5_000_000_000;

/// What rounding to the target dtype did to the update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MergeReport {
    /// ‖round(W + ΔW) − round(W) − ΔW‖ / ‖ΔW‖ over all adapted maps; 0 for kind `full`.
    pub relative_loss: f64,
    pub bytes: usize,
}

/// Writes config.json, tokenizer files and safetensors of W + ΔW, computed in f32 and rounded once
/// to `dtype`. Memory holds one tensor at a time.
pub fn write_merged(
    model: &Model,
    adapter: Option<&Adapter>,
    dir: &Path,
    dtype: Dtype,
) -> Result<MergeReport> {
    fs::create_dir_all(dir)?;
    let decoder = &model.decoder;
    let weights = adapter
        .and_then(Adapter::full_weights)
        .unwrap_or(&decoder.weights);
    let named = weights.named();
    let sizes = named
        .iter()
        .map(|(name, weight)| Ok((name.clone(), weight.shape()?)))
        .collect::<Result<Vec<_>>>()?;
    let shards = shards(&sizes, dtype);
    let mut loss = Loss::default();
    let mut index = Map::new();
    for (number, range) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", number + 1),
        };
        let mut writer = Writer::create(&dir.join(&file), dtype, sizes[range.clone()].to_vec())?;
        for (name, weight) in &named[range.clone()] {
            writer.write(&merged(name, weight, adapter, dtype, &mut loss)?)?;
            index.insert(name.clone(), file.clone().into());
        }
        writer.finish()?;
    }
    let elements: usize = sizes.iter().map(|(_, s)| s.iter().product::<usize>()).sum();
    let bytes = elements * dtype.size_in_bytes();
    let write = |name: &str, value: &Value| {
        fs::write_atomic(&dir.join(name), format!("{value:#}\n").as_bytes())
    };
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": bytes}, "weight_map": index});
        write("model.safetensors.index.json", &index)?;
    }
    write("config.json", &decoder.config.to_hf_json(dtype)?)?;
    model.tokenizer.save(dir)?;
    Ok(MergeReport {
        relative_loss: loss.relative(),
        bytes,
    })
}

/// Consecutive tensors that go into one file.
fn shards(sizes: &[(String, Vec<usize>)], dtype: Dtype) -> Vec<std::ops::Range<usize>> {
    let rows: Vec<usize> = sizes
        .iter()
        .map(|(_, shape)| shape.iter().product::<usize>() * dtype.size_in_bytes())
        .collect();
    let (mut shards, mut start, mut filled) = (Vec::new(), 0, 0);
    for (i, bytes) in rows.iter().enumerate() {
        if i > start && filled + bytes > SHARD_BYTES {
            shards.push(start..i);
            (start, filled) = (i, 0);
        }
        filled += bytes;
    }
    shards.push(start..rows.len());
    shards
}

/// Squared norms over all adapted maps.
#[derive(Debug, Default)]
struct Loss {
    lost: f64,
    delta: f64,
}

impl Loss {
    fn relative(&self) -> f64 {
        match self.delta {
            0.0 => 0.0,
            delta => (self.lost / delta).sqrt(),
        }
    }
}

fn merged(
    name: &str,
    weight: &Weight<'_>,
    adapter: Option<&Adapter>,
    dtype: Dtype,
    loss: &mut Loss,
) -> Result<Vec<f32>> {
    let mut values = weight.to_f32()?;
    let (Some(adapter), Some(id)) = (adapter, module(name, adapter)) else {
        return Ok(values);
    };
    let Some(low_rank) = adapter.low_rank(id) else {
        return Ok(values);
    };
    let delta = low_rank.b.matmul(&low_rank.m)?.matmul(&low_rank.a)?;
    let delta: Vec<f32> = delta
        .flatten_all()?
        .to_dtype(candle_core::DType::F32)?
        .to_vec1()?;
    if delta.len() != values.len() {
        return Err(Error::Internal(format!(
            "the update of {name} has another size"
        )));
    }
    for (value, delta) in values.iter_mut().zip(delta) {
        let rounded = dtype.round(*value + delta);
        let moved = f64::from(rounded) - f64::from(dtype.round(*value));
        loss.lost += (moved - f64::from(delta)).powi(2);
        loss.delta += f64::from(delta).powi(2);
        *value = rounded;
    }
    Ok(values)
}

fn module(name: &str, adapter: Option<&Adapter>) -> Option<ModuleId> {
    let path = name.strip_suffix(".weight")?;
    let modules = &adapter?.tying().modules;
    modules.iter().find(|id| id.to_string() == path).copied()
}
