//! The remote engine against a server that keeps vLLM's contract and samples with the native engine: what
//! comes over the wire must then be what the native engine gives, and every kind of failure can be had.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::DType;
use serde_json::{Value, json};

use super::*;
use crate::adapter::PeftAdapter;
use crate::model::{Placement, Tokenizer, tests as fixtures};
use crate::rollout::NativeEngine;

/// How a server misbehaves.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Faults {
    /// Every so many requests: no answer, but the end of the connection.
    hang_up_every: usize,
    /// Every so many requests: status 503.
    busy_every: usize,
    /// After so many completions everything that was loaded is forgotten, once.
    forget_at: usize,
    /// Goes on with the first adapter, whatever is loaded later.
    stale: bool,
    /// Log-probabilities of another model.
    foreign: bool,
    /// Refuses connections for ever after so many requests.
    die_at: usize,
}

/// A server on a port of this machine.
struct FakeVllm {
    url: String,
    state: Arc<State>,
}

struct State {
    model: Model,
    faults: Faults,
    adapters: Mutex<HashMap<String, Adapter>>,
    first: Mutex<Option<Adapter>>,
    requests: AtomicUsize,
    completions: AtomicUsize,
    unloaded: AtomicUsize,
}

fn model() -> Model {
    let decoder = fixtures::decoder(Placement::cpu(DType::F32));
    let words: serde_json::Map<String, Value> = (0..decoder.config.vocab_size)
        .map(|id| ((id % 5).to_string() + &" ".repeat(id / 5), id.into()))
        .collect();
    let json = json!({
        "version": "1.0", "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "1"},
    });
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).expect("written");
    let tokenizer = Tokenizer::from_hf_dir(dir.path(), &decoder.config).expect("a tokenizer");
    Model {
        decoder,
        tokenizer,
        name: "random".to_owned(),
        hash: "abc".to_owned(),
    }
}

impl FakeVllm {
    fn start(faults: Faults) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let state = Arc::new(State {
            model: model(),
            faults,
            adapters: Mutex::default(),
            first: Mutex::default(),
            requests: AtomicUsize::new(0),
            completions: AtomicUsize::new(0),
            unloaded: AtomicUsize::new(0),
        });
        let own = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&own);
                std::thread::spawn(move || state.serve(stream));
            }
        });
        Self { url, state }
    }
}

impl State {
    /// One connection: requests one after the other.
    fn serve(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
        let mut stream = stream;
        while let Some((path, body)) = read_request(&mut reader) {
            let number = self.requests.fetch_add(1, Ordering::SeqCst) + 1;
            let every = |n: usize| n > 0 && number.is_multiple_of(n);
            let dead = self.faults.die_at > 0 && number >= self.faults.die_at;
            if dead || every(self.faults.hang_up_every) {
                return;
            }
            let (status, answer) = match every(self.faults.busy_every) {
                true => (503, json!({"error": "too busy"})),
                false => self.answer(&path, &body),
            };
            let text = answer.to_string();
            let head = format!(
                "HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                text.len()
            );
            if write!(stream, "{head}{text}").is_err() {
                return;
            }
        }
    }

    fn answer(&self, path: &str, body: &Value) -> (u16, Value) {
        match path {
            "/health" => (200, json!({})),
            "/v1/models" => (
                200,
                json!({"data": [{"id": "p", "parent": "random"}, {"id": "random", "parent": null}]}),
            ),
            "/v1/load_lora_adapter" => self.load(body),
            "/v1/unload_lora_adapter" => {
                let name = body["lora_name"].as_str().expect("a name");
                let known = self.adapters.lock().unwrap().remove(name);
                self.unloaded.fetch_add(1, Ordering::SeqCst);
                (if known.is_some() { 200 } else { 404 }, json!({}))
            }
            "/v1/completions" => self.complete(body),
            other => (404, json!({"error": other})),
        }
    }

    fn load(&self, body: &Value) -> (u16, Value) {
        let name = body["lora_name"].as_str().expect("a name").to_owned();
        let path = body["lora_path"].as_str().expect("a path");
        let mut adapters = self.adapters.lock().unwrap();
        if adapters.contains_key(&name) {
            return (
                400,
                json!({"message": format!("{name} has already been loaded")}),
            );
        }
        let read = PeftAdapter::open(Path::new(path)).expect("a LoRA directory");
        let adapter = read.onto(self.model.base(), &self.model.decoder);
        let adapter = adapter.expect("a LoRA for this model");
        let first = self
            .first
            .lock()
            .unwrap()
            .get_or_insert(adapter.clone())
            .clone();
        adapters.insert(name, if self.faults.stale { first } else { adapter });
        (200, json!("Success"))
    }

    fn complete(&self, body: &Value) -> (u16, Value) {
        let name = body["model"].as_str().expect("a name");
        let count = self.completions.fetch_add(1, Ordering::SeqCst) + 1;
        if count == self.faults.forget_at {
            self.adapters.lock().unwrap().clear();
        }
        let adapter = self.adapters.lock().unwrap().get(name).cloned();
        if adapter.is_none() && name != "random" {
            return (
                404,
                json!({"message": format!("The model `{name}` does not exist.")}),
            );
        }
        assert_eq!(body["return_token_ids"], true);
        assert_eq!(body["n"], 1);
        let ids = |key: &str| -> Vec<u32> {
            let ids = body[key].as_array().expect("ids").iter();
            ids.map(|id| id.as_u64().expect("an id") as u32).collect()
        };
        let params = SamplingParams {
            temperature: body["temperature"].as_f64().expect("a number"),
            top_p: body["top_p"].as_f64().expect("a number"),
            top_k: body["top_k"].as_i64().expect("a number").max(0) as usize,
            min_p: body["min_p"].as_f64().expect("a number"),
            max_tokens: body["max_tokens"].as_u64().expect("a number") as usize,
            stop: Vec::new(),
            eos: ids("stop_token_ids"),
            seed: body["seed"].as_u64().expect("a number"),
            step: 0,
        };
        let request = Request {
            id: 0,
            prompt: ids("prompt"),
            n: 1,
        };
        let mut engine = NativeEngine::new(&self.model.decoder, &self.model.tokenizer, 4);
        let mut completion = engine
            .generate(
                adapter.as_ref(),
                &[request],
                &params,
                &mut |_, _, _| {},
                &mut |_, _, _| {},
            )
            .expect("a completion")
            .remove(0)
            .remove(0);
        if self.faults.foreign {
            completion.logprobs.iter_mut().for_each(|l| *l -= 2.0);
        }
        let reason = match completion.finish {
            FinishReason::Length => "length",
            _ => "stop",
        };
        let choice = json!({
            "token_ids": completion.tokens, "finish_reason": reason,
            "logprobs": {"token_logprobs": completion.logprobs},
        });
        (200, json!({"model": name, "choices": [choice]}))
    }
}

fn read_request(reader: &mut impl BufRead) -> Option<(String, Value)> {
    let (mut line, mut length) = (String::new(), 0);
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((path, serde_json::from_slice(&body).unwrap_or_default()))
}

/// A remote engine on servers with these faults.
struct World {
    model: Model,
    adapter: Adapter,
    servers: Vec<FakeVllm>,
    folder: tempfile::TempDir,
}

impl World {
    fn new(faults: &[Faults]) -> Self {
        let model = model();
        let adapter = fixtures::adapter(&model.decoder);
        Self {
            model,
            adapter,
            servers: faults.iter().copied().map(FakeVllm::start).collect(),
            folder: tempfile::tempdir().expect("a folder"),
        }
    }

    fn engine(&self, max_retries: u32) -> Result<RemoteEngine<'_>> {
        let config = RolloutConfig {
            engine: RolloutEngine::Vllm,
            base_url: self
                .servers
                .iter()
                .map(|server| server.url.clone())
                .collect(),
            max_concurrency: 3,
            max_retries,
            ..RolloutConfig::default()
        };
        let site = Site {
            folder: self.folder.path(),
            context: 64,
            rank: 0,
            ranks: 1,
            progress: Progress::Silent,
        };
        RemoteEngine::open(&config, &self.model, Some(&self.adapter), &site)
    }

    /// The same numbers, moved far enough that the policy is clearly another.
    fn moved(&self) -> Adapter {
        let mut adapter = self.adapter.clone();
        let far: Vec<f32> = adapter.parameters().iter().map(|v| 3.0 - 4.0 * v).collect();
        adapter.set_parameters(&far).expect("finite");
        adapter
    }

    /// What the native engine gives for the seeds that the servers get.
    fn expected(&self, adapter: Option<&Adapter>) -> Vec<Vec<Completion>> {
        let mut engine = NativeEngine::new(&self.model.decoder, &self.model.tokenizer, 4);
        let one = |request: &Request, sample: usize, engine: &mut NativeEngine<'_>| {
            let params = SamplingParams {
                seed: seed(&params(), request, sample).into(),
                step: 0,
                ..params()
            };
            let request = Request {
                id: 0,
                n: 1,
                ..request.clone()
            };
            generate(engine, adapter, &[request], &params).expect("sampled")[0][0].clone()
        };
        requests()
            .iter()
            .map(|request| {
                (0..request.n)
                    .map(|s| one(request, s, &mut engine))
                    .collect()
            })
            .collect()
    }
}

fn params() -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        max_tokens: 9,
        stop: vec!["3 ".to_owned()],
        eos: vec![0],
        seed: 5,
        step: 2,
    }
}

fn requests() -> Vec<Request> {
    let request = |id: u64| Request {
        id,
        prompt: (1..id as u32 + 4).collect(),
        n: 4,
    };
    (0..3).map(request).collect()
}

fn generate(
    engine: &mut dyn Engine,
    adapter: Option<&Adapter>,
    requests: &[Request],
    params: &SamplingParams,
) -> Result<Vec<Vec<Completion>>> {
    let mut finished = 0;
    let all = engine.generate(
        adapter,
        requests,
        params,
        &mut |_, _, _| {},
        &mut |_, _, _| {
            finished += 1;
        },
    )?;
    assert_eq!(finished, all.iter().map(Vec::len).sum::<usize>());
    Ok(all)
}

/// Tokens, texts and reasons must be the same, log-probabilities to the roundings of ΔW's other form.
fn assert_same(got: &[Vec<Completion>], expected: &[Vec<Completion>]) {
    for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
        assert_eq!(got.tokens, expected.tokens);
        assert_eq!((&got.text, got.finish), (&expected.text, expected.finish));
        for (a, b) in got.logprobs.iter().zip(&expected.logprobs) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
    }
}

#[test]
fn completions_are_those_of_the_policy_asked_for_whatever_fails_on_the_way() {
    let flaky = Faults {
        hang_up_every: 7,
        busy_every: 5,
        forget_at: 9,
        ..Faults::default()
    };
    for faults in [vec![Faults::default()], vec![flaky, Faults::default()]] {
        let world = World::new(&faults);
        let mut engine = world.engine(6).expect("servers");
        let moved = world.moved();
        for adapter in [Some(&world.adapter), Some(&moved), None, Some(&moved)] {
            let got = generate(&mut engine, adapter, &requests(), &params()).expect("sampled");
            let expected = world.expected(adapter);
            assert_same(&got, &expected);
            let ends = |reason| expected.iter().flatten().any(|c| c.finish == reason);
            assert!(ends(FinishReason::Stop), "stop strings are not tested");
        }
        let (sent, received) = engine.bytes();
        assert!(sent > 1000 && received > 1000, "{sent} {received}");
        // Each policy but the last was unloaded, where the server heard of it, and its files removed.
        let calm = world.servers.last().expect("a server");
        assert_eq!(calm.state.unloaded.load(Ordering::SeqCst), 2);
        assert_eq!(std::fs::read_dir(world.folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn what_was_begun_is_of_the_policy_of_then_whatever_is_asked_in_between() {
    let world = World::new(&[Faults::default()]);
    let mut engine = world.engine(0).expect("a server");
    let (then, now) = (Some(&world.adapter), world.moved());
    for asked_in_between in [false, true] {
        engine.begin(then, &requests(), &params()).expect("begun");
        if asked_in_between {
            let others = &requests()[..1];
            let got = generate(&mut engine, Some(&now), others, &params()).expect("sampled");
            assert_same(&got, &world.expected(Some(&now))[..1]);
        }
        let got = generate(&mut engine, Some(&now), &requests(), &params()).expect("sampled");
        assert_same(&got, &world.expected(then));
        // Only once: the next time it is the policy that was asked for.
        let got = generate(&mut engine, Some(&now), &requests(), &params()).expect("sampled");
        assert_same(&got, &world.expected(Some(&now)));
    }
}

#[test]
fn a_server_that_keeps_an_earlier_adapter_is_found() {
    let world = World::new(&[Faults {
        stale: true,
        ..Faults::default()
    }]);
    let mut engine = world.engine(0).expect("a server");
    generate(&mut engine, Some(&world.adapter), &requests(), &params()).expect("the first");
    let moved = world.moved();
    let error = generate(&mut engine, Some(&moved), &requests(), &params()).unwrap_err();
    assert!(
        error.to_string().contains("answers with an earlier one"),
        "{error}"
    );
    assert_eq!(error.exit_code(), 3);
}

#[test]
fn a_server_with_another_model_is_refused() {
    let world = World::new(&[Faults {
        foreign: true,
        ..Faults::default()
    }]);
    let mut engine = world.engine(0).expect("a server");
    let error = generate(&mut engine, Some(&world.adapter), &requests(), &params()).unwrap_err();
    assert!(
        error.to_string().contains("it has another model"),
        "{error}"
    );
}

#[test]
fn the_work_of_a_server_that_dies_goes_to_the_others_and_without_any_it_ends() {
    let dying = Faults {
        die_at: 8,
        ..Faults::default()
    };
    let world = World::new(&[dying, Faults::default()]);
    let mut engine = world.engine(1).expect("servers");
    let adapter = Some(&world.adapter);
    let got = generate(&mut engine, adapter, &requests(), &params()).expect("one is left");
    assert_same(&got, &world.expected(adapter));

    let world = World::new(&[dying]);
    let mut engine = world.engine(1).expect("a server");
    let error = generate(&mut engine, Some(&world.adapter), &requests(), &params()).unwrap_err();
    assert!(
        error.to_string().contains("no server answers any more"),
        "{error}"
    );
}

#[test]
fn servers_are_divided_between_ranks() {
    let urls: Vec<String> = (0..5).map(|i| format!("http://{i}")).collect();
    let folder = tempfile::tempdir().expect("a folder");
    let of = |urls: &[String], rank: usize, ranks: usize| {
        let site = Site {
            folder: folder.path(),
            context: 1,
            rank,
            ranks,
            progress: Progress::Silent,
        };
        own_urls(urls, &site)
    };
    assert_eq!(of(&urls, 0, 1), urls);
    assert_eq!(of(&urls, 1, 2), ["http://1", "http://3"]);
    assert_eq!(of(&urls[..2], 2, 3), ["http://0"]);
    assert!(of(&[], 0, 1).is_empty());
}
