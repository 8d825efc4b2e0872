//! `tokenizer.json`, up to a zero byte, and the chat template behind it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tinylora::Error;
use tinylora::model::{ChatMessage, ModelConfig, Tokenizer};
use tinylora_fuzz::{mini_with, promises};

fuzz_target!(|data: &[u8]| {
    let end = data.iter().position(|byte| *byte == 0);
    let (json, template) = data.split_at(end.unwrap_or(data.len()));
    let template = template.get(1..).unwrap_or_default();
    mini_with("chat_template.jinja", template);
    let folder = mini_with("tokenizer.json", json);
    promises("", || {
        let config = ModelConfig::from_hf_dir(&folder)?;
        let tokenizer = Tokenizer::from_hf_dir(&folder, &config)?;
        let text = String::from_utf8_lossy(template);
        let ids = tokenizer.encode(&text, true)?;
        tokenizer.decode(&ids, false);
        let message = ChatMessage::new("user", "What is 7 times 8?");
        tokenizer.apply_chat_template(&[message], true)?;
        Ok::<_, Error>(())
    });
});
