//! What a run would train and how much memory it would take, from the configuration alone.

use crate::adapter::{AdapterKind, ModuleKind, Tying};
use crate::config::{Config, Method, WeightDtype};
use crate::model::{Dtype, ModelConfig, expected_tensors};

/// Numbers that training changes.
pub fn trained_parameters(config: &Config, model: &ModelConfig) -> usize {
    let spec = &config.adapter;
    let tying = Tying::new(spec, model.num_hidden_layers);
    match spec.kind {
        AdapterKind::TinyLora => tying.num_groups * spec.u,
        AdapterKind::LoraXs => tying.modules.len() * spec.r * spec.r,
        AdapterKind::Lora => {
            let sizes = tying.modules.iter().map(|id| {
                let (output, input) = shape(model, id.kind);
                spec.r * (output + input)
            });
            sizes.sum()
        }
        AdapterKind::Full => weights(model),
    }
}

/// (out, in) features of a linear map.
fn shape(model: &ModelConfig, kind: ModuleKind) -> (usize, usize) {
    let hidden = model.hidden_size;
    let q = model.num_attention_heads * model.head_dim;
    let kv = model.num_key_value_heads * model.head_dim;
    match kind {
        ModuleKind::Q => (q, hidden),
        ModuleKind::K | ModuleKind::V => (kv, hidden),
        ModuleKind::O => (hidden, q),
        ModuleKind::Gate | ModuleKind::Up => (model.intermediate_size, hidden),
        ModuleKind::Down => (hidden, model.intermediate_size),
    }
}

fn weights(model: &ModelConfig) -> usize {
    let sizes = expected_tensors(model).into_iter();
    sizes
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum()
}

/// Peak memory by use, in bytes: an estimate to see orders of magnitude by.
pub fn memory(config: &Config, model: &ModelConfig, longest_prompt: usize) -> Vec<(String, usize)> {
    const F32: usize = 4;
    let weight_bytes = match (config.model.dtype, model.dtype) {
        (WeightDtype::F32, _) | (WeightDtype::Auto, None | Some(Dtype::F32)) => 4,
        _ => 2,
    };
    let mut plan = vec![("frozen weights".to_owned(), weights(model) * weight_bytes)];
    let trained = trained_parameters(config, model);
    // Parameters, two moments and the gradient (f64).
    plan.push(("adapter and optimizer".to_owned(), trained * (3 * F32 + 8)));
    if config.adapter.kind == AdapterKind::Full {
        plan.push(("trained copy of the weights".to_owned(), trained * F32));
    }
    let kv = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * F32;
    if config.method == Method::Grpo {
        let (grpo, batch) = (&config.grpo, config.rollout.max_batch_size);
        // A group's prompt is there once.
        let prompts = batch.div_ceil(grpo.num_generations) * longest_prompt;
        let tokens = batch * grpo.max_completion_length + prompts;
        let what = format!("keys and values of {batch} sequences");
        plan.push((what, tokens * kv));
    }
    let tokens = match config.method {
        Method::Grpo => {
            let grpo = &config.grpo;
            let group = longest_prompt + grpo.num_generations * grpo.max_completion_length;
            let step = grpo.prompts_per_step * group * model.input_bytes();
            let kept = step.min(grpo.activation_memory());
            plan.push(("inputs of blocks, kept while sampling".into(), kept));
            grpo.micro_batch_tokens
        }
        Method::Sft => {
            let tokens = config.sft.micro_batch_tokens;
            let kept = tokens * model.input_bytes();
            plan.push((format!("inputs of blocks, {tokens} tokens"), kept));
            tokens
        }
    };
    // One block at a time has all of its activations, and their gradients.
    let block = 6 * model.hidden_size + 5 * model.intermediate_size;
    let what = format!("activations of a block, {tokens} tokens");
    plan.push((what, tokens * block * F32));
    plan
}

/// `1.5 GB`, `26 bytes`.
pub fn bytes(count: usize) -> String {
    let scaled = |unit: f64, name: &str| format!("{:.1} {name}", count as f64 / unit);
    match count {
        0..1_000 => format!("{count} bytes"),
        1_000..1_000_000 => scaled(1e3, "kB"),
        1_000_000..1_000_000_000 => scaled(1e6, "MB"),
        _ => scaled(1e9, "GB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes(26), "26 bytes");
        assert_eq!(bytes(1_500), "1.5 kB");
        assert_eq!(bytes(15_200_000_000), "15.2 GB");
    }
}
