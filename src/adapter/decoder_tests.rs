//! Every kind on a small decoder: the start changes nothing, gradients are those of finite
//! differences, and the CPU kernels agree with the portable path for any number of threads.

use candle_core::{DType, Device};

use super::*;
use crate::model::{
    Arch, Batch, Coefficients, Dtype, GradientPass, Keep, ModelConfig, Placement, RopeConfig,
    RopeScaling, ScorePass, Weights, expected_tensors, random_weights,
};
use crate::ops::Backend;
use crate::ops::head::Scores;
use crate::ops::random::Stream;

pub(super) fn decoder(tied: bool, placement: Placement) -> Decoder {
    let config = ModelConfig {
        arch: Arch::Qwen2,
        hidden_size: 12,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        num_key_value_heads: 1,
        head_dim: 4,
        intermediate_size: 20,
        vocab_size: 17,
        rms_norm_eps: 1e-6,
        rope: RopeConfig {
            theta: 10_000.0,
            scaling: RopeScaling::None,
        },
        tie_word_embeddings: tied,
        attention_bias: true,
        max_position_embeddings: 64,
        eos_token_ids: vec![0],
        bos_token_id: None,
        dtype: Some(Dtype::F32),
    };
    let weights = Weights::load(&config, &random_weights(&config, 9), &placement).unwrap();
    Decoder::new(config, weights, placement)
}

fn exact() -> Placement {
    Placement {
        backend: Backend::Portable,
        device: Device::Cpu,
        dtype: DType::F64,
        as_stored: false,
        mmap: false,
    }
}

pub(super) fn spec(kind: AdapterKind) -> AdapterSpec {
    let lora_alpha = (kind == AdapterKind::Lora).then_some(6.0);
    AdapterSpec {
        kind,
        lora_alpha,
        n_tie: 3,
        ..Default::default()
    }
}

pub(super) fn adapter(spec: &AdapterSpec, decoder: &Decoder) -> Adapter {
    let base = BaseModel {
        name: "small".into(),
        hash: "00".into(),
        num_layers: 2,
    };
    Adapter::new(spec, base, decoder, &SvdCache::disabled(), &|_, _| ()).unwrap()
}

/// Moves every parameter a little, so that no gradient vanishes; exact in f32.
pub(super) fn disturb(adapter: &mut Adapter) {
    let noise = Stream {
        seed: 4,
        domain: 96,
        index: 0,
    }
    .normals(adapter.num_parameters());
    let moved: Vec<f32> = adapter
        .parameters()
        .iter()
        .zip(noise)
        .map(|(x, z)| ((f64::from(*x) + z / 8.0) * 1024.0).round() as f32 / 1024.0)
        .collect();
    adapter.set_parameters(&moved).unwrap();
}

fn batch() -> Batch {
    let mut batch = Batch::default();
    batch
        .push_group(&[3, 1, 4, 1], &[&[5, 9, 2], &[6], &[5, 3, 5, 8]])
        .unwrap();
    batch.push_sequence(&[9, 7], &[9, 3]).unwrap();
    batch
}

fn coefficients(batch: &Batch) -> Vec<f64> {
    (0..batch.targets.len())
        .map(|n| (n * 5 % 7) as f64 - 2.5)
        .collect()
}

fn loss(decoder: &Decoder, adapter: Option<&Adapter>) -> f64 {
    let scores = decoder.score(adapter, &batch(), 1.0).unwrap();
    coefficients(&batch())
        .iter()
        .zip(&scores.logprobs)
        .map(|(c, l)| c * l)
        .sum()
}

fn gradient(decoder: &Decoder, adapter: &Adapter) -> Vec<f64> {
    let mut gradients = adapter.gradients();
    let known = Coefficients::Known(coefficients(&batch()));
    decoder
        .accumulate_gradients(
            adapter,
            &batch(),
            1.0,
            Keep::Inputs.into(),
            known,
            &mut gradients,
        )
        .unwrap();
    gradients.sum()
}

pub(super) const KINDS: [AdapterKind; 4] = [
    AdapterKind::TinyLora,
    AdapterKind::LoraXs,
    AdapterKind::Lora,
    AdapterKind::Full,
];

#[test]
fn every_kind_starts_as_the_frozen_model() {
    for tied in [true, false] {
        for placement in [exact(), Placement::cpu(DType::F32)] {
            let decoder = decoder(tied, placement);
            let frozen = loss(&decoder, None);
            for kind in KINDS {
                let mut adapter = adapter(&spec(kind), &decoder);
                let tensors = adapter.tensors().unwrap();
                let size = |(_, shape): &(String, Vec<usize>)| shape.iter().product::<usize>();
                let sizes: usize = tensors.iter().map(size).sum();
                assert_eq!(sizes, adapter.num_parameters());
                assert_eq!(loss(&decoder, Some(&adapter)), frozen, "{kind:?}");
                disturb(&mut adapter);
                assert!(
                    (loss(&decoder, Some(&adapter)) - frozen).abs() > 1e-3,
                    "{kind:?}"
                );
            }
        }
    }
}

#[test]
fn gradients_of_every_kind_are_those_of_finite_differences() {
    for (kind, tied) in KINDS
        .map(|kind| (kind, true))
        .into_iter()
        .chain([(AdapterKind::Full, false)])
    {
        let decoder = decoder(tied, exact());
        let mut adapter = adapter(&spec(kind), &decoder);
        disturb(&mut adapter);
        let got = gradient(&decoder, &adapter);
        let scale = got.iter().map(|x| x * x).sum::<f64>().sqrt() / (got.len() as f64).sqrt();
        let start = adapter.parameters().to_vec();
        // A few of every tensor: the ends and one between.
        let mut first = 0;
        for (name, shape) in adapter.tensors().unwrap() {
            let size: usize = shape.iter().product();
            for i in [first, first + size / 3, first + size - 1] {
                let step = 2f32.powi(-12);
                let mut at = |shift: f32| {
                    let mut moved = start.clone();
                    moved[i] += shift;
                    adapter.set_parameters(&moved).unwrap();
                    loss(&decoder, Some(&adapter))
                };
                let expected = (at(step) - at(-step)) / f64::from(2.0 * step);
                assert!(
                    (got[i] - expected).abs() < 1e-4 * (expected.abs() + scale),
                    "{kind:?} {name} [{i}]: {} instead of {expected}",
                    got[i]
                );
            }
            first += size;
        }
    }
}

#[test]
fn the_cpu_path_agrees_and_has_the_same_bits_for_any_number_of_threads() {
    for kind in KINDS {
        let (fast, reference) = (
            decoder(true, Placement::cpu(DType::F32)),
            decoder(true, exact()),
        );
        let mut fast_adapter = adapter(&spec(kind), &fast);
        let mut reference_adapter = adapter(&spec(kind), &reference);
        disturb(&mut reference_adapter);
        fast_adapter
            .set_parameters(reference_adapter.parameters())
            .unwrap();
        let expected = gradient(&reference, &reference_adapter);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| gradient(&fast, &fast_adapter))
        };
        let got = run(1);
        assert_eq!(got, run(3), "{kind:?}");
        let distance = |a: &[f64], b: &[f64]| {
            a.iter()
                .zip(b)
                .map(|(x, y)| (x - y).powi(2))
                .sum::<f64>()
                .sqrt()
        };
        let norm = distance(&expected, &vec![0.0; expected.len()]);
        assert!(distance(&got, &expected) < 1e-4 * norm, "{kind:?}");
    }
}

/// A batch of each run, with its adapter and temperature.
fn shares() -> Vec<(Option<AdapterSpec>, f64, Batch)> {
    let tinylora = spec(AdapterKind::TinyLora);
    let small = |sigma, r, target_modules: Option<Vec<ModuleKind>>| {
        let defaults = AdapterSpec::default().target_modules;
        Some(AdapterSpec {
            sigma,
            r,
            target_modules: target_modules.unwrap_or(defaults),
            ..tinylora.clone()
        })
    };
    let some = vec![ModuleKind::Q, ModuleKind::Down];
    let mut one = Batch::default();
    one.push_sequence(&[2, 3, 4], &[5, 6]).unwrap();
    vec![
        (Some(tinylora.clone()), 1.0, batch()),
        (
            Some(AdapterSpec {
                projection_seed: 5,
                n_tie: 1,
                ..tinylora.clone()
            }),
            1.0,
            one.clone(),
        ),
        (small(Sigma::Split, 2, None), 0.8, batch()),
        (small(Sigma::Output, 1, Some(some)), 1.0, one.clone()),
        (Some(spec(AdapterKind::LoraXs)), 1.0, one.clone()),
        (Some(spec(AdapterKind::Lora)), 1.0, batch()),
        (None, 0.8, one),
        (Some(tinylora), 1.0, batch()),
    ]
}

#[test]
fn rows_of_several_adapters_have_the_bits_of_each_alone() {
    for placement in [Placement::cpu(DType::F32), exact()] {
        let is_cpu = placement.backend == Backend::Cpu;
        let decoder = decoder(true, placement);
        let mut runs: Vec<(Option<Adapter>, f64, Batch)> = Vec::new();
        for (number, (spec, temperature, batch)) in shares().into_iter().enumerate() {
            let own = spec.map(|spec| {
                let mut own = adapter(&spec, &decoder);
                disturb(&mut own);
                let moved: Vec<f32> = own
                    .parameters()
                    .iter()
                    .map(|x| x + number as f32 / 64.0)
                    .collect();
                own.set_parameters(&moved).unwrap();
                for other in runs.iter().filter_map(|(other, ..)| other.as_ref()) {
                    own.share_factors(other).unwrap();
                }
                own
            });
            runs.push((own, temperature, batch));
        }
        let of = |i: usize| runs[i].0.as_ref().unwrap();
        assert!(of(1).shares_factors(of(0)) && of(4).shares_factors(of(0)));
        assert!(!of(2).shares_factors(of(0)) && !of(5).shares_factors(of(0)));
        let same = |together: &[f64], alone: &[f64], what: &str| {
            assert_eq!(together.len(), alone.len());
            for (t, a) in together.iter().zip(alone) {
                // Only the CPU path promises the same bits.
                let close = (t - a).abs() <= 1e-12 * a.abs().max(1.0);
                assert!(if is_cpu { t == a } else { close }, "{what}: {t} {a}");
            }
        };

        let passes: Vec<ScorePass<'_>> = runs
            .iter()
            .map(|(adapter, temperature, batch)| ScorePass {
                adapter: adapter.as_ref(),
                batch,
                temperature: *temperature,
            })
            .collect();
        let together = decoder.score_together(&passes).unwrap();
        for (pass, together) in passes.iter().zip(together) {
            let alone = decoder
                .score(pass.adapter, pass.batch, pass.temperature)
                .unwrap();
            same(&together.logprobs, &alone.logprobs, "scores");
            same(&together.entropies, &alone.entropies, "entropies");
        }

        for keep in [Keep::Inputs, Keep::Activations] {
            let trained: Vec<_> = runs
                .iter()
                .filter_map(|(adapter, t, batch)| Some((adapter.as_ref()?, *t, batch)))
                .collect();
            let mut sums: Vec<Gradients> = trained.iter().map(|(a, ..)| a.gradients()).collect();
            let mut losses: Vec<_> = trained
                .iter()
                .map(|_| |scores: &Scores| Ok(scores.logprobs.iter().map(|l| 0.1 * l).collect()))
                .collect();
            let passes = trained.iter().zip(&mut sums).zip(&mut losses).enumerate();
            let passes =
                passes.map(
                    |(i, ((&(adapter, temperature, batch), sum), loss))| GradientPass {
                        adapter,
                        batch,
                        temperature,
                        inputs: keep.into(),
                        coefficients: match i % 2 {
                            0 => Coefficients::Known(coefficients(batch)),
                            _ => Coefficients::OfScores(loss),
                        },
                        gradients: sum,
                    },
                );
            decoder.accumulate_together(passes.collect()).unwrap();
            for (i, ((adapter, temperature, batch), together)) in
                trained.iter().zip(&sums).enumerate()
            {
                let mut alone = adapter.gradients();
                let mut loss = |s: &Scores| Ok(s.logprobs.iter().map(|l| 0.1 * l).collect());
                let own = match i % 2 {
                    0 => Coefficients::Known(coefficients(batch)),
                    _ => Coefficients::OfScores(&mut loss),
                };
                decoder
                    .accumulate_gradients(
                        adapter,
                        batch,
                        *temperature,
                        keep.into(),
                        own,
                        &mut alone,
                    )
                    .unwrap();
                assert!(alone.sum().iter().any(|g| *g != 0.0));
                same(&together.sum(), &alone.sum(), &format!("gradient {i}"));
            }
        }
    }
}

#[test]
fn trained_weights_share_no_pass() {
    let decoder = decoder(true, Placement::cpu(DType::F32));
    let full = adapter(&spec(AdapterKind::Full), &decoder);
    let other = adapter(&spec(AdapterKind::TinyLora), &decoder);
    assert!(AdapterSet::new(vec![Some(&full)]).is_ok());
    for other in [None, Some(&other), Some(&full)] {
        assert!(AdapterSet::new(vec![other, Some(&full)]).is_err());
    }
}

#[test]
fn a_second_start_takes_the_decompositions_from_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let cache = SvdCache::at(dir.path());
    let decoder = decoder(true, Placement::cpu(DType::F32));
    let computed = std::sync::atomic::AtomicUsize::new(0);
    let build = |hash: &str, r: usize| {
        let base = BaseModel {
            name: "small".into(),
            hash: hash.into(),
            num_layers: 2,
        };
        let spec = AdapterSpec {
            r,
            ..Default::default()
        };
        let count = |_: usize, _: usize| {
            computed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        };
        let adapter = Adapter::new(&spec, base, &decoder, &cache, &count).unwrap();
        let id = ModuleId::new(1, ModuleKind::Up);
        let b = adapter.low_rank(id).unwrap().b.flatten_all().unwrap();
        (
            b.to_vec1::<f32>().unwrap(),
            computed.swap(0, std::sync::atomic::Ordering::Relaxed),
        )
    };
    let (first, count) = build("abc", 2);
    assert_eq!(count, 14);
    assert_eq!(build("abc", 2), (first.clone(), 0));
    assert_eq!(build("abd", 2), (first, 14));
    assert_eq!(build("abc", 1).1, 14);
}

#[test]
fn full_takes_over_biases_norms_and_both_ends_of_the_model() {
    let decoder = decoder(false, Placement::cpu(DType::BF16));
    let adapter = adapter(&spec(AdapterKind::Full), &decoder);
    let sorted = |mut tensors: Vec<(String, Vec<usize>)>| {
        tensors.sort();
        tensors
    };
    let expected = expected_tensors(&decoder.config);
    assert_eq!(sorted(adapter.tensors().unwrap()), sorted(expected));
    assert!(adapter.trains_weights());
    assert!(adapter.low_rank(ModuleId::new(0, ModuleKind::Q)).is_none());
    let (own, frozen) = (
        adapter.full_weights().unwrap().named(),
        decoder.weights.named(),
    );
    for ((_, own), (_, frozen)) in own.into_iter().zip(frozen) {
        assert_eq!(own.to_f32().unwrap(), frozen.to_f32().unwrap());
    }
    assert!(adapter.gradients_per_sequence(2).is_err());
}

#[test]
fn a_rank_beyond_the_model_is_a_configuration_error() {
    let decoder = decoder(true, exact());
    let base = BaseModel {
        name: "small".into(),
        hash: "00".into(),
        num_layers: 2,
    };
    let spec = AdapterSpec {
        r: 5,
        ..Default::default()
    };
    let error = Adapter::new(&spec, base, &decoder, &SvdCache::disabled(), &|_, _| ()).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(
        error.to_string().contains("layers.0.self_attn.k_proj"),
        "{error}"
    );
}
