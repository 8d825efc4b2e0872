//! The kinds against their formulas: updates, gradients, rounding.

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::ops::random::Stream;

const OUT: usize = 6;
const IN: usize = 5;

fn random(index: u32, n: usize) -> Vec<f64> {
    Stream {
        seed: 1,
        domain: 99,
        index,
    }
    .normals(n)
}

fn tensor(index: u32, rows: usize, columns: usize) -> Tensor {
    Tensor::from_vec(random(index, rows * columns), (rows, columns), &Device::Cpu).unwrap()
}

/// Not orthonormal: the adapter must not care.
fn svds(n: usize, r: usize) -> Vec<Svd> {
    let floats = |index, n| random(index, n).into_iter().map(|x| x as f32).collect();
    (0..n as u32)
        .map(|i| {
            let s = (0..r).map(|k| 3.0 / (k + 1) as f32).collect();
            Svd::new(floats(1000 + i, OUT * r), s, floats(2000 + i, r * IN)).unwrap()
        })
        .collect()
}

fn adapter(spec: &AdapterSpec, num_layers: usize, dtype: DType) -> Adapter {
    let base = BaseModel {
        name: "toy".into(),
        hash: "00".into(),
        num_layers,
    };
    let n = Tying::new(spec, num_layers).modules.len();
    Adapter::from_svds(spec, base, &svds(n, spec.r), &Device::Cpu, dtype).unwrap()
}

fn delta(adapter: &Adapter, id: ModuleId) -> Vec<f64> {
    let LowRank { a, m, b, .. } = adapter.low_rank(id).unwrap();
    let product = b.matmul(m).unwrap().matmul(a).unwrap();
    product.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn an_untrained_tinylora_changes_nothing() {
    let adapter = adapter(&AdapterSpec::default(), 3, DType::F64);
    assert_eq!(adapter.num_parameters(), 2);
    assert!(ModuleId::all(3).all(|id| delta(&adapter, id).iter().all(|&x| x == 0.0)));
    assert!(adapter.low_rank(ModuleId::new(3, ModuleKind::Q)).is_none());
}

#[test]
fn the_update_is_u_sigma_r_vt_wherever_sigma_stands() {
    let id = ModuleId::new(1, ModuleKind::Gate);
    let v = [0.25f32, -1.5];
    for sigma in [Sigma::Output, Sigma::Input, Sigma::Split] {
        let spec = AdapterSpec {
            u: 2,
            sigma,
            scaling: 0.5,
            tie: Tie::All,
            ..Default::default()
        };
        let mut adapter = adapter(&spec, 2, DType::F64);
        adapter.set_parameters(&v).unwrap();

        let svd = &svds(14, 2)[id.index()];
        let s: Vec<f64> = svd.values().iter().map(|&s| f64::from(s)).collect();
        let left = |s: f64| match sigma {
            Sigma::Output => s,
            Sigma::Input => 1.0,
            Sigma::Split => s.sqrt(),
        };
        let right = |s: f64| s / left(s);
        let p = projection(&spec, id);
        let (vt, u) = svd.factors(Sigma::Output);
        for (at, &actual) in delta(&adapter, id).iter().enumerate() {
            let (row, column) = (at / IN, at % IN);
            let mut expected = 0.0;
            for i in 0..2 {
                for j in 0..2 {
                    let r: f64 = (0..2).map(|n| f64::from(v[n] * p[n * 4 + i * 2 + j])).sum();
                    let u = f64::from(u[row * 2 + i]) / s[i];
                    let vt = f64::from(vt[j * IN + column]);
                    expected += 0.5 * u * left(s[i]) * r * right(s[j]) * vt;
                }
            }
            assert!(
                (actual - expected).abs() < 1e-5,
                "{sigma:?}: {actual} {expected}"
            );
        }
    }
}

/// Rows of three sequences, interleaved.
const ROWS: [u32; 7] = [0, 2, 1, 1, 0, 2, 2];

/// Loss `Σ_t w_t |y_t|² / 2` of every adapted map's own toy problem, sequence by sequence.
fn toy_loss(adapter: &Adapter, num_layers: usize, gradients: Option<&mut Gradients>) -> [f64; 3] {
    let mut losses = [0.0; 3];
    let mut gradients = gradients;
    for id in ModuleId::all(num_layers) {
        let Some(LowRank { a, m, b, .. }) = adapter.low_rank(id) else {
            continue;
        };
        let x = tensor(id.index() as u32, ROWS.len(), IN);
        let frozen = tensor(500 + id.index() as u32, ROWS.len(), OUT);
        let xa = x.matmul(&a.t().unwrap()).unwrap();
        let update = xa
            .matmul(&m.t().unwrap())
            .unwrap()
            .matmul(&b.t().unwrap())
            .unwrap();
        let y = (frozen + update).unwrap();
        for (row, &sequence) in y.to_vec2::<f64>().unwrap().iter().zip(&ROWS) {
            losses[sequence as usize] += row.iter().map(|y| y * y / 2.0).sum::<f64>();
        }
        if let Some(gradients) = gradients.as_deref_mut() {
            let gb = y.matmul(b).unwrap();
            let lin = LinearGrads {
                x: &x,
                g: &y,
                low_rank: Some((&xa, &gb)),
            };
            adapter.accumulate(id, &lin, &ROWS, gradients).unwrap();
        }
    }
    losses
}

#[test]
fn gradients_agree_with_finite_differences_sequence_by_sequence() {
    let tiny = AdapterSpec {
        u: 3,
        n_tie: 4,
        scaling: 0.7,
        r: 3,
        ..Default::default()
    };
    let xs = AdapterSpec {
        kind: AdapterKind::LoraXs,
        scaling: 0.7,
        ..Default::default()
    };
    for (spec, count) in [(tiny, 4 * 3), (xs, 14 * 4)] {
        let mut adapter = adapter(&spec, 2, DType::F64);
        assert_eq!(adapter.num_parameters(), count);
        let start: Vec<f32> = random(7, count)
            .iter()
            .map(|x| (x * 64.0).round() as f32 / 64.0)
            .collect();
        adapter.set_parameters(&start).unwrap();
        let mut gradients = adapter.gradients_per_sequence(3).unwrap();
        toy_loss(&adapter, 2, Some(&mut gradients));
        let mut total = adapter.gradients();
        toy_loss(&adapter, 2, Some(&mut total));
        let rows = gradients.rows().unwrap().chunks_exact(count);
        let rows: Vec<Vec<f64>> = rows.map(<[f64]>::to_vec).collect();

        // The loss is quadratic in every parameter: central differences are exact.
        let step = 0.125f32;
        for i in 0..count {
            let mut at = |x: f32| {
                let mut moved = start.clone();
                moved[i] += x;
                adapter.set_parameters(&moved).unwrap();
                toy_loss(&adapter, 2, None)
            };
            let (high, low) = (at(step), at(-step));
            let mut sum = 0.0;
            for sequence in 0..3 {
                let expected = (high[sequence] - low[sequence]) / f64::from(2.0 * step);
                let actual = rows[sequence][i];
                let scale = expected.abs().max(1.0);
                assert!(
                    (actual - expected).abs() < 1e-9 * scale,
                    "{actual} {expected}"
                );
                sum += expected;
            }
            let scale = sum.abs().max(1.0);
            assert!((total.sum()[i] - sum).abs() < 1e-9 * scale);
            assert!((gradients.sum()[i] - sum).abs() < 1e-9 * scale);
        }
        gradients.clear();
        assert!(gradients.sum().iter().all(|&x| x == 0.0));
    }
}

#[test]
fn the_policy_sees_rounded_parameters_and_the_master_copy_stays() {
    let spec = AdapterSpec {
        dtype: StoredDtype::Bf16,
        tie: Tie::All,
        ..Default::default()
    };
    let mut rounded = adapter(&spec, 1, DType::F32);
    let fine = [1.0f32 + 1.0 / 1024.0];
    rounded.set_parameters(&fine).unwrap();
    assert_eq!(rounded.parameters(), fine);
    assert_eq!(rounded.rounded_parameters(), [1.0]);
    let mut exact = rounded.clone();
    exact.set_parameters(&[1.0]).unwrap();
    let id = ModuleId::new(0, ModuleKind::Down);
    let m = |adapter: &Adapter| adapter.low_rank(id).unwrap().m.to_vec2::<f32>().unwrap();
    assert_eq!(m(&rounded), m(&exact));

    for bad in [f32::NAN, f32::INFINITY, f32::MAX] {
        assert_eq!(rounded.set_parameters(&[bad]).unwrap_err().exit_code(), 4);
    }
    assert!(rounded.set_parameters(&[0.0, 0.0]).is_err());
    assert_eq!(rounded.parameters(), fine);
}

#[test]
fn lora_xs_may_start_with_small_noise() {
    let spec = AdapterSpec {
        kind: AdapterKind::LoraXs,
        init_std: 1e-5,
        ..Default::default()
    };
    let adapter = adapter(&spec, 2, DType::F32);
    let variance = adapter.parameters().iter().map(|x| x * x).sum::<f32>() / 56.0;
    assert!((0.5e-5..2e-5).contains(&variance.sqrt()), "{variance}");
}

#[test]
fn what_waits_on_a_device_until_the_pass_ends_adds_up_to_the_same_bits() {
    let adapter = adapter(&AdapterSpec::default(), 2, DType::F64);
    let (mut at_once, mut deferred) = (adapter.gradients(), adapter.gradients());
    for gradients in [&mut at_once, &mut deferred] {
        gradients.begin_pass(vec![0..2, 2..3]);
    }
    for (number, id) in adapter
        .tying()
        .modules
        .clone()
        .into_iter()
        .rev()
        .enumerate()
    {
        let (x, g) = (tensor(number as u32, 3, IN), tensor(1, 3, OUT));
        let (xa, gb) = (tensor(2 + number as u32, 3, 2), tensor(90, 3, 2));
        let lin = LinearGrads {
            x: &x,
            g: &g,
            low_rank: Some((&xa, &gb)),
        };
        adapter.accumulate(id, &lin, &[0; 3], &mut at_once).unwrap();
        let slot = adapter.slot(id).unwrap();
        deferred.defer(slot, &lin).unwrap();
    }
    for gradients in [&mut at_once, &mut deferred] {
        adapter.end_pass(&[0; 3], gradients).unwrap();
    }
    assert!(at_once.sum().iter().any(|&x| x != 0.0));
    assert_eq!(at_once.sum(), deferred.sum());
}

#[test]
fn wrong_shapes_are_internal_errors_not_panics() {
    let adapter = adapter(&AdapterSpec::default(), 1, DType::F64);
    let id = ModuleId::new(0, ModuleKind::Q);
    let (x, g) = (tensor(0, 3, IN), tensor(1, 3, OUT));
    let (xa, gb, short) = (tensor(2, 3, 2), tensor(3, 3, 2), tensor(4, 2, 2));
    let mut rows = adapter.gradients_per_sequence(1).unwrap();
    for (low_rank, sequences) in [
        (None, &[0u32, 0, 0][..]),
        (Some((&xa, &short)), &[0, 0, 0]),
        (Some((&xa, &gb)), &[0, 0]),
        (Some((&xa, &gb)), &[0, 0, 1]),
    ] {
        let lin = LinearGrads {
            x: &x,
            g: &g,
            low_rank,
        };
        let error = adapter
            .accumulate(id, &lin, sequences, &mut rows)
            .unwrap_err();
        assert_eq!(error.exit_code(), 1);
    }
}
