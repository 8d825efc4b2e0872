//! Directories that PEFT wrote (`scripts/peft_fixture.py`), and directories that are wrong.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};

use super::*;
use crate::adapter::{LowRank, Projection, Sigma, SvdCache, Tie};
use crate::model::{Arch, Dtype, ModelConfig, Placement, RopeConfig, RopeScaling, Weights};
use crate::model::{Weight, random_weights};

/// The fixture's model: hashes as weights, as its script has them.
fn decoder(other: bool) -> Decoder {
    let config = ModelConfig {
        arch: Arch::Llama,
        hidden_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        intermediate_size: 40,
        vocab_size: 37,
        rms_norm_eps: 1e-6,
        rope: RopeConfig {
            theta: 10_000.0,
            scaling: RopeScaling::None,
        },
        tie_word_embeddings: true,
        attention_bias: false,
        max_position_embeddings: 128,
        eos_token_ids: vec![0],
        bos_token_id: None,
        dtype: Some(Dtype::F32),
    };
    let placement = Placement::cpu(DType::F32);
    let raw = random_weights(&config, 3);
    let mut weights = Weights::load(&config, &raw, &placement).unwrap();
    if !other {
        let values: BTreeMap<String, Vec<f32>> = weights
            .named()
            .iter()
            .map(|(name, weight)| (name.clone(), hashed(name, weight)))
            .collect();
        weights.replace(|name| Ok(&values[name])).unwrap();
    }
    Decoder::new(config, weights, placement)
}

fn hashed(name: &str, weight: &Weight<'_>) -> Vec<f32> {
    let path = name.strip_suffix(".weight").unwrap();
    let Some(number) = ModuleId::all(2).position(|id| id.to_string() == path) else {
        return weight.to_f32().unwrap();
    };
    let count: usize = weight.shape().unwrap().iter().product();
    let hash = |i: u32| {
        let mut x = i + ((number as u32) << 20);
        for _ in 0..2 {
            x = (x ^ (x >> 16)).wrapping_mul(0x045d_9f3b);
        }
        f64::from(x ^ (x >> 16)) / 2f64.powi(32) - 0.5
    };
    (0..count as u32).map(|i| hash(i) as f32).collect()
}

fn base() -> BaseModel {
    BaseModel {
        name: "small".into(),
        hash: "00".repeat(32),
        num_layers: 2,
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/peft")
        .join(name)
}

fn products(name: &str) -> BTreeMap<String, Vec<f64>> {
    let text = std::fs::read_to_string(fixture(name).join("products.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// B M A x with x_j = cos(j).
fn product(low_rank: &LowRank) -> Vec<f64> {
    let f64s = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let inner = low_rank.a.dim(1).unwrap();
    let x: Vec<f64> = (0..inner).map(|j| (j as f64).cos()).collect();
    let x = Tensor::from_vec(x, (inner, 1), &candle_core::Device::Cpu).unwrap();
    let product = f64s(&low_rank.a).matmul(&x).unwrap();
    let product = f64s(&low_rank.m).matmul(&product).unwrap();
    let product = f64s(&low_rank.b).matmul(&product).unwrap();
    product.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(ours: &[f64], theirs: &[f64], tolerance: f64, what: &str) {
    let norm = theirs.iter().map(|y| y * y).sum::<f64>().sqrt();
    assert!(norm > 1e-3 && ours.len() == theirs.len(), "{what}");
    for (a, b) in ours.iter().zip(theirs) {
        assert!((a - b).abs() < tolerance * norm, "{what}: {a} {b}");
    }
}

#[test]
fn what_peft_wrote_updates_the_model_as_peft_does() {
    let decoder = decoder(false);
    for (name, adapted) in [
        ("lora", 14),
        ("lora_patterns", 6),
        ("tinylora", 14),
        ("tinylora_drawn", 14),
    ] {
        let adapter = PeftAdapter::open(&fixture(name)).unwrap();
        let adapter = adapter.onto(base(), &decoder).unwrap();
        let products = products(name);
        assert_eq!(products.len(), adapted, "{name}");
        for id in ModuleId::all(2) {
            let what = format!("{name} {id}");
            match (adapter.low_rank(id), products.get(&id.to_string())) {
                (Some(ours), Some(theirs)) => assert_close(&product(ours), theirs, 2e-6, &what),
                (None, None) => (),
                _ => panic!("{what}"),
            }
        }
    }
}

#[test]
fn training_in_pefts_convention_gives_what_peft_makes_of_the_same_v() {
    for (name, spec) in [
        (
            "tinylora",
            AdapterSpec {
                u: 3,
                weight_tying: 0.8,
                ..AdapterSpec::default()
            },
        ),
        (
            "tinylora_drawn",
            AdapterSpec {
                r: 3,
                u: 3,
                weight_tying: 0.55,
                projection_seed: 7,
                ..AdapterSpec::default()
            },
        ),
    ] {
        let spec = AdapterSpec {
            tie: Tie::Peft,
            sigma: Sigma::Split,
            projection: Projection::Peft,
            ..spec
        };
        let (decoder, cache) = (decoder(false), SvdCache::disabled());
        let mut ours = Adapter::new(&spec, base(), &decoder, &cache, &|_, _| ()).unwrap();
        let file = TensorFile::open(&fixture(name).join(WEIGHTS)).unwrap();
        let groups = 0..ours.tying().num_groups;
        let v = groups.map(|g| {
            file.get(&format!("base_model.tinylora_v.{g}"), &[3])
                .unwrap()
        });
        ours.set_parameters(&v.flatten().collect::<Vec<_>>())
            .unwrap();
        for (path, theirs) in products(name) {
            let id = ModuleId::all(2).find(|id| id.to_string() == path).unwrap();
            let mut low_rank = ours.low_rank(id).unwrap().clone();
            // LAPACK leaves the sign of each pair of singular vectors open.
            let (r, inner) = low_rank.a.dims2().unwrap();
            let a = file.get(&format!("base_model.model.{path}.tinylora_A"), &[r, inner]);
            let a = Tensor::from_vec(a.unwrap(), (r, inner), &candle_core::Device::Cpu).unwrap();
            let signs = (&a * &low_rank.a).unwrap().sum(1).unwrap().sign().unwrap();
            let signs = signs.reshape((1, r)).unwrap();
            low_rank.m = low_rank
                .m
                .broadcast_mul(&signs)
                .and_then(|m| m.broadcast_mul(&signs.t()?))
                .unwrap();
            assert_close(&product(&low_rank), &theirs, 1e-3, &path);
        }
    }
}

/// A copy of a fixture that can be damaged.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in [CONFIG, WEIGHTS] {
        std::fs::copy(fixture(name).join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn refusal(dir: &Path, decoder: &Decoder) -> String {
    let error = match PeftAdapter::open(dir) {
        Ok(adapter) => adapter.onto(base(), decoder).unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error.exit_code(), 3, "{error}");
    let text = error.to_string();
    assert!(text.contains(&dir.display().to_string()), "{text}");
    text
}

#[test]
fn configurations_that_mean_more_are_refused_by_key() {
    let decoder = decoder(false);
    for (name, key, value, reason) in [
        ("lora", "peft_type", "\"LOHA\"", "LOHA"),
        ("lora", "peft_type", "null", "no PEFT adapter"),
        ("lora", "use_dora", "true", "use_dora"),
        ("lora", "bias", "\"lora_only\"", "bias"),
        (
            "lora",
            "modules_to_save",
            "[\"lm_head\"]",
            "modules_to_save",
        ),
        (
            "lora",
            "init_lora_weights",
            "\"pissa_niter_4\"",
            "pissa_niter_4",
        ),
        ("lora", "layer_replication", "[[0, 1]]", "layer_replication"),
        ("lora", "r", "0", "r = 0"),
        ("lora", "r", "100000", "r = 100000"),
        ("lora", "r", "\"3\"", "r = \"3\""),
        (
            "lora",
            "r",
            "4",
            "has shape [3, 24], the model needs [4, 24]",
        ),
        ("lora", "lora_alpha", "-1", "lora_alpha"),
        ("lora", "rank_pattern", "{\"(\": 2}", "pattern"),
        (
            "lora",
            "target_modules",
            "[\"q_proj\"]",
            "does not belong to",
        ),
        (
            "lora",
            "target_modules",
            "[\"embed_tokens\"]",
            "embed_tokens",
        ),
        (
            "lora_patterns",
            "target_modules",
            "[\"up_proj\"]",
            "is missing",
        ),
        ("lora_patterns", "layers_to_transform", "[0]", "layers.1."),
        ("tinylora", "bias", "\"all\"", "bias"),
        ("tinylora", "u", "60000", "[60000"),
        ("tinylora", "weight_tying", "2", "weight_tying"),
        ("tinylora", "weight_tying", "0.0", "tinylora_v.3 is missing"),
        (
            "tinylora_drawn",
            "peft_version",
            "\"0.19.1\"",
            "0.20 changed it",
        ),
        ("tinylora_drawn", "peft_version", "null", "no peft_version"),
        ("tinylora_drawn", "peft_version", "\"new\"", "no version"),
        (
            "tinylora_drawn",
            "save_projection",
            "true",
            "tinylora_P is missing",
        ),
    ] {
        let dir = copy(name);
        let path = dir.path().join(CONFIG);
        let mut config: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config.insert(key.into(), serde_json::from_str(value).unwrap());
        std::fs::write(&path, serde_json::to_string(&config).unwrap()).unwrap();
        let text = refusal(dir.path(), &decoder);
        assert!(text.contains(reason), "{name} {key}: {text}");
    }
}

#[test]
fn damaged_and_incomplete_directories_are_refused_by_file_and_tensor() {
    let decoder = decoder(false);
    let header = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| {
            let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let text = std::str::from_utf8(&bytes[8..end]).unwrap();
            let text = text.replacen(from, to, 1);
            let len = (text.len() as u64).to_le_bytes();
            [&len[..], text.as_bytes(), &bytes[end..]].concat()
        }
    };
    type Edit = Box<dyn Fn(Vec<u8>) -> Vec<u8>>;
    let edits: Vec<(Edit, &str)> = vec![
        (Box::new(|b| b[..b.len() - 1].to_vec()), "truncated"),
        (Box::new(|_| b"{}".to_vec()), "not safetensors"),
        (
            Box::new(header("0.mlp.up_proj.lora_A", "0.mlp.up_proj.lora_X")),
            "0.mlp.up_proj.lora_A.weight is missing",
        ),
        (Box::new(header("[3,24]", "[24,3]")), "has shape [24, 3]"),
        (Box::new(header("\"F32\"", "\"I32\"")), "is I32"),
        (
            Box::new(|mut b| {
                let end = b.len();
                b[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
                b
            }),
            "holds NaN",
        ),
    ];
    for (edit, reason) in edits {
        let dir = copy("lora");
        let path = dir.path().join(WEIGHTS);
        std::fs::write(&path, edit(std::fs::read(&path).unwrap())).unwrap();
        let text = refusal(dir.path(), &decoder);
        assert!(
            text.contains(WEIGHTS) && text.contains(reason),
            "{reason}: {text}"
        );
    }
    for (other, reason) in [
        (None, "not complete"),
        (Some("adapter_model.bin"), "pickled"),
        (
            Some("adapter_model.safetensors.index.json"),
            "several files",
        ),
    ] {
        let dir = copy("lora");
        std::fs::remove_file(dir.path().join(WEIGHTS)).unwrap();
        if let Some(name) = other {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let text = refusal(dir.path(), &decoder);
        assert!(text.contains(reason), "{text}");
    }
    let dir = copy("lora");
    std::fs::write(dir.path().join(CONFIG), "{").unwrap();
    assert!(refusal(dir.path(), &decoder).contains(CONFIG));
}

#[test]
fn another_model_is_refused() {
    let other = decoder(true);
    let text = refusal(&fixture("tinylora"), &other);
    assert!(
        text.contains("another model") && text.contains("tinylora_A"),
        "{text}"
    );
    let smaller = BaseModel {
        num_layers: 1,
        ..base()
    };
    let error = PeftAdapter::open(&fixture("lora"))
        .unwrap()
        .onto(smaller, &other);
    assert!(error.unwrap_err().to_string().contains("layers.1."));
}
