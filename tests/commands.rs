//! `eval`, `score` and `generate` on a run of the embedded model's shape with random weights.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

const CONFIG: &str = r#"
method = "sft"
[model]
path = "mini"
random_init = true
[data]
train = "mini"
limit = 8
[adapter]
n_tie = 4
[train]
max_steps = 2
[optim]
learning_rate = 10.0
[sft]
examples_per_step = 2
"#;

/// A folder with one finished run.
struct Place(tempfile::TempDir);

impl Place {
    fn with_run() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::write(place.path("small.toml"), CONFIG).unwrap();
        place.succeed(&["train", "--config", "small.toml"]);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_tinylora"))
            .args(arguments)
            .current_dir(self.0.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.path("hf"))
            .env_remove("HF_HUB_CACHE")
            .env_remove("TINYLORA_DATA_DIR")
            .env("COLUMNS", "60")
            .output()
            .unwrap()
    }

    /// stdout of a command that must succeed.
    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn refuse(&self, arguments: &[&str], code: i32, part: &str) {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(part), "no {part:?} in: {stderr}");
    }
}

#[test]
fn a_run_is_evaluated_scored_and_asked() {
    let place = Place::with_run();

    // The newest run's model and adapter, without naming either.
    let eval = [
        "eval",
        "--benchmark",
        "mini",
        "--limit",
        "3",
        "--max-tokens",
        "5",
    ];
    let with = |more: &[&'static str]| -> Vec<&str> { [&eval[..], more].concat() };
    let results = place.succeed(&with(&["--base", "--json", "--out", "out"]));
    let results: Value = serde_json::from_str(&results).unwrap();
    let task = &results["results"]["mini"];
    assert!(task["exact_match,strict-match"].is_number(), "{task}");
    assert!(task["exact_match,flexible-extract"].is_number(), "{task}");
    assert_eq!(results["n-samples"]["mini"]["effective"], 3);
    let compared = &results["tinylora"]["tasks"]["mini"]["comparison"];
    assert!(compared["exact_match,strict-match"]["mcnemar_p"].is_number());
    let files = std::fs::read_dir(place.path("out")).unwrap();
    assert_eq!(files.count(), 5, "results, samples and completions of both");

    // The same again only reads back; another configuration is refused.
    let table = place.succeed(&with(&["--base", "--out", "out"]));
    assert!(
        table.contains("0 tokens") && table.contains("3 completions read back"),
        "{table}"
    );
    place.refuse(
        &with(&["--out", "out", "--seed", "9"]),
        2,
        "seed was 0, is 9",
    );

    // Completions do not depend on how many are decoded at once.
    let sampled = ["--samples-per-problem", "3", "--json", "--out"];
    place.succeed(&[&eval[..], &sampled, &["one", "--batch-size", "1"]].concat());
    place.succeed(&[&eval[..], &sampled, &["four", "--batch-size", "4"]].concat());
    let completions = |folder: &str| {
        let text = std::fs::read_to_string(place.path(folder).join("completions_mini.jsonl"));
        let mut lines: Vec<String> = text.unwrap().lines().map(String::from).collect();
        lines.sort();
        lines
    };
    assert_eq!(completions("one").len(), 10);
    assert_eq!(completions("one"), completions("four"));

    // The adapter's file says as much as its run.
    let runs = std::fs::read_dir(place.path("runs")).unwrap();
    let run = runs.map(|r| r.unwrap().path()).next().unwrap();
    let file = run.join("adapter.safetensors").display().to_string();
    for (folder, which) in [
        ("run", vec!["--run", run.to_str().unwrap()]),
        ("file", vec!["--adapter", &file]),
    ] {
        place.succeed(&[&eval[..], &which, &["--out", folder]].concat());
    }
    assert_eq!(completions("run"), completions("file"));

    score(&place);
    generate(&place);
    user_data(&place);
    hub_cache(&place);
}

#[test]
fn several_adapters_are_evaluated_as_each_alone() {
    let place = Place::with_run();
    for (name, set) in [
        ("b", vec!["--set", "adapter.projection_seed=5"]),
        ("split", vec!["--set", "adapter.sigma=split"]),
        (
            "all",
            vec![
                "--set",
                "adapter.type=full",
                "--set",
                "optim.learning_rate=0.01",
            ],
        ),
    ] {
        let train = ["train", "--config", "small.toml", "--run-dir", name];
        place.succeed(&[&train[..], &set].concat());
    }
    let eval = [
        "eval",
        "--benchmark",
        "mini",
        "--limit",
        "3",
        "--max-tokens",
        "6",
        "--samples-per-problem",
        "2",
        "--json",
        "--out",
    ];
    let with = |more: &[&'static str]| -> Vec<&str> { [&eval[..], more].concat() };
    let together = place.succeed(&with(&[
        "out",
        "--base",
        "--adapter",
        "b,split",
        "--adapter",
        "all",
    ]));
    let together: Value = serde_json::from_str(&together).unwrap();
    assert_eq!(together.as_array().map(Vec::len), Some(3));
    let completions = |folder: &str, file: &str| {
        let text = std::fs::read_to_string(place.path(folder).join(file)).unwrap();
        let mut lines: Vec<String> = text.lines().skip(1).map(String::from).collect();
        lines.sort();
        lines
    };
    let mut seen = vec![completions("out", "completions_mini_base.jsonl")];
    for (i, name) in ["b", "split", "all"].into_iter().enumerate() {
        let alone = place.succeed(&with(&[name, "--base", "--adapter", name]));
        let alone: Value = serde_json::from_str(&alone).unwrap();
        for part in ["results", "configs"] {
            assert_eq!(together[i][part], alone[part], "{name}");
        }
        let compared = |report: &Value| report["tinylora"]["tasks"]["mini"]["comparison"].clone();
        assert_eq!(compared(&together[i]), compared(&alone), "{name}");
        let own = completions(&format!("out/{name}"), "completions_mini.jsonl");
        assert_eq!(own, completions(name, "completions_mini.jsonl"), "{name}");
        assert!(!seen.contains(&own), "{name} answers as another one");
        seen.push(own);
    }
    let table = place.succeed(&[
        "eval",
        "--benchmark",
        "mini",
        "--limit",
        "2",
        "--adapter",
        "b,split",
    ]);
    assert_eq!(
        table.matches("exact_match,strict-match").count(),
        2,
        "{table}"
    );
    for (more, said) in [
        (
            vec!["eval", "--benchmark", "mini", "--adapter", "b,b"],
            "twice",
        ),
        (
            vec![
                "generate",
                "--adapter",
                "b",
                "--adapter",
                "split",
                "--chat",
                "Hi",
            ],
            "takes one adapter",
        ),
    ] {
        place.refuse(&more, 2, said);
    }
}

fn score(place: &Place) {
    let rows = [
        r#"{"id": 1, "prompt": "Tom has 7", "completion": " jars."}"#,
        r#"{"prompt": "Mia buys 3 baskets.", "completion": ""}"#,
        r#"{"prompt": "a", "completion": "b"}"#,
    ];
    std::fs::write(place.path("rows.jsonl"), rows.join("\n")).unwrap();
    let parse = |text: String| -> Vec<Value> {
        text.lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect()
    };
    let together = parse(place.succeed(&["score", "rows.jsonl"]));
    assert_eq!(together.len(), 3);
    assert_eq!(together[0]["id"], 1);
    for row in &together {
        let (ids, logprobs) = (&row["completion_ids"], &row["logprobs"]);
        assert_eq!(
            ids.as_array().unwrap().len(),
            logprobs.as_array().unwrap().len()
        );
        assert!(
            logprobs
                .as_array()
                .unwrap()
                .iter()
                .all(|l| l.as_f64().unwrap() < 0.0)
        );
    }
    // A row has the same bits alone.
    std::fs::write(place.path("last.jsonl"), rows[2]).unwrap();
    let alone = parse(place.succeed(&["score", "last.jsonl"]));
    assert_eq!(alone[0], together[2]);

    std::fs::write(
        place.path("bad.jsonl"),
        "{\"prompt\": \"\", \"completion\": \"a\"}",
    )
    .unwrap();
    place.refuse(
        &["score", "bad.jsonl"],
        3,
        "bad.jsonl line 1 has an empty prompt",
    );
    place.refuse(&["score", "none.jsonl"], 3, "none.jsonl");
}

fn generate(place: &Place) {
    let ask = ["generate", "--prompt", "Tom has", "--max-tokens", "6"];
    let greedy = place.succeed(&ask);
    assert_eq!(greedy, place.succeed(&ask));
    let three = [&ask[..], &["-n", "3", "--seed", "5"]].concat();
    let three = place.succeed(&three);
    assert!(
        three.starts_with("[1/3]\n") && three.contains("\n[3/3]\n"),
        "{three}"
    );
    let sides = place.succeed(&[&ask[..], &["--compare"]].concat());
    // In 60 columns one after the other.
    assert!(
        sides.starts_with("── base\n") && sides.contains("── adapter\n"),
        "{sides}"
    );
    place.refuse(
        &[&ask[..], &["--temperature=-1"]].concat(),
        2,
        "--temperature must be 0 (greedy) or more",
    );
    place.refuse(
        &["generate", "--prompt", "x", "--chat", "y"],
        2,
        "cannot be used with",
    );
    place.refuse(&["generate"], 2, "--prompt");
}

fn user_data(place: &Place) {
    let rows = [
        r#"{"q": "Tom has 2 jars. He buys 1 jar. How many?", "gold": "3"}"#,
        "not JSON",
        r#"{"q": "Mia has 1 bead. How many?", "gold": ""}"#,
    ];
    std::fs::write(place.path("mine.jsonl"), rows.join("\n")).unwrap();
    let eval = [
        "eval",
        "--data",
        "mine.jsonl",
        "--problem-field",
        "q",
        "--answer-field",
        "gold",
        "--max-tokens",
        "3",
        "--json",
    ];
    place.refuse(&eval, 3, "mine.jsonl line 2 is not valid JSON");
    let results = place.succeed(&[&eval[..], &["--skip-bad-rows"]].concat());
    let results: Value = serde_json::from_str(&results).unwrap();
    assert_eq!(results["n-samples"]["mine"]["effective"], 1);
    let rows = &results["tinylora"]["tasks"]["mine"];
    assert_eq!(rows["rows_not_usable"], 1);
    assert_eq!(rows["rows_without_answer"], 1);
    place.refuse(&["eval", "--benchmark", "min"], 2, "did you mean mini?");
    place.refuse(
        &["eval", "--benchmark", "aime24", "--limit", "1"],
        3,
        "HF_HUB_OFFLINE",
    );
}

fn hub_cache(place: &Place) {
    let eval = [
        "eval",
        "--benchmark",
        "gsm8k",
        "--limit",
        "2",
        "--max-tokens",
        "3",
        "--json",
        "--prompt",
        "plain",
    ];
    place.refuse(&eval, 3, "HF_HUB_OFFLINE");
    let repo = place.path("hf/hub/datasets--openai--gsm8k");
    let snapshot = repo.join("snapshots/c0ffee/main");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), "c0ffee").unwrap();
    let fixture = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/data/gsm8k/test.parquet"
    );
    let file = snapshot.join("test-00000-of-00001.parquet");
    std::fs::copy(fixture, file).unwrap();
    let results: Value = serde_json::from_str(&place.succeed(&eval)).unwrap();
    assert_eq!(results["n-samples"]["gsm8k"]["effective"], 2);
    assert_eq!(results["configs"]["gsm8k"]["dataset_path"], "openai/gsm8k");
}

#[test]
fn bench_reports_every_phase() {
    let place = Place(tempfile::tempdir().unwrap());
    let small = [
        "--prompts",
        "2",
        "--num-generations",
        "2",
        "--max-tokens",
        "4",
    ];
    let ask = [&["bench", "--repeats", "1"], &small[..]].concat();
    let report: Value =
        serde_json::from_str(&place.succeed(&[&ask[..], &["--json"]].concat())).unwrap();
    for key in ["gemm_peak_gflops", "svd_s", "load_s"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}");
    }
    for phase in ["prefill", "rollout", "forward", "backward", "step"] {
        for key in [
            "seconds",
            "tokens",
            "tokens_per_s",
            "gflops",
            "share_of_peak",
        ] {
            assert!(report[phase][key].as_f64().unwrap() > 0.0, "{phase} {key}");
        }
    }
    // At most 2 × 2 completions of 4 tokens.
    let tokens = report["rollout"]["tokens"].as_u64().unwrap();
    assert!((4..=16).contains(&tokens), "{tokens}");
    let seconds = |phase: &str| report[phase]["seconds"].as_f64().unwrap();
    let parts = seconds("rollout") + seconds("backward");
    assert!((seconds("step") - parts).abs() < 1e-9);
    assert!(place.succeed(&ask).contains("of peak"));
    place.refuse(
        &["bench", "--max-tokens", "100000"],
        2,
        "--max-tokens 100000",
    );
    place.refuse(&["bench", "--prompts", "0"], 2, "--prompts");
}

#[test]
fn a_run_has_its_page_and_one_is_made_of_several() {
    let place = Place::with_run();
    let runs = std::fs::read_dir(place.path("runs")).unwrap();
    let run = runs.map(|r| r.unwrap().path()).next().unwrap();
    let own = std::fs::read_to_string(run.join("report.html")).unwrap();
    assert!(
        own.contains("13") && own.contains("52 bytes"),
        "13 numbers in f32"
    );
    let environment = std::fs::read_to_string(run.join("environment.json")).unwrap();
    let environment: Value = serde_json::from_str(&environment).unwrap();
    assert_eq!(environment["model"]["name"], "mini");
    assert!(environment["threads"].is_number() && environment["kernels"].is_string());

    let name = run.file_name().unwrap().to_str().unwrap();
    let summary = place.succeed(&["report", name, run.to_str().unwrap(), "--out", "all.html"]);
    assert_eq!(summary.matches("· finished").count(), 2, "{summary}");
    assert!(
        summary.contains("mini · SFT · tinylora, 13 numbers, 52 bytes"),
        "{summary}"
    );
    let page = std::fs::read_to_string(place.path("all.html")).unwrap();
    assert!(page.contains("2 runs") && page.contains("Comparison"));

    place.refuse(
        &["report", "nothing", "--out", "x.html"],
        2,
        "no run nothing",
    );
    place.refuse(&["report", name, "--out", "small.toml"], 2, "is no report");
}
