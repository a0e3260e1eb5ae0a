//! The process that trains for a job: this program again, as `homeroom fine-tune … --resume`.
//!
//! What it takes, and whatever becomes of it, is not the server's: its memory is its own, the system ends it before the server where
//! memory is short, it computes when answers leave the processor free, and it ends when the server does. It is told the same command
//! each time, so that a run that was broken off goes on, and one that has finished is left as it is.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use homeroom_engine::train::TrainConfig;

use super::job::{Job, MethodKind};
use crate::handler::config::fine_tuning::Settings;
use crate::job::defaults::{self, Open};
use crate::serve::files::store::private_file;

/// What is read of the end of a log.
const TAIL_BYTES: u64 = 16 << 10;

/// Starts to train, or goes on.
///
/// # Errors
/// When the program cannot be started.
pub fn start(job: &Job, settings: &Settings, training: &Path, validation: Option<&Path>, log: &Path) -> Result<Child> {
    let program = std::env::current_exe().context("cannot tell which program this is")?;
    let mut command = Command::new(program);
    // Models are not downloaded because a client asks for it.
    command.args(["--offline", "fine-tune", "--resume", "--fit", "--name", &job.name]);
    command.arg("--model-name").arg(&job.base).arg("--training-file").arg(training);
    command.arg("--seed").arg(job.seed.to_string());
    if let Some(adapter) = &job.init_from {
        command.arg("--init-from").arg(adapter);
    }
    let method = &job.method;
    if method.kind == MethodKind::Dpo {
        command.args(["--objective", "dpo"]);
    }
    let mut option = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            command.args([name, &value]);
        }
    };
    option("--epochs", method.n_epochs.map(|epochs| epochs.to_string()));
    option("--batch-size", method.batch_size.map(|rows| rows.to_string()));
    option("--learning-rate-multiplier", method.learning_rate_multiplier.map(|factor| factor.to_string()));
    option("--beta", method.beta.map(|beta| beta.to_string()));
    if let Some(file) = validation {
        option("--eval-every", Some(steps_of_epoch(job, training).to_string()));
        command.arg("--eval-file").arg(file);
    }
    if let Some(threads) = settings.threads {
        command.env("RAYON_NUM_THREADS", threads.to_string());
    }
    let log = match File::options().append(true).open(log) {
        Ok(log) => log,
        Err(_) => private_file(log)?,
    };
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    set_apart(&mut command, settings.niceness);
    let child = command.spawn().context("the training cannot be started")?;
    // Where memory is short, the system ends the training, which can go on later, and not the server.
    #[cfg(target_os = "linux")]
    let _ = std::fs::write(format!("/proc/{}/oom_score_adj", child.id()), "800");
    Ok(child)
}

/// The steps of an epoch: after each, the held-out rows are measured.
fn steps_of_epoch(job: &Job, training: &Path) -> usize {
    let rows = rows(training).max(1);
    let mut config = TrainConfig { epochs: job.method.n_epochs.unwrap_or(1), ..TrainConfig::default() };
    let epochs = job.method.n_epochs.is_none();
    defaults::choose(&mut config, Open { epochs, batch_size: epochs && job.method.batch_size.is_none() }, rows);
    let batch = job.method.batch_size.map_or(config.batch_size, |rows| rows as usize);
    rows.div_ceil(batch.max(1))
}

/// About how many rows a file has: its lines that are not empty.
fn rows(path: &Path) -> usize {
    let Ok(mut file) = File::open(path) else { return 0 };
    let (mut piece, mut rows, mut is_blank) = (vec![0; 64 << 10], 0, true);
    while let Ok(read @ 1..) = file.read(&mut piece) {
        for byte in &piece[..read] {
            if *byte == b'\n' {
                rows += usize::from(!is_blank);
                is_blank = true;
            } else if !byte.is_ascii_whitespace() {
                is_blank = false;
            }
        }
    }
    rows + usize::from(!is_blank)
}

/// Ctrl-C in the server's terminal is the server's alone; the training yields to others, and does not outlive the server.
#[cfg(unix)]
fn set_apart(command: &mut Command, niceness: u8) {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
    let prepare = move || {
        // SAFETY: `setpriority` takes numbers alone; it is safe to call between fork and exec.
        unsafe { libc::setpriority(libc::PRIO_PROCESS as _, 0, i32::from(niceness)) };
        #[cfg(target_os = "linux")]
        // SAFETY: as above. The signal comes when the thread ends that started the child, and that lives as long as the server.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM)
        };
        Ok(())
    };
    // SAFETY: `prepare` allocates nothing, takes no lock and calls only what is safe between fork and exec.
    unsafe { command.pre_exec(prepare) };
}

/// Here a training competes with answers as an equal.
#[cfg(not(unix))]
fn set_apart(_: &mut Command, _: u8) {}

/// Asks the training to save what it has and end.
pub fn interrupt(child: &mut Child) {
    #[cfg(unix)]
    if let Ok(process) = i32::try_from(child.id()) {
        // SAFETY: `kill` takes numbers alone. The child has not been waited for, so that the number is still its own.
        unsafe { libc::kill(process, libc::SIGTERM) };
    }
    // Its last checkpoint is some minutes old at most.
    #[cfg(not(unix))]
    let _ = child.kill();
}

/// The error at the end of a log.
pub fn last_error(log: &Path) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES))).ok()?;
    let mut tail = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut tail).ok()?;
    let tail = String::from_utf8_lossy(&tail);
    let at = tail.rfind("\nerror: ").map(|at| at + 1).or_else(|| tail.starts_with("error: ").then_some(0))?;
    Some(tail[at + "error: ".len()..].trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_the_last_one_of_a_log() -> Result<()> {
        let place = tempfile::tempdir()?;
        let log = place.path().join("log");
        std::fs::write(
            &log,
            "error: old\nnote: x\nerror: /home/a/files/file-1/content.jsonl: line 3: bad\nhint: mend it\n",
        )?;
        let wanted = "/home/a/files/file-1/content.jsonl: line 3: bad\nhint: mend it";
        assert_eq!(last_error(&log).as_deref(), Some(wanted));
        std::fs::write(&log, "note: no error: here\n")?;
        assert_eq!(last_error(&log), None);
        std::fs::write(&log, "{}\n\n  \n{}")?;
        assert_eq!(rows(&log), 2);
        Ok(())
    }
}
