//! `tinylora grade`: grades a file of answers with one of the named graders.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use serde_json::{Map, Value};

use crate::reward::{Graded, Grader};
use crate::{Error, Result};

/// Reads JSON Lines with `gold` and `completion` (extract, then compare) or `gold` and `pred`
/// (compare; ignored beside a `completion`), and writes each row with `extracted` and `correct`
/// added to `out`, in order.
///
/// Fails with the file and line of a row that is not such an object.
pub fn run(grader: Grader, path: &Path, out: &mut dyn Write) -> Result<()> {
    let file = std::fs::File::open(path).map_err(|e| Error::file("open", path, e))?;
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = reader.read_until(b'\n', &mut line);
        if read.map_err(|e| Error::file("read", path, e))? == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let row = grade_row(grader, &line)
            .map_err(|cause| Error::data(format!("{}:{number}: {cause}", path.display())))?;
        serde_json::to_writer(&mut *out, &row).map_err(|e| Error::Internal(e.to_string()))?;
        writeln!(out).map_err(|e| Error::Internal(e.to_string()))?;
    }
    Ok(())
}

fn grade_row(grader: Grader, line: &[u8]) -> std::result::Result<Map<String, Value>, String> {
    let mut row: Map<String, Value> =
        serde_json::from_slice(line).map_err(|e| format!("not a JSON object: {e}"))?;
    let field = |key: &str| match row.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(format!("'{key}' is not a string")),
    };
    let gold = field("gold")?.ok_or("no 'gold'")?;
    let Graded { extracted, correct } = match (field("completion")?, field("pred")?) {
        (Some(completion), _) => grader.grade(gold, completion),
        (None, Some(pred)) => Graded {
            correct: grader.equal(gold, pred),
            extracted: Some(pred.to_owned()),
        },
        (None, None) => return Err("neither 'completion' nor 'pred'".to_owned()),
    };
    row.insert("extracted".to_owned(), extracted.into());
    row.insert("correct".to_owned(), correct.into());
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grade(grader: Grader, input: &[u8]) -> Result<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), input).unwrap();
        let mut out = Vec::new();
        run(grader, file.path(), &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn rows_keep_their_fields_and_gain_the_verdict() {
        let input = br#"{"id": 7, "gold": "42", "completion": "so\n#### 42"}

{"gold": "42", "pred": "41"}
"#;
        let expected = r#"{"id":7,"gold":"42","completion":"so\n#### 42","extracted":"42","correct":true}
{"gold":"42","pred":"41","extracted":"41","correct":false}
"#;
        assert_eq!(grade(Grader::Gsm8k, input).unwrap(), expected);
    }

    #[test]
    fn bad_rows_are_named_by_line() {
        for (row, cause) in [
            (
                &b"{\"gold\": 1, \"pred\": \"1\"}"[..],
                "'gold' is not a string",
            ),
            (b"{\"gold\": \"1\"}", "neither 'completion' nor 'pred'"),
            (b"[1]", "not a JSON object"),
            (
                b"{\"gold\": \"\xff\", \"pred\": \"1\"}",
                "not a JSON object",
            ),
        ] {
            let input = [&b"{\"gold\": \"1\", \"pred\": \"1\"}\n"[..], row].concat();
            let message = grade(Grader::Math, &input).unwrap_err().to_string();
            assert!(
                message.contains(":2: ") && message.contains(cause),
                "{message}"
            );
        }
    }
}
