//! The configurations compiled into the binary.

/// Name and text of each.
pub type List = &'static [(&'static str, &'static str)];

macro_rules! builtin {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../configs/", $name)))),*]
    };
}

/// For `train`.
pub const TRAINING: List = builtin![
    "mini.toml",
    "mini-pretrain.toml",
    "mini-habits.toml",
    "qwen7b-13p.toml",
    "qwen7b-math.toml",
    "qwen3b-16p.toml",
    "llama3.1-8b.toml",
    "smollm2-13p.toml",
    "qwen7b-vllm.toml",
    "llama70b.toml",
];

/// For `sweep`.
pub const SWEEPS: List = builtin![
    "sweep-mini.toml",
    "sweep-mini-tying.toml",
    "sweep-mini-rank.toml",
    "sweep-mini-adamw.toml",
    "sweep-mini-adamw-sizes.toml",
    "sweep-mini-natural.toml",
    "sweep-mini-precision.toml",
    "sweep-smollm2-adamw.toml",
    "sweep-smollm2-natural.toml",
];

/// The one of that name (with or without `.toml`).
pub fn get(list: List, name: &str) -> Option<&'static str> {
    list.iter()
        .find(|(n, _)| *n == name || n.strip_suffix(".toml") == Some(name))
        .map(|(_, text)| *text)
}
