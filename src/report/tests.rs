//! Pages about run directories in every state.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;
use crate::config::{Config, Method};

/// A folder with run directories in it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn run(&self, name: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.join("evaluations")).unwrap();
        path
    }

    /// A GRPO run of `steps` steps with evaluations, completions and a configuration.
    fn whole_run(&self, name: &str, steps: u64, text: &str) -> PathBuf {
        let path = self.run(name);
        let mut config = Config::default();
        config.train.max_steps = Some(steps);
        config.model.path = format!("folder/of/someone/{text}");
        std::fs::write(path.join("config.toml"), config.to_toml().unwrap()).unwrap();
        let environment = json!({"tinylora": "0.1.0", "cpu": text, "model": {"name": text}});
        std::fs::write(path.join("environment.json"), environment.to_string()).unwrap();

        let evaluation = |step: u64, value: f64| {
            json!({"step": step, "eval_set/exact_match,strict-match": value,
                "eval_set/exact_match,strict-match_stderr": 0.02,
                "eval_set/completion_tokens": 20.5, text: 1.0})
        };
        let mut metrics = format!("{}\n", evaluation(0, 0.4));
        let (mut timings, mut completions) = (String::new(), String::new());
        for step in 1..=steps {
            let row = json!({"step": step, "reward": 0.4 + step as f64 / 1000.0, "entropy": 0.01,
                "grad_norm": 0.02 * step as f64, "clip_ratio/region_mean": 0.0, "kl": null});
            writeln!(metrics, "{row}").unwrap();
            writeln!(timings, "{}", json!({"step": step, "step_time": 1.5})).unwrap();
            for (sample, reward) in [1.0, 0.0].into_iter().enumerate() {
                let row = json!({"step": step, "problem": format!("p{step}"), "prompt": text,
                    "completion": format!("{text} {sample}"), "answer": text, "extracted": text,
                    "reward": reward, "advantage": reward - 0.5, "num_tokens": 3, "finish": "eos"});
                writeln!(completions, "{row}").unwrap();
            }
        }
        writeln!(metrics, "{}", evaluation(steps, 0.8)).unwrap();
        std::fs::write(path.join("metrics.jsonl"), metrics).unwrap();
        std::fs::write(path.join("timings.jsonl"), timings).unwrap();
        std::fs::write(path.join("completions.jsonl"), completions).unwrap();
        evaluations(&path, steps, text);
        path
    }
}

/// Four problems, one for each way an answer can change.
fn evaluations(run: &Path, steps: u64, text: &str) {
    let mut problems = format!(
        "{}\n",
        json!({"tinylora_problems": 1, "metric": "exact_match,gsm8k", "grader": "gsm8k"})
    );
    let header = json!({"tinylora_eval": 1, "configuration": {}});
    let (mut before, mut after) = (format!("{header}\n"), format!("{header}\n"));
    for (index, (old, new)) in [("1", "7"), ("7", "1"), ("1", "1"), ("7", "7")]
        .iter()
        .enumerate()
    {
        let row = json!({"index": index, "id": index.to_string(), "problem": text, "answer": "7"});
        writeln!(problems, "{row}").unwrap();
        for (log, answer) in [(&mut before, old), (&mut after, new)] {
            let row = json!({"problem": index, "sample": 0, "text": format!("{text} #### {answer}"),
                "num_tokens": 5, "finish": "eos"});
            writeln!(log, "{row}").unwrap();
        }
    }
    let folder = run.join("evaluations");
    std::fs::write(folder.join("problems-set.jsonl"), problems).unwrap();
    std::fs::write(folder.join("step-000000-set.jsonl"), before).unwrap();
    std::fs::write(folder.join(format!("step-{steps:06}-set.jsonl")), after).unwrap();
}

fn page(runs: &[&PathBuf]) -> String {
    let runs: Vec<PathBuf> = runs.iter().map(|path| (*path).clone()).collect();
    page::render(&read(&runs).unwrap()).unwrap()
}

const HOSTILE: &str =
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u{2028}'\"&]]>";

#[test]
fn nothing_from_a_run_becomes_markup() {
    let place = Place::new();
    let path = place.whole_run("<b>run", 3, HOSTILE);
    let html = page(&[&path]);
    for bad in ["<img", "<script>alert", "</script><script>a", "<b>run"] {
        assert!(!html.contains(bad), "{bad}");
    }
    // Three of our own: the data, the program, and no more.
    assert_eq!(html.matches("<script").count(), 2);
    assert_eq!(html.matches("</script>").count(), 2);
    assert!(html.contains("&lt;script&gt;alert(1)"));
    let start = html.find("id=\"data\">").unwrap() + 10;
    let end = start + html[start..].find("</script>").unwrap();
    let data: serde_json::Value = serde_json::from_str(&html[start..end]).unwrap();
    assert_eq!(data["runs"][0], "<b>run");
    let names = data["groups"].to_string();
    assert!(
        names.contains("alert(1)"),
        "a metric's name is hostile too: {names}"
    );
}

#[test]
fn the_page_fetches_nothing() {
    let place = Place::new();
    let html = page(&[&place.whole_run("run", 3, "plain")]);
    for word in [
        "http:", "https:", "//cdn", "@import", "url(", "<link", "src=", "fetch(", "XMLHttp",
    ] {
        assert!(!html.contains(word), "{word}");
    }
    assert!(html.contains("default-src 'none'; script-src 'sha256-"));
    assert!(html.starts_with("<!doctype html>"));
    // The policy's hashes are those of what stands in the page.
    for (open, close, rule) in [
        ("<script>", "</script>", "script-src"),
        ("<style>", "</style>", "style-src"),
    ] {
        let start = html.rfind(open).unwrap() + open.len();
        let end = start + html[start..].find(close).unwrap();
        use base64::Engine;
        use sha2::Digest;
        let hash = sha2::Sha256::digest(&html[start..end]);
        let hash = base64::engine::general_purpose::STANDARD.encode(hash);
        assert!(html.contains(&format!("{rule} 'sha256-{hash}'")), "{rule}");
    }
    // A style attribute would be against the policy.
    assert!(!html.contains(" style=\""));
}

#[test]
fn a_whole_run_says_what_matters() {
    let place = Place::new();
    let path = place.whole_run("run", 40, "plain");
    let runs = read(std::slice::from_ref(&path)).unwrap();
    let run = &runs[0];
    let score = run.main_score().unwrap();
    assert_eq!((score.before.0, score.after.0), (0.4, 0.8));
    assert_eq!(run.comparisons[0].counts, [1, 1, 1, 1]);
    assert_eq!(run.comparisons[0].pairs.len(), 4);
    assert_eq!(run.history.seconds, 60.0);
    assert_eq!(run.model(), "plain");
    let subjects: Vec<String> = run
        .history
        .findings()
        .into_iter()
        .map(|f| f.subject)
        .collect();
    assert_eq!(subjects, ["entropy", "kl"]);
    // Without adapter.safetensors it has not ended, and that file is named.
    assert_eq!(run.status, Status::Stopped);
    assert!(
        run.remarks
            .iter()
            .any(|r| r.contains("adapter.safetensors is missing"))
    );

    let html = page(&[&path]);
    for part in [
        "wrong → right",
        "0.400 ± 0.020",
        "0.800 ± 0.020",
        "+0.400",
        "1 min 00 s",
        "below its healthy range (0.05–0.5)",
        "not finite at steps 1–40",
        "train.max_steps",
    ] {
        assert!(html.contains(part), "{part}");
    }
    assert!(
        !html.contains("of&#x2f;someone&#x2f;plain ·"),
        "the head names no folders"
    );
    let text = summary(run);
    assert!(text.contains("reward 0.401 → 0.44"), "{text}");
    assert!(
        text.contains("set exact_match,strict-match: 0.400 ± 0.020 → 0.800 ± 0.020"),
        "{text}"
    );
}

#[test]
fn torn_lines_and_missing_files_are_said_and_do_no_harm() {
    let place = Place::new();
    let whole = place.whole_run("run", 5, "plain");
    // Every file cut off at every so many bytes, and then taken away.
    let files = [
        "metrics.jsonl",
        "timings.jsonl",
        "completions.jsonl",
        "config.toml",
        "environment.json",
        "evaluations/problems-set.jsonl",
        "evaluations/step-000000-set.jsonl",
    ];
    for file in files {
        let path = whole.join(file);
        let content = std::fs::read(&path).unwrap();
        for length in (0..content.len()).step_by(content.len() / 7 + 1) {
            std::fs::write(&path, &content[..length]).unwrap();
            let runs = read(std::slice::from_ref(&whole)).unwrap();
            page::render(&runs).unwrap();
        }
        std::fs::remove_file(&path).unwrap();
        let runs = read(std::slice::from_ref(&whole)).unwrap();
        page::render(&runs).unwrap();
        let name = file.rsplit('/').next().unwrap();
        let said = runs[0]
            .remarks
            .iter()
            .any(|r| r.contains(name) && r.contains("missing"));
        // An evaluation that never began is no gap.
        assert!(
            said || name.starts_with("step-"),
            "{file}: {:?}",
            runs[0].remarks
        );
        std::fs::write(&path, content).unwrap();
    }
    let text = std::fs::read_to_string(whole.join("metrics.jsonl")).unwrap();
    std::fs::write(whole.join("metrics.jsonl"), text + "{\"step\":6,\"rew").unwrap();
    let runs = read(std::slice::from_ref(&whole)).unwrap();
    assert!(
        runs[0]
            .remarks
            .contains(&"metrics.jsonl: its last line is incomplete".to_owned())
    );
    assert_eq!(runs[0].history.last_step, 5);
}

#[test]
fn an_empty_folder_is_no_run_and_a_bare_one_is() {
    let place = Place::new();
    let bare = place.run("bare");
    let error = find(&bare).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    std::fs::write(bare.join("metrics.jsonl"), "").unwrap();
    assert_eq!(find(&bare).unwrap(), bare);
    let html = page(&[&bare]);
    assert!(html.contains("config.toml is missing"));
    assert!(html.contains("unknown model"));
}

#[test]
fn sft_runs_have_no_completions_and_need_none() {
    let place = Place::new();
    let path = place.run("sft");
    let config = Config {
        method: Method::Sft,
        ..Config::default()
    };
    std::fs::write(path.join("config.toml"), config.to_toml().unwrap()).unwrap();
    let rows =
        "{\"step\":1,\"loss\":2.5,\"entropy\":9.0}\n{\"step\":2,\"loss\":1.5,\"entropy\":9.0}\n";
    std::fs::write(path.join("metrics.jsonl"), rows).unwrap();
    let runs = read(std::slice::from_ref(&path)).unwrap();
    assert!(
        !runs[0].remarks.iter().any(|r| r.contains("completions")),
        "{:?}",
        runs[0].remarks
    );
    assert!(
        runs[0].history.findings().is_empty(),
        "ranges of sampling do not hold for SFT"
    );
    assert!(summary(&runs[0]).contains("loss 2.5 → 1.5"));
    assert!(page(&[&path]).contains("SFT"));
}

#[test]
fn several_runs_share_charts_and_have_a_table() {
    let place = Place::new();
    let first = place.whole_run("a/run", 30, "plain");
    let second = place.whole_run("b/run", 50, "plain");
    let third = place.run("third");
    std::fs::write(third.join("metrics.jsonl"), "{\"step\":1,\"reward\":0.5}\n").unwrap();
    let html = page(&[&first, &second, &third]);
    for part in [
        "Comparison",
        "run (1)",
        "run (2)",
        "third",
        "id=\"run-2\"",
        "3 runs",
    ] {
        assert!(html.contains(part), "{part}");
    }
    let charts = charts::charts(&read(&[first, second, third]).unwrap());
    let reward = &charts["groups"][0]["charts"][0];
    assert_eq!(reward["name"], "reward");
    let runs: Vec<_> = reward["lines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|l| &l["run"])
        .collect();
    assert_eq!(runs, [0, 1, 2]);
    // Steps are there once for all metrics of a run that share them.
    assert!(charts["steps"].as_array().unwrap().len() <= 5);
}

#[test]
fn the_page_of_a_long_run_is_bounded() {
    let place = Place::new();
    let path = place.run("long");
    let mut metrics = String::new();
    for step in 0..20_000 {
        let mut row = serde_json::Map::from_iter([("step".to_owned(), json!(step))]);
        for metric in 0..20 {
            row.insert(
                format!("m{metric}"),
                json!((step as f64 * 0.37).sin() + f64::from(metric)),
            );
        }
        writeln!(metrics, "{}", serde_json::Value::Object(row)).unwrap();
    }
    std::fs::write(path.join("metrics.jsonl"), metrics).unwrap();
    // Names without end, and texts of a megabyte.
    let mut wide = String::from("{\"step\":1");
    for metric in 0..5_000 {
        write!(wide, ",\"w{metric}\":1").unwrap();
    }
    std::fs::write(path.join("timings.jsonl"), wide + "}\n").unwrap();
    let long = "x".repeat(1_000_000);
    let row = json!({"step": 1, "problem": "p", "prompt": long, "completion": long, "reward": 1.0});
    std::fs::write(
        path.join("completions.jsonl"),
        format!("{row}\n").repeat(20),
    )
    .unwrap();
    evaluations(&path, 9, &long);
    let html = page(&[&path]);
    assert!(html.len() < 1_500_000, "{}", html.len());
    let many: Vec<&PathBuf> = std::iter::repeat_n(&path, 12).collect();
    let html = page(&many);
    assert!(html.len() < 8_000_000, "{}", html.len());
}

#[test]
fn other_files_are_not_overwritten() {
    let place = Place::new();
    let run = place.whole_run("run", 2, "plain");
    let runs = read(std::slice::from_ref(&run)).unwrap();
    let out = run.join("page.html");
    write(&runs, &out).unwrap();
    write(&runs, &out).unwrap();
    let error = write(&runs, &run.join("metrics.jsonl")).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("is no report"), "{error}");
    assert!(write(&runs, &run).is_err());
    let error = write(&runs, &run.join("nowhere/page.html"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("there is no folder"), "{error}");
}
