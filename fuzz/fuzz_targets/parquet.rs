//! Problems as parquet.

#![no_main]

use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use tinylora::data::dataset::ReadOptions;
use tinylora::data::load_file;
use tinylora_fuzz::read_file;

static HOOK: Once = Once::new();

fuzz_target!(|data: &[u8]| {
    // The parquet crate panics on some broken files and is caught; libFuzzer's hook would end the
    // process before. What is not caught ends it all the same.
    HOOK.call_once(|| std::panic::set_hook(Box::new(|_| ())));
    read_file("fuzz.parquet", data, "fuzz.parquet", |path| {
        load_file(path, &ReadOptions::default())
    });
});
