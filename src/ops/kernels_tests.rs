//! What the portable path asks of candle has a CUDA kernel for f32 and bf16.
//!
//! The source of the path is searched for candle's methods, each of which must be in a table with the
//! kernels it starts; these must be among those that candle-kernels is built to. A method that is new on
//! the path fails until its kernels are known to be there. Which kernels a training really asks for is
//! checked with the CUDA build, `scripts/build_cuda.sh --check`.

use std::collections::BTreeSet;

/// Version of candle that the fixtures are of.
const CANDLE: &str = "0.11.1";

/// What runs on a GPU, with its host code.
const SOURCES: &[(&str, &str)] = &[
    ("ops/add.rs", include_str!("add.rs")),
    ("ops/attention.rs", include_str!("attention.rs")),
    ("ops/causal.rs", include_str!("causal.rs")),
    ("ops/head.rs", include_str!("head.rs")),
    ("ops/lanes.rs", include_str!("lanes.rs")),
    ("ops/linear.rs", include_str!("linear.rs")),
    ("ops/rms_norm.rs", include_str!("rms_norm.rs")),
    ("ops/rope.rs", include_str!("rope.rs")),
    ("ops/swiglu.rs", include_str!("swiglu.rs")),
    ("model/batch.rs", include_str!("../model/batch.rs")),
    ("model/decoder.rs", include_str!("../model/decoder.rs")),
    ("model/kv_cache.rs", include_str!("../model/kv_cache.rs")),
    ("rollout/native.rs", include_str!("../rollout/native.rs")),
    (
        "rollout/device_sampler.rs",
        include_str!("../rollout/device_sampler.rs"),
    ),
    ("adapter/mod.rs", include_str!("../adapter/mod.rs")),
    (
        "adapter/gradients.rs",
        include_str!("../adapter/gradients.rs"),
    ),
];

/// Methods that start no kernel: they look at a tensor, make another view of it, or copy memory.
const NO_KERNEL: &[&str] = &[
    "device",
    "dim",
    "dims",
    "dtype",
    "elem_count",
    "shape",
    "get",
    "narrow",
    "permute",
    "squeeze",
    "t",
    "transpose",
    "unsqueeze",
    "broadcast_as",
    "from_slice",
    "from_vec",
    "new",
    "zeros",
    "zeros_like",
    "to_device",
    "to_vec1",
    "to_vec2",
];

/// Kernels of a method without the number type at their ends, which may be either.
const KERNELS: &[(&str, &[&str])] = &[
    // Of the operators + − × ÷ on tensors and numbers, which have no name in the source.
    ("add", &["badd", "bsub", "bmul", "bdiv", "affine"]),
    ("matmul", &[]), // cuBLAS
    ("contiguous", &["ucopy"]),
    ("copy", &["ucopy"]),
    ("reshape", &["ucopy"]),
    ("flatten", &["ucopy"]),
    ("flatten_all", &["ucopy"]),
    ("cat", &["copy2d", "ucopy"]),
    ("slice_set", &["copy2d"]),
    ("pad_with_zeros", &["copy2d"]),
    ("full", &["const_set"]),
    (
        "to_dtype",
        &["cast_f32", "cast_bf16", "cast_u32", "cast_u8"],
    ),
    ("broadcast_add", &["badd"]),
    ("broadcast_sub", &["bsub"]),
    ("broadcast_mul", &["bmul"]),
    ("max", &["fast_max"]),
    ("max_keepdim", &["fast_max"]),
    ("min", &["fast_min"]),
    ("minimum", &["bminimum"]),
    ("clamp", &["bmaximum", "bminimum"]),
    ("sum", &["fast_sum", "fast_sum_small"]),
    ("sum_keepdim", &["fast_sum", "fast_sum_small"]),
    ("mean_keepdim", &["fast_sum", "fast_sum_small", "affine"]),
    ("argmax_keepdim", &["fast_argmax"]),
    ("exp", &["uexp"]),
    ("log", &["ulog"]),
    ("neg", &["uneg"]),
    ("recip", &["urecip"]),
    ("sqr", &["usqr"]),
    ("sqrt", &["usqrt"]),
    ("cos", &["ucos"]),
    ("sin", &["usin"]),
    ("silu", &["usilu"]),
    ("index_select", &["is_u32"]),
    ("index_add", &["ia_u32"]),
    ("gather", &["gather_u32"]),
    ("scatter", &["s_u32"]),
    ("scatter_set", &["s_u32"]),
    ("scatter_add", &["sa_u32"]),
    ("where_cond", &["where_u8"]),
    // Fused operations of candle-nn.
    ("candle_nn::rms_norm", &["rmsnorm"]),
    ("candle_nn::softmax_last_dim", &["softmax"]),
    ("candle_nn::rope_thd", &["rope_thd"]),
];

/// Kernels with one number type only, that of indices and of the bytes which comparisons give.
const OF_INDICES: &[(&str, &[&str])] = &[
    ("arange", &[]),
    ("broadcast_le", &["le_u32", "le_f32", "cast_u8_f32"]),
];

fn lines(text: &'static str) -> BTreeSet<&'static str> {
    text.lines().filter(|line| !line.starts_with('#')).collect()
}

/// Names before a parenthesis in a source, its tests left out: `narrow`, `candle_nn::rms_norm`.
fn calls(source: &str) -> BTreeSet<String> {
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let call = regex::Regex::new(r"(candle_nn::[a-z_]+::|\.|Tensor::)([a-z_0-9]+)\(").unwrap();
    let code = source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    code.flat_map(|line| call.captures_iter(line).collect::<Vec<_>>())
        .map(|found| match found[1].starts_with("candle_nn") {
            true => format!("candle_nn::{}", &found[2]),
            false => found[2].to_owned(),
        })
        .collect()
}

#[test]
fn the_portable_path_has_cuda_kernels_for_what_it_does() {
    let methods = lines(include_str!(
        "../../tests/fixtures/candle/tensor_methods.txt"
    ));
    let kernels = lines(include_str!("../../tests/fixtures/candle/kernels.txt"));
    let mut used = BTreeSet::new();
    for (file, source) in SOURCES {
        let found = calls(source);
        let of_candle = found
            .iter()
            .filter(|name| methods.contains(name.as_str()) || name.starts_with("candle_nn::"));
        for name in of_candle {
            let known = KERNELS.iter().map(|(name, _)| name);
            let known = known.chain(OF_INDICES.iter().map(|(name, _)| name));
            assert!(
                known.chain(NO_KERNEL).any(|known| known == name),
                "{file} uses {name}: which CUDA kernels does it start?"
            );
            used.insert(name.clone());
        }
    }
    for expected in [
        "broadcast_add",
        "scatter_set",
        "candle_nn::rms_norm",
        "matmul",
    ] {
        assert!(
            used.contains(expected),
            "the search no longer finds {expected}"
        );
    }
    for (name, roots) in KERNELS.iter().filter(|(name, _)| used.contains(*name)) {
        for root in *roots {
            for dtype in ["f32", "bf16"] {
                let kernel = format!("{root}_{dtype}");
                assert!(kernels.contains(&*kernel), "{name}: there is no {kernel}");
            }
        }
    }
    for kernel in OF_INDICES.iter().flat_map(|(_, kernels)| *kernels) {
        assert!(kernels.contains(kernel), "there is no {kernel}");
    }
}

#[test]
fn the_lists_are_of_the_candle_that_is_built() {
    let lock = include_str!("../../Cargo.lock");
    for name in ["candle-core", "candle-kernels", "candle-nn"] {
        let entry = format!("name = \"{name}\"\nversion = \"{CANDLE}\"\n");
        assert!(
            lock.contains(&entry),
            "{name} is no longer {CANDLE}: make the lists again"
        );
    }
}
