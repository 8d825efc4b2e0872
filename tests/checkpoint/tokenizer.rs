//! Ids as Hugging Face gives them, streams of text, and saving.

use safetensors::Dtype as StDtype;
use tinylora::model::{Arch, TextStream, Tokenizer};

use crate::support::{HfDir, TOKENIZERS, config};

fn smollm() -> (HfDir, Tokenizer) {
    let made = HfDir::new(Arch::Llama, StDtype::F32);
    let settings =
        r#"{"eos_token": "<|endoftext|>", "chat_template": "{{ messages[0].content }}"}"#;
    made.write("tokenizer_config.json", settings);
    let tokenizer = Tokenizer::from_hf_dir(made.dir.path(), &config(&made.config));
    (made, tokenizer.expect("a tokenizer"))
}

fn texts() -> Vec<(String, Vec<u32>)> {
    let cases = TOKENIZERS["cases"]["smollm"].as_array().expect("cases");
    let case = |case: &serde_json::Value| {
        let ids = serde_json::from_value(case["ids"].clone()).expect("ids");
        (case["text"].as_str().expect("text").to_string(), ids)
    };
    cases.iter().map(case).collect()
}

#[test]
fn ids_are_those_of_the_library_and_decode_to_the_text() {
    let (_made, tokenizer) = smollm();
    for (text, ids) in texts() {
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false), text);
    }
    assert_eq!(tokenizer.eos_ids(), [2, 0]);
}

#[test]
fn special_tokens_are_skipped_on_request() {
    let (_made, tokenizer) = smollm();
    let ids = tokenizer
        .encode("<|im_start|>Hi<tool_call><|im_end|>", false)
        .unwrap();
    assert_eq!(tokenizer.decode(&ids, true), "Hi<tool_call>");
    assert_eq!(
        tokenizer.decode(&ids, false),
        "<|im_start|>Hi<tool_call><|im_end|>"
    );
}

#[test]
fn tokens_that_only_the_settings_list_are_added_with_their_ids() {
    let (made, _) = smollm();
    let entry = |content: &str| {
        serde_json::json!({"content": content, "special": true, "lstrip": false, "rstrip": false,
                           "normalized": false, "single_word": false})
    };
    let mut config = config(&made.config);
    config.vocab_size += 2;
    let settings = |first: &str, second: &str| {
        serde_json::json!({"added_tokens_decoder": {
            first: entry("<extra_1>"), "0": entry("<|endoftext|>"), second: entry("<extra_0>")}})
    };
    made.write("tokenizer_config.json", settings("447", "446").to_string());
    let tokenizer = Tokenizer::from_hf_dir(made.dir.path(), &config).expect("a tokenizer");
    let ids = tokenizer.encode("<extra_0><extra_1><|endoftext|>", false);
    assert_eq!(ids.unwrap(), [446, 447, 0]);
    for (first, second) in [("447", "3"), ("450", "446"), ("x", "446")] {
        made.write("tokenizer_config.json", settings(first, second).to_string());
        let refused = Tokenizer::from_hf_dir(made.dir.path(), &config).err();
        let error = refused.expect("refused").to_string();
        assert!(error.contains("tokenizer_config.json"), "{error}");
    }
}

#[test]
fn streamed_pieces_join_to_the_decoded_text_and_are_never_broken() {
    let (_made, tokenizer) = smollm();
    for skip_special in [false, true] {
        for (text, ids) in texts() {
            let mut stream = TextStream::new(skip_special);
            let mut joined = String::new();
            for &id in &ids {
                let piece = stream.push(&tokenizer, id);
                assert!(!piece.contains('\u{fffd}'), "{text:?}: {piece:?}");
                joined.push_str(&piece);
            }
            joined.push_str(&stream.finish(&tokenizer));
            assert_eq!(joined, tokenizer.decode(&ids, skip_special));
        }
    }
    // Any sequence of ids at all: broken UTF-8, special tokens, ids beyond the vocabulary.
    let mut state = 1u32;
    for length in 0..60 {
        let ids: Vec<u32> = (0..length)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 16) % 460
            })
            .collect();
        let mut stream = TextStream::new(true);
        let mut joined: String = ids.iter().map(|&id| stream.push(&tokenizer, id)).collect();
        joined.push_str(&stream.finish(&tokenizer));
        assert_eq!(joined, tokenizer.decode(&ids, true), "{ids:?}");
    }
}

/// Llama 2's kind of tokenizer: a token's text depends on its neighbours.
#[test]
fn streams_work_without_byte_level_tokens() {
    let (made, _) = smollm();
    let json = serde_json::json!({
        "version": "1.0", "added_tokens": [],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": {"▁the": 0, "▁cat": 1, "s": 2, "<0xE2>": 3, "<0x82>": 4,
                                            "<0xAC>": 5, "▁": 6}, "merges": []},
    });
    made.write("tokenizer.json", json.to_string());
    let tokenizer = Tokenizer::from_hf_dir(made.dir.path(), &config(&made.config)).unwrap();
    assert!(tokenizer.token_bytes(0, false).is_none());
    let mut ids = vec![0, 1, 2, 6, 3, 4, 5, 0, 3, 4];
    ids.extend([1, 2, 0].repeat(30));
    let mut stream = TextStream::new(true);
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(&tokenizer, id)).collect();
    assert_eq!(pieces[..7], ["the", " cat", "s", " ", "", "", "€"]);
    let mut joined = pieces.concat();
    joined.push_str(&stream.finish(&tokenizer));
    assert_eq!(joined, tokenizer.decode(&ids, true));
}

#[test]
fn a_saved_tokenizer_is_the_same() {
    let (_made, tokenizer) = smollm();
    let target = HfDir::new(Arch::Llama, StDtype::F32);
    tokenizer.save(target.dir.path()).expect("saved");
    let again = Tokenizer::from_hf_dir(target.dir.path(), &config(&target.config)).unwrap();
    for (text, ids) in texts() {
        assert_eq!(again.encode(&text, false).unwrap(), ids, "{text:?}");
    }
    assert_eq!(again.eos_ids(), tokenizer.eos_ids());
    assert!(again.has_chat_template());
}
