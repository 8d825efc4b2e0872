//! Configurations of published checkpoints, in both spellings, and what is refused.

use serde_json::{Value, json};
use tinylora::model::{Arch, Dtype, ModelConfig, RopeScaling};

use crate::support;

fn read(config: &Value, generation: Option<&Value>) -> Result<ModelConfig, String> {
    let generation = generation.map(|g| g.as_object().expect("an object"));
    let map = config.as_object().expect("an object");
    ModelConfig::from_hf_json(map, generation, "config.json").map_err(|e| {
        assert_eq!(e.exit_code(), 3);
        e.to_string()
    })
}

fn qwen2(sizes: [usize; 5], vocab: usize, tied: bool) -> Value {
    let [hidden, layers, heads, kv_heads, feed_forward] = sizes;
    json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": hidden,
        "initializer_range": 0.02, "intermediate_size": feed_forward,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
        "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "use_cache": true, "use_sliding_window": false, "vocab_size": vocab,
    })
}

fn llama3(sizes: [usize; 5], factor: f64, tied: bool) -> Value {
    let [hidden, layers, heads, kv_heads, feed_forward] = sizes;
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": feed_forward, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    })
}

fn smollm2() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
        "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "pad_token_id": 2, "rms_norm_eps": 1e-05,
        "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 49152,
    })
}

#[test]
fn published_checkpoints_have_their_published_number_of_parameters() {
    let cases = [
        (
            "Qwen2.5-0.5B",
            qwen2([896, 24, 14, 2, 4864], 151936, true),
            494_032_768,
        ),
        (
            "Qwen2.5-7B",
            qwen2([3584, 28, 28, 4, 18944], 152064, false),
            7_615_616_512,
        ),
        (
            "Llama-3.1-8B",
            llama3([4096, 32, 32, 8, 14336], 8.0, false),
            8_030_261_248,
        ),
        (
            "Llama-3.2-1B",
            llama3([2048, 16, 32, 8, 8192], 32.0, true),
            1_235_814_400,
        ),
        ("SmolLM2-135M", smollm2(), 134_515_008),
    ];
    for (name, json, parameters) in cases {
        let config = read(&json, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(config.num_parameters(), parameters, "{name}");
        assert_eq!(config.dtype, Some(Dtype::Bf16), "{name}");
        assert_eq!(config.attention_bias, config.arch == Arch::Qwen2, "{name}");
    }
}

#[test]
fn eos_ids_of_both_files_are_joined() {
    let generation = json!({"eos_token_id": [151645, 151643], "temperature": 0.7});
    let config = qwen2([896, 24, 14, 2, 4864], 151936, true);
    let config = read(&config, Some(&generation)).unwrap();
    assert_eq!(config.eos_token_ids, [151645, 151643]);
    assert_eq!(config.bos_token_id, Some(151643));
    let config = read(&llama3([4096, 32, 32, 8, 14336], 8.0, false), None).unwrap();
    assert_eq!(config.eos_token_ids, [128001, 128008, 128009]);
}

#[test]
fn both_spellings_of_rope_give_the_same() {
    let old = read(&llama3([4096, 32, 32, 8, 14336], 8.0, false), None).unwrap();
    let mut json = llama3([4096, 32, 32, 8, 14336], 8.0, false);
    let map = json.as_object_mut().unwrap();
    let mut parameters = map.remove("rope_scaling").unwrap();
    parameters["rope_theta"] = map.remove("rope_theta").unwrap();
    map.insert("rope_parameters".into(), parameters);
    map.remove("torch_dtype");
    map.insert("dtype".into(), "bfloat16".into());
    assert_eq!(read(&json, None).unwrap(), old);

    let old = read(&smollm2(), None).unwrap();
    let mut json = smollm2();
    let map = json.as_object_mut().unwrap();
    map.remove("rope_scaling");
    map.remove("rope_theta");
    let parameters = json!({"rope_theta": 100000, "rope_type": "default"});
    map.insert("rope_parameters".into(), parameters);
    assert_eq!(read(&json, None).unwrap(), old);
    assert_eq!((old.rope.theta, old.rope.scaling), (1e5, RopeScaling::None));
}

/// Inverse frequencies that transformers 5.23 computes for Llama-3.1-8B.
#[test]
fn llama3_frequencies_are_those_of_transformers() {
    let config = read(&llama3([4096, 32, 32, 8, 14336], 8.0, false), None).unwrap();
    let frequencies = config.rope.inverse_frequencies(config.head_dim);
    assert_eq!(frequencies.len(), 64);
    for (index, expected) in [
        (0, 1.0),
        (1, 0.8146172165870667),
        (20, 0.016560440883040428),
        (28, 0.0032114461064338684),
        (30, 0.0013718936825171113),
        (32, 0.0005248460220173001),
        (35, 9.556212171446532e-05),
        (40, 3.428102354519069e-05),
        (63, 3.068925877869333e-07),
    ] {
        let relative: f64 = frequencies[index] / expected - 1.0;
        assert!(relative.abs() < 1e-6, "{index}: {}", frequencies[index]);
    }
}

#[test]
fn what_is_written_is_read_back() {
    for json in [
        qwen2([3584, 28, 28, 4, 18944], 152064, false),
        llama3([2048, 16, 32, 8, 8192], 32.0, true),
        smollm2(),
    ] {
        let config = read(&json, None).unwrap();
        let written = config.to_hf_json(Dtype::Bf16).unwrap();
        assert_eq!(read(&written, None).unwrap(), config);
    }
}

#[test]
fn what_would_change_the_arithmetic_is_refused() {
    let cases = [
        ("hidden_act", json!("gelu"), "gelu"),
        ("model_type", json!("mistral"), "mistral"),
        (
            "architectures",
            json!(["LlamaForSequenceClassification"]),
            "Sequence",
        ),
        ("architectures", json!("LlamaForCausalLM"), "architectures"),
        ("mlp_bias", json!(true), "mlp_bias"),
        ("attention_bias", json!(true), "attention_bias"),
        ("sliding_window", json!(4096), "sliding"),
        (
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
            "layer_types",
        ),
        ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
        ("rope_interleaved", json!(true), "rope_interleaved"),
        (
            "rope_scaling",
            json!({"type": "linear", "factor": 2.0}),
            "linear",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0}),
            "yarn",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8.0}),
            "low_freq_factor",
        ),
        ("rope_scaling", json!(8), "rope_scaling"),
        ("rope_parameters", json!({"rope_theta": 5.0}), "rope_theta"),
        (
            "quantization_config",
            json!({"quant_method": "gptq"}),
            "gptq",
        ),
        ("hidden_size", json!(null), "hidden_size is missing"),
        ("hidden_size", json!("576"), "hidden_size"),
        ("hidden_size", json!(576.5), "hidden_size"),
        ("hidden_size", json!(-576), "hidden_size"),
        ("hidden_size", json!(u64::MAX), "hidden_size"),
        (
            "num_hidden_layers",
            json!(1_000_000_000),
            "num_hidden_layers",
        ),
        ("num_attention_heads", json!(0), "num_attention_heads"),
        ("num_key_value_heads", json!(4), "num_key_value_heads"),
        ("num_attention_heads", json!(7), "hidden_size"),
        ("head_dim", json!(63), "head_dim"),
        ("vocab_size", json!(1u64 << 60), "vocab_size"),
        ("rms_norm_eps", json!(-1e-5), "rms_norm_eps"),
        ("rms_norm_eps", json!("1e-5"), "rms_norm_eps"),
        ("rope_theta", json!(0), "theta"),
        ("eos_token_id", json!(49152), "49152"),
        ("eos_token_id", json!([2, "x"]), "eos_token_id"),
        ("tie_word_embeddings", json!("yes"), "tie_word_embeddings"),
    ];
    for (key, value, named) in cases {
        let mut config = smollm2();
        config[key] = value;
        let error = read(&config, None).expect_err(key);
        assert!(error.starts_with("config.json: "), "{error}");
        assert!(error.contains(named), "{key}: {error}");
    }
    let mut windowed = qwen2([896, 24, 14, 2, 4864], 151936, true);
    windowed["use_sliding_window"] = json!(true);
    assert!(read(&windowed, None).unwrap_err().contains("sliding"));
}

#[test]
fn files_that_are_not_configurations_are_refused() {
    let made = support::HfDir::new(Arch::Llama, safetensors::Dtype::F32);
    let dir = made.finish();
    let deep = "[".repeat(200_000);
    for content in ["", "{", "[]", "null", "{\"a\": 1e999}", &deep] {
        made.write("config.json", content);
        let error = support::refusal(dir);
        assert!(error.contains("config.json"), "{error}");
    }
    std::fs::remove_file(dir.join("config.json")).unwrap();
    assert!(support::refusal(dir).contains("config.json"));
}
