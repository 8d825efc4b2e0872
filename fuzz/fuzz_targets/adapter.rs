//! An adapter, as a file and as a line of text.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tinylora::adapter::SavedAdapter;
use tinylora_fuzz::{promises, seeds};

fuzz_target!(init: {
    seeds::add("file", seeds::adapter_file);
    seeds::add("text", seeds::adapter_text);
}, |data: &[u8]| {
    promises("fuzzed", || SavedAdapter::from_bytes(data, "fuzzed"));
    let text = String::from_utf8_lossy(data);
    promises("adapter", || SavedAdapter::from_text(&text));
    // The checksum would keep all but copies of the seed away from what it protects.
    let text = format!("tinylora1:{text}");
    promises("adapter", || SavedAdapter::from_text(&text));
});
