//! The configurations compiled into the binary.

const BUILTIN: &[(&str, &str)] = &[];

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
