//! Reading a log that may be large, still written to, cut off in the middle, or not ours at all.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use serde::de::DeserializeOwned;

/// Bytes of a line beyond which it is skipped: memory does not depend on the file.
const MAX_LINE: u64 = 4 << 20;

/// The JSON values of a JSON Lines file, one at a time.
pub struct Lines {
    reader: BufReader<File>,
    /// Where the next line begins.
    offset: u64,
    line: Vec<u8>,
    /// Whole lines that were not what was expected, or too long.
    pub damaged: usize,
    /// Whether the last line has no end: a crash tore it, or it is being written.
    pub torn: bool,
}

impl Lines {
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            reader: BufReader::new(File::open(path)?),
            offset: 0,
            line: Vec::new(),
            damaged: 0,
            torn: false,
        })
    }

    /// Bytes in the file now.
    pub fn size(&self) -> io::Result<u64> {
        Ok(self.reader.get_ref().metadata()?.len())
    }

    /// Goes to a place where a line begins.
    pub fn seek(&mut self, offset: u64) -> io::Result<()> {
        self.reader.seek(SeekFrom::Start(offset))?;
        self.offset = offset;
        Ok(())
    }

    /// Goes to the first line that begins at or after `offset`.
    pub fn seek_to_line(&mut self, offset: u64) -> io::Result<()> {
        match offset.checked_sub(1) {
            None => self.seek(0),
            Some(before) => {
                self.seek(before)?;
                self.skip_line()
            }
        }
    }

    /// The next line that is a `T`, with the place where it begins.
    pub fn read<T: DeserializeOwned>(&mut self) -> io::Result<Option<(u64, T)>> {
        loop {
            let start = self.offset;
            self.line.clear();
            let read = (&mut self.reader)
                .take(MAX_LINE)
                .read_until(b'\n', &mut self.line)?;
            self.offset += read as u64;
            if read == 0 {
                return Ok(None);
            }
            let whole = self.line.last() == Some(&b'\n');
            if !whole && read as u64 == MAX_LINE {
                self.damaged += 1;
                self.skip_line()?;
                continue;
            }
            match serde_json::from_slice(&self.line) {
                Ok(value) => return Ok(Some((start, value))),
                Err(_) if !whole => self.torn = true,
                Err(_) => self.damaged += 1,
            }
        }
    }

    /// Passes over the rest of a line without keeping it.
    fn skip_line(&mut self) -> io::Result<()> {
        loop {
            let available = self.reader.fill_buf()?;
            if available.is_empty() {
                return Ok(());
            }
            let end = available.iter().position(|&b| b == b'\n');
            let used = end.map_or(available.len(), |end| end + 1);
            self.reader.consume(used);
            self.offset += used as u64;
            if end.is_some() {
                return Ok(());
            }
        }
    }

    /// What to say of lines that could not be read.
    pub fn remark(&self, name: &str) -> Option<String> {
        let lines = match self.damaged {
            0 => None,
            1 => Some("1 line cannot be read and is left out".to_owned()),
            n => Some(format!("{n} lines cannot be read and are left out")),
        };
        let torn = self.torn.then(|| "its last line is incomplete".to_owned());
        let what: Vec<String> = lines.into_iter().chain(torn).collect();
        (!what.is_empty()).then(|| format!("{name}: {}", what.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn file(content: &[u8]) -> (tempfile::TempDir, Lines) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        std::fs::write(&path, content).unwrap();
        let lines = Lines::open(&path).unwrap();
        (folder, lines)
    }

    fn all(lines: &mut Lines) -> Vec<String> {
        let mut values = Vec::new();
        while let Some((_, value)) = lines.read::<Value>().unwrap() {
            values.push(value.to_string());
        }
        values
    }

    #[test]
    fn torn_and_damaged_lines_are_passed_over_and_counted() {
        let (_folder, mut lines) = file(b"{\"a\":1}\n\xff\xfe\n[2]\n{\"a\":");
        assert_eq!(all(&mut lines), ["{\"a\":1}", "[2]"]);
        assert_eq!((lines.damaged, lines.torn), (1, true));
        let remark = lines.remark("x.jsonl").unwrap();
        assert_eq!(
            remark,
            "x.jsonl: 1 line cannot be read and is left out; its last line is incomplete"
        );
        // A last line that is whole but for its end is one.
        let (_folder, mut lines) = file(b"1\n2");
        assert_eq!(all(&mut lines), ["1", "2"]);
        assert!(lines.remark("x").is_none());
    }

    #[test]
    fn long_lines_are_skipped_and_places_found() {
        let long = vec![b'7'; MAX_LINE as usize + 10];
        let (_folder, mut lines) = file(&[b"1\n", &long[..], b"\n3\n"].concat());
        assert_eq!(all(&mut lines), ["1", "3"]);
        assert_eq!(lines.damaged, 1);

        let (_folder, mut lines) = file(b"11\n22\n33\n");
        for (offset, expected) in [(0, "11"), (1, "22"), (3, "22"), (4, "33"), (6, "33")] {
            lines.seek_to_line(offset).unwrap();
            let (start, value) = lines.read::<Value>().unwrap().unwrap();
            assert_eq!(value.to_string(), expected, "{offset}");
            lines.seek(start).unwrap();
            assert_eq!(lines.read::<Value>().unwrap().unwrap().1, value);
        }
        lines.seek_to_line(7).unwrap();
        assert!(lines.read::<Value>().unwrap().is_none());
    }
}
