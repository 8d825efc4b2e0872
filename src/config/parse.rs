//! Raw TOML and `key=value` → a [`Config`], with messages that say where and what.

use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::{Map, Value as Json};
use toml::de::{DeTable, DeValue, ValueDeserializer};
use toml::{Table, Value};

use super::Config;
use super::schema::{self, Kind, nearest};
use crate::{Error, Result};

/// Other places a key may stand in.
const ALIASES: &[(&str, &str)] = &[("train.method", "method")];

/// Every key of a configuration by its dotted name.
static KEYS: LazyLock<Vec<(String, Kind)>> = LazyLock::new(schema::keys::<Config>);

/// Checked keys and values on their way to a [`Config`]. As JSON, since TOML has no null, which a
/// key takes that is unset against its default.
#[derive(Default)]
pub struct Values(Map<String, Json>);

impl Values {
    /// Takes a file's text; `origin` names it in messages.
    pub fn add_file(&mut self, text: &str, origin: &str) -> Result<()> {
        let line = |offset: usize| 1 + text[..offset.min(text.len())].matches('\n').count();
        let document = DeTable::parse(text).map_err(|e| {
            let at = e.span().map_or(1, |span| line(span.start));
            Error::config(format!("{origin}:{at}: not valid TOML: {}", e.message()))
        })?;
        let mut leaves = Vec::new();
        flatten("", document.get_ref(), &mut leaves);
        leaves.sort_by_key(|leaf| leaf.offset);
        for Leaf {
            name,
            value,
            offset,
        } in leaves
        {
            self.set(&name, value)
                .map_err(|m| Error::config(format!("{origin}:{}: {m}", line(offset))))?;
        }
        Ok(())
    }

    /// Takes keys by dotted name; `origin` says in messages where they stand.
    pub fn add_keys(&mut self, keys: &[(String, Value)], origin: &str) -> Result<()> {
        for (name, value) in keys {
            self.set(name, value.clone())
                .map_err(|m| Error::config(format!("{origin}: {m}")))?;
        }
        Ok(())
    }

    /// Takes one `--set key=value`. The value is TOML; a bare word is a string.
    pub fn add_override(&mut self, assignment: &str) -> Result<()> {
        let fail = |message: &str| Error::config(format!("--set {assignment}: {message}"));
        let (key, text) = assignment
            .split_once('=')
            .ok_or_else(|| fail("expected key=value, as in train.max_steps=100"))?;
        let (key, text) = (key.trim(), text.trim());
        let Err(message) = self.set(key, typed(text)) else {
            return Ok(());
        };
        // A number where text is wanted (run_name=13), a single item or `a,b` where a list is.
        let list = text.split(',').map(|item| typed(item.trim())).collect();
        for reading in [Value::String(text.to_owned()), Value::Array(list)] {
            if self.set(key, reading).is_ok() {
                return Ok(());
            }
        }
        Err(fail(&message))
    }

    /// The configuration with defaults for what was not given.
    pub fn finish(self) -> Result<Config> {
        Config::deserialize(Json::Object(self.0)).map_err(Error::config)
    }

    /// Sets one key; the message names it.
    fn set(&mut self, name: &str, value: Value) -> Result<(), String> {
        let name = ALIASES
            .iter()
            .find(|(a, _)| *a == name)
            .map_or(name, |(_, full)| full);
        let Some((_, kind)) = KEYS.iter().find(|(known, _)| known == name) else {
            return Err(unknown(name));
        };
        let value = match kind.check(value).map_err(|m| format!("{name}: {m}"))? {
            Some(value) => serde_json::to_value(value).map_err(|e| format!("{name}: {e}"))?,
            None => Json::Null,
        };
        // What the type alone cannot tell (a device's name) is tried with this key by itself.
        let mut alone = Map::new();
        insert(&mut alone, name, value.clone());
        Config::deserialize(Json::Object(alone)).map_err(|e| format!("{name}: {e}"))?;
        insert(&mut self.0, name, value);
        Ok(())
    }
}

/// Keys that `config` leaves unset though they have a default: their absence would not say so.
pub fn unset_against_default(config: &Config) -> Result<Vec<&'static str>> {
    let json = |config: &Config| serde_json::to_value(config).map_err(Error::config);
    let (given, default) = (json(config)?, json(&Config::default())?);
    let has = |value: &Json, key: &str| {
        let found = key.split('.').try_fold(value, |v, part| v.get(part));
        found.is_some_and(|v| !v.is_null())
    };
    let keys = KEYS.iter().map(|(key, _)| key.as_str());
    Ok(keys
        .filter(|key| has(&default, key) && !has(&given, key))
        .collect())
}

struct Leaf {
    name: String,
    value: Value,
    offset: usize,
}

fn flatten(prefix: &str, table: &DeTable<'_>, leaves: &mut Vec<Leaf>) {
    for (key, item) in table {
        let name = match prefix {
            "" => key.get_ref().to_string(),
            _ => format!("{prefix}.{}", key.get_ref()),
        };
        match item.get_ref() {
            // An unknown table is a leaf: it is the mistake to report, not each of its keys.
            DeValue::Table(inner) if is_table(&name) => flatten(&name, inner, leaves),
            _ => leaves.push(Leaf {
                value: value_of(item),
                offset: key.span().start,
                name,
            }),
        }
    }
}

fn is_table(name: &str) -> bool {
    let inside = |key: &str| {
        key.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with('.'))
    };
    KEYS.iter().any(|(key, _)| inside(key))
}

fn value_of(item: &toml::Spanned<DeValue<'_>>) -> Value {
    // A parsed value always reads as a `Value`; the fallback keeps this free of panics.
    Value::deserialize(ValueDeserializer::from(item.clone()))
        .unwrap_or_else(|e| Value::String(e.to_string()))
}

fn typed(text: &str) -> Value {
    toml::from_str::<Table>(&format!("v = {text}"))
        .ok()
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("v"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

fn insert(table: &mut Map<String, Json>, name: &str, value: Json) {
    match name.split_once('.') {
        None => {
            table.insert(name.to_owned(), value);
        }
        Some((first, rest)) => {
            let inner = table
                .entry(first)
                .or_insert_with(|| Json::Object(Map::new()));
            if let Json::Object(inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

fn unknown(name: &str) -> String {
    if is_table(name) {
        return format!("[{name}] is a table, not a key");
    }
    let hint = suggestion(name).map_or_else(String::new, |near| format!("; did you mean {near}?"));
    format!("unknown key {name}{hint}")
}

/// The same key in another section is the likeliest slip, then a misspelling.
fn suggestion(name: &str) -> Option<String> {
    fn last(name: &str) -> &str {
        name.rsplit('.').next().unwrap_or(name)
    }
    let names = || KEYS.iter().map(|(key, _)| key.as_str());
    if let Some(same) = names().find(|key| last(key) == last(name)) {
        return Some(same.to_owned());
    }
    if !name.contains('.') {
        let sections = names()
            .filter_map(|key| key.split_once('.'))
            .map(|(s, _)| s);
        if let Some(section) = nearest(name, sections) {
            return Some(format!("[{section}]"));
        }
    }
    let key = nearest(last(name), names().map(last))?;
    let section = name.split_once('.').map_or("", |(section, _)| section);
    let mut matches: Vec<&str> = names().filter(|full| last(full) == key).collect();
    // Of keys that several sections have, the one in the section that was written.
    matches.sort_by_key(|full| !full.starts_with(section));
    matches.first().map(|full| (*full).to_owned())
}
