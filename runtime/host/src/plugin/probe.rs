//! Asks a strategy in a process of its own, so that one that crashes, aborts or never returns is a failure that can be told,
//! and not the end of this program.
//!
//! The child is this program again, as `homeroom plugins probe FILE`: it loads the file as [`Plugin::load`] does, answers on its
//! stdout with one JSON line for the description and one for each plan as it has it, and ends. This guards against accidents:
//! the child has all the rights of this program, and a plugin may use them.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use homeroom_abi::describe::Description;
use homeroom_abi::plan::{Plan, PlanRequest};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Plugin;
use crate::stdout::Stdout;

/// How long a strategy may take to load, describe itself and answer the plans that it is asked for.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Longest answer that is read: a plan of a large model has some megabytes.
const LONGEST: u64 = 1 << 28;

/// What strategies are asked with.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The `homeroom` program, which the child runs. [`Probe::this_program`] is right in that program only.
    pub program: PathBuf,
    /// How long a child may live.
    pub deadline: Duration,
}

/// What a strategy answered.
#[derive(Clone, Debug)]
pub struct Answers {
    /// SHA-256 of the bytes that were loaded, in hexadecimal digits.
    pub sha256: String,
    /// What it says of itself.
    pub description: Description,
    /// One for each request: the plan, or why there is none. After a crash the rest say that it had crashed before.
    pub plans: Vec<Result<Plan, String>>,
}

/// First line of a child.
#[derive(Serialize, Deserialize)]
struct Loaded {
    sha256: String,
    description: Description,
}

impl Probe {
    /// With the program that runs now, and [`DEADLINE`].
    ///
    /// # Errors
    /// When the system does not say which program that is.
    pub fn this_program() -> Result<Self> {
        let program = std::env::current_exe().context("cannot tell which program this is")?;
        Ok(Self { program, deadline: DEADLINE })
    }

    /// Loads a strategy in a child and asks it for a description and some plans.
    ///
    /// # Errors
    /// When it cannot be loaded or does not describe itself, with the reason; a crash is one, and so is a missed deadline.
    pub fn ask(&self, plugin: &Path, requests: &[PlanRequest]) -> Result<Answers> {
        let input = serde_json::to_vec(requests)?;
        let mut child = Running::start(&self.program, plugin, self.deadline)?;
        child.give(input);
        let loaded: Loaded = match child.line() {
            Ok(line) => serde_json::from_str::<Result<Loaded, String>>(&line)
                .context("the answer of the child cannot be read")?
                .map_err(|reason| anyhow!(reason))?,
            Err(reason) => bail!("{reason} while it was loaded and described itself"),
        };
        let mut plans: Vec<Result<Plan, String>> = Vec::with_capacity(requests.len());
        let mut ended = None;
        for _ in requests {
            let plan = match &ended {
                Some(reason) => Err(format!("{reason} at an earlier plan")),
                None => match child.line() {
                    Ok(line) => serde_json::from_str(&line)
                        .unwrap_or_else(|error| Err(format!("the answer of the child cannot be read: {error}"))),
                    Err(reason) => {
                        let error = format!("{reason} in its plan");
                        ended = Some(reason);
                        Err(error)
                    }
                },
            };
            plans.push(plan);
        }
        if ended.is_none() {
            // A destructor that hangs or crashes does so after the last answer.
            child.end().map_err(|reason| anyhow!("{reason} after its last answer"))?;
        }
        let Loaded { sha256, description } = loaded;
        Ok(Answers { sha256, description, plans })
    }
}

/// A child that is asked. Dropped, it is killed.
struct Running {
    child: Child,
    lines: Receiver<String>,
    errors: Receiver<String>,
    started: Instant,
    deadline: Duration,
}

impl Running {
    fn start(program: &Path, plugin: &Path, deadline: Duration) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(["plugins", "probe"]).arg(plugin).arg(deadline.as_secs().max(1).to_string());
        // Of what it says last one line is told: a trace, which the user's shell may ask for, would stand in its place.
        command.env("RUST_BACKTRACE", "0").env_remove("RUST_LIB_BACKTRACE");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
        let stdout = child.stdout.take().context("its stdout is a pipe")?;
        let mut stderr = child.stderr.take().context("its stderr is a pipe")?;
        // Threads of their own, which nobody waits for: what a plugin starts may hold the pipes open for ever.
        let (line, lines) = channel();
        thread::spawn(move || {
            for text in BufReader::new(stdout.take(LONGEST)).lines().map_while(Result::ok) {
                if line.send(text).is_err() {
                    break;
                }
            }
        });
        let (error, errors) = channel();
        thread::spawn(move || {
            let mut head = Vec::new();
            let _ = (&mut stderr).take(1 << 16).read_to_end(&mut head);
            let _ = error.send(String::from_utf8_lossy(&head).into_owned());
            let _ = std::io::copy(&mut stderr, &mut std::io::sink());
        });
        Ok(Self { child, lines, errors, started: Instant::now(), deadline })
    }

    /// Hands the requests over. A child that ended before it read them shows in its lines.
    fn give(&mut self, input: Vec<u8>) {
        if let Some(mut stdin) = self.child.stdin.take() {
            thread::spawn(move || stdin.write_all(&input));
        }
    }

    /// The next line, or how the child ended without one.
    fn line(&mut self) -> Result<String, String> {
        match self.lines.recv_timeout(self.deadline.saturating_sub(self.started.elapsed())) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => Err(self.late()),
            Err(RecvTimeoutError::Disconnected) => match self.wait() {
                None => Err(self.late()),
                Some(status) => Err(self.how(status)),
            },
        }
    }

    /// Waits for the end that a child without further questions comes to.
    fn end(&mut self) -> Result<(), String> {
        match self.wait() {
            None => Err(self.late()),
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(self.how(status)),
        }
    }

    fn late(&self) -> String {
        format!("it did not return within {} s", self.deadline.as_secs_f32())
    }

    fn wait(&mut self) -> Option<ExitStatus> {
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if self.started.elapsed() < self.deadline => thread::sleep(Duration::from_millis(2)),
                _ => return None,
            }
        }
    }

    /// How a child ended that did not answer, with the last thing it said.
    fn how(&self, status: ExitStatus) -> String {
        let said = self.errors.recv_timeout(Duration::from_millis(500)).unwrap_or_default();
        let last = said.lines().map(str::trim).rfind(|line| !line.is_empty() && !line.starts_with("note: "));
        let said = last.unwrap_or_default().to_owned();
        let said = if said.is_empty() { said } else { format!(", having said `{said}`") };
        #[cfg(unix)]
        if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
            let name = match signal {
                libc::SIGABRT => " (it aborted)",
                libc::SIGSEGV => " (it touched memory that is not its own)",
                libc::SIGBUS => " (its file was cut short while it ran)",
                libc::SIGFPE => " (an arithmetic fault)",
                libc::SIGILL => " (an instruction that this processor does not have, or a trap)",
                libc::SIGKILL => " (killed, perhaps for its memory)",
                _ => "",
            };
            return format!("it crashed with signal {signal}{name}{said}");
        }
        match status.code() {
            Some(code) => format!("it ended the process with exit code {code}{said}"),
            None => format!("it ended the process{said}"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A strategy that takes memory without end aborts before the machine has none left, and a crash leaves no file behind.
#[cfg(unix)]
fn limit() {
    const MEMORY_BYTES: libc::rlim_t = 4 << 30;
    for (what, most) in [(libc::RLIMIT_DATA, MEMORY_BYTES), (libc::RLIMIT_CORE, 0)] {
        let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
        // SAFETY: the struct is whole and outlives the call. Where the system sets a lower limit it refuses, and that one holds.
        unsafe { libc::setrlimit(what, &raw const limit) };
    }
}

/// The child: loads a strategy and answers the requests on stdin.
///
/// # Errors
/// When stdin or stdout fail. What fails in the strategy is an answer.
pub fn answer(plugin: &Path, deadline_s: u32) -> Result<()> {
    // A parent that was killed kills nobody: the system ends this process then.
    #[cfg(unix)]
    // SAFETY: alarm has no preconditions, and nothing else in this process uses it.
    unsafe {
        libc::alarm(deadline_s.saturating_add(5));
    }
    #[cfg(not(unix))]
    let _ = deadline_s;
    #[cfg(unix)]
    limit();
    let mut out = Stdout;
    let mut say = |line: Value| -> Result<()> {
        writeln!(out, "{line}")?;
        Ok(out.flush()?)
    };
    let requests: Vec<PlanRequest> = serde_json::from_reader(std::io::stdin().lock())?;
    let plugin = match Plugin::load(plugin) {
        Ok(plugin) => plugin,
        Err(error) => return say(serde_json::to_value(Err::<Loaded, _>(format!("{error:#}")))?),
    };
    let loaded = Loaded { sha256: plugin.sha256.clone(), description: plugin.description.clone() };
    say(serde_json::to_value(Ok::<_, String>(loaded))?)?;
    for request in &requests {
        let plan = plugin.plan(request).map_err(|error| format!("{error:#}"));
        say(serde_json::to_value(plan)?)?;
    }
    Ok(())
}
