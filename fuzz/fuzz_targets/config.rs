//! A training configuration and the description of a sweep.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tinylora::config::{Config, Source};
use tinylora::sweep::file::SweepFile;
use tinylora_fuzz::promises;

fuzz_target!(|data: &[u8]| {
    let source = Source {
        origin: "fuzz.toml".to_owned(),
        name: "fuzz".to_owned(),
        text: String::from_utf8_lossy(data).into_owned(),
    };
    promises("", || Config::load(&source, &[]));
    promises("", || SweepFile::parse(&source));
});
