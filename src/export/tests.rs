//! What is written, read back with the safetensors crate.

use candle_core::{DType, Device};
use safetensors::SafeTensors;

use super::stream::Writer;
use super::*;
use crate::adapter::{Adapter, AdapterSpec, BaseModel, Projection, SvdCache, Tie, projection};
use crate::model::{Arch, Decoder, ModelConfig, Placement, tests as fixtures};

fn adapter() -> (Decoder, Adapter) {
    let decoder = fixtures::decoder(Placement::cpu(DType::F32));
    let adapter = fixtures::adapter(&decoder);
    (decoder, adapter)
}

fn values(file: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<f32>) {
    let view = file.tensor(name).expect(name);
    let bytes = view.data().as_chunks::<4>().0;
    let values = bytes.iter().map(|b| f32::from_le_bytes(*b)).collect();
    (view.shape().to_vec(), values)
}

/// Row-major `[m, k]` · `[k, n]` in f64.
fn product(a: &[f32], b: &[f32], k: usize) -> Vec<f64> {
    let (m, n) = (a.len() / k, b.len() / k);
    let entry = |i: usize, j: usize| -> f64 {
        (0..k)
            .map(|l| f64::from(a[i * k + l]) * f64::from(b[l * n + j]))
            .sum()
    };
    (0..m * n).map(|at| entry(at / n, at % n)).collect()
}

/// ΔW of every module, from the adapter itself.
fn updates(adapter: &Adapter) -> Vec<Vec<f32>> {
    let modules = adapter.tying().modules.iter();
    modules
        .map(|&id| {
            let low_rank = adapter.low_rank(id).expect("adapted");
            let delta = low_rank.b.matmul(&low_rank.m).expect("b m");
            let delta = delta.matmul(&low_rank.a).expect("b m a");
            delta.flatten_all().expect("flat").to_vec1().expect("f32")
        })
        .collect()
}

fn assert_close(got: &[f64], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        assert!(
            (got - f64::from(*expected)).abs() < 1e-6,
            "{got} {expected}"
        );
    }
}

#[test]
fn lora_files_multiply_out_to_the_update() {
    let (_, adapter) = adapter();
    let dir = tempfile::tempdir().expect("a folder");
    write_lora(&adapter, dir.path()).expect("written");
    let bytes = std::fs::read(dir.path().join("adapter_model.safetensors")).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    assert_eq!(file.len(), 2 * adapter.tying().modules.len());
    for (id, expected) in adapter.tying().modules.iter().zip(updates(&adapter)) {
        let (_, a) = values(&file, &format!("base_model.model.{id}.lora_A.weight"));
        let (shape, b) = values(&file, &format!("base_model.model.{id}.lora_B.weight"));
        assert_eq!(shape[1], 2);
        assert_close(&product(&b, &a, 2), &expected);
    }
}

#[test]
fn peft_files_hold_everything_the_update_is_made_of() {
    let (_, adapter) = adapter();
    let dir = tempfile::tempdir().expect("a folder");
    write_peft(&adapter, dir.path()).expect("written");
    let bytes = std::fs::read(dir.path().join("adapter_model.safetensors")).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    for (index, (&id, expected)) in adapter
        .tying()
        .modules
        .iter()
        .zip(updates(&adapter))
        .enumerate()
    {
        let part = |part: &str| values(&file, &format!("base_model.model.{id}.tinylora_{part}"));
        let ((_, a), (_, b), (shape, p)) = (part("A"), part("B"), part("P"));
        assert_eq!(
            (shape, &p),
            (vec![2, 2, 2], &projection(adapter.spec(), id))
        );
        let (_, v) = values(&file, &format!("base_model.tinylora_v.{index}"));
        let mixed: Vec<f32> = (0..4).map(|i| v[0] * p[i] + v[1] * p[4 + i]).collect();
        let bm: Vec<f32> = product(&b, &mixed, 2).iter().map(|&x| x as f32).collect();
        assert_close(&product(&bm, &a, 2), &expected);
    }
}

#[test]
fn gguf_files_hold_the_update_in_the_rows_order_of_their_architecture() {
    use candle_core::quantized::gguf_file::{Content, Value};

    let (decoder, adapter) = adapter();
    let dir = tempfile::tempdir().expect("a folder");
    for arch in [Arch::Qwen2, Arch::Llama] {
        let config = ModelConfig {
            arch,
            ..decoder.config.clone()
        };
        let path = dir.path().join("adapter.gguf");
        write_gguf_lora(&adapter, &config, &path).expect("written");
        let mut file = std::fs::File::open(&path).expect("a file");
        let content = Content::read(&mut file).expect("GGUF");
        let text = |key: &str| match &content.metadata[key] {
            Value::String(text) => text.clone(),
            other => format!("{other:?}"),
        };
        assert_eq!(text("general.type"), "adapter");
        assert_eq!(text("adapter.type"), "lora");
        assert_eq!(text("general.architecture"), arch.name());
        let alpha = content.metadata["adapter.lora.alpha"]
            .to_f32()
            .expect("f32");
        assert_eq!(alpha, 2.0);
        assert_eq!(
            content.tensor_infos.len(),
            2 * adapter.tying().modules.len()
        );
        let names = [
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
        ];
        for (id, expected) in adapter.tying().modules.iter().zip(updates(&adapter)) {
            let mut read = |part: &str| {
                let name = format!("blk.{}.{}.weight.{part}", id.layer, names[id.kind.index()]);
                let tensor = content.tensor(&mut file, &name, &Device::Cpu).expect(&name);
                tensor.dequantize(&Device::Cpu).expect("f32")
            };
            let (a, b) = (read("lora_a"), read("lora_b"));
            let columns = a.dim(1).expect("a matrix");
            let delta = b.matmul(&a).and_then(|d| d.to_vec2::<f32>()).expect("b a");
            let heads = match (arch, id.kind.index()) {
                (Arch::Llama, 0) => Some(config.num_attention_heads),
                (Arch::Llama, 1) => Some(config.num_key_value_heads),
                _ => None,
            };
            // Rows j and j + head / 2 of a head are rows 2j and 2j + 1 there.
            let place = |row: usize| match heads {
                None => row,
                Some(heads) => {
                    let head = delta.len() / heads;
                    let (start, j) = (row / head * head, row % head);
                    start
                        + if j < head / 2 {
                            2 * j
                        } else {
                            2 * j - head + 1
                        }
                }
            };
            for (row, expected) in expected.chunks_exact(columns).enumerate() {
                let row: Vec<f64> = delta[place(row)].iter().map(|&x| x.into()).collect();
                assert_close(&row, expected);
            }
        }
    }
}

#[test]
fn peft_directories_share_v_where_pefts_groups_do() {
    let (decoder, _) = adapter();
    let spec = AdapterSpec {
        tie: Tie::Peft,
        weight_tying: 0.8,
        projection: Projection::Peft,
        ..AdapterSpec::default()
    };
    let base = BaseModel {
        name: "test".into(),
        hash: "test".into(),
        num_layers: 2,
    };
    let cache = SvdCache::disabled();
    let mut adapter = Adapter::new(&spec, base, &decoder, &cache, &|_, _| ()).expect("an adapter");
    adapter.set_parameters(&[0.25, 0.5, 0.75]).expect("finite");
    let dir = tempfile::tempdir().expect("a folder");
    write_peft(&adapter, dir.path()).expect("written");
    let bytes = std::fs::read(dir.path().join("adapter_model.safetensors")).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    assert_eq!(file.len(), 3 * 14 + 3);
    assert_eq!(
        values(&file, "base_model.tinylora_v.2"),
        (vec![1], vec![0.75])
    );
    let config = std::fs::read_to_string(dir.path().join("adapter_config.json")).expect("a file");
    assert!(config.contains("\"weight_tying\": 0.8"), "{config}");
}

#[test]
fn a_stream_refuses_what_was_not_announced_and_leaves_no_file() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("model.safetensors");
    let announced = vec![("a".to_owned(), vec![2, 3]), ("b".to_owned(), vec![1])];
    let mut writer = Writer::create(&path, Dtype::Bf16, announced.clone()).expect("created");
    writer.write(&[1.0; 6]).expect("announced");
    assert!(writer.write(&[1.0; 2]).is_err());
    drop(writer);
    let mut writer = Writer::create(&path, Dtype::Bf16, announced).expect("created");
    writer.write(&[1.5; 6]).expect("announced");
    assert!(writer.finish().is_err());
    let left = std::fs::read_dir(dir.path()).expect("a folder").count();
    assert_eq!(left, 0);
}
