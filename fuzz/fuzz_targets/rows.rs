//! Problems as JSON Lines and as a JSON array.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tinylora::data::dataset::ReadOptions;
use tinylora::data::load_file;
use tinylora_fuzz::read_file;

fuzz_target!(|data: &[u8]| {
    for name in ["fuzz.jsonl", "fuzz.json"] {
        read_file(name, data, name, |path| {
            load_file(path, &ReadOptions::default())
        });
    }
});
