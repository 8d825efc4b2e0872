//! Configuration and tensors of a GGUF file in Hugging Face's terms.

use std::collections::BTreeMap;

use super::super::config::{Arch, ModelConfig, RopeConfig, RopeScaling};
use super::super::weights::{Encoding, Entry, Location, RawWeights};
use super::file::GgufFile;
use crate::error::Result;

const ROPE_FACTORS: &str = "rope_freqs.weight";
/// Largest relative deviation at which factors count as Llama 3's rule (they are f32).
const FACTOR_TOLERANCE: f64 = 1e-5;

/// Reads the model's shape from the metadata and, for what they leave out, from the tensors.
pub(super) fn read_config(file: &GgufFile) -> Result<ModelConfig> {
    let architecture = file.required("general.architecture", file.str("general.architecture")?)?;
    let known = [Arch::Qwen2, Arch::Llama];
    let Some(arch) = known.into_iter().find(|a| a.name() == architecture) else {
        return file.refuse(format!(
            "architecture {architecture:?} is not supported; qwen2 and llama are"
        ));
    };
    let key = |suffix: &str| format!("{architecture}.{suffix}");
    let required = |suffix: &str| file.required(&key(suffix), file.usize(&key(suffix))?);
    refuse_unsupported(file, &key)?;

    let hidden_size = required("embedding_length")?;
    let num_attention_heads = required("attention.head_count")?;
    let key_length = file.usize(&key("attention.key_length"))?;
    let head_dim = match key_length {
        Some(length) => length,
        None if num_attention_heads > 0 => hidden_size / num_attention_heads,
        None => 0,
    };
    for suffix in ["attention.value_length", "rope.dimension_count"] {
        if let Some(length) = file.usize(&key(suffix))?.filter(|&n| n != head_dim) {
            return file.refuse(format!("{} = {length}, heads have {head_dim}", key(suffix)));
        }
    }
    let embedding = file.tensors.get("token_embd.weight");
    let Some(&vocab_size) = embedding.and_then(|t| t.shape.first()) else {
        return file.refuse("tensor token_embd.weight is missing");
    };
    let theta = file.f64(&key("rope.freq_base"))?.unwrap_or(10_000.0);
    let mut config = ModelConfig {
        arch,
        hidden_size,
        num_hidden_layers: required("block_count")?,
        num_attention_heads,
        num_key_value_heads: file
            .usize(&key("attention.head_count_kv"))?
            .unwrap_or(num_attention_heads),
        head_dim,
        intermediate_size: required("feed_forward_length")?,
        vocab_size,
        rms_norm_eps: file.required(
            &key("attention.layer_norm_rms_epsilon"),
            file.f64(&key("attention.layer_norm_rms_epsilon"))?,
        )?,
        rope: RopeConfig {
            theta,
            scaling: RopeScaling::None,
        },
        tie_word_embeddings: !file.tensors.contains_key("output.weight"),
        attention_bias: arch == Arch::Qwen2,
        max_position_embeddings: required("context_length")?,
        eos_token_ids: Vec::new(),
        bos_token_id: file.u32("tokenizer.ggml.bos_token_id")?,
        dtype: None,
    };
    for name in ["eos", "eot", "eom"] {
        let id = file.u32(&format!("tokenizer.ggml.{name}_token_id"))?;
        if let Some(id) = id.filter(|id| !config.eos_token_ids.contains(id)) {
            config.eos_token_ids.push(id);
        }
    }
    let origin = file.mapped.path.display().to_string();
    config.check(&origin)?;
    if let Some(factors) = read_factors(file)? {
        config.rope.scaling = recognise_llama3(theta, config.head_dim, &factors)
            .unwrap_or(RopeScaling::Factors(factors));
        config.check(&origin)?;
    }
    Ok(config)
}

fn refuse_unsupported(file: &GgufFile, key: &impl Fn(&str) -> String) -> Result<()> {
    for suffix in ["expert_count", "attention.sliding_window"] {
        if let Some(n) = file.usize(&key(suffix))?.filter(|&n| n > 0) {
            return file.refuse(format!("{} = {n} is not supported", key(suffix)));
        }
    }
    let scaling = file.str(&key("rope.scaling.type"))?.unwrap_or("none");
    if scaling != "none" {
        return file.refuse(format!("rope scaling {scaling:?} is not supported"));
    }
    for suffix in ["rope.scale_linear", "rope.scaling.factor"] {
        if let Some(factor) = file.f64(&key(suffix))?.filter(|&f| f != 1.0) {
            return file.refuse(format!("{} = {factor} is not supported", key(suffix)));
        }
    }
    Ok(())
}

fn read_factors(file: &GgufFile) -> Result<Option<Vec<f32>>> {
    let Some(tensor) = file.tensors.get(ROPE_FACTORS) else {
        return Ok(None);
    };
    let Encoding::Plain(super::super::config::Dtype::F32) = tensor.encoding else {
        return file.refuse(format!("{ROPE_FACTORS} is not f32"));
    };
    let bytes = &file.mapped.bytes[tensor.offset..tensor.offset + tensor.len];
    let (numbers, _) = bytes.as_chunks::<4>();
    Ok(Some(
        numbers.iter().map(|&n| f32::from_le_bytes(n)).collect(),
    ))
}

/// Llama 3's converter writes its rule out as factors. With the constants of all published models
/// of that family (1, 4, 8192) and the largest factor, the rule can be had back, which config.json
/// can express and which is not rounded to f32.
fn recognise_llama3(theta: f64, head_dim: usize, factors: &[f32]) -> Option<RopeScaling> {
    let factor = factors.iter().copied().fold(1.0, f32::max);
    let scaling = RopeScaling::Llama3 {
        factor: f64::from(factor),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let plain = RopeConfig {
        theta,
        scaling: RopeScaling::None,
    };
    let scaled = RopeConfig {
        theta,
        scaling: scaling.clone(),
    };
    let plain = plain.inverse_frequencies(head_dim);
    let scaled = scaled.inverse_frequencies(head_dim);
    let same = factors.len() == plain.len()
        && plain.iter().zip(&scaled).zip(factors).all(|((p, s), &f)| {
            let expected = p / s;
            (expected / f64::from(f) - 1.0).abs() < FACTOR_TOLERANCE
        });
    same.then_some(scaling)
}

/// The tensors under Hugging Face names. Names without a counterpart are kept as they are, so
/// that the comparison with the configuration refuses them.
pub(super) fn into_weights(file: GgufFile, config: &ModelConfig) -> RawWeights {
    let entries: BTreeMap<String, Entry> = file
        .tensors
        .iter()
        .filter(|(name, _)| *name != ROPE_FACTORS)
        .map(|(name, tensor)| {
            let hf_name = hugging_face_name(name).unwrap_or_else(|| name.clone());
            let location = Location::File {
                file: 0,
                offset: tensor.offset,
                len: tensor.len,
                encoding: tensor.encoding,
                interleaved_heads: interleaved_heads(&hf_name, config),
            };
            let shape = tensor.shape.clone();
            (hf_name, Entry { shape, location })
        })
        .collect();
    RawWeights::new(vec![file.mapped], entries)
}

/// llama.cpp rotates neighbouring rows in the Llama family, so its files store q and k that way.
fn interleaved_heads(hf_name: &str, config: &ModelConfig) -> Option<usize> {
    if config.arch != Arch::Llama {
        return None;
    }
    if hf_name.ends_with(".q_proj.weight") {
        Some(config.num_attention_heads)
    } else if hf_name.ends_with(".k_proj.weight") {
        Some(config.num_key_value_heads)
    } else {
        None
    }
}

fn hugging_face_name(name: &str) -> Option<String> {
    let outer = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(outer) = outer {
        return Some(outer.to_string());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let module = match module {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{module}.{kind}"))
}
