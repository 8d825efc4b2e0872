//! Which keys a configuration has and what each takes, asked of serde itself.
//!
//! `Deserialize` implementations tell a deserializer what they want: field names, variants, number
//! types. A deserializer that only listens therefore knows every key without a second list.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use toml::Value;

/// What a key takes.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    Bool,
    /// Whole numbers between the bounds.
    Integer(i64, i64),
    Float,
    Text,
    /// One of the names.
    Choice(&'static [&'static str]),
    List(Box<Kind>),
    /// A table with these keys.
    Table(&'static [&'static str]),
    /// May be unset, which the word "none" does.
    Optional(Box<Kind>),
    /// Something this module does not follow; serde's own message has to do.
    Any,
}

impl Kind {
    /// Reads after "expected".
    pub fn expected(&self) -> String {
        match self {
            Self::Bool => "true or false".to_owned(),
            Self::Integer(0, _) => "a whole number ≥ 0".to_owned(),
            Self::Integer(..) => "a whole number".to_owned(),
            Self::Float => "a number".to_owned(),
            Self::Text => "a string".to_owned(),
            Self::Choice(names) => format!("one of {}", names.join(", ")),
            Self::List(item) => format!("a list, each item {}", item.expected()),
            Self::Table(_) => "a table".to_owned(),
            Self::Optional(inner) => inner.expected(),
            Self::Any => "another kind of value".to_owned(),
        }
    }

    /// The value as the key wants it (`None`: unset), or a message that reads after the key.
    pub fn check(&self, value: Value) -> Result<Option<Value>, String> {
        let fits = match (self, &value) {
            (Self::Optional(_), Value::String(s)) if s == "none" => return Ok(None),
            (Self::Optional(inner), _) => return inner.check(value),
            (Self::Float, Value::Integer(n)) => return Ok(Some(Value::Float(*n as f64))),
            (Self::Float, Value::Float(x)) if !x.is_finite() => false,
            (Self::List(item), Value::Array(_)) => {
                let Value::Array(items) = value else {
                    return Ok(Some(value));
                };
                let items: Result<Vec<_>, _> = items.into_iter().map(|v| item.check(v)).collect();
                return Ok(Some(Value::Array(items?.into_iter().flatten().collect())));
            }
            (Self::Choice(names), Value::String(text)) => {
                if names.contains(&text.as_str()) {
                    true
                } else {
                    return Err(unknown_choice(text, names));
                }
            }
            (Self::Integer(low, high), Value::Integer(n)) => (low..=high).contains(&n),
            (Self::Bool, Value::Boolean(_))
            | (Self::Float, Value::Float(_))
            | (Self::Text, Value::String(_))
            | (Self::Any, _) => true,
            _ => false,
        };
        if fits {
            return Ok(Some(value));
        }
        let got = match &value {
            Value::String(s) => format!("the string {s:?}"),
            Value::Table(_) => "a table".to_owned(),
            Value::Array(_) => "a list".to_owned(),
            other => other.to_string(),
        };
        Err(format!("expected {}, got {got}", self.expected()))
    }
}

fn unknown_choice(text: &str, names: &[&str]) -> String {
    let mut message = format!("expected one of {}, got {text:?}", names.join(", "));
    if let Some(near) = nearest(text, names.iter().copied()) {
        message.push_str(&format!("; did you mean {near:?}?"));
    }
    message
}

/// The candidate most like `text`, when one is like it at all.
pub fn nearest<'a>(text: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let lower = text.to_lowercase();
    candidates
        .map(|c| (strsim::jaro_winkler(&lower, &c.to_lowercase()), c))
        .filter(|(score, _)| *score >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, c)| c)
}

/// Every key of `T` by its dotted name, tables opened, in order of declaration.
pub fn keys<T: DeserializeOwned>() -> Vec<(String, Kind)> {
    fn walk<T: DeserializeOwned>(path: &mut Vec<&'static str>, found: &mut Vec<(String, Kind)>) {
        let kind = kind_at::<T>(path);
        if let Kind::Table(fields) = kind {
            for field in fields {
                path.push(field);
                walk::<T>(path, found);
                path.pop();
            }
        } else {
            found.push((path.join("."), kind));
        }
    }
    let mut found = Vec::new();
    walk::<T>(&mut Vec::new(), &mut found);
    found
}

fn kind_at<T: DeserializeOwned>(path: &[&'static str]) -> Kind {
    let mut kind = Kind::Any;
    // Listening ends with an error once the kind is heard.
    let _ = T::deserialize(Listener {
        path,
        heard: &mut kind,
    });
    kind
}

/// Deserializes a table that holds only `path`, and notes what is asked for at its end.
struct Listener<'a> {
    path: &'a [&'static str],
    heard: &'a mut Kind,
}

/// The end of listening; it never reaches a user.
#[derive(Debug)]
struct Heard;

impl fmt::Display for Heard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("heard")
    }
}

impl std::error::Error for Heard {}

impl serde::de::Error for Heard {
    fn custom<M: fmt::Display>(_message: M) -> Self {
        Self
    }
}

macro_rules! hear {
    ($($method:ident => $kind:expr;)*) => {$(
        fn $method<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Heard> {
            *self.heard = $kind;
            Err(Heard)
        }
    )*};
}

impl<'de> Deserializer<'de> for Listener<'_> {
    type Error = Heard;

    hear! {
        deserialize_any => Kind::Any;
        deserialize_bool => Kind::Bool;
        deserialize_i8 => Kind::Integer(i8::MIN.into(), i8::MAX.into());
        deserialize_i16 => Kind::Integer(i16::MIN.into(), i16::MAX.into());
        deserialize_i32 => Kind::Integer(i32::MIN.into(), i32::MAX.into());
        deserialize_i64 => Kind::Integer(i64::MIN, i64::MAX);
        deserialize_u8 => Kind::Integer(0, u8::MAX.into());
        deserialize_u16 => Kind::Integer(0, u16::MAX.into());
        deserialize_u32 => Kind::Integer(0, u32::MAX.into());
        // TOML's integers are i64.
        deserialize_u64 => Kind::Integer(0, i64::MAX);
        deserialize_f32 => Kind::Float;
        deserialize_f64 => Kind::Float;
        deserialize_char => Kind::Text;
        deserialize_str => Kind::Text;
        deserialize_string => Kind::Text;
        deserialize_identifier => Kind::Text;
        deserialize_bytes => Kind::Any;
        deserialize_byte_buf => Kind::Any;
        deserialize_unit => Kind::Any;
        deserialize_map => Kind::Any;
        deserialize_ignored_any => Kind::Any;
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Heard> {
        let Self { path, heard } = self;
        let result = visitor.visit_some(Listener { path, heard });
        if path.is_empty() && !matches!(heard, Kind::Table(_)) {
            *heard = Kind::Optional(Box::new(heard.clone()));
        }
        result
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Heard> {
        let heard = self.heard;
        let result = visitor.visit_seq(OneItem { heard: &mut *heard });
        *heard = Kind::List(Box::new(heard.clone()));
        result
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Heard> {
        match self.path.split_first() {
            Some((first, path)) => visitor.visit_map(OneEntry {
                key: Some(first),
                value: Listener {
                    path,
                    heard: self.heard,
                },
            }),
            None => {
                *self.heard = Kind::Table(fields);
                Err(Heard)
            }
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Heard> {
        *self.heard = Kind::Choice(variants);
        Err(Heard)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Heard> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Heard> {
        self.deserialize_any(visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, Heard> {
        self.deserialize_any(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, Heard> {
        self.deserialize_any(visitor)
    }
}

struct OneItem<'a> {
    heard: &'a mut Kind,
}

impl<'de> SeqAccess<'de> for OneItem<'_> {
    type Error = Heard;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Heard> {
        let heard = &mut *self.heard;
        seed.deserialize(Listener { path: &[], heard }).map(Some)
    }
}

struct OneEntry<'a> {
    key: Option<&'static str>,
    value: Listener<'a>,
}

impl<'de> MapAccess<'de> for OneEntry<'_> {
    type Error = Heard;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Heard> {
        match self.key.take() {
            Some(key) => seed
                .deserialize(StrDeserializer::<Heard>::new(key))
                .map(Some),
            None => Ok(None),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Heard> {
        let Listener { path, heard } = &mut self.value;
        seed.deserialize(Listener { path, heard })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Colour {
        Red,
        DarkBlue,
    }

    #[derive(serde::Deserialize, Default)]
    #[serde(default, deny_unknown_fields)]
    struct Inner {
        count: u32,
        #[serde(rename = "type")]
        kind: Option<Colour>,
        names: Vec<String>,
    }

    #[derive(serde::Deserialize, Default)]
    #[serde(default)]
    struct Outer {
        on: bool,
        rate: Option<f64>,
        inner: Inner,
    }

    #[test]
    fn serde_tells_every_key_and_its_kind() {
        let keys = keys::<Outer>();
        let kind = |name: &str| &keys.iter().find(|(n, _)| n == name).unwrap().1;
        assert_eq!(keys.len(), 5);
        assert_eq!(*kind("on"), Kind::Bool);
        assert_eq!(*kind("rate"), Kind::Optional(Box::new(Kind::Float)));
        assert_eq!(*kind("inner.count"), Kind::Integer(0, u32::MAX.into()));
        assert_eq!(*kind("inner.names"), Kind::List(Box::new(Kind::Text)));
        let colours = Kind::Choice(&["red", "dark-blue"]);
        assert_eq!(*kind("inner.type"), Kind::Optional(Box::new(colours)));
    }

    #[test]
    fn values_are_coerced_or_refused() {
        assert_eq!(
            Kind::Float.check(Value::Integer(3)),
            Ok(Some(Value::Float(3.0)))
        );
        let optional = Kind::Optional(Box::new(Kind::Integer(0, 9)));
        assert_eq!(optional.check(Value::String("none".into())), Ok(None));
        let message = optional.check(Value::Integer(-1)).unwrap_err();
        assert_eq!(message, "expected a whole number ≥ 0, got -1");
        let message = Kind::Choice(&["grpo", "sft"])
            .check(Value::String("gpro".into()))
            .unwrap_err();
        assert!(message.ends_with("did you mean \"grpo\"?"), "{message}");
        assert!(Kind::Float.check(Value::Float(f64::NAN)).is_err());
    }
}
