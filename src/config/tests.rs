//! A configuration as a user writes it: what is accepted, and what is said when it is not.

use super::*;

const MODEL: &str = "[model]\npath = \"some/dir\"\n";

fn load(text: &str, overrides: &[&str]) -> Result<Config> {
    let source = Source {
        origin: "a.toml".to_owned(),
        name: "a".to_owned(),
        text: format!("{text}\n"),
    };
    let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    Config::load(&source, &overrides)
}

fn message(text: &str, overrides: &[&str]) -> String {
    let error = load(text, overrides).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn the_resolved_file_reads_back_to_the_same_configuration() {
    let overrides = [
        "method=sft",
        "train.max_steps=7",
        "adapter.type=lora-xs",
        "adapter.init_std=1e-5",
        "optim.learning_rate=3",
        "grpo.stop=[\"\\n\\n\", \"Q:\"]",
        "model.device=cuda:1",
        "eval.data=gsm8k,svamp",
        "train.run_name=13",
    ];
    let config = load(MODEL, &overrides).unwrap();
    assert_eq!(config.method, Method::Sft);
    assert_eq!(config.optim.learning_rate, 3.0);
    assert_eq!(config.eval.data, ["gsm8k", "svamp"]);
    assert_eq!(config.train.run_name.as_deref(), Some("13"));
    let again = load(&config.to_toml().unwrap(), &[]).unwrap();
    assert_eq!(again, config);
}

#[test]
fn method_may_stand_on_top_or_in_train() {
    for text in ["method = \"sft\"\n", "[train]\nmethod = \"sft\"\n"] {
        let config = load(&format!("{text}{MODEL}"), &[]).unwrap();
        assert_eq!(config.method, Method::Sft);
    }
}

#[test]
fn none_unsets_a_key_of_the_file() {
    let text = format!("{MODEL}[train]\nmax_steps = 5\n");
    let config = load(&text, &["train.max_steps=none"]).unwrap();
    assert_eq!(config.train.max_steps, None);
    // Also one that is set by default, and the resolved file says so.
    let config = load(&text, &["sft.max_length=none"]).unwrap();
    assert_eq!(config.sft.max_length, None);
    assert_eq!(load(&config.to_toml().unwrap(), &[]).unwrap(), config);
}

#[test]
fn mistakes_in_a_file_name_line_key_and_remedy() {
    for (text, expected) in [
        (
            "\n[train]\nmax_step = 3",
            "a.toml:3: unknown key train.max_step; did you mean train.max_steps?",
        ),
        (
            "[train]\nn_tie = 3",
            "a.toml:2: unknown key train.n_tie; did you mean adapter.n_tie?",
        ),
        (
            "[trian]\nmax_steps = 3",
            "a.toml:1: unknown key trian; did you mean [train]?",
        ),
        (
            "method = \"gpro\"",
            "a.toml:1: method: expected one of grpo, sft, got \"gpro\"; did you mean \"grpo\"?",
        ),
        (
            "[train]\n\nmax_steps = \"many\"",
            "a.toml:3: train.max_steps: expected a whole number ≥ 0, got the string \"many\"",
        ),
        (
            "[train]\nseed = -1",
            "a.toml:2: train.seed: expected a whole number ≥ 0, got -1",
        ),
        (
            "[optim]\nlearning_rate = nan",
            "a.toml:2: optim.learning_rate: expected a number, got nan",
        ),
        (
            "[model]\ndevice = \"gpu\"",
            "a.toml:2: model.device: expected auto, cpu, cuda",
        ),
        ("train = 3", "a.toml:1: [train] is a table, not a key"),
        ("[train\n", "a.toml:1: not valid TOML"),
        (
            "[train]\nseed = 1\nseed = 2",
            "a.toml:3: not valid TOML: duplicate key",
        ),
        ("", "model.path = \"\": name a Hugging Face directory"),
    ] {
        let message = message(text, &[]);
        assert!(message.starts_with(expected), "{text:?} gave {message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}

#[test]
fn mistakes_in_an_override_name_it() {
    for (assignment, expected) in [
        (
            "train.max_steps",
            "--set train.max_steps: expected key=value",
        ),
        (
            "max_steps=3",
            "--set max_steps=3: unknown key max_steps; did you mean train.max_steps?",
        ),
        (
            "train.max_steps=x",
            "--set train.max_steps=x: train.max_steps: expected a whole number",
        ),
        ("grpo.num_generations=1", "grpo.num_generations = 1"),
        (
            "reward.funcs=gsm9k",
            "reward.funcs = [\"gsm9k\"]: unknown reward 'gsm9k'",
        ),
        (
            "grpo.reward_weights=1,2",
            "grpo.reward_weights = [1.0, 2.0]: must be one number for each of the 1 reward.funcs",
        ),
        (
            "adapter.type=dora",
            "--set adapter.type=dora: adapter.type: expected one of tinylora, lora-xs, lora, full",
        ),
    ] {
        let message = message(MODEL, &[assignment]);
        assert!(message.starts_with(expected), "{assignment} gave {message}");
    }
}

#[test]
fn every_built_in_is_valid_and_trains_what_it_says() {
    for (name, layers, expected) in [
        ("qwen7b-13p.toml", 28, 13),
        ("qwen7b-math.toml", 28, 13),
        ("qwen3b-16p.toml", 36, 16),
        ("llama3.1-8b.toml", 32, 112),
        ("smollm2-13p.toml", 30, 13),
    ] {
        let text = builtin::get(builtin::TRAINING, name).unwrap();
        let config = load(text, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
        let tying = crate::adapter::Tying::new(&config.adapter, layers);
        assert_eq!(tying.num_groups * config.adapter.u, expected, "{name}");
    }
    let get = |name| builtin::get(builtin::TRAINING, name).unwrap();
    assert_eq!(get("qwen7b-13p"), get("qwen7b-13p.toml"));
    for (name, text) in builtin::TRAINING {
        load(text, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn the_length_may_change_where_it_decides_nothing() {
    let keys = |overrides: &[&str]| load(MODEL, overrides).unwrap().defining_keys().unwrap();
    let constant = "optim.lr_scheduler_type=constant";
    assert_eq!(
        keys(&[constant, "train.max_steps=5"]),
        keys(&[constant, "train.max_steps=9"])
    );
    assert_ne!(keys(&["train.max_steps=5"]), keys(&["train.max_steps=9"]));
}

#[test]
fn a_missing_configuration_names_the_built_in_ones() {
    let message = Source::find("nothing-here.toml").unwrap_err().to_string();
    assert!(
        message.starts_with("no configuration nothing-here.toml"),
        "{message}"
    );
}

#[test]
fn device_and_paths_do_not_define_a_run_but_the_seed_does() {
    let base = load(MODEL, &[]).unwrap().defining_keys().unwrap();
    let same = load(MODEL, &["model.device=cpu", "model.path=elsewhere"]).unwrap();
    assert_eq!(same.defining_keys().unwrap(), base);
    let other = load(MODEL, &["train.seed=7"]).unwrap();
    assert_ne!(other.defining_keys().unwrap(), base);
}
