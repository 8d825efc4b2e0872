//! Every benchmark read from a folder of its files (`TINYLORA_TEST_DATA`), and parquet files as
//! pyarrow writes them with the hub's columns.

use std::path::{Path, PathBuf};

use tinylora::config::{DataConfig, FieldMapping, OnBadRow};
use tinylora::data::{self, BENCHMARKS, BenchmarkOptions, Dataset, benchmark};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data")
}

/// The folder with all benchmarks, or a message that the test was skipped.
fn benchmark_folder() -> Option<PathBuf> {
    let folder =
        std::env::var_os("TINYLORA_TEST_DATA").map(|d| PathBuf::from(d).join("benchmarks"));
    if folder.is_none() {
        eprintln!("skipped: TINYLORA_TEST_DATA is not set");
    }
    folder
}

fn load(name: &str, split: &str, data_dir: &Path) -> Dataset {
    let options = BenchmarkOptions {
        data_dir: Some(data_dir.to_path_buf()),
        ..BenchmarkOptions::default()
    };
    benchmark(name).unwrap().load(split, &options).unwrap()
}

#[test]
fn all_benchmarks_load_with_the_right_row_counts() {
    let Some(folder) = benchmark_folder() else {
        return;
    };
    for benchmark in BENCHMARKS.iter().filter(|b| b.name != "simplerl-math") {
        for split in benchmark.splits {
            let dataset = load(benchmark.name, split.name, &folder);
            let problems = dataset.problems.len();
            println!(
                "{} {}: {problems} problems; {}",
                benchmark.name,
                split.name,
                dataset.report.summary()
            );
            assert!(
                split.rows.contains(&dataset.report.rows),
                "{}",
                benchmark.name
            );
            let empty = match (benchmark.name, split.name) {
                ("math", "train") | ("gaokao2023en", _) => 2,
                _ => 0,
            };
            assert_eq!(dataset.report.empty_answers, empty, "{}", benchmark.name);
            assert_eq!(problems + empty, dataset.report.rows);
            for problem in &dataset.problems {
                let answer = &problem.answer;
                assert!(!answer.is_empty() && !problem.id.is_empty());
                match benchmark.name {
                    "aime24" | "amc23" => {
                        assert_eq!(answer.parse::<i64>().unwrap().to_string(), *answer);
                    }
                    "gsm8k" => assert!(answer.parse::<i64>().is_ok(), "{answer}"),
                    "gaokao2023en" | "college_math" => assert!(!answer.contains('$')),
                    "olympiadbench" => assert!(!answer.starts_with('$')),
                    _ => {}
                }
            }
        }
    }
}

#[test]
fn levels_three_to_five_of_math_are_counted() {
    let Some(folder) = benchmark_folder() else {
        return;
    };
    let config = DataConfig {
        train: "math".to_string(),
        levels: vec![3, 4, 5],
        data_dir: Some(folder),
        ..DataConfig::default()
    };
    let dataset = data::load(&config, true).unwrap();
    // 5,586 rows; the two without an answer are not among those levels or are left out.
    assert_eq!(
        dataset.problems.len() + dataset.report.empty_answers,
        5586,
        "{}",
        dataset.report.summary()
    );
}

#[test]
fn parquet_with_the_hubs_columns() {
    let gsm8k = load("gsm8k", "test", &fixtures());
    assert_eq!(gsm8k.report.rows, 3);
    assert_eq!(gsm8k.problems[0].answer, "7");
    assert_eq!(gsm8k.problems[1].answer, "1200");
    assert!(
        gsm8k.problems[1]
            .solution
            .as_ref()
            .unwrap()
            .contains("#### 1,200")
    );
    assert_eq!(gsm8k.problems[2].problem, "Größer als ½? Ünïcödé 数学");

    let olympiad = load("olympiadbench", "test", &fixtures());
    assert_eq!(olympiad.problems[0].answer, "\\sqrt{3}");
    assert_eq!(olympiad.problems[0].id, "1606");
    assert_eq!(
        olympiad.problems[0].solution.as_deref(),
        Some("First way.\n\nSecond way.")
    );
    // An empty list of answers is a row without an answer.
    assert_eq!(olympiad.report.empty_answers, 1);

    // 27.0 as a double, over two row groups.
    let amc = load("amc23", "test", &fixtures());
    let answers: Vec<&str> = amc.problems.iter().map(|p| p.answer.as_str()).collect();
    assert_eq!(answers, ["27", "36", "0"]);

    let aime = load("aime24", "test", &fixtures());
    assert_eq!(aime.problems[0].answer, "25");
    assert_eq!(aime.problems[0].id, "60");

    let math = load("math", "test", &fixtures());
    assert_eq!(math.problems[0].answer, "\\frac{1}{2}");
}

#[test]
fn nested_parquet_columns_and_nulls() {
    let config = DataConfig {
        train: fixtures().join("nested.parquet").display().to_string(),
        fields: FieldMapping {
            problem: Some("prompt.0.content".to_string()),
            answer: Some("reward_model.ground_truth".to_string()),
            ..FieldMapping::default()
        },
        on_bad_row: OnBadRow::Skip,
        ..DataConfig::default()
    };
    let dataset = data::load(&config, true).unwrap();
    assert_eq!(dataset.problems.len(), 1);
    assert_eq!(dataset.problems[0].problem, "What is 6 times 7?");
    assert_eq!(dataset.problems[0].answer, "42");
    assert_eq!(dataset.report.bad, 2, "{:?}", dataset.report.bad_examples);
    assert!(dataset.report.bad_examples[0].contains("nested.parquet row 2 has no answer"));

    let strict = DataConfig {
        on_bad_row: OnBadRow::Error,
        ..config
    };
    let error = data::load(&strict, true).unwrap_err();
    assert_eq!(error.exit_code(), 3);
}

#[test]
fn parquet_that_cannot_be_used_is_refused_with_its_name() {
    let good = std::fs::read(fixtures().join("gsm8k/test.parquet")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let refuse = |content: &[u8], why: &str| {
        let path = dir.path().join("bad.parquet");
        std::fs::write(&path, content).unwrap();
        let config = DataConfig {
            train: path.display().to_string(),
            ..DataConfig::default()
        };
        let error = data::load(&config, true).unwrap_err();
        assert_eq!(error.exit_code(), 3, "{why}: {error}");
        assert!(error.to_string().contains("bad.parquet"), "{why}: {error}");
    };
    refuse(b"", "empty");
    refuse(b"PAR1PAR1", "no footer");
    refuse(&good[..good.len() / 2], "cut");
    refuse(&vec![0u8; 4096], "zeros");
    // Invalid UTF-8 wherever the text stands (the page, and the statistics).
    let mut bytes = good.clone();
    for at in 0..bytes.len() - 4 {
        if bytes[at..].starts_with("Größ".as_bytes()) {
            bytes[at + 2] = 0xff;
        }
    }
    assert_ne!(bytes, good);
    refuse(&bytes, "not UTF-8");
    // Any single damaged byte of the metadata gives an error or a result, never a panic.
    let footer = good.len()
        - 8
        - u32::from_le_bytes(good[good.len() - 8..good.len() - 4].try_into().unwrap()) as usize;
    for at in (footer..good.len()).step_by(7) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x5a;
        let path = dir.path().join("damaged.parquet");
        std::fs::write(&path, &bytes).unwrap();
        let config = DataConfig {
            train: path.display().to_string(),
            ..DataConfig::default()
        };
        let _ = data::load(&config, true);
    }
}

#[test]
fn text_that_is_not_utf8_or_holds_nul_bytes_is_refused_by_line_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let good = "{\"problem\": \"p\", \"answer\": \"1\"}";
    for (name, bad, cause) in [
        (
            "utf8.jsonl",
            &b"{\"problem\": \"\xff\", \"answer\": \"1\"}"[..],
            "not valid UTF-8",
        ),
        (
            "nul.jsonl",
            b"{\"problem\": \"p\0\", \"answer\": \"1\"}",
            "not valid JSON",
        ),
        ("zeros.jsonl", &[0; 4096], "not valid JSON"),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, [good.as_bytes(), b"\n", bad, b"\n"].concat()).unwrap();
        let config = |on_bad_row| DataConfig {
            train: path.display().to_string(),
            on_bad_row,
            ..DataConfig::default()
        };
        let start = std::time::Instant::now();
        let error = data::load(&config(OnBadRow::Error), true).unwrap_err();
        assert!(
            start.elapsed().as_millis() < 50,
            "{name}: {:?}",
            start.elapsed()
        );
        let message = error.to_string();
        assert_eq!(error.exit_code(), 3);
        assert!(
            message.contains(name) && message.contains("line 2") && message.contains(cause),
            "{message}"
        );
        let dataset = data::load(&config(OnBadRow::Skip), true).unwrap();
        assert_eq!((dataset.problems.len(), dataset.report.bad), (1, 1));
    }
}

#[test]
fn a_file_of_times_is_not_text() {
    let config = DataConfig {
        train: fixtures().join("times.parquet").display().to_string(),
        ..DataConfig::default()
    };
    let error = data::load(&config, true).unwrap_err().to_string();
    assert!(error.contains("times.parquet"), "{error}");
}

#[test]
fn what_is_neither_benchmark_nor_file_is_named() {
    for (train, code) in [("gsm8", 2), ("no/such.jsonl", 3), ("nothing.jsonl", 3)] {
        let config = DataConfig {
            train: train.to_string(),
            ..DataConfig::default()
        };
        let error = data::load(&config, true).unwrap_err();
        assert_eq!(error.exit_code(), code, "{train}: {error}");
        assert!(error.to_string().contains(train), "{error}");
    }
}

#[test]
fn few_shot_examples_are_not_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.jsonl");
    let rows: Vec<String> = (0..5)
        .map(|i| format!("{{\"problem\": \"p{i}\", \"answer\": \"{i}\"}}"))
        .collect();
    std::fs::write(&path, rows.join("\n")).unwrap();
    let config = |limit| DataConfig {
        train: path.display().to_string(),
        limit,
        ..DataConfig::default()
    };
    let names = |problems: &[data::Problem]| -> Vec<String> {
        problems.iter().map(|p| p.problem.clone()).collect()
    };
    let (dataset, shots) = data::load_with_shots(&config(Some(2)), 2, true).unwrap();
    assert_eq!(names(&shots), ["p0", "p1"]);
    assert_eq!(names(&dataset.problems), ["p2", "p3"]);
    let (dataset, shots) = data::load_with_shots(&config(None), 0, true).unwrap();
    assert_eq!((dataset.problems.len(), shots.len()), (5, 0));
    let error = data::load_with_shots(&config(None), 5, true).unwrap_err();
    assert_eq!(error.exit_code(), 2);

    let benchmark = DataConfig {
        train: "mini".to_string(),
        limit: Some(3),
        ..DataConfig::default()
    };
    let (dataset, shots) = data::load_with_shots(&benchmark, 4, true).unwrap();
    assert_eq!((dataset.problems.len(), shots.len()), (3, 4));
    assert!(shots.iter().all(|shot| !dataset.problems.contains(shot)));
}
