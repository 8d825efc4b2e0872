//! A model's weights: `model.safetensors` beside the configuration of the embedded model.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tinylora::model::{LoadOptions, Model};
use tinylora_fuzz::{mini_with, promises};

fuzz_target!(|data: &[u8]| {
    let folder = mini_with("model.safetensors", data).display().to_string();
    promises("model.safetensors", || {
        Model::load(&folder, &LoadOptions::default())
    });
});
