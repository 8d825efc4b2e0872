//! Descriptions of sweeps, the runs they give, and what is made of results.

use serde_json::{Map, Value, json};

use super::file::SweepFile;
use super::grid::{self, Point};
use super::results::RunResult;
use super::summary::Summary;
use super::{figure, table};
use crate::Result;
use crate::config::{Method, Source};
use crate::model::ModelConfig;
use crate::run::plan;

const SMALL: &str = r#"
base = "mini.toml"
seeds = [1, 2]
learning_rates = [0.01, 0.02]
[set]
eval.limit = 8
[[method]]
name = "grpo"
set = { train.max_steps = 3 }
[[method]]
name = "sft"
[[size]]
name = "13"
adapter = { n_tie = 4 }
[[size]]
name = "full weights"
adapter = { type = "full" }
learning_rates = { grpo = [1e-4], sft = [1e-3, 2e-3] }
"#;

fn expand(text: &str, overrides: &[&str]) -> Result<Vec<Point>> {
    let source = Source {
        origin: "a.toml".to_owned(),
        name: "a".to_owned(),
        text: text.to_owned(),
    };
    let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    grid::expand(&source, &SweepFile::parse(&source)?, &overrides)
}

fn names(points: &[Point]) -> Vec<&str> {
    points.iter().map(|p| p.name.as_str()).collect()
}

fn mini() -> ModelConfig {
    ModelConfig::from_hf_dir(&crate::data::mini::directory().unwrap()).unwrap()
}

#[test]
fn a_grid_is_every_combination_with_the_seeds_outermost() {
    let points = expand(SMALL, &["train.save_steps=7"]).unwrap();
    assert_eq!(
        names(&points)[..7],
        [
            "grpo-13-lr0.01-seed1",
            "grpo-13-lr0.02-seed1",
            "grpo-full_weights-lr0.0001-seed1",
            "sft-13-lr0.01-seed1",
            "sft-13-lr0.02-seed1",
            "sft-full_weights-lr0.001-seed1",
            "sft-full_weights-lr0.002-seed1",
        ]
    );
    assert_eq!(points.len(), 14);
    let config = &points[12].config;
    assert_eq!(points[12].name, "sft-full_weights-lr0.001-seed2");
    assert_eq!(config.method, Method::Sft);
    assert_eq!((config.train.seed, config.train.save_steps), (2, 7));
    assert_eq!(config.optim.learning_rate, 1e-3);
    assert_eq!(config.eval.limit, Some(8));
    // The method's own key, and the base's where it has none.
    assert_eq!(points[0].config.train.max_steps, Some(3));
    assert_eq!(config.train.max_steps, Some(60));
}

#[test]
fn axes_multiply_and_name_the_runs() {
    let axes = "[[axis]]\nkey = \"adapter.tie\"\nvalues = [\"tiled\", \"structured\"]\n\
                [[axis]]\nkey = \"adapter.r\"\nvalues = [1, 2]\n";
    let text = SMALL.replace("[[method]]\nname = \"sft\"\n", axes);
    let text = text.replace("seeds = [1, 2]", "seeds = [1]");
    let points = expand(&text, &[]).unwrap();
    assert_eq!(points.len(), 4 * 3);
    assert_eq!(points[3].name, "grpo-13-tiled-r2-lr0.01-seed1");
    assert_eq!(points[3].axes["adapter.r"], 2);
    assert_eq!(points[3].config.adapter.r, 2);
    let series = grid::series(Method::Grpo, &points[3].axes);
    assert_eq!(series, ["grpo", "tiled", "r = 2"]);
}

#[test]
fn the_natural_gradient_runs_once_whatever_the_learning_rates() {
    let axis = "[[axis]]\nkey = \"optim.type\"\nvalues = [\"adamw\", \"natural\"]\n";
    let text = SMALL.replace("[[method]]\nname = \"sft\"\n", axis);
    let text = text.replace("seeds = [1, 2]", "seeds = [1]");
    let points = expand(&text, &[]).unwrap();
    assert_eq!(
        names(&points),
        [
            "grpo-13-adamw-lr0.01-seed1",
            "grpo-13-adamw-lr0.02-seed1",
            "grpo-full_weights-adamw-lr0.0001-seed1",
            "grpo-13-natural-seed1",
            "grpo-full_weights-natural-seed1",
        ]
    );
    let rates: Vec<_> = points.iter().map(Point::learning_rate).collect();
    assert_eq!(rates[2..4], [Some(1e-4), None]);
    // Alone it needs none.
    let alone = text
        .replace(
            "values = [\"adamw\", \"natural\"]",
            "values = [\"natural\"]",
        )
        .replace("learning_rates = [0.01, 0.02]\n", "");
    let points = expand(&alone, &[]).unwrap();
    assert_eq!(names(&points)[0], "grpo-13-natural-seed1");
}

#[test]
fn the_built_in_sweeps_train_what_they_say() {
    let points = |name: &str| {
        let source = Source::find_sweep(name).unwrap();
        let file = SweepFile::parse(&source).unwrap();
        grid::expand(&source, &file, &[]).unwrap_or_else(|e| panic!("{name}: {e}"))
    };
    let model = mini();
    let mut sizes: Vec<(String, usize)> = Vec::new();
    for point in points("sweep-mini") {
        let size = (point.size, plan::trained_parameters(&point.config, &model));
        if !sizes.contains(&size) {
            sizes.push(size);
        }
    }
    let counts: Vec<usize> = sizes.iter().map(|(_, count)| *count).collect();
    assert_eq!(counts[..8], [1, 2, 4, 7, 13, 25, 49, 196]);
    for (name, count) in &sizes[..8] {
        assert_eq!(*name, count.to_string());
    }
    assert!(counts.is_sorted() && counts.len() == 11, "{sizes:?}");
    for name in [
        "mini-tying",
        "mini-rank",
        "mini-precision",
        "mini-adamw",
        "mini-adamw-sizes",
        "mini-natural",
    ] {
        assert!(!points(&format!("sweep-{name}.toml")).is_empty());
    }
}

#[test]
fn mistakes_name_their_place() {
    for (from, to, expected) in [
        (
            "seeds = [1, 2]",
            "seed = [1]",
            "a.toml:3: unknown key seed; did you mean seeds?",
        ),
        ("seeds = [1, 2]", "seeds = 1", "a.toml:3: invalid type"),
        ("seeds = [1, 2]", "seeds = []", "a.toml: seeds is empty"),
        (
            "seeds = [1, 2]",
            "seeds = [1, 1]",
            "a.toml: seeds has 1 twice",
        ),
        (
            "[[method]]\nname = \"sft\"",
            "[[methods]]",
            "a.toml:10: unknown key methods; did you mean method?",
        ),
        (
            "name = \"sft\"",
            "name = \"stf\"",
            "a.toml:11: unknown variant `stf`",
        ),
        ("mini.toml", "minn.toml", "no configuration minn.toml"),
        (
            "eval.limit",
            "eval.limits",
            "a.toml: set: unknown key eval.limits; did you mean eval.limit?",
        ),
        (
            "train.max_steps",
            "train.max_step",
            "a.toml: method grpo: unknown key train.max_step; did you mean train.max_steps?",
        ),
        (
            "n_tie = 4",
            "ntie = 4",
            "a.toml: size 13: unknown key adapter.ntie; did you mean adapter.n_tie?",
        ),
        (
            "n_tie = 4",
            "n_tie = 0",
            "a.toml: grpo-13-lr0.01-seed1: adapter.n_tie must lie between 1",
        ),
        (
            "type = \"full\"",
            "type = \"full\", scaling = 2.0",
            "a.toml: grpo-full_weights-lr0.0001-seed1: adapter.scaling has no effect",
        ),
        ("full weights", "13", "a.toml: [[size]] has 13 twice"),
        ("full weights", "1/3", "1_3"),
        (
            "learning_rates = [0.01, 0.02]\n",
            "",
            "a.toml: no learning rates for size 13 with grpo",
        ),
        (
            "[0.01, 0.02]",
            "[0.01, -1.0]",
            "a.toml: grpo-13-lr-1-seed1: optim.learning_rate",
        ),
        (
            "[0.01, 0.02]",
            "[0.01, 0.01]",
            "a.toml: size 13 has the learning rate 0.01 twice",
        ),
        (
            "[0.01, 0.02]",
            "0.01",
            "a.toml:4: expected a list of numbers, or { grpo",
        ),
        (
            "name = \"sft\"",
            "name = \"sft\"\nset = { eval.limit = 9 }",
            "a.toml: [eval] of grpo-13-lr0.01-seed1 and of sft-13-lr0.01-seed1 differ",
        ),
        (
            "eval.limit = 8",
            "model.random_init = true",
            "a.toml: model.random_init makes another model for every seed",
        ),
        (
            "eval.limit",
            "train.seed",
            "a.toml: train.seed cannot be set: seeds are in seeds",
        ),
        (
            "eval.limit = 8",
            "eval.data = []",
            "a.toml: eval.data is empty",
        ),
    ] {
        let text = SMALL.replacen(from, to, 1);
        assert_ne!(text, SMALL, "{from}");
        match expand(&text, &[]) {
            Err(error) => {
                let message = error.to_string();
                assert!(message.starts_with(expected), "{to:?} gave {message}");
                assert_eq!(
                    (error.exit_code(), message.lines().count()),
                    (2, 1),
                    "{message}"
                );
            }
            // Not every name is a folder's.
            Ok(points) => assert!(points[2].name.contains(expected), "{to:?} is accepted"),
        }
    }
    for (key, expected) in [
        (
            "adapter.tye",
            "a.toml: axis: unknown key adapter.tye; did you mean adapter.type?",
        ),
        (
            "adapter.n_tie",
            "a.toml: adapter.n_tie cannot be an axis: sizes have it",
        ),
        (
            "train.seed",
            "a.toml: train.seed cannot be an axis: seeds are in seeds",
        ),
        (
            "model.dtype",
            "a.toml: model.dtype cannot be an axis: all runs",
        ),
    ] {
        let text = format!("{SMALL}[[axis]]\nkey = \"{key}\"\nvalues = [1]\n");
        let message = expand(&text, &[]).unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }
    for (change, expected) in [
        (
            "adapter.n_tie=2",
            "--set adapter.n_tie=2: the runs of a.toml differ in adapter.n_tie",
        ),
        (
            "train.seed=2",
            "--set train.seed=2: the runs of a.toml differ",
        ),
        ("train.max_step=2", "--set train.max_step=2: unknown key"),
    ] {
        let message = expand(SMALL, &[change]).unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn another_definition_is_told_in_few_words() {
    let definition =
        |overrides: &[&str]| grid::definition(&expand(SMALL, overrides).unwrap()).unwrap();
    let before = definition(&[]);
    assert_eq!(
        grid::differences(&before, &definition(&["train.save_steps=9"])),
        None
    );
    let now = definition(&["grpo.temperature=0.9"]);
    assert_eq!(
        grid::differences(&before, &now).unwrap(),
        "all runs: grpo.temperature was 1.0, is 0.9"
    );
    let fewer = grid::definition(&expand(SMALL, &[]).unwrap()[..13]).unwrap();
    let words = grid::differences(&before, &fewer).unwrap();
    assert!(
        words.contains("seed2: ") && words.contains(" more"),
        "{words}"
    );
    assert_eq!(words.split("; ").count(), 5, "{words}");
}

fn scores(greedy: f64, sampled: f64) -> Map<String, Value> {
    let value = json!({"mini": {
        "exact_match_stderr": 0.02,
        "exact_match": greedy,
        "other": 0.9,
        "sampled_exact_match": sampled,
    }});
    value.as_object().unwrap().clone()
}

fn result(method: Method, size: usize, rate: f64, seed: u64, after: Option<f64>) -> RunResult {
    RunResult {
        run: format!("{method:?}-{size}-{rate}-{seed}"),
        size: size.to_string(),
        method,
        axes: Map::new(),
        adapter: if size > 1000 { "full" } else { "tinylora" }.to_owned(),
        trained_parameters: size,
        learning_rate: rate,
        seed,
        steps: 3,
        before: scores(0.4, 0.3),
        after: after.map_or_else(Map::new, |a| scores(a, a - 0.1)),
        seconds: 1.0,
        diverged: after.is_none().then(|| "NaN".to_owned()),
    }
}

fn results() -> Vec<RunResult> {
    let (grpo, sft) = (Method::Grpo, Method::Sft);
    vec![
        result(grpo, 750_000, 0.1, 1, Some(0.9)),
        result(grpo, 13, 0.1, 1, Some(0.7)),
        result(grpo, 13, 0.2, 1, Some(0.84)),
        result(grpo, 13, 0.3, 1, None),
        result(sft, 13, 0.1, 1, None),
        result(grpo, 13, 0.1, 2, Some(0.7)),
        result(grpo, 13, 0.2, 2, Some(0.76)),
        // The best of one seed alone is no better than the mean of two.
        result(grpo, 13, 0.25, 1, Some(0.99)),
    ]
}

#[test]
fn the_best_rate_is_that_of_the_mean_over_whole_seeds() {
    let summary = Summary::new(&results()).unwrap();
    assert_eq!(summary.metrics, ["exact_match", "sampled_exact_match"]);
    assert!((summary.untrained[0].mean - 0.4).abs() < 1e-12);
    let [small, full, sft] = &summary.cells[..] else {
        panic!("{:?}", summary.cells)
    };
    assert_eq!(
        (small.learning_rate, small.seeds, small.diverged),
        (0.2, 2, 1)
    );
    assert!((small.scores[0].mean - 0.8).abs() < 1e-12 && !small.at_end);
    assert!((small.scores[0].stderr.unwrap() - 0.04).abs() < 1e-12);
    assert!((small.scores[1].mean - 0.7).abs() < 1e-12);
    assert!((summary.share_of_gain(small).unwrap() - 0.8).abs() < 1e-12);
    assert_eq!(
        (full.size.as_str(), full.scores[0].stderr),
        ("750000", None)
    );
    assert_eq!(summary.share_of_gain(full), Some(1.0));
    assert!(sft.scores.is_empty() && sft.learning_rate.is_nan());
    assert_eq!(summary.curves(), [["grpo"], ["sft"]]);
    assert!(Summary::new(&results()[4..5]).is_none());
}

#[test]
fn the_table_and_the_figure_show_it() {
    let summary = Summary::new(&results()).unwrap();
    let text = table::table(&summary);
    let row = |start: &str| {
        let line = text.lines().find(|l| l.starts_with(start)).unwrap();
        line.split("  ")
            .filter(|c| !c.is_empty())
            .map(str::trim)
            .map(String::from)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        text.lines().next().unwrap(),
        "untrained mini exact_match: 0.400 ± 0.020"
    );
    let small = [
        "grpo",
        "13",
        "13",
        "0.2",
        "0.800 ± 0.040",
        "0.700 ± 0.040",
        "80 %",
        "2",
    ];
    assert_eq!(row("grpo    13"), small);
    assert_eq!(
        row("sft "),
        ["sft", "13", "13", "diverged", "-", "-", "-", "0"]
    );
    assert!(text.contains("2 runs diverged"), "{text}");

    let chart = figure::chart(&summary, 0, "title").unwrap();
    let names: Vec<&str> = chart.curves.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["GRPO", "SFT"]);
    assert_eq!(chart.curves[0].points.len(), 2);
    assert_eq!(chart.references[1].name, "full fine-tuning (GRPO)");
    assert_eq!(chart.references[1].y, 0.9);
    assert!(figure::chart(&summary, 2, "title").is_none());
}
