//! Rows of JSON Lines and JSON files, read with bounded memory and reported by line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// The columns of one row.
pub type Row = Map<String, Value>;

/// Receives every row with its place in the file ("line 17", "row 3"), or why it is not valid.
/// Breaking ends the reading.
pub type RowSink<'a> = dyn FnMut(&str, Result<Row, String>) -> Result<ControlFlow<()>> + 'a;

/// How much of a hostile or mistaken file is looked at, checked before memory is taken.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest line or array element, in bytes; a longer one is a bad row.
    pub row_bytes: usize,
    /// Largest `.json` file, which has to be held in memory as a whole.
    pub file_bytes: u64,
    /// Text kept of one file, in bytes.
    pub kept_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            row_bytes: 8 << 20,
            file_bytes: 1 << 30,
            kept_bytes: 2 << 30,
        }
    }
}

/// Streams a JSON Lines file. Blank lines are passed over; a byte order mark is allowed.
pub fn read_json_lines(path: &Path, limits: &Limits, sink: &mut RowSink) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::file("open", path, e))?;
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let mut line = Vec::new();
    let mut number = 0usize;
    loop {
        line.clear();
        number += 1;
        // One byte over the limit tells "too long" from "just fits" without reading further.
        let read = (&mut reader)
            .take(limits.row_bytes as u64 + 1)
            .read_until(b'\n', &mut line)
            .map_err(|e| Error::file("read", path, e))?;
        if read == 0 {
            return Ok(());
        }
        let row = if line.last() != Some(&b'\n') && line.len() > limits.row_bytes {
            skip_line(&mut reader).map_err(|e| Error::file("read", path, e))?;
            Err(format!("is longer than {} bytes", limits.row_bytes))
        } else {
            let mut bytes = line.as_slice();
            if number == 1 {
                bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
            }
            if bytes.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            parse_row(bytes)
        };
        if sink(&format!("line {number}"), row)?.is_break() {
            return Ok(());
        }
    }
}

fn skip_line(reader: &mut impl BufRead) -> std::io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        let (used, done) = match buffer.iter().position(|&b| b == b'\n') {
            Some(at) => (at + 1, true),
            None => (buffer.len(), false),
        };
        reader.consume(used);
        if done {
            return Ok(());
        }
    }
}

/// Reads a JSON file that holds one array of objects.
///
/// The array is cut into elements before they are parsed, so that a bad element is reported by
/// its line and need not spoil the others.
pub fn read_json_array(path: &Path, limits: &Limits, sink: &mut RowSink) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::file("open", path, e))?;
    let size = file
        .metadata()
        .map_err(|e| Error::file("read", path, e))?
        .len();
    if size > limits.file_bytes {
        return Err(Error::data(format!(
            "{} has {size} bytes, more than the {} allowed for .json: convert it to JSON Lines",
            path.display(),
            limits.file_bytes
        )));
    }
    let mut bytes = Vec::new();
    file.take(limits.file_bytes)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::file("read", path, e))?;
    let mut elements = ArrayElements::new(&bytes).map_err(|why| Error::file("read", path, why))?;
    while let Some(element) = elements.next() {
        let (line, element) = element.map_err(|why| Error::file("read", path, why))?;
        let row = if element.len() > limits.row_bytes {
            Err(format!("is longer than {} bytes", limits.row_bytes))
        } else {
            parse_row(element)
        };
        if sink(&format!("line {line}"), row)?.is_break() {
            return Ok(());
        }
    }
    Ok(())
}

/// Parses one object; the error reads after "line N".
fn parse_row(bytes: &[u8]) -> Result<Row, String> {
    let text = std::str::from_utf8(bytes)
        .map_err(|e| format!("is not valid UTF-8 (byte {})", e.valid_up_to() + 1))?;
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(row)) => Ok(row),
        Ok(other) => Err(format!("holds {}, not an object", kind_of(&other))),
        // serde_json's own line number counts within the row and would mislead.
        Err(e) => {
            let message = e.to_string();
            let message = message.split(" at line ").next().unwrap_or(&message);
            Err(format!(
                "is not valid JSON: {message} (column {})",
                e.column()
            ))
        }
    }
}

/// What a JSON value is, for messages.
pub fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The byte ranges of the elements of a top-level array, found by following strings and depth.
struct ArrayElements<'a> {
    bytes: &'a [u8],
    at: usize,
    line: usize,
    finished: bool,
}

impl<'a> ArrayElements<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, String> {
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let mut elements = Self {
            bytes,
            at: 0,
            line: 1,
            finished: false,
        };
        elements.skip_space();
        match bytes.get(elements.at) {
            Some(b'[') => elements.at += 1,
            Some(b'{') => {
                return Err(
                    "it holds one object, not an array of objects (one object a line goes into a .jsonl file)"
                        .to_string(),
                );
            }
            Some(_) => return Err("it does not hold an array of objects".to_string()),
            None => return Err("it is empty".to_string()),
        }
        elements.skip_space();
        if bytes.get(elements.at) == Some(&b']') {
            elements.finished = true;
        }
        Ok(elements)
    }

    fn skip_space(&mut self) {
        while let Some(b) = self.bytes.get(self.at).filter(|b| b.is_ascii_whitespace()) {
            self.line += usize::from(*b == b'\n');
            self.at += 1;
        }
    }

    /// The next element with the line it starts on; an error when the array never ends.
    fn next(&mut self) -> Option<Result<(usize, &'a [u8]), String>> {
        if self.finished {
            return None;
        }
        self.skip_space();
        let (start, start_line) = (self.at, self.line);
        let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
        while let Some(&b) = self.bytes.get(self.at) {
            if in_string {
                match b {
                    _ if escaped => escaped = false,
                    b'\\' => escaped = true,
                    b'"' => in_string = false,
                    _ => {}
                }
            } else {
                match b {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' if depth > 0 => depth -= 1,
                    b',' | b']' if depth == 0 => {
                        let element = &self.bytes[start..self.at];
                        self.finished = b == b']';
                        self.at += 1;
                        return Some(Ok((start_line, element)));
                    }
                    _ => {}
                }
            }
            self.line += usize::from(b == b'\n');
            self.at += 1;
        }
        self.finished = true;
        Some(Err(format!(
            "the array is not closed (the element from line {start_line} runs to the end)"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn collect(
        read: fn(&Path, &Limits, &mut RowSink) -> Result<()>,
        content: &[u8],
        limits: &Limits,
    ) -> Result<Vec<(String, Result<Row, String>)>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let mut rows = Vec::new();
        read(file.path(), limits, &mut |place, row| {
            rows.push((place.to_string(), row));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(rows)
    }

    #[test]
    fn json_lines_are_numbered_and_judged_one_by_one() {
        let content =
            b"\xef\xbb\xbf{\"a\":1}\r\n\n[1]\n{\"a\":\xff}\n{\"a\"\n\x00\n{\"a\":2}".as_slice();
        let rows = collect(read_json_lines, content, &Limits::default()).unwrap();
        let places: Vec<&str> = rows.iter().map(|(p, _)| p.as_str()).collect();
        assert_eq!(
            places,
            ["line 1", "line 3", "line 4", "line 5", "line 6", "line 7"]
        );
        assert_eq!(rows[0].1.as_ref().unwrap()["a"], 1);
        assert!(rows[1].1.as_ref().unwrap_err().contains("a list"));
        assert_eq!(
            rows[2].1.as_ref().unwrap_err(),
            "is not valid UTF-8 (byte 6)"
        );
        assert!(rows[3].1.as_ref().unwrap_err().contains("not valid JSON"));
        assert!(rows[4].1.is_err());
        assert_eq!(rows[5].1.as_ref().unwrap()["a"], 2);
    }

    #[test]
    fn a_huge_line_is_passed_over_without_being_held() {
        let limits = Limits {
            row_bytes: 64,
            ..Limits::default()
        };
        let mut content = vec![b'x'; 300_000];
        content.extend_from_slice(b"\n{\"a\":1}\n");
        // A row of exactly the limit is fine.
        let fitting = format!("{{\"a\":\"{}\"}}", "y".repeat(64 - 8));
        assert_eq!(fitting.len(), 64);
        content.extend_from_slice(fitting.as_bytes());
        let rows = collect(read_json_lines, &content, &limits).unwrap();
        assert_eq!(rows[0].1.as_ref().unwrap_err(), "is longer than 64 bytes");
        assert_eq!(rows[1].0, "line 2");
        assert!(rows[1].1.is_ok() && rows[2].1.is_ok());
    }

    #[test]
    fn deep_nesting_is_refused_by_the_row() {
        let deep = "[".repeat(100_000);
        let rows = collect(
            read_json_lines,
            format!("{{\"a\":{deep}\n{{\"a\":1}}").as_bytes(),
            &Limits::default(),
        )
        .unwrap();
        assert!(rows[0].1.is_err() && rows[1].1.is_ok());
    }

    #[test]
    fn array_elements_keep_their_lines_and_their_faults() {
        let content = b"[\n {\"a\": \"],\\\"\\n}\"},\n\n {\"a\": oops},\n {\"a\": [1, {}]}\n]\n";
        let rows = collect(read_json_array, content, &Limits::default()).unwrap();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[0].0, "line 2");
        assert_eq!(rows[0].1.as_ref().unwrap()["a"], "],\"\n}");
        assert_eq!(rows[1].0, "line 4");
        assert!(rows[1].1.is_err());
        assert_eq!(rows[2].0, "line 5");
        assert!(rows[2].1.is_ok());
        assert!(
            collect(read_json_array, b" [ ] ", &Limits::default())
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn what_is_not_an_array_is_refused() {
        for content in ["", "{}", "17", "[{\"a\":1}", "[{\"a\":\"x]"] {
            assert!(
                collect(read_json_array, content.as_bytes(), &Limits::default()).is_err(),
                "{content}"
            );
        }
        let small = Limits {
            file_bytes: 4,
            ..Limits::default()
        };
        assert!(collect(read_json_array, b"[{}, {}]", &small).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in proptest::collection::vec(
                prop_oneof![
                    any::<u8>(),
                    proptest::sample::select(b"[]{}\",:\\\n0a".to_vec()),
                ],
                0..400,
            ),
            row_bytes in 1usize..64,
        ) {
            let limits = Limits { row_bytes, ..Limits::default() };
            let lines = collect(read_json_lines, &bytes, &limits).unwrap();
            prop_assert!(lines.len() <= 1 + bytes.iter().filter(|&&b| b == b'\n').count());
            let _ = collect(read_json_array, &bytes, &limits);
        }

        #[test]
        fn an_array_gives_what_its_lines_give(texts in proptest::collection::vec(".{0,20}", 1..8)) {
            let rows: Vec<String> =
                texts.iter().map(|t| serde_json::json!({"t": t, "n": [1, {}]}).to_string()).collect();
            let limits = Limits::default();
            let lines = collect(read_json_lines, rows.join("\n").as_bytes(), &limits).unwrap();
            let array = format!("[\n{}\n]", rows.join(" ,\n"));
            let array = collect(read_json_array, array.as_bytes(), &limits).unwrap();
            prop_assert_eq!(lines.len(), array.len());
            for (index, (line, element)) in lines.iter().zip(&array).enumerate() {
                prop_assert_eq!(line.1.as_ref().unwrap(), element.1.as_ref().unwrap());
                prop_assert_eq!(&element.0, &format!("line {}", index + 2));
            }
        }
    }
}
