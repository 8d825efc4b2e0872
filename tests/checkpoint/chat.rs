//! Chat templates against Jinja2 (`tests/fixtures/checkpoint/make_chats.py`), and hostile ones.

use safetensors::Dtype as StDtype;
use serde_json::{Value, json};
use tinylora::model::{Arch, ChatMessage, Tokenizer};

use crate::support::{HfDir, config};

fn tokenizer(made: &HfDir) -> Tokenizer {
    Tokenizer::from_hf_dir(made.dir.path(), &config(&made.config)).expect("a tokenizer")
}

fn with_template(template: &str) -> (HfDir, Tokenizer) {
    let made = HfDir::new(Arch::Llama, StDtype::F32);
    let settings = json!({"chat_template": template, "eos_token": "<|im_end|>",
                          "bos_token": {"content": "<|endoftext|>", "lstrip": false}});
    made.write("tokenizer_config.json", settings.to_string());
    let tokenizer = tokenizer(&made);
    (made, tokenizer)
}

/// Compares every case of `fixture`; gives the number of templates.
fn compare(fixture: &Value) -> usize {
    for case in fixture["cases"].as_array().expect("cases") {
        let name = case["template"].as_str().expect("a name");
        let template = fixture["templates"][name].as_str().expect("a template");
        let (_made, tokenizer) = with_template(template);
        let messages: Vec<ChatMessage> =
            serde_json::from_value(case["messages"].clone()).expect("messages");
        let prompt = case["add_generation_prompt"].as_bool().expect("a flag");
        let rendered = tokenizer.apply_chat_template(&messages, prompt);
        match (&case["text"], &case["error"]) {
            (Value::String(text), _) => assert_eq!(&rendered.expect(name), text, "{name}"),
            (_, Value::String(error)) => {
                let refusal = rendered.expect_err(name).to_string();
                assert!(refusal.contains(error), "{name}: {refusal}");
            }
            _ => panic!("a case without a result"),
        }
    }
    fixture["templates"].as_object().expect("templates").len()
}

#[test]
fn renderings_are_those_of_jinja2() {
    let fixture = include_str!("../fixtures/checkpoint/chats.json");
    assert_eq!(compare(&serde_json::from_str(fixture).expect("JSON")), 4);
}

#[test]
fn oracle_renderings_are_those_of_jinja2() {
    let Some(path) = std::env::var_os("TINYLORA_CHAT_ORACLE") else {
        println!(
            "skipped: TINYLORA_CHAT_ORACLE is not set (tests/fixtures/checkpoint/make_chats.py)"
        );
        return;
    };
    let text = std::fs::read_to_string(path).expect("read");
    let count = compare(&serde_json::from_str(&text).expect("JSON"));
    println!("{count} templates render as with Jinja2");
}

#[test]
fn the_template_file_wins_over_the_key_and_a_list_has_a_default() {
    let hello = [ChatMessage::new("user", "hello")];
    let (made, from_key) = with_template("key {{ messages[0].content }}");
    assert_eq!(
        from_key.apply_chat_template(&hello, false).unwrap(),
        "key hello"
    );
    made.write("chat_template.jinja", "file {{ messages[0].content }}");
    let from_file = tokenizer(&made);
    assert_eq!(
        from_file.apply_chat_template(&hello, false).unwrap(),
        "file hello"
    );

    std::fs::remove_file(made.dir.path().join("chat_template.jinja")).unwrap();
    let named = json!({"chat_template": [{"name": "tool_use", "template": "tools"},
                                         {"name": "default", "template": "default"}]});
    made.write("tokenizer_config.json", named.to_string());
    assert_eq!(
        tokenizer(&made).apply_chat_template(&hello, false).unwrap(),
        "default"
    );
}

#[test]
fn a_checkpoint_without_a_template_says_so() {
    let made = HfDir::new(Arch::Llama, StDtype::F32);
    let tokenizer = tokenizer(&made);
    assert!(!tokenizer.has_chat_template());
    let error = tokenizer.apply_chat_template(&[], true).unwrap_err();
    assert!(error.to_string().contains("chat template"), "{error}");
}

#[test]
fn broken_and_endless_templates_are_refused_when_used() {
    let recursive = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    let nested = format!(
        "{}x{}",
        "{% if true %}".repeat(5000),
        "{% endif %}".repeat(5000)
    );
    let huge = "x".repeat(2 << 20);
    for (template, said) in [
        ("{% for %}", "line 1"),
        ("{{ nonsense() }}", "nonsense"),
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "steps",
        ),
        (recursive, "recursion"),
        (&nested, ""),
        (&huge, "128 KiB"),
        ("{{ strftime_now('%Q') }}", "%Q"),
        ("{{ [1] | tojson(sort_keys=true) }}", "sort_keys"),
    ] {
        let (_made, tokenizer) = with_template(template);
        let error = tokenizer.apply_chat_template(&[], true).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        let shown = error.to_string();
        assert!(
            shown.starts_with("chat template: ") && shown.contains(said),
            "{shown}"
        );
    }
}
