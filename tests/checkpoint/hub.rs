//! Hub ids against a server on this machine that answers as the hub does.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use safetensors::Dtype as StDtype;
use serde_json::json;
use tinylora::data::hub::Hub;
use tinylora::model::{Arch, Checkpoint, OpenOptions, fetch_model};

use crate::support::{HfDir, tensors};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves the files of one repository `maker/tiny`; other names do not exist, `maker/gated` is
/// refused without a token.
struct Server {
    endpoint: String,
    /// "path authorization" of every request.
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn new(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(stream, &files, &log);
            }
        });
        Self { endpoint, requests }
    }

    fn of(dir: &Path) -> Self {
        let files = std::fs::read_dir(dir).expect("listed").map(|entry| {
            let path = entry.expect("an entry").path();
            let name = path
                .file_name()
                .expect("a name")
                .to_string_lossy()
                .into_owned();
            (name, std::fs::read(path).expect("read"))
        });
        Self::new(files.collect())
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no panic").clone()
    }
}

fn answer(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().expect("cloned"));
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_string());
    }
    let Some(path) = lines.first().and_then(|l| l.split(' ').nth(1)) else {
        return;
    };
    let header = |name: &str| {
        lines.iter().find_map(|l| {
            let (key, value) = l.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    };
    let authorization = header("authorization").unwrap_or("-");
    log.lock()
        .expect("no panic")
        .push(format!("{path} {authorization}"));

    let mut respond = |status: &str, headers: &str, body: &[u8]| {
        let len = body.len();
        let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len}\r\n");
        let _ = stream.write_all(format!("{head}{headers}\r\n").as_bytes());
        let _ = stream.write_all(body);
    };
    if path.contains("maker/gated") {
        return respond("401 Unauthorized", "", b"");
    }
    if path == "/api/models/maker/tiny/revision/main" {
        let siblings: Vec<_> = files.keys().map(|f| json!({"rfilename": f})).collect();
        let info = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return respond(
            "200 OK",
            "Content-Type: application/json\r\n",
            info.as_bytes(),
        );
    }
    let file = path.strip_prefix("/maker/tiny/resolve/main/");
    let Some((name, content)) = file.and_then(|name| Some((name, files.get(name)?))) else {
        return respond("404 Not Found", "", b"");
    };
    let range = header("range")
        .and_then(|r| r.strip_prefix("bytes="))
        .unwrap_or("0-");
    let (from, to) = range.split_once('-').expect("a range");
    let from: usize = from.parse().expect("a number");
    let to = to
        .parse()
        .map_or(content.len(), |to: usize| to + 1)
        .min(content.len());
    let headers = format!(
        "ETag: \"etag-{name}\"\r\nx-repo-commit: {COMMIT}\r\nContent-Range: bytes {from}-{to}/{}\r\n",
        content.len()
    );
    respond("206 Partial Content", &headers, &content[from..to]);
}

fn repository() -> HfDir {
    let made = HfDir::new(Arch::Qwen2, StDtype::BF16);
    made.finish();
    made.write("generation_config.json", r#"{"eos_token_id": [2, 1]}"#);
    made.write("README.md", "not fetched");
    made.write("pytorch_model.bin", "not fetched");
    made
}

fn open(dir: &Path) -> Checkpoint {
    crate::support::open(dir).expect("opened")
}

#[test]
fn a_model_is_downloaded_once_and_then_needs_no_network() {
    let made = repository();
    let server = Server::of(made.dir.path());
    let cache = tempfile::tempdir().expect("a cache");
    let hub = Hub::new(cache.path().to_path_buf(), &server.endpoint);
    let dir = fetch_model(&hub, "maker/tiny", true).expect("downloaded");
    let checkpoint = open(&dir);
    assert_eq!(checkpoint.config.eos_token_ids, [2, 1]);
    let expected = tensors(&checkpoint.config);
    let name = "model.layers.0.mlp.up_proj.weight";
    assert!(checkpoint.weights.get_f32(name).expect("read") == expected[name].1);
    let requests = server.requests();
    assert!(
        requests
            .iter()
            .all(|r| !r.contains("README") && !r.contains(".bin"))
    );

    let again = fetch_model(&hub, "maker/tiny", true).expect("cached");
    assert_eq!(again, dir);
    let by_commit = fetch_model(&hub, &format!("maker/tiny@{COMMIT}"), true);
    assert_eq!(by_commit.expect("cached"), dir);
    assert_eq!(server.requests(), requests);
}

#[test]
fn shards_are_fetched_as_the_index_says() {
    let made = repository();
    let dir = made.dir.path();
    std::fs::rename(
        dir.join("model.safetensors"),
        dir.join("model-00001-of-00001.safetensors"),
    )
    .expect("renamed");
    let map: serde_json::Map<_, _> = made
        .tensors
        .keys()
        .map(|name| (name.clone(), "model-00001-of-00001.safetensors".into()))
        .collect();
    let index = json!({"weight_map": map}).to_string();
    made.write("model.safetensors.index.json", index);
    let server = Server::of(dir);
    let cache = tempfile::tempdir().expect("a cache");
    let hub = Hub::new(cache.path().to_path_buf(), &server.endpoint);
    open(&fetch_model(&hub, "maker/tiny", true).expect("downloaded"));

    // A snapshot that lost a shard is completed.
    let snapshot = cache
        .path()
        .join(format!("models--maker--tiny/snapshots/{COMMIT}"));
    std::fs::remove_file(snapshot.join("model-00001-of-00001.safetensors")).expect("removed");
    open(&fetch_model(&hub, "maker/tiny", true).expect("completed"));
}

#[test]
fn refusals_say_what_to_do() {
    let made = repository();
    std::fs::remove_file(made.dir.path().join("model.safetensors")).expect("removed");
    made.write("tiny.gguf", "");
    let server = Server::of(made.dir.path());
    let cache = tempfile::tempdir().expect("a cache");
    let ask = |endpoint: &str, id: &str| {
        let hub = Hub::new(cache.path().to_path_buf(), endpoint);
        let error = fetch_model(&hub, id, true).expect_err("refused");
        (error.exit_code(), error.to_string())
    };
    for (id, said) in [
        ("maker/nothing", "no such thing"),
        ("maker/gated", "HF_TOKEN"),
        ("maker/tiny", "GGUF"),
    ] {
        let (code, error) = ask(&server.endpoint, id);
        assert_eq!(code, 3);
        assert!(error.contains(id) && error.contains(said), "{error}");
    }
    // Port 9 of this machine answers nobody.
    let (code, error) = ask("http://127.0.0.1:9", "maker/tiny");
    assert_eq!(code, 3);
    assert!(error.contains("cannot reach http://127.0.0.1:9"), "{error}");
    let (code, error) = ask(&server.endpoint, "../maker");
    assert_eq!(code, 2);
    assert!(error.contains("hub id"), "{error}");
}

/// The environment belongs to the whole process, so this runs itself as a child.
#[test]
fn the_environment_is_honoured_and_the_token_is_not_shown() {
    let made = repository();
    let server = Server::of(made.dir.path());
    let home = tempfile::tempdir().expect("a home");
    let token = "hf_secret0123456789";
    let child = |offline: &str, id: &str| {
        let output = Command::new(std::env::current_exe().expect("this test"))
            .args(["hub::child", "--exact", "--ignored", "--nocapture"])
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", &server.endpoint)
            .env("HF_TOKEN", token)
            .env("HF_HUB_OFFLINE", offline)
            .env("TINYLORA_TEST_HUB_ID", id)
            .env_remove("HF_HUB_CACHE")
            .output()
            .expect("run");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(!text.contains(token), "{text}");
        text
    };
    assert!(child("1", "maker/tiny").contains("HF_HUB_OFFLINE"));
    assert!(server.requests().is_empty());
    assert!(child("0", "maker/tiny").contains("opened maker/tiny"));
    let requests = server.requests();
    assert!(
        requests
            .iter()
            .all(|r| r.ends_with(&format!("Bearer {token}")))
    );
    assert!(child("1", "maker/tiny").contains("opened maker/tiny"));
    assert_eq!(server.requests(), requests);
    assert!(child("0", "maker/gated").contains("access is refused"));
    assert!(home.path().join("hub/models--maker--tiny").is_dir());
}

#[test]
#[ignore = "run by the test above with its environment"]
fn child() {
    let id = std::env::var("TINYLORA_TEST_HUB_ID").expect("set by the parent");
    match Checkpoint::open(&id, &OpenOptions::default()) {
        Ok(checkpoint) => println!("opened {}", checkpoint.source),
        Err(error) => println!("{error}"),
    }
}
