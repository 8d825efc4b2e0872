//! The decoder against finite differences, against itself, and the two backends against each other.

use candle_core::{DType, Device};

use super::checkpoint::random_weights;
use super::*;
use crate::adapter::{
    Adapter, AdapterKind, AdapterSpec, BaseModel, Gradients, StoredDtype, Svd, Tying,
};
use crate::ops::Backend;
use crate::ops::random::Stream;

/// Two layers with every dimension different, q/k/v bias, grouped queries.
pub(crate) fn config(tie_word_embeddings: bool) -> ModelConfig {
    ModelConfig {
        arch: Arch::Qwen2,
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
        tie_word_embeddings,
        attention_bias: true,
        max_position_embeddings: 128,
        eos_token_ids: vec![0],
        bos_token_id: None,
        dtype: Some(Dtype::F32),
    }
}

pub(crate) fn decoder(placement: Placement) -> Decoder {
    decoder_of(config(true), placement)
}

fn decoder_of(config: ModelConfig, placement: Placement) -> Decoder {
    let raw = random_weights(&config, 3);
    let weights = Weights::load(&config, &raw, &placement).expect("random weights load");
    Decoder::new(config, weights, placement)
}

fn portable(dtype: DType) -> Placement {
    Placement {
        backend: Backend::Portable,
        device: Device::Cpu,
        dtype,
        as_stored: false,
        mmap: false,
    }
}

/// Rank 2, two numbers a group of three modules, on random bases; v set to multiples of 2⁻⁶.
pub(crate) fn adapter(decoder: &Decoder) -> Adapter {
    adapter_of(decoder, spec())
}

pub(crate) fn spec() -> AdapterSpec {
    AdapterSpec {
        u: 2,
        n_tie: 3,
        dtype: StoredDtype::F32,
        ..AdapterSpec::default()
    }
}

/// The same on another specification of rank 2.
pub(crate) fn adapter_of(decoder: &Decoder, spec: AdapterSpec) -> Adapter {
    let mut adapter = untrained(decoder, spec);
    let v: Vec<f32> = (0..adapter.num_parameters())
        .map(|i| ((i * 7 % 11) as f32 - 5.0) / 64.0)
        .collect();
    adapter.set_parameters(&v).expect("finite");
    adapter
}

/// The same at v = 0.
pub(crate) fn untrained(decoder: &Decoder, spec: AdapterSpec) -> Adapter {
    let base = BaseModel {
        name: "test".into(),
        hash: "test".into(),
        num_layers: decoder.config.num_hidden_layers,
    };
    let noise = |index: usize, len: usize| -> Vec<f32> {
        let stream = Stream {
            seed: 5,
            domain: 0,
            index: index as u32,
        };
        (0..len)
            .map(|i| 0.3 * stream.normal_pair(i as u64)[0] as f32)
            .collect()
    };
    let svds: Vec<Svd> = Tying::new(&spec, base.num_layers)
        .modules
        .iter()
        .map(|&id| {
            let linear = decoder.weights.blocks[id.layer].linear(id.kind);
            let (out, input) = linear.weight.dims().expect("a matrix");
            let (u, vt) = (
                noise(2 * id.index(), 2 * out),
                noise(2 * id.index() + 1, 2 * input),
            );
            Svd::new(u, vec![1.5, 0.5], vt).expect("lengths fit")
        })
        .collect();
    let dtype = match decoder.placement.dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    Adapter::from_svds(&spec, base, &svds, &Device::Cpu, dtype).expect("adapter")
}

const PROMPT: [u32; 5] = [3, 14, 15, 9, 2];
const COMPLETIONS: [&[u32]; 4] = [&[6, 5, 35], &[8], &[9, 7, 9, 3, 2, 3], &[6, 5, 34, 1]];

/// One group with a shared prompt and a second group of two.
fn grouped() -> Batch {
    let mut batch = Batch::default();
    batch.push_group(&PROMPT, &COMPLETIONS).expect("valid");
    batch.push_group(&[1], &COMPLETIONS[..2]).expect("valid");
    batch
}

/// The same sequences, each with a prompt of its own.
fn separate() -> Batch {
    let mut batch = Batch::default();
    for completion in COMPLETIONS {
        batch.push_sequence(&PROMPT, completion).expect("valid");
    }
    for completion in &COMPLETIONS[..2] {
        batch.push_sequence(&[1], completion).expect("valid");
    }
    batch
}

/// dL/dlogp of a loss with different weights, positive and negative.
fn coefficients(batch: &Batch) -> Vec<f64> {
    (0..batch.targets.len())
        .map(|n| ((n * 5 % 7) as f64 - 2.5) / 3.0)
        .collect()
}

fn gradient(decoder: &Decoder, adapter: &Adapter, batch: &Batch, keep: Keep) -> Gradients {
    let mut gradients = adapter.gradients();
    let known = Coefficients::Known(coefficients(batch));
    decoder
        .accumulate_gradients(adapter, batch, 0.7, keep.into(), known, &mut gradients)
        .expect("gradients");
    gradients
}

fn loss(decoder: &Decoder, adapter: &Adapter, batch: &Batch) -> f64 {
    let scores = decoder.score(Some(adapter), batch, 0.7).expect("scores");
    let coefficients = coefficients(batch);
    coefficients
        .iter()
        .zip(&scores.logprobs)
        .map(|(c, l)| c * l)
        .sum()
}

fn assert_close(got: &[f64], expected: &[f64], relative: f64) {
    assert_eq!(got.len(), expected.len());
    let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let error = got
        .iter()
        .zip(expected)
        .map(|(g, e)| (g - e).powi(2))
        .sum::<f64>()
        .sqrt();
    assert!(
        error <= relative * norm,
        "error {error:e} of norm {norm:e}:\n{got:?}\n{expected:?}"
    );
}

#[test]
fn gradient_of_v_is_that_of_finite_differences() {
    let decoder = decoder(portable(DType::F64));
    let batch = grouped();
    let mut adapter = adapter(&decoder);
    let got = gradient(&decoder, &adapter, &batch, Keep::Activations).sum();
    let v = adapter.parameters().to_vec();
    let step = 2f32.powi(-12);
    let expected: Vec<f64> = (0..v.len())
        .map(|i| {
            let mut at = |shift: f32| {
                let mut moved = v.clone();
                moved[i] += shift;
                adapter.set_parameters(&moved).expect("finite");
                loss(&decoder, &adapter, &batch)
            };
            (at(step) - at(-step)) / (2.0 * f64::from(step))
        })
        .collect();
    assert_close(&got, &expected, 1e-6);
}

#[test]
fn recomputing_a_block_changes_nothing() {
    for placement in [portable(DType::F64), Placement::cpu(DType::F32)] {
        let decoder = decoder(placement);
        let (adapter, batch) = (adapter(&decoder), grouped());
        let kept = gradient(&decoder, &adapter, &batch, Keep::Activations).sum();
        let computed_again = gradient(&decoder, &adapter, &batch, Keep::Inputs).sum();
        assert_eq!(kept, computed_again);
    }
}

#[test]
fn a_shared_prompt_gives_the_scores_and_gradient_of_separate_ones() {
    let decoder = decoder(portable(DType::F64));
    let adapter = adapter(&decoder);
    let (shared, apart) = (grouped(), separate());
    let scores = |batch: &Batch| {
        let scores = decoder.score(Some(&adapter), batch, 0.7).expect("scores");
        [scores.logprobs, scores.entropies].concat()
    };
    assert_close(&scores(&shared), &scores(&apart), 1e-12);
    assert_close(
        &gradient(&decoder, &adapter, &shared, Keep::Activations).sum(),
        &gradient(&decoder, &adapter, &apart, Keep::Activations).sum(),
        1e-10,
    );
}

#[test]
fn pieces_give_the_same_bits_in_one_pass_and_in_several() {
    let decoder = decoder(Placement::cpu(DType::F32));
    let (adapter, batch) = (adapter(&decoder), grouped());
    let together = gradient(&decoder, &adapter, &batch, Keep::Inputs);
    let mut one_by_one = adapter.gradients();
    let mut coefficients = coefficients(&batch).into_iter();
    for (prompt, completions) in [(&PROMPT[..], &COMPLETIONS[..]), (&[1], &COMPLETIONS[..2])] {
        let mut batch = Batch::default();
        batch.push_group(prompt, completions).expect("valid");
        let own = coefficients.by_ref().take(batch.targets.len()).collect();
        let known = Coefficients::Known(own);
        let keep = Keep::Inputs.into();
        decoder
            .accumulate_gradients(&adapter, &batch, 0.7, keep, known, &mut one_by_one)
            .expect("gradients");
    }
    assert_eq!(one_by_one.sum(), together.sum());
}

/// The gradient of every completion's part of [`loss`], `[completions, parameters]`.
fn per_sequence(decoder: &Decoder, adapter: &Adapter, batch: &Batch, keep: Keep) -> Vec<f64> {
    let rows = adapter.gradients_per_sequence(batch.lengths.len());
    let mut rows = rows.expect("small");
    let known = Coefficients::Known(coefficients(batch));
    decoder
        .accumulate_gradients(adapter, batch, 0.7, keep.into(), known, &mut rows)
        .expect("gradients");
    rows.rows().expect("rows").to_vec()
}

#[test]
fn per_sequence_gradients_with_shared_prompts_are_those_of_finite_differences() {
    let decoder = decoder(portable(DType::F64));
    let (mut adapter, batch) = (adapter(&decoder), grouped());
    let got = per_sequence(&decoder, &adapter, &batch, Keep::Activations);
    let (v, step) = (adapter.parameters().to_vec(), 2f32.powi(-14));
    let completions = batch.lengths.len();
    let mut expected = vec![0.0; completions * v.len()];
    for i in 0..v.len() {
        let mut at = |shift: f32| -> Vec<f64> {
            let mut moved = v.clone();
            moved[i] += shift;
            adapter.set_parameters(&moved).expect("finite");
            let scores = decoder.score(Some(&adapter), &batch, 0.7).expect("scores");
            let parts = coefficients(&batch).into_iter().zip(&scores.logprobs);
            let parts: Vec<f64> = parts.map(|(c, l)| c * l).collect();
            batch
                .by_completion(&parts)
                .map(|own| own.iter().sum())
                .collect()
        };
        for (s, (high, low)) in at(step).iter().zip(at(-step)).enumerate() {
            expected[s * v.len() + i] = (high - low) / (2.0 * f64::from(step));
        }
    }
    for (got, expected) in got.chunks(v.len()).zip(expected.chunks(v.len())) {
        assert_close(got, expected, 1e-5);
    }
}

#[test]
fn per_sequence_gradients_are_those_of_separate_prompts_and_add_up() {
    let exact = decoder(portable(DType::F64));
    let fast = decoder(Placement::cpu(DType::F32));
    let (shared, apart) = (grouped(), separate());
    let adapter = adapter(&exact);
    let rows = per_sequence(&exact, &adapter, &shared, Keep::Inputs);
    assert_close(
        &rows,
        &per_sequence(&exact, &adapter, &apart, Keep::Inputs),
        1e-12,
    );
    let mut sum = vec![0.0; adapter.num_parameters()];
    for row in rows.chunks(sum.len()) {
        sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
    }
    let total = gradient(&exact, &adapter, &shared, Keep::Inputs).sum();
    assert_close(&sum, &total, 1e-12);
    let adapter = self::adapter(&fast);
    for keep in [Keep::Inputs, Keep::Activations] {
        let on_cpu = per_sequence(&fast, &adapter, &shared, keep);
        assert_close(&on_cpu, &rows, 1e-4);
        assert_eq!(on_cpu, per_sequence(&fast, &adapter, &apart, keep));
    }
}

#[test]
fn the_cpu_kernels_agree_with_the_portable_path() {
    let (fast, reference) = (
        decoder(Placement::cpu(DType::F32)),
        decoder(portable(DType::F64)),
    );
    let (fast_adapter, reference_adapter) = (adapter(&fast), adapter(&reference));
    let batch = grouped();
    let scores = |decoder: &Decoder, adapter: &Adapter| {
        let scores = decoder.score(Some(adapter), &batch, 0.7).expect("scores");
        [scores.logprobs, scores.entropies].concat()
    };
    assert_close(
        &scores(&fast, &fast_adapter),
        &scores(&reference, &reference_adapter),
        1e-6,
    );
    assert_close(
        &gradient(&fast, &fast_adapter, &batch, Keep::Activations).sum(),
        &gradient(&reference, &reference_adapter, &batch, Keep::Activations).sum(),
        1e-4,
    );
}

#[test]
fn on_the_cpu_a_token_has_the_same_bits_alone_and_in_a_batch() {
    let decoder = decoder(Placement::cpu(DType::F32));
    let adapter = adapter(&decoder);
    let whole = decoder
        .score(Some(&adapter), &grouped(), 0.7)
        .expect("scores");
    let mut alone = Vec::new();
    for (prompt, completions) in [(&PROMPT[..], &COMPLETIONS[..]), (&[1], &COMPLETIONS[..2])] {
        for completion in completions {
            let mut batch = Batch::default();
            batch.push_sequence(prompt, completion).expect("valid");
            let scores = decoder.score(Some(&adapter), &batch, 0.7).expect("scores");
            alone.extend(scores.logprobs);
        }
    }
    assert_eq!(whole.logprobs, alone);
}

fn full(decoder: &Decoder) -> Adapter {
    let spec = AdapterSpec {
        kind: AdapterKind::Full,
        ..AdapterSpec::default()
    };
    let base = BaseModel {
        name: "test".into(),
        hash: "test".into(),
        num_layers: decoder.config.num_hidden_layers,
    };
    Adapter::full(&spec, base, &decoder.weights).expect("adapter")
}

/// Every 41st weight and some of each norm and bias; the head tied and not.
#[test]
fn gradient_of_the_weights_is_that_of_finite_differences() {
    for tied in [true, false] {
        let decoder = decoder_of(config(tied), portable(DType::F64));
        let batch = grouped();
        let mut adapter = full(&decoder);
        let all = gradient(&decoder, &adapter, &batch, Keep::Inputs).sum();
        let start = adapter.parameters().to_vec();
        let chosen: Vec<usize> = (0..start.len()).step_by(41).collect();
        let got: Vec<f64> = chosen.iter().map(|&i| all[i]).collect();
        let step = 2f32.powi(-10);
        let expected: Vec<f64> = chosen
            .iter()
            .map(|&i| {
                let mut at = |shift: f32| {
                    let mut moved = start.clone();
                    moved[i] += shift;
                    adapter.set_parameters(&moved).expect("finite");
                    (loss(&decoder, &adapter, &batch), f64::from(moved[i]))
                };
                let ((above, high), (below, low)) = (at(step), at(-step));
                (above - below) / (high - low)
            })
            .collect();
        assert_close(&got, &expected, 1e-3);
        let fast = decoder_of(config(tied), Placement::cpu(DType::F32));
        let on_cpu = gradient(&fast, &full(&fast), &batch, Keep::Inputs).sum();
        assert_close(&on_cpu, &all, 1e-4);
    }
}
