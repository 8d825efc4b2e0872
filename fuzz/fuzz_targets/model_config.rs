//! `config.json` of a model.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tinylora::model::ModelConfig;
use tinylora_fuzz::{mini_with, promises};

fuzz_target!(|data: &[u8]| {
    let folder = mini_with("config.json", data);
    promises("config.json", || ModelConfig::from_hf_dir(&folder));
});
