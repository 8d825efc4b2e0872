//! Damaged and malicious weight files: refused without panic, overflow or large allocations.

use safetensors::Dtype as StDtype;
use tinylora::model::Arch;

use crate::support::{HfDir, config, open, refusal, tensors};

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

#[test]
fn truncated_safetensors_are_refused_wherever_they_end() {
    let made = HfDir::new(Arch::Llama, StDtype::F32);
    made.finish();
    let path = made.dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for end in [0, 1, 7, 8, 9, 100, 2000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..end]).unwrap();
        let error = refusal(made.dir.path());
        assert!(error.contains("model.safetensors"), "{end}: {error}");
    }
    let mut longer = whole;
    longer.push(0);
    std::fs::write(&path, longer).unwrap();
    refusal(made.dir.path());
}

#[test]
fn headers_that_lie_are_refused() {
    let entry = |shape: &str, from: u64, to: u64| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let cases = [
        u64::MAX.to_le_bytes().to_vec(),
        (99_999_999u64).to_le_bytes().to_vec(),
        with_header("", &[]),
        with_header("{", &[]),
        with_header("[]", &[]),
        with_header("\u{fffd}", &[]),
        with_header(&deep, &[]),
        with_header(&format!(r#"{{"a":{deep}}}"#), &[]),
        with_header(&entry("[2]", 0, 4), &[0; 4]),
        with_header(&entry("[1]", 4, 8), &[0; 8]),
        with_header(&entry("[1]", 4, 0), &[0; 4]),
        with_header(&entry("[1]", 0, 4), &[0; 8]),
        with_header(&entry("[4611686018427387904,4]", 0, 0), &[]),
        with_header(
            &entry("[2305843009213693951]", 0, 9223372036854775804),
            &[0; 4],
        ),
        with_header(&entry("[-1]", 0, 4), &[0; 4]),
        with_header(
            r#"{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}"#,
            &[0; 4],
        ),
        with_header(r#"{"a":{"dtype":"F32","shape":[1]}}"#, &[0; 4]),
    ];
    let made = HfDir::new(Arch::Llama, StDtype::F32);
    made.finish();
    for bytes in cases {
        made.write("model.safetensors", &bytes);
        let error = refusal(made.dir.path());
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]);
        assert!(error.contains("model.safetensors"), "{shown}: {error}");
    }
}

#[test]
fn unaligned_data_are_read_all_the_same() {
    let made = HfDir::new(Arch::Llama, StDtype::F32);
    let expected = tensors(&config(&made.config));
    let bytes = std::fs::read(made.finish().join("model.safetensors")).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + len]).unwrap().trim_end();
    for padding in 1..4 {
        let header = format!("{header}{}", " ".repeat(padding));
        let moved = with_header(&header, &bytes[8 + len..]);
        made.write("model.safetensors", moved);
        let weights = open(made.dir.path()).unwrap().weights;
        for (name, (_, values)) in &expected {
            assert!(&weights.get_f32(name).unwrap() == values, "{name}");
        }
    }
}

#[test]
fn tokenizers_that_would_crash_are_refused() {
    let made = HfDir::new(Arch::Llama, StDtype::F32);
    let dir = made.finish();
    // The merged token is longer than any in the vocabulary.
    let mut json = crate::support::tokenizer_json();
    let merges = json["model"]["merges"].as_array_mut().unwrap();
    merges.push(serde_json::json!(["Ġthereabouts", "Ġthereabouts"]));
    made.write("tokenizer.json", json.to_string());
    assert!(refusal(dir).contains("tokenizer.json"));
    // An id without an embedding.
    let mut json = crate::support::tokenizer_json();
    json["model"]["vocab"]["beyond"] = 5000.into();
    made.write("tokenizer.json", json.to_string());
    assert!(refusal(dir).contains("5000"));
    let deep = "[".repeat(100_000);
    for content in ["", "{}", "[]", "{\"model\": 3}", deep.as_str()] {
        made.write("tokenizer.json", content);
        assert!(refusal(dir).contains("tokenizer.json"));
    }
    std::fs::remove_file(dir.join("tokenizer.json")).unwrap();
    assert!(refusal(dir).contains("tokenizer.json"));
}
