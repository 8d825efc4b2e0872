//! A server that the run starts itself, restarts when it dies, and ends.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Site;
use crate::config::RolloutConfig;
use crate::model::Model;
use crate::{Error, Result};

/// Times that a server is started again in a run: one that dies more often has a reason to.
const MAX_RESTARTS: u32 = 5;

/// A running `llama-server`.
pub(super) struct Started {
    program: String,
    arguments: Vec<String>,
    port: u16,
    child: Arc<Mutex<Child>>,
    restarts: u32,
    log: PathBuf,
}

impl Started {
    /// Starts the program of the configuration with the model and these adapters.
    ///
    /// # Errors
    /// [`Error::Config`] when the model is no GGUF file or the program does not start.
    pub fn new(
        config: &RolloutConfig,
        model: &Model,
        adapters: &[PathBuf],
        site: &Site<'_>,
    ) -> Result<Self> {
        let Some((program, given)) = config.server.split_first() else {
            return Err(Error::config("rollout.server names no program"));
        };
        if !model.name.ends_with(".gguf") {
            return Err(Error::config(format!(
                "llama.cpp's server reads GGUF files, and {} is none: name a .gguf file as model.path",
                model.name
            )));
        }
        let port = free_port()?;
        let slots = config.max_concurrency;
        let mut arguments = given.to_vec();
        let numbers = [
            ("--port", usize::from(port)),
            ("--parallel", slots),
            ("--ctx-size", slots * site.context),
        ];
        arguments.extend(["--model".to_owned(), model.name.clone()]);
        arguments.extend(["--host", "127.0.0.1"].map(str::to_owned));
        arguments.extend(
            numbers
                .iter()
                .flat_map(|(k, v)| [(*k).to_owned(), v.to_string()]),
        );
        arguments.push("--lora-init-without-apply".to_owned());
        for path in adapters {
            arguments.extend(["--lora".to_owned(), path.display().to_string()]);
        }
        let log = site.folder.join(format!("server-{}.log", site.rank));
        crate::run::fs::create_dir_all(site.folder)?;
        let child = spawn(program, &arguments, &log)?;
        Ok(Self {
            program: program.clone(),
            arguments,
            port,
            child,
            restarts: 0,
            log,
        })
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the server again if it has died.
    ///
    /// # Errors
    /// [`Error::Data`] when it does so again and again.
    pub fn keep_alive(&mut self) -> Result<()> {
        let status = match self.child().try_wait() {
            Ok(None) => return Ok(()),
            Ok(Some(status)) => status.to_string(),
            Err(error) => error.to_string(),
        };
        if self.restarts == MAX_RESTARTS {
            return Err(Error::data(format!(
                "{} ended again ({status}); what it said is in {}",
                self.program,
                self.log.display()
            )));
        }
        tracing::warn!("{} ended ({status}): starting it again", self.program);
        self.restarts += 1;
        self.child = spawn(&self.program, &self.arguments, &self.log)?;
        Ok(())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // It may have ended by itself.
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A port that nobody listens to now.
fn free_port() -> Result<u16> {
    let found = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    found
        .map(|address| address.port())
        .map_err(|e| Error::Internal(format!("no port for a server: {e}")))
}

fn spawn(program: &str, arguments: &[String], log: &std::path::Path) -> Result<Arc<Mutex<Child>>> {
    let open = || {
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
    };
    let failed = |e: std::io::Error| Error::file("write", log, e);
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(open().map_err(failed)?)
        .stderr(open().map_err(failed)?);
    #[cfg(unix)]
    {
        // Ctrl-C is for this program, which has something to save before its server goes.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
    }
    let child = command.spawn().map_err(|e| {
        Error::config(format!(
            "rollout.server: cannot start {program}: {e}; install llama.cpp, or give rollout.base_url"
        ))
    })?;
    let child = Arc::new(Mutex::new(child));
    crate::run::signals::ends_with_us(&child);
    Ok(child)
}
