//! Chat templates: the Jinja program that turns messages into the text the model was tuned on,
//! run the way Hugging Face's `apply_chat_template` runs it.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use minijinja::value::{Kwargs, ViaDeserialize};
use minijinja::{Environment, ErrorKind, context};
use minijinja_contrib::pycompat;
use regex::Regex;
use serde::{Deserialize, Serialize};

use super::chat_date::Date;
use crate::bounded::{self, Limits};
use crate::error::{Error, Result};

// Templates come with checkpoints from anywhere.
/// Longer than any that is published by a factor of five.
const MAX_TEMPLATE_BYTES: usize = 128 << 10;
/// Steps of one rendering: enough for a thousand messages.
const FUEL: u64 = 100_000;
/// Depth of calls.
const RECURSION_LIMIT: usize = 100;
/// What all of it may take, however it is done. Expressions as long as a template and values as deep as
/// it has steps are taken apart by recursion, hence the stack; what is not used of it costs nothing.
const LIMITS: Limits = Limits {
    memory: 32 << 20,
    stack: 256 << 20,
    time: Duration::from_millis(500),
};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    pub content: String,
}

impl ChatMessage {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// A template's source. It is compiled when used, so that a checkpoint whose template is broken
/// still serves for plain text.
#[derive(Debug, Clone)]
pub(super) struct ChatTemplate {
    source: Arc<str>,
}

/// Texts of the special tokens a template may name.
#[derive(Debug, Default, Serialize)]
pub(super) struct SpecialTexts {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bos_token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eos_token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unk_token: Option<String>,
}

impl ChatTemplate {
    pub fn new(source: String) -> Self {
        Self {
            source: source.into(),
        }
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether what it makes may depend on the day.
    pub fn names_the_day(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// Renders `messages` on the day `today`.
    ///
    /// # Errors
    /// The template does not compile, refuses the messages (`raise_exception`), or does not end.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        special: &SpecialTexts,
        today: Date,
    ) -> Result<String> {
        if self.source.len() > MAX_TEMPLATE_BYTES {
            return Err(Error::data(format!(
                "chat template: larger than {} KiB",
                MAX_TEMPLATE_BYTES >> 10
            )));
        }
        let source = Arc::clone(&self.source);
        let context = context! {
            messages => messages,
            tools => (),
            documents => (),
            add_generation_prompt => add_generation_prompt,
            ..minijinja::Value::from_serialize(special),
        };
        let rendered = bounded::run(LIMITS, move || render(&source, today, context));
        rendered
            .flatten()
            .map_err(|error| Error::data(format!("chat template: {error}")))
    }
}

fn render(source: &str, today: Date, context: minijinja::Value) -> Result<String> {
    let render = || {
        let mut env = environment(today);
        let source = without_generation_tags(source);
        env.add_template("chat_template", &source)?;
        env.get_template("chat_template")?.render(context)
    };
    render().map_err(|error| Error::data(explain(&error)))
}

/// The environment of transformers' `_compile_jinja_template`: block tags leave no line behind,
/// Python's string methods exist, JSON is written as `json.dumps(ensure_ascii=False)` does.
fn environment(today: Date) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION_LIMIT);
    env.set_unknown_method_callback(pycompat::unknown_method_callback);
    env.add_filter("tojson", to_json);
    env.add_function("strftime_now", move |format: String| {
        today.strftime(&format)
    });
    env.add_function(
        "raise_exception",
        |message: String| -> Result<(), minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    env
}

/// `{% generation %}` marks the assistant's part for training masks and prints nothing; the tag is
/// Hugging Face's own.
fn without_generation_tags(source: &str) -> String {
    static TAG: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").ok());
    let Some(tag) = TAG.as_ref() else {
        return source.to_string();
    };
    let replaced = tag.replace_all(source, |found: &regex::Captures| {
        let word = match found.get(2) {
            Some(_) => "endif",
            None => "if true",
        };
        format!("{{%{} {word} {}%}}", &found[1], &found[3])
    });
    replaced.into_owned()
}

/// The filter `tojson(indent=None, …)`: unlike Jinja's it does not escape for HTML.
fn to_json(
    value: ViaDeserialize<serde_json::Value>,
    options: Kwargs,
) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Sorting and the escaping of non-ASCII text are accepted as HF's filter accepts them; the
    // defaults (neither) are all that published templates use.
    for key in ["ensure_ascii", "sort_keys"] {
        if options.get::<Option<bool>>(key)? == Some(true) {
            let message = format!("tojson({key}=true) is not supported");
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
        }
    }
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut out,
            SpacedFormatter,
        )),
        Some(width) => {
            let spaces = " ".repeat(width.min(32));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(
                &mut out, formatter,
            ))
        }
    };
    let text = written.map(|()| String::from_utf8_lossy(&out).into_owned());
    text.map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// Python's separators: `", "` and `": "`.
struct SpacedFormatter;

impl serde_json::ser::Formatter for SpacedFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

fn explain(error: &minijinja::Error) -> String {
    let what = match error.kind() {
        ErrorKind::OutOfFuel => "does not end within the allowed number of steps".to_string(),
        _ => match error.detail() {
            Some(detail) => detail.to_string(),
            None => error.kind().to_string(),
        },
    };
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}
