//! The configuration reference in README.md, made from the sections' own documentation.
//!
//! `TINYLORA_UPDATE_DOCS=1 cargo test reference` rewrites it; otherwise the test compares.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

use super::schema::{self, Kind};
use super::{Config, Method};

const SOURCES: &[&str] = &[
    include_str!("mod.rs"),
    include_str!("data.rs"),
    include_str!("grpo.rs"),
    include_str!("model.rs"),
    include_str!("optim.rs"),
    include_str!("reward.rs"),
    include_str!("rollout.rs"),
    include_str!("sft.rs"),
    include_str!("train.rs"),
    include_str!("../adapter/spec.rs"),
];

const BEGIN: &str = "<!-- configuration reference: made by a test, do not edit -->\n";
const END: &str = "<!-- end of the configuration reference -->\n";

/// A field of a section: its type and its documentation.
struct Field {
    ty: String,
    doc: String,
}

/// Struct name → key → field, read from the source text.
fn fields() -> HashMap<String, HashMap<String, Field>> {
    let mut structs: HashMap<String, HashMap<String, Field>> = HashMap::new();
    for source in SOURCES {
        let mut current = None;
        let (mut doc, mut rename) = (Vec::new(), None);
        for line in source.lines().map(str::trim) {
            if let Some(rest) = line.strip_prefix("pub struct ") {
                current = rest.strip_suffix(" {").map(str::to_owned);
                doc.clear();
            } else if line == "}" {
                current = None;
            } else if let Some(text) = line.strip_prefix("///") {
                doc.push(text.trim());
            } else if let Some(rest) = line.strip_prefix("#[serde(rename = \"") {
                rename = rest.split('"').next().map(str::to_owned);
            } else if let (Some(name), Some(rest)) = (&current, line.strip_prefix("pub ")) {
                let Some((field, ty)) = rest.trim_end_matches(',').split_once(": ") else {
                    continue;
                };
                let key = rename.take().unwrap_or_else(|| field.to_owned());
                let field = Field {
                    ty: ty.to_owned(),
                    doc: std::mem::take(&mut doc).join(" "),
                };
                structs.entry(name.clone()).or_default().insert(key, field);
            }
        }
    }
    structs
}

fn document() -> String {
    let structs = fields();
    let defaults = toml::Value::try_from(Config::default()).unwrap();
    let mut text = String::new();
    let mut section = "";
    let mut keys = schema::keys::<Config>();
    // Tables within a section come after its own keys, as they do in a file.
    let order = |name: &str| {
        let section = name.split('.').next().map(str::to_owned);
        let sections = schema::keys::<Config>();
        let starts = |n: &str| n.split('.').next() == section.as_deref();
        (
            sections.iter().position(|(n, _)| starts(n)),
            name.matches('.').count(),
        )
    };
    keys.sort_by_cached_key(|(name, _)| order(name));
    for (name, kind) in &keys {
        let (table, key) = name.rsplit_once('.').unwrap_or(("", name));
        let mut holder = "Config".to_owned();
        for part in table.split('.').filter(|p| !p.is_empty()) {
            holder = structs[&holder][part].ty.clone();
        }
        // Other spellings of a key are not in the struct; they are for TRL's users to know.
        let Some(field) = structs.get(&holder).and_then(|s| s.get(key)) else {
            continue;
        };
        assert!(!field.doc.is_empty(), "{name} has no documentation");
        if table != section || text.is_empty() {
            section = table;
            if table.is_empty() {
                text.push_str("\n| key | default | |\n|---|---|---|\n");
            } else {
                let _ = write!(
                    text,
                    "\n**`[{table}]`**\n\n| key | default | |\n|---|---|---|\n"
                );
            }
        }
        let default = name.split('.').try_fold(&defaults, |v, part| v.get(part));
        let default = match default {
            Some(value) => format!("`{value}`"),
            None => "unset".to_owned(),
        };
        let doc = format!("{}{}", field.doc, choices(kind)).replace('|', "\\|");
        let _ = writeln!(text, "| `{key}` | {default} | {doc} |");
    }
    text
}

fn choices(kind: &Kind) -> String {
    match kind {
        Kind::Choice(names) => {
            let names: Vec<String> = names.iter().map(|n| format!("`{n}`")).collect();
            format!(" One of {}.", names.join(", "))
        }
        Kind::Optional(inner) | Kind::List(inner) => choices(inner),
        _ => String::new(),
    }
}

#[test]
fn readme_has_the_current_reference() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = readme.split_once(BEGIN).unwrap();
    let (found, after) = rest.split_once(END).unwrap();
    let expected = format!("{}\n", document());
    if found == expected {
        return;
    }
    if std::env::var_os("TINYLORA_UPDATE_DOCS").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{expected}{END}{after}")).unwrap();
        return;
    }
    panic!("README.md is behind: run TINYLORA_UPDATE_DOCS=1 cargo test reference");
}

#[test]
fn every_key_but_the_other_spellings_is_documented() {
    let text = document();
    for key in [
        "`method`",
        "`n_tie`",
        "`num_generations`",
        "`learning_rate`",
    ] {
        assert!(text.contains(&format!("| {key} |")), "{key}");
    }
    assert!(text.contains(&format!("`{}`", Method::Sft.name())));
    assert!(!text.contains("vllm_"));
}
