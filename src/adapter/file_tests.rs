//! The adapter file: round trips, and files that lie.

use candle_core::DType;

use super::decoder_tests::{KINDS, adapter, decoder, disturb, spec};
use super::*;
use crate::model::Placement;

fn onto(saved: &SavedAdapter, base: BaseModel) -> Result<Adapter> {
    let decoder = decoder(true, Placement::cpu(DType::F32));
    saved.onto(base, &decoder, &SvdCache::disabled(), &|_, _| ())
}

fn trained(spec: &AdapterSpec) -> Adapter {
    let mut adapter = adapter(spec, &decoder(true, Placement::cpu(DType::F32)));
    disturb(&mut adapter);
    adapter
}

/// The file with its JSON header changed by `edit`, data untouched.
fn edited(bytes: &[u8], edit: impl Fn(&str) -> String) -> Vec<u8> {
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let before = std::str::from_utf8(&bytes[8..8 + len]).unwrap();
    let header = edit(before);
    assert_ne!(before, header, "the edit must change something");
    [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        &bytes[8 + len..],
    ]
    .concat()
}

#[test]
fn every_kind_comes_back_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    for kind in KINDS {
        for dtype in [StoredDtype::F32, StoredDtype::Bf16, StoredDtype::F16] {
            let adapter = trained(&AdapterSpec {
                dtype,
                ..spec(kind)
            });
            let path = dir.path().join("adapter.safetensors");
            adapter.save(&path).unwrap();
            let saved = SavedAdapter::load(&path).unwrap();
            assert_eq!(&saved.spec, adapter.spec());
            let back = onto(&saved, adapter.base().clone()).unwrap();
            assert_eq!(
                back.parameters(),
                adapter.rounded_parameters(),
                "{kind:?} {dtype:?}"
            );
            assert_eq!(back.to_bytes().unwrap(), std::fs::read(&path).unwrap());
        }
    }
}

#[test]
fn thirteen_numbers_are_26_bytes_in_a_file_of_less_than_2_kb() {
    let spec = AdapterSpec {
        dtype: StoredDtype::Bf16,
        ..Default::default()
    };
    let base = BaseModel {
        name: "/a/long/path/".repeat(100) + "Qwen2.5-7B-Instruct",
        hash: "0".repeat(64),
        num_layers: 28,
    };
    let svd = Svd::new(vec![0.5; 8], vec![2.0, 1.0], vec![0.5; 8]).unwrap();
    let svds = vec![svd; 196];
    let mut adapter = Adapter::from_svds(&spec, base, &svds, &Device::Cpu, DType::F32).unwrap();
    let v: Vec<f32> = (0..13).map(|i| i as f32 / 7.0 - 0.9).collect();
    adapter.set_parameters(&v).unwrap();
    let bytes = adapter.to_bytes().unwrap();
    assert!(bytes.len() < 2048, "{} bytes", bytes.len());
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    assert_eq!(bytes.len() - 8 - header, 26);
    assert_eq!(header % 8, 0);
    let saved = SavedAdapter::from_bytes(&bytes, "memory").unwrap();
    assert!(saved.base.name.ends_with("Qwen2.5-7B-Instruct"));
}

#[test]
fn another_base_model_is_refused_by_name() {
    let adapter = trained(&AdapterSpec::default());
    let saved = SavedAdapter::from_bytes(&adapter.to_bytes().unwrap(), "a.safetensors").unwrap();
    let other = BaseModel {
        name: "elsewhere".into(),
        hash: "ff".into(),
        num_layers: 2,
    };
    let error = onto(&saved, other).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    for part in ["a.safetensors", "small", "00", "elsewhere", "ff"] {
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn hostile_files_are_refused_with_a_reason() {
    let bytes = trained(&AdapterSpec::default()).to_bytes().unwrap();
    let refused = |bytes: &[u8], reason: &str| {
        let error = SavedAdapter::from_bytes(bytes, "evil.safetensors").unwrap_err();
        assert_eq!(error.exit_code(), 3);
        let text = error.to_string();
        assert!(
            text.contains("evil.safetensors") && text.contains(reason),
            "{reason}: {text}"
        );
    };
    for cut in 0..bytes.len() {
        refused(&bytes[..cut], "");
    }
    refused(b"{\"not\": \"safetensors\"}", "not a safetensors file");
    refused(
        &[&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        "not a safetensors file",
    );
    for (from, to, reason) in [
        ("tinylora", "something", "no key \"tinylora\""),
        (
            "format_version\\\":1",
            "format_version\\\":2",
            "format version is 2",
        ),
        (
            "svd_version\\\":1",
            "svd_version\\\":99",
            "decomposition 99",
        ),
        ("\\\"r\\\":2", "\\\"r\\\":0", "adapter.r"),
        ("\\\"r\\\":2", "\\\"r\\\":-2", "metadata cannot be read"),
        ("\\\"u\\\":1", "\\\"u\\\":2", "[1, 2]"),
        ("\\\"r\\\":2", "\\\"rank\\\":2", "unknown field"),
        (
            "num_layers\\\":2",
            "num_layers\\\":999999999999",
            "999999999999 layers",
        ),
        ("num_layers\\\":2", "num_layers\\\":0", "0 layers"),
        ("num_layers\\\":2", "num_layers\\\":20", "[9, 1]"),
        (
            "\\\"type\\\":\\\"tinylora\\\"",
            "\\\"type\\\":\\\"lora-xs\\\"",
            "\"R\"",
        ),
        ("\"v\":", "\"w\":", "\"w\""),
        ("\"F32\"", "\"I32\"", "I32"),
        ("[1,1]", "[1,2]", "not a safetensors file"),
        ("\\\"scaling\\\":1.0", "\\\"scaling\\\":1e999", ""),
    ] {
        refused(&edited(&bytes, |header| header.replace(from, to)), reason);
    }
    let mut not_a_number = bytes.clone();
    let last = bytes.len() - 4;
    not_a_number[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    refused(&not_a_number, "number 0 of tensor v is NaN");

    let missing = SavedAdapter::load(std::path::Path::new("/nowhere/a.safetensors")).unwrap_err();
    assert!(missing.to_string().contains("/nowhere/a.safetensors"));
}

#[test]
fn tensors_that_do_not_fit_the_model_are_refused() {
    let adapter = trained(&spec(AdapterKind::Lora));
    let bytes = adapter.to_bytes().unwrap();
    for (from, to) in [
        ("[2,12]", "[12,2]"),
        ("layers.1.self_attn.q_proj", "layers.1.other"),
    ] {
        let changed = edited(&bytes, |header| header.replace(from, to));
        let saved = SavedAdapter::from_bytes(&changed, "a.safetensors").unwrap();
        let error = onto(&saved, adapter.base().clone()).unwrap_err();
        assert!(error.to_string().contains("do not fit"), "{error}");
    }
}
