//! Plans of the 7B shape: what is chosen, what is refused.

use super::*;
use crate::config::{LossType, Source};

/// Qwen2.5-7B.
fn model() -> ModelConfig {
    let json = r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "hidden_act": "silu", "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1}"#;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), json).unwrap();
    ModelConfig::from_hf_dir(dir.path()).unwrap()
}

fn config(overrides: &[&str]) -> Config {
    let source = Source {
        origin: "test".into(),
        name: "test".into(),
        text: "[model]\npath = \"mini\"\n".into(),
    };
    let overrides: Vec<String> = overrides.iter().map(|&o| o.to_owned()).collect();
    Config::load(&source, &overrides).unwrap()
}

fn plan(config: &Config, gb: f64) -> Result<Plan> {
    plan_of(1, config, gb)
}

fn plan_of(runs: usize, config: &Config, gb: f64) -> Result<Plan> {
    let weights = WeightBytes {
        held: 15_200_000_000,
        format: "bf16",
        stored: 4_400_000_000,
        ..WeightBytes::default()
    };
    let workload = Workload {
        lengths: vec![200; 100],
        ..Workload::default()
    };
    let limit = Limit {
        bytes: (gb * 1e9) as u64,
        origin: "as the test says".into(),
    };
    let setting = Setting {
        model: &model(),
        weights,
        on_cpu: true,
        room: Room {
            resident: 0,
            limit: Some(limit),
        },
        runs,
    };
    Plan::make(config, &workload, &setting)
}

#[test]
fn sizes_read_well() {
    assert_eq!(bytes(26), "26 bytes");
    assert_eq!(bytes(1_500), "1.5 kB");
    assert_eq!(bytes(15_200_000_000), "15.2 GB");
}

#[test]
fn where_memory_is_plenty_the_usual_sizes_stay() {
    let config = config(&[]);
    let plan = plan(&config, 200.0).unwrap();
    assert_eq!(plan.sizes, Sizes::of(&config));
}

#[test]
fn unset_sizes_shrink_until_the_plan_fits() {
    let config = config(&["grpo.max_completion_length=128"]);
    let usual = plan(&config, 200.0).unwrap();
    let mut before = usual.sizes;
    for gb in [19.0, 18.0, 17.0] {
        let plan = plan(&config, gb).unwrap();
        assert!(plan.peak_needed() <= (gb * 1e9) as usize, "{gb}: {plan}");
        let sizes = plan.sizes;
        assert!(sizes.activation_memory <= before.activation_memory);
        assert!(sizes.max_batch_size <= before.max_batch_size);
        // A group is never cut for memory: 200 tokens and 8 completions of 127 rows.
        assert!(sizes.pass_tokens >= 200 + 8 * 127);
        before = sizes;
    }
    assert_ne!(before, usual.sizes);
}

#[test]
fn what_is_set_is_honoured_or_refused() {
    let sizes = [
        "grpo.micro_batch_tokens=2048",
        "rollout.max_batch_size=64",
        "grpo.activation_memory_gb=2.0",
    ];
    let config = config(&sizes);
    assert_eq!(plan(&config, 200.0).unwrap().sizes, Sizes::of(&config));
    let error = plan(&config, 17.0).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let message = error.to_string();
    for part in [
        "17.0 GB (as the test says)",
        "15.2 GB frozen weights as bf16 + ",
        "keys and values of 64 sequences",
        "model.memory_gb",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn runs_in_lockstep_share_the_weights_and_the_batch_and_keep_their_own_inputs() {
    let config = config(&["grpo.max_completion_length=128"]);
    let peak = |runs| plan_of(runs, &config, 500.0).unwrap().peak();
    // 8 groups of 200 tokens and 8 × 127 rows, of 28 blocks and a norm, up to 2 GB; the adapter; and prompts
    // whose last completion is in the batch.
    let own = Sizes::of(&config).activation_memory;
    for (fewer, more) in [(1, 2), (2, 4), (4, 8)] {
        let each = (peak(more) - peak(fewer)) / (more - fewer);
        assert!((own..own + 200_000_000).contains(&each), "{each}");
    }
    let short = plan_of(4, &config, 21.0).unwrap();
    assert!(short.sizes.activation_memory < own, "{short}");
    assert!(short.peak_needed() <= 21_000_000_000);
}

#[test]
fn the_smallest_sizes_may_be_too_large() {
    let error = plan(&config(&[]), 15.0).unwrap_err();
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn passes_are_not_packed_by_memory_where_that_has_a_say_in_the_gradient() {
    let free = config(&["grpo.max_completion_length=32"]);
    assert!(plan(&free, 16.5).unwrap().sizes.pass_tokens < 2048);
    let mut bnpo = free.clone();
    bnpo.grpo.loss_type = LossType::Bnpo;
    assert!(plan(&bnpo, 16.5).map_or(true, |plan| plan.sizes.pass_tokens == 2048));
    assert!(!bnpo.packing_is_free());
    assert!(!config(&["adapter.type=lora"]).packing_is_free());
}

#[test]
fn a_server_that_the_run_starts_has_its_share() {
    let remote = "rollout.engine=llama-server";
    let slots = "rollout.max_concurrency=8";
    let own = config(&[remote, slots]);
    let url = "rollout.base_url=[\"http://there:8080\"]";
    let (own, other) = (
        plan(&own, 200.0).unwrap(),
        plan(&config(&[remote, slots, url]), 200.0).unwrap(),
    );
    // Its memory is not that of this process, but has to be there.
    assert_eq!(own.peak(), other.peak());
    let share = own.peak_needed() - other.peak_needed();
    // 8 slots of 200 tokens and a completion in 28 layers of 2 × 512 halves; the file; the rest.
    let length = 200 + Config::default().grpo.max_completion_length;
    let keys = (8 * length).next_multiple_of(256) * 28 * 2 * 512 * 2;
    let known = 4_400_000_000 + keys;
    assert!(
        (known..known + 1_000_000_000).contains(&share),
        "{share}, {known}"
    );
    assert!(own.to_string().contains("llama-server's weights"), "{own}");
    let error = plan(&config(&[remote, slots]), 17.0).unwrap_err();
    assert!(
        error.to_string().contains("4.4 GB llama-server's weights"),
        "{error}"
    );
}

#[test]
fn what_servers_sample_is_computed_again_and_nothing_is_kept() {
    let url = "rollout.base_url=[\"http://there:8080\"]";
    let memory = "grpo.activation_memory_gb=100";
    let native = plan(&config(&[memory]), 200.0).unwrap().to_string();
    let remote = config(&[memory, "rollout.engine=llama-server", url]);
    let remote = plan(&remote, 200.0).unwrap().to_string();
    let (kept, decoded, computed) = (
        "inputs of blocks, kept while sampling",
        "keys and values of",
        "inputs or activations of a pass",
    );
    assert!(native.contains(kept) && native.contains(decoded) && !native.contains(computed));
    assert!(!remote.contains(kept) && !remote.contains(decoded) && remote.contains(computed));
}

#[test]
fn a_common_beginning_is_short_of_every_prompt() {
    let common = |prompts: &[&[u32]]| Workload::common(prompts.iter().copied());
    assert_eq!(common(&[&[1, 2, 3, 4], &[1, 2, 5]]), 2);
    assert_eq!(common(&[&[1, 2], &[1, 2, 5]]), 1);
    assert_eq!(common(&[&[1, 2]]), 0);
    assert_eq!(common(&[]), 0);
}
