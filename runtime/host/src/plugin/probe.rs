//! Asks a strategy in a process of its own, so that one that crashes, aborts or never returns is a failure that can be told,
//! and not the end of this program.
//!
//! The child is this program again, as `homeroom plugins probe FILE`: it loads a private copy, answers on its stdout with a JSON
//! line for each stage as it passes it, and ends. Its time, memory and output are bounded, it leaves no core file, and what it has
//! started ends with it. This guards against accidents: the child has all the rights of this program, and a plugin may use them.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use homeroom_abi::check::{check_description, check_plan};
use homeroom_abi::describe::Description;
use homeroom_abi::limits::PLAN_BYTES_MAX;
use homeroom_abi::plan::{Plan, PlanRequest};
use serde::{Deserialize, Serialize};

use super::library::Library;
use super::stage::Staged;
use super::text;
use crate::stdout::Stdout;

/// How long a strategy may take to load, describe itself and answer the plans that it is asked for.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Longest line that is read of a child: escapes may make a plan longer than it was.
const LINE_BYTES_MAX: u64 = 2 * PLAN_BYTES_MAX as u64;
/// What is read of a child's stderr.
const SAID_BYTES_MAX: u64 = 1 << 16;
/// Exit code of a child that has answered all: a strategy that ends the process has another.
const ANSWERED: i32 = 93;

/// The program, where this process is it.
static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Says that this process is the `homeroom` program, and not another that uses this crate: strategies are probed from then on
/// before they are loaded.
pub fn this_is_the_program() {
    if let Ok(program) = program() {
        PROGRAM.get_or_init(|| program);
    }
}

fn program() -> Result<PathBuf> {
    // The file that runs, even if another has its name by now.
    let link = Path::new("/proc/self/exe");
    if cfg!(target_os = "linux") && link.exists() {
        return Ok(link.to_owned());
    }
    std::env::current_exe().context("cannot tell which program this is")
}

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
    /// What it says of itself.
    pub description: Description,
    /// One for each request: the plan, or why there is none. After a crash the rest say that it had crashed before.
    pub plans: Vec<Result<Plan, Failure>>,
    /// What it printed.
    pub said: String,
}

/// Why there is no answer.
#[derive(Clone, Debug, Default)]
pub struct Failure {
    /// In words.
    pub reason: String,
    /// Whether the child has ended or was late: it has not answered.
    pub ended: bool,
    /// Whether it was late.
    pub late: bool,
    /// The last thing that it printed.
    pub(super) said: String,
}

impl Failure {
    /// With the stage at which it failed, and what it said there.
    fn at(self, stage: &str) -> Self {
        let said = if self.said.is_empty() { String::new() } else { format!("; it had said `{}`", self.said) };
        Self { reason: format!("{} {stage}{said}", self.reason), said: String::new(), ..self }
    }
}

/// A line of a child.
#[derive(Serialize, Deserialize)]
enum Line {
    /// It cannot be loaded, or does not describe itself.
    Refused(String),
    /// It is loaded, and will describe itself.
    Loaded,
    Description(Box<Description>),
    Plan(Box<Plan>),
    NoPlan(String),
}

impl Probe {
    /// With the program that runs now, and [`DEADLINE`].
    ///
    /// # Errors
    /// When the system does not say which program that is.
    pub fn this_program() -> Result<Self> {
        Ok(Self { program: program()?, deadline: DEADLINE })
    }

    /// The same in the `homeroom` program; `None` in another one, which has no program to ask.
    pub fn of_program() -> Option<Self> {
        let program = PROGRAM.get()?.clone();
        Some(Self { program, deadline: DEADLINE })
    }

    /// Loads a strategy in a child and asks it for a description and some plans.
    ///
    /// # Errors
    /// When it cannot be loaded or does not describe itself, with the reason; a crash is one, and so is a missed deadline.
    pub fn ask(&self, plugin: &Staged, requests: &[PlanRequest]) -> Result<Answers> {
        let input = serde_json::to_vec(requests)?;
        let mut child = Running::start(&self.program, &plugin.copy, self.deadline)?;
        child.give(input);
        match child.line() {
            Ok(Line::Loaded) => {}
            Ok(Line::Refused(reason)) => bail!("{reason}"),
            Ok(_) => bail!("{NO_ANSWER}"),
            Err(failure) => bail!("{}", failure.at("while it was loaded").reason),
        }
        let description = match child.line() {
            Ok(Line::Description(about)) => checked(*about)?,
            Ok(Line::Refused(reason)) => bail!("{reason}"),
            Ok(_) => bail!("{NO_ANSWER}"),
            Err(failure) => bail!("{}", failure.at("while it described itself").reason),
        };
        let mut plans: Vec<Result<Plan, Failure>> = Vec::with_capacity(requests.len());
        let mut ended: Option<Failure> = None;
        for _ in requests {
            let said = |reason| Failure { reason, ..Failure::default() };
            let plan = match &ended {
                Some(failure) => Err(failure.clone().at("at an earlier plan")),
                None => match child.line() {
                    Ok(Line::Plan(plan)) => check_plan(&plan).map(|()| *plan).map_err(said),
                    Ok(Line::NoPlan(reason)) => Err(said(reason)),
                    Ok(_) => Err(said(NO_ANSWER.to_owned())),
                    Err(failure) => {
                        ended = Some(failure.clone());
                        Err(failure.at("while it planned"))
                    }
                },
            };
            plans.push(plan);
        }
        if ended.is_none() {
            // A destructor that hangs or crashes does so after the last answer, and would when this program ends.
            child.end().map_err(|failure| anyhow!(failure.at("when the process was to end").reason))?;
        }
        Ok(Answers { description, plans, said: child.said() })
    }
}

const NO_ANSWER: &str = "the child process gave another answer than it was asked for";

fn checked(about: Description) -> Result<Description> {
    check_description(&about).map_err(|problem| anyhow!(problem))?;
    Ok(about)
}

/// Runs foreign code in a thread of its own, which is left behind when it is late.
///
/// # Errors
/// As `work`, and when it is late.
pub fn within<T: Send + 'static>(deadline: Duration, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, answer) = channel();
    thread::spawn(move || sender.send(work()));
    answer.recv_timeout(deadline).map_err(|_| anyhow!("it did not return within {} s", deadline.as_secs_f32()))?
}

/// A child that is asked. Dropped, it is killed.
struct Running {
    child: Child,
    lines: Receiver<Vec<u8>>,
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
        // What a plugin starts is in the child's group, and ends with it.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
        let stdout = child.stdout.take().context("its stdout is a pipe")?;
        let mut stderr = child.stderr.take().context("its stderr is a pipe")?;
        // Threads of their own, which nobody waits for: what a plugin starts may hold the pipes open for ever. A line is read when
        // the one before it was taken.
        let (line, lines) = sync_channel(1);
        thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            loop {
                let mut text = Vec::new();
                let read = (&mut stdout).take(LINE_BYTES_MAX).read_until(b'\n', &mut text);
                // What has no end was cut short when the child ended, or is too long.
                if read.is_err() || text.pop() != Some(b'\n') || line.send(text).is_err() {
                    break;
                }
            }
        });
        let (error, errors) = channel();
        thread::spawn(move || {
            let mut head = Vec::new();
            let _ = (&mut stderr).take(SAID_BYTES_MAX).read_to_end(&mut head);
            let _ = error.send(text::lines(&String::from_utf8_lossy(&head)));
            let _ = std::io::copy(&mut stderr, &mut std::io::sink());
        });
        Ok(Self { child, lines, errors, started: Instant::now(), deadline })
    }

    /// Hands the requests over. A child that ended before it read them shows in its lines.
    fn give(&mut self, input: Vec<u8>) {
        if let Some(mut stdin) = self.child.stdin.take() {
            thread::spawn(move || {
                let _ = stdin.write_all(&input);
            });
        }
    }

    /// The child's next answer; or what became of it instead.
    fn line(&mut self) -> Result<Line, Failure> {
        let left = self.deadline.saturating_sub(self.started.elapsed());
        match self.lines.recv_timeout(left) {
            Ok(line) => serde_json::from_slice(&line).map_err(|error| Failure {
                reason: format!("{NO_ANSWER} ({})", text::line(&error.to_string())),
                ..Failure::default()
            }),
            Err(RecvTimeoutError::Timeout) => Err(self.late()),
            Err(RecvTimeoutError::Disconnected) => Err(match self.wait() {
                Some(status) => self.how(status),
                None => self.late(),
            }),
        }
    }

    /// Waits for the child to end well.
    fn end(&mut self) -> Result<(), Failure> {
        match self.wait() {
            None => Err(self.late()),
            Some(status) if status.code() == Some(ANSWERED) => Ok(()),
            Some(status) => Err(self.how(status)),
        }
    }

    /// What the child printed, once it has ended.
    fn said(&self) -> String {
        self.end_group();
        self.errors.recv_timeout(Duration::from_millis(500)).unwrap_or_default()
    }

    fn late(&self) -> Failure {
        let reason = format!("it did not return within {} s", self.deadline.as_secs_f32());
        Failure { reason, ended: true, late: true, said: String::new() }
    }

    fn wait(&mut self) -> Option<ExitStatus> {
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if self.started.elapsed() < self.deadline => thread::sleep(Duration::from_millis(1)),
                _ => return None,
            }
        }
    }

    /// How a child ended that did not answer, with the last thing it said.
    fn how(&self, status: ExitStatus) -> Failure {
        let said = self.said();
        let last = said.lines().map(str::trim).rfind(|line| !line.is_empty() && !line.starts_with("note: "));
        let said = last.map(text::line).unwrap_or_default();
        Failure { reason: ending(status), ended: true, late: false, said }
    }

    /// Ends whatever the plugin has started, unless that has taken care not to be found.
    fn end_group(&self) {
        #[cfg(unix)]
        if let Ok(group) = libc::pid_t::try_from(self.child.id()) {
            // SAFETY: kill has no preconditions. The group is the child's: it was its first process, and no other process gets the
            // number while one of the group is there. If none is, there is nothing to end.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end_group();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a process ended, in words.
fn ending(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return match signal {
            libc::SIGABRT => "it aborted (SIGABRT)".to_owned(),
            libc::SIGSEGV => "it crashed: it touched memory that is not its own (SIGSEGV)".to_owned(),
            libc::SIGBUS => "it crashed: it read beyond a file, or from an odd address (SIGBUS)".to_owned(),
            libc::SIGFPE => "it crashed: an arithmetic fault (SIGFPE)".to_owned(),
            libc::SIGILL | libc::SIGTRAP => {
                format!("it crashed: a trap, or an instruction that this processor does not have (signal {signal})")
            }
            libc::SIGKILL => "it was killed, perhaps for its memory (SIGKILL)".to_owned(),
            libc::SIGXFSZ => "it crashed: it wrote a file that is too large (SIGXFSZ)".to_owned(),
            _ => format!("signal {signal} ended it"),
        };
    }
    match status.code() {
        Some(ANSWERED) => "it left an answer out".to_owned(),
        Some(code) => format!("it ended the process with exit code {code}"),
        None => "it ended the process".to_owned(),
    }
}

/// Bounds what a strategy can take by accident, and leaves no file behind when it crashes.
#[cfg(unix)]
fn limit() {
    const MEMORY_BYTES: libc::rlim_t = 4 << 30;
    // Addresses are more than memory: allocators reserve them, and the program itself is mapped. Shared memory counts here only.
    const ADDRESSES_BYTES: libc::rlim_t = 16 << 30;
    const FILE_BYTES: libc::rlim_t = 1 << 30;
    for (what, most) in [
        (libc::RLIMIT_DATA, MEMORY_BYTES),
        (libc::RLIMIT_AS, ADDRESSES_BYTES),
        (libc::RLIMIT_FSIZE, FILE_BYTES),
        (libc::RLIMIT_CORE, 0),
    ] {
        let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
        // SAFETY: the struct is whole and outlives the call. Where the system sets a lower limit it refuses, and that one holds.
        unsafe { libc::setrlimit(what, &raw const limit) };
    }
    #[cfg(target_os = "linux")]
    // SAFETY: these take numbers. No core is written, even where a program receives them; and the child ends when the thread does
    // that has started it, which waits for its answers.
    unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
}

/// The child: loads a strategy's copy, answers the requests on stdin, and ends the process.
///
/// # Errors
/// When stdin or stdout fail. What fails in the strategy is an answer.
pub fn answer(copy: &Path, deadline_s: u32) -> Result<()> {
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
    let mut say = |line: &Line| -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        out.write_all(&text)?;
        Ok(out.flush()?)
    };
    let requests: Vec<PlanRequest> = serde_json::from_reader(std::io::stdin().lock())?;
    let refused = |error: anyhow::Error| Line::Refused(format!("{error:#}"));
    match Library::open(copy) {
        Err(error) => say(&refused(error))?,
        Ok(library) => {
            say(&Line::Loaded)?;
            match library.describe() {
                Err(error) => say(&refused(error))?,
                Ok(about) => {
                    say(&Line::Description(Box::new(about)))?;
                    for request in &requests {
                        say(&match library.plan(request) {
                            Ok(plan) => Line::Plan(Box::new(plan)),
                            Err(error) => Line::NoPlan(format!("{error:#}")),
                        })?;
                    }
                }
            }
        }
    }
    // Destructors of libraries run, as they would at the end of the program.
    std::process::exit(ANSWERED)
}
