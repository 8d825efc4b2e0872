//! A PEFT directory: its configuration, up to a zero byte, and its tensors.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tinylora::adapter::PeftAdapter;
use tinylora_fuzz::{path, promises};

fuzz_target!(|data: &[u8]| {
    let end = data.iter().position(|byte| *byte == 0);
    let (config, tensors) = data.split_at(end.unwrap_or(data.len()));
    let folder = path("peft");
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("adapter_config.json"), config).expect("written");
    let tensors = tensors.get(1..).unwrap_or_default();
    std::fs::write(folder.join("adapter_model.safetensors"), tensors).expect("written");
    promises("peft", || PeftAdapter::open(&folder));
});
