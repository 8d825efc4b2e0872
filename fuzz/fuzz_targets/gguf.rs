//! A model in one GGUF file: configuration, tokenizer, chat template, weights.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tinylora::model::{LoadOptions, Model};
use tinylora_fuzz::{read_file, seeds};

fuzz_target!(init: seeds::add("small", seeds::gguf), |data: &[u8]| {
    read_file("fuzz.gguf", data, "fuzz.gguf", |path| {
        Model::load(&path.display().to_string(), &LoadOptions::default())
    });
});
