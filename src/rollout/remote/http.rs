//! JSON over HTTP to one server.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;

use super::Failure;
use crate::config::RolloutConfig;

/// Answers larger than this are refused: a million tokens are a few hundred megabytes.
const MAX_ANSWER: u64 = 512 << 20;
/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);
/// Characters of a server's complaint that are passed on.
const MAX_COMPLAINT: usize = 300;

/// A server with what was sent to it.
pub(super) struct Server {
    pub url: String,
    agent: Agent,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Server {
    pub fn new(url: &str, config: &RolloutConfig) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_global(Some(Duration::from_secs_f64(config.request_timeout)))
            .max_idle_connections_per_host(config.max_concurrency)
            .build();
        Self {
            url: url.trim_end_matches('/').to_owned(),
            agent: agent.into(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        }
    }

    /// Bytes of the bodies sent and received so far.
    pub fn bytes(&self) -> (u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.sent), read(&self.received))
    }

    pub fn get(&self, path: &str) -> Result<Value, Failure> {
        let url = format!("{}{path}", self.url);
        self.answer(path, self.agent.get(url).call())
    }

    pub fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let url = format!("{}{path}", self.url);
        let body = body.to_string();
        self.sent.fetch_add(body.len() as u64, Ordering::Relaxed);
        let request = self.agent.post(url).content_type("application/json");
        self.answer(path, request.send(body))
    }

    fn answer(
        &self,
        path: &str,
        response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Value, Failure> {
        let passing = |error: ureq::Error| Failure::Passing(format!("{}{path}: {error}", self.url));
        let mut response = response.map_err(passing)?;
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(MAX_ANSWER);
        let body = body.read_to_vec().map_err(passing)?;
        self.received
            .fetch_add(body.len() as u64, Ordering::Relaxed);
        if !(200..300).contains(&status) {
            return Err(self.refused(path, status, &body));
        }
        // Some answers are plain words.
        Ok(serde_json::from_slice(&body)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&body).into_owned())))
    }

    fn refused(&self, path: &str, status: u16, body: &[u8]) -> Failure {
        let text: String = String::from_utf8_lossy(body)
            .chars()
            .take(MAX_COMPLAINT)
            .collect();
        let message = format!("{}{path}: status {status}: {text}", self.url);
        match status {
            404 => Failure::UnknownPolicy(message),
            408 | 425 | 429 | 500.. => Failure::Passing(message),
            _ => Failure::Final(message),
        }
    }
}
