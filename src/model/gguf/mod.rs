//! GGUF files: weights, configuration and tokenizer in one file, as llama.cpp writes them.

mod blocks;

pub(super) use blocks::BlockType;
