//! Bytes of each token of a byte-level vocabulary.

use tokenizers::Tokenizer;
use tokenizers::decoders::DecoderWrapper;

/// Token bytes by id. Byte-level vocabularies spell every byte as one printable character; a
/// token that uses any other character is taken as its own text.
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    /// `ends[id]` is where token `id` ends; it begins where the one before ends.
    ends: Vec<usize>,
    special: Vec<bool>,
}

impl TokenBytes {
    /// `None` when the tokenizer is not byte-level.
    pub fn new(tokenizer: &Tokenizer) -> Option<Self> {
        let Some(DecoderWrapper::ByteLevel(_)) = tokenizer.get_decoder() else {
            return None;
        };
        let byte_of = byte_alphabet();
        let count = tokenizer
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id as usize + 1);
        let mut table = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(count),
            special: vec![false; count],
        };
        for id in 0..count as u32 {
            if let Some(token) = tokenizer.id_to_token(id) {
                let start = table.bytes.len();
                for c in token.chars() {
                    match byte_of.get(c as usize).copied().flatten() {
                        Some(byte) => table.bytes.push(byte),
                        None => {
                            table.bytes.truncate(start);
                            table.bytes.extend_from_slice(token.as_bytes());
                            break;
                        }
                    }
                }
            }
            table.ends.push(table.bytes.len());
        }
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            if let Some(special) = table.special.get_mut(id as usize) {
                *special = token.special;
            }
        }
        Some(table)
    }

    /// Nothing for unknown ids and, if asked, for special tokens.
    pub fn get(&self, id: u32, skip_special: bool) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        if skip_special && self.special[id] {
            return &[];
        }
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }
}

/// GPT-2's alphabet, by code point: printable Latin-1 characters stand for themselves, the other
/// bytes for the characters from U+0100 on, in order.
fn byte_alphabet() -> Vec<Option<u8>> {
    let mut byte_of = vec![None; 0x200];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        if printable {
            byte_of[byte as usize] = Some(byte);
        } else {
            byte_of[next] = Some(byte);
            next += 1;
        }
    }
    byte_of
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_that_of_the_library() {
        use tokenizers::pre_tokenizers::byte_level::ByteLevel;
        let alphabet = byte_alphabet();
        let known: Vec<usize> = (0..alphabet.len())
            .filter(|&c| alphabet[c].is_some())
            .collect();
        assert_eq!(known.len(), 256);
        let library = ByteLevel::alphabet();
        for code in known {
            let c = char::from_u32(code as u32).unwrap();
            assert!(library.contains(&c), "{c:?}");
        }
        assert_eq!(alphabet['Ġ' as usize], Some(b' '));
        assert_eq!(alphabet['Ċ' as usize], Some(b'\n'));
    }
}
