//! Text of tokens as they arrive, never with half a character.

use super::tokenizer::Tokenizer;

/// Turns ids into text piece by piece; the pieces together are what [`Tokenizer::decode`] gives
/// for all ids at once.
#[derive(Debug, Clone)]
pub struct TextStream {
    skip_special: bool,
    /// Ids since the last one whose text is settled. With byte-level tokenizers, whose tokens are
    /// bytes, `pending` serves instead.
    ids: Vec<u32>,
    /// Text of `ids` that was given out already (context that the next token's text depends on).
    given: usize,
    /// Bytes that do not make a character yet.
    pending: Vec<u8>,
}

/// Ids kept as context where a token's text depends on its neighbours.
const CONTEXT: usize = 8;

impl TextStream {
    pub fn new(skip_special: bool) -> Self {
        Self {
            skip_special,
            ids: Vec::new(),
            given: 0,
            pending: Vec::new(),
        }
    }

    /// The text that has become certain with `id`; often empty within a character.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        if let Some(bytes) = tokenizer.token_bytes(id, self.skip_special) {
            self.pending.extend_from_slice(bytes);
            return take_settled(&mut self.pending);
        }
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids, self.skip_special);
        // A replacement character at the end may be the first half of something.
        let settled = text.trim_end_matches(char::REPLACEMENT_CHARACTER).len();
        let piece = text.get(self.given..settled).unwrap_or("").to_string();
        self.given = self.given.max(settled);
        if settled == text.len() && self.ids.len() > 4 * CONTEXT {
            self.ids.drain(..self.ids.len() - CONTEXT);
            self.given = tokenizer.decode(&self.ids, self.skip_special).len();
        }
        piece
    }

    /// What is left when no more tokens come: a cut character becomes U+FFFD.
    pub fn finish(self, tokenizer: &Tokenizer) -> String {
        if !self.pending.is_empty() {
            return String::from_utf8_lossy(&self.pending).into_owned();
        }
        let text = tokenizer.decode(&self.ids, self.skip_special);
        text.get(self.given..).unwrap_or("").to_string()
    }
}

/// Takes from `pending` everything up to a character that is still incomplete, with bytes that
/// can never become one replaced just as [`String::from_utf8_lossy`] does.
fn take_settled(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut settled = 0;
    for chunk in pending.utf8_chunks() {
        text.push_str(chunk.valid());
        settled += chunk.valid().len();
        let invalid = chunk.invalid();
        let at_end = settled + invalid.len() == pending.len();
        let may_become_one = at_end && is_incomplete(invalid);
        if !invalid.is_empty() && !may_become_one {
            text.push(char::REPLACEMENT_CHARACTER);
            settled += invalid.len();
        }
    }
    pending.drain(..settled);
    text
}

/// Whether more bytes could complete this beginning of a character.
fn is_incomplete(bytes: &[u8]) -> bool {
    match std::str::from_utf8(bytes) {
        Ok(_) => false,
        Err(error) => error.error_len().is_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_bytes_join_to_the_lossy_text() {
        let samples: [&[u8]; 5] = [
            "é€𝄞 plain".as_bytes(),
            b"\xe2\x82",
            b"\xff\xfe ok \xe2\x28\xa1",
            b"\xf0\x9f\x98\x80\xf0\x9f",
            b"\xc3\xc3\xa9\x80",
        ];
        for bytes in samples {
            for step in 1..=3 {
                let mut pending = Vec::new();
                let mut text = String::new();
                for piece in bytes.chunks(step) {
                    pending.extend_from_slice(piece);
                    let new = take_settled(&mut pending);
                    text.push_str(&new);
                }
                text.push_str(&String::from_utf8_lossy(&pending));
                assert_eq!(text, String::from_utf8_lossy(bytes), "{bytes:x?} by {step}");
            }
        }
    }

    #[test]
    fn an_incomplete_character_is_held_back() {
        let mut pending = b"a\xe2\x82".to_vec();
        assert_eq!(take_settled(&mut pending), "a");
        pending.push(0xac);
        assert_eq!(take_settled(&mut pending), "€");
        assert!(pending.is_empty());
    }
}
