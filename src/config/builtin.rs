//! The configurations compiled into the binary.

macro_rules! builtin {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../configs/", $name)))),*]
    };
}

const BUILTIN: &[(&str, &str)] = builtin![
    "mini.toml",
    "mini-pretrain.toml",
    "qwen7b-13p.toml",
    "qwen7b-math.toml",
    "qwen3b-16p.toml",
    "llama3.1-8b.toml",
    "smollm2-13p.toml",
];

/// The built-in of that name (with or without `.toml`).
pub fn get(name: &str) -> Option<&'static str> {
    BUILTIN
        .iter()
        .find(|(n, _)| *n == name || n.strip_suffix(".toml") == Some(name))
        .map(|(_, text)| *text)
}

/// Names of all built-ins.
pub fn names() -> impl Iterator<Item = &'static str> {
    BUILTIN.iter().map(|(name, _)| *name)
}
