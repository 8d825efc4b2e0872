//! Weights of directories: exact values, sharding, hashes, refusals that name tensor and file.

use std::collections::BTreeMap;

use safetensors::Dtype as StDtype;
use serde_json::json;
use tinylora::model::{Arch, Checkpoint, Dtype, LoadOptions, OpenOptions, RawTensor};

use crate::support::{
    HfDir, Stored, config, load, logits, open, refusal, safetensors_bytes, tensors,
};

#[test]
fn every_dtype_gives_the_written_values() {
    for (stored, dtype) in [
        (StDtype::F32, Dtype::F32),
        (StDtype::F16, Dtype::F16),
        (StDtype::BF16, Dtype::Bf16),
    ] {
        for arch in [Arch::Qwen2, Arch::Llama] {
            let made = HfDir::new(arch, stored);
            let checkpoint = open(made.finish()).expect("opened");
            let expected = tensors(&config(&made.config));
            let names: Vec<&str> = checkpoint.weights.names().collect();
            assert_eq!(names, expected.keys().collect::<Vec<_>>());
            assert_eq!(checkpoint.config.dtype, Some(dtype));
            for (name, (shape, values)) in &expected {
                let info = checkpoint.weights.info(name).expect("known");
                assert_eq!((&info.shape, info.dtype), (shape, dtype), "{name}");
                assert_eq!(info.stored_bytes, values.len() * dtype.size_in_bytes());
                let raw = checkpoint.weights.get(name).expect("read");
                assert_eq!((raw.dtype(), raw.len()), (dtype, values.len()));
                assert!(&raw.into_f32() == values, "{name}");
            }
            assert!(
                checkpoint
                    .weights
                    .get("model.layers.9.mlp.up_proj.weight")
                    .is_err()
            );
        }
    }
}

#[test]
fn weights_left_in_their_file_give_the_same_bits() {
    for stored in [StDtype::BF16, StDtype::F16, StDtype::F32] {
        for arch in [Arch::Qwen2, Arch::Llama] {
            let made = HfDir::new(arch, stored);
            let source = made.finish();
            let mapped = LoadOptions {
                mmap: true,
                ..LoadOptions::default()
            };
            let (mapped, copied) = (load(source, mapped), load(source, LoadOptions::default()));
            assert_eq!(logits(&mapped), logits(&copied));
        }
    }
}

/// Writes the tensors into two files with an index.
fn shard(made: &HfDir, place: impl Fn(&str) -> usize) -> BTreeMap<String, String> {
    made.finish();
    let dir = made.dir.path();
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    let file = |n: usize| format!("model-0000{}-of-00002.safetensors", n + 1);
    for n in 0..2 {
        let part: BTreeMap<String, Stored> = made
            .tensors
            .iter()
            .filter(|(name, _)| place(name) == n)
            .map(|(name, t)| {
                let copy = Stored {
                    dtype: t.dtype,
                    shape: t.shape.clone(),
                    bytes: t.bytes.clone(),
                };
                (name.clone(), copy)
            })
            .collect();
        made.write(&file(n), safetensors_bytes(&part));
    }
    let map = |name: &String| (name.clone(), file(place(name)));
    made.tensors.keys().map(map).collect()
}

fn write_index(made: &HfDir, map: &BTreeMap<String, String>) {
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    made.write("model.safetensors.index.json", index.to_string());
}

#[test]
fn shards_are_one_checkpoint_with_the_hash_of_one_file() {
    let made = HfDir::new(Arch::Qwen2, StDtype::BF16);
    let whole = open(made.finish()).expect("opened");
    let hash = whole.weights.hash().expect("hashed").to_string();
    assert_eq!(hash.len(), 64);
    let map = shard(&made, |name| name.len() % 2);
    write_index(&made, &map);
    let sharded = open(made.dir.path()).expect("opened");
    assert_eq!(sharded.weights.hash().expect("hashed"), hash);
    for (name, (_, values)) in tensors(&sharded.config) {
        assert!(sharded.weights.get_f32(&name).expect("read") == values);
    }
}

#[test]
fn the_hash_changes_with_any_byte() {
    let mut made = HfDir::new(Arch::Llama, StDtype::F32);
    let before = open(made.finish())
        .unwrap()
        .weights
        .hash()
        .unwrap()
        .to_string();
    let norm = made.tensors.get_mut("model.norm.weight").unwrap();
    norm.bytes[0] ^= 1;
    let after = open(made.finish())
        .unwrap()
        .weights
        .hash()
        .unwrap()
        .to_string();
    assert_ne!(before, after);
}

#[test]
fn an_index_that_leaves_the_directory_is_refused() {
    let made = HfDir::new(Arch::Llama, StDtype::F32);
    let map = shard(&made, |_| 0);
    let outside = made.dir.path().join("../outside.safetensors");
    let outside = outside.display().to_string();
    for file in [
        "../model.safetensors",
        "sub/model.safetensors",
        "/etc/passwd",
        "..",
        "",
        "model.bin",
        "a\\b.safetensors",
        outside.as_str(),
    ] {
        let mut map = map.clone();
        map.insert("model.norm.weight".into(), file.into());
        write_index(&made, &map);
        let error = refusal(made.dir.path());
        assert!(error.contains("model.norm.weight"), "{file}: {error}");
        assert!(error.contains("same directory"), "{file}: {error}");
    }
}

#[test]
fn an_index_that_lies_is_refused() {
    let made = HfDir::new(Arch::Llama, StDtype::F32);
    let map = shard(&made, |_| 0);
    let mut moved = map.clone();
    let other = "model-00002-of-00002.safetensors";
    moved.insert("model.norm.weight".into(), other.into());
    write_index(&made, &moved);
    let error = refusal(made.dir.path());
    assert!(
        error.contains("model.norm.weight") && error.contains(other),
        "{error}"
    );

    let mut absent = map.clone();
    absent.insert("model.norm.weight".into(), "gone.safetensors".into());
    write_index(&made, &absent);
    assert!(refusal(made.dir.path()).contains("gone.safetensors"));

    for index in [
        "{}",
        "[]",
        "{\"weight_map\": {}}",
        "{\"weight_map\": {\"a\": 1}}",
    ] {
        made.write("model.safetensors.index.json", index);
        assert!(refusal(made.dir.path()).contains("index.json"), "{index}");
    }
}

#[test]
fn tensors_that_do_not_fit_the_configuration_are_refused_by_name() {
    let name = "model.layers.1.self_attn.k_proj.weight";
    let cases: [(&str, Option<Stored>, &str); 4] = [
        (name, None, "missing"),
        (
            name,
            Some(Stored::new(StDtype::F32, &[32, 16], &[0.0; 512])),
            "[32, 16]",
        ),
        (
            name,
            Some(Stored::new(StDtype::I64, &[32, 32], &[0.0; 1024])),
            "I64",
        ),
        (
            "model.layers.2.mlp.up_proj.weight",
            Some(Stored::new(StDtype::F32, &[1], &[0.0])),
            "no place",
        ),
    ];
    for (name, tensor, said) in cases {
        let mut made = HfDir::new(Arch::Llama, StDtype::F32);
        match tensor {
            Some(tensor) => made.tensors.insert(name.into(), tensor),
            None => made.tensors.remove(name),
        };
        let error = refusal(made.finish());
        assert!(error.contains(name) && error.contains(said), "{error}");
    }
}

#[test]
fn harmless_extras_are_ignored() {
    let mut made = HfDir::new(Arch::Llama, StDtype::F32);
    let plain = open(made.finish())
        .unwrap()
        .weights
        .hash()
        .unwrap()
        .to_string();
    let rotary = Stored::new(StDtype::F32, &[8], &[0.5; 8]);
    let inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq";
    made.tensors.insert(inv_freq.into(), rotary);
    let head = Stored::new(StDtype::F32, &[3], &[0.5; 3]);
    made.tensors.insert("lm_head.weight".into(), head);
    let checkpoint = open(made.finish()).expect("opened");
    assert!(checkpoint.weights.info(inv_freq).is_none());
    assert_eq!(checkpoint.weights.hash().unwrap(), plain);
}

#[test]
fn directories_without_weights_say_what_is_missing() {
    let made = HfDir::new(Arch::Llama, StDtype::F32);
    let dir = made.finish();
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    assert!(refusal(dir).contains("model.safetensors"));
    made.write("pytorch_model.bin", "");
    assert!(refusal(dir).contains("convert"));
    assert!(refusal(&dir.join("nowhere")).contains("nowhere"));
}

#[test]
fn random_weights_are_made_only_when_asked() {
    let mut made = HfDir::new(Arch::Qwen2, StDtype::F32);
    made.config["torch_dtype"] = json!("bfloat16");
    let dir = made.finish().display().to_string();
    let ask = |seed| OpenOptions {
        random_init: Some(seed),
        ..OpenOptions::default()
    };
    // Not asked: the file's own. Asked: from the seed, although there is a file.
    let norm = |options: &OpenOptions| {
        let checkpoint = Checkpoint::open(&dir, options).expect("opened");
        let norm = checkpoint.weights.get_f32("model.norm.weight").unwrap();
        (
            norm,
            tensors(&checkpoint.config)["model.norm.weight"].1.clone(),
        )
    };
    let (found, in_file) = norm(&OpenOptions::default());
    assert_eq!(found, in_file);
    assert_eq!(norm(&ask(1)).0, vec![1.0; in_file.len()]);

    std::fs::remove_file(made.dir.path().join("model.safetensors")).unwrap();
    let [one, same, other] = [1, 1, 2].map(|seed| Checkpoint::open(&dir, &ask(seed)).unwrap());
    let name = "model.layers.0.mlp.down_proj.weight";
    assert!(matches!(one.weights.get(name).unwrap(), RawTensor::Bf16(_)));
    assert_eq!(
        one.weights.get(name).unwrap(),
        same.weights.get(name).unwrap()
    );
    assert_ne!(
        one.weights.get(name).unwrap(),
        other.weights.get(name).unwrap()
    );
    assert_eq!(one.weights.hash().unwrap(), same.weights.hash().unwrap());
    assert_ne!(one.weights.hash().unwrap(), other.weights.hash().unwrap());
    assert!(
        one.weights
            .get_f32("model.norm.weight")
            .unwrap()
            .iter()
            .all(|&x| x == 1.0)
    );
}
