//! A model's weights: `model.safetensors` beside a configuration of a small model.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tinylora::model::{LoadOptions, Model};
use tinylora_fuzz::{SMALL_CONFIG, mini_with, promises, seeds};

fuzz_target!(init: seeds::add("small", seeds::weights), |data: &[u8]| {
    mini_with("config.json", SMALL_CONFIG.as_bytes());
    let folder = mini_with("model.safetensors", data).display().to_string();
    // What is missing is said of the folder, which may have several files.
    promises(&folder, || {
        Model::load(&folder, &LoadOptions::default())
    });
});
