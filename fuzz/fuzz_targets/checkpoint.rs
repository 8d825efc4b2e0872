//! A checkpoint whose checksums are right: the manifest, up to a zero byte, and the state.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};
use tinylora::run::checkpoint;
use tinylora_fuzz::{path, promises, seeds};

fuzz_target!(init: seeds::add("saved", seeds::checkpoint), |data: &[u8]| {
    let end = data.iter().position(|byte| *byte == 0);
    let (manifest, state) = data.split_at(end.unwrap_or(data.len()));
    let state = state.get(1..).unwrap_or_default();
    let folder = path("step-000001");
    std::fs::create_dir_all(&folder).expect("a folder");
    let mut sums = String::new();
    for (name, bytes) in [
        ("manifest.json", manifest),
        ("state.safetensors", state),
        ("adapter.safetensors", &[]),
    ] {
        std::fs::write(folder.join(name), bytes).expect("written");
        sums.push_str(&format!("{:x}  {name}\n", Sha256::digest(bytes)));
    }
    std::fs::write(folder.join("SHA256SUMS"), sums).expect("written");
    promises("step-000001", || checkpoint::load(&folder));
});
