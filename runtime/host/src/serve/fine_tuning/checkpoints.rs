//! Checkpoints of a job that can be asked: the adapter as it was after the last epochs that were better than those before, copied from what
//! the training keeps to go on from.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use homeroom_engine::adapt::adapter::is_adapter;
use homeroom_engine::files::{NewDirectory, make_directory, result_files, take_away};

/// So many are kept, the newest.
const KEPT: usize = 3;
/// Their directory in that of a job.
const DIRECTORY: &str = "checkpoints";

/// The steps in a directory of checkpoints, ascending, and where they are.
fn steps(directory: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let step = |path: PathBuf| Some((path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?, path));
    let mut steps: Vec<(u64, PathBuf)> = entries.filter_map(|entry| step(entry.path())).collect();
    steps.sort();
    steps
}

/// The checkpoints of a job, ascending by step, and where they are.
pub fn kept(job: &Path) -> Vec<(u64, PathBuf)> {
    steps(&job.join(DIRECTORY))
}

/// The name by which a checkpoint is asked, as OpenAI has it.
pub fn name(model: &str, step: u64) -> String {
    format!("{model}:ckpt-step-{step}")
}

/// Copies what the run of a job has saved since, and lets the oldest go. Returns the steps that are new.
pub fn keep(job: &Path, run: &Path) -> Vec<u64> {
    let newest = kept(job).last().map_or(0, |(step, _)| *step);
    let saved = steps(&run.join("trainings/1/checkpoints"));
    let fresh = saved.into_iter().filter(|(step, path)| *step > newest && is_adapter(path));
    let mut copied = Vec::new();
    for (step, path) in fresh {
        // The training may let one go meanwhile.
        if copy(&path, &job.join(DIRECTORY).join(format!("step-{step}"))).is_ok() {
            copied.push(step);
        }
    }
    let all = kept(job);
    for (_, path) in &all[..all.len().saturating_sub(KEPT)] {
        let _ = take_away(path);
    }
    copied
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        make_directory(parent)?;
    }
    let directory = NewDirectory::start(to)?;
    for file in result_files().filter(|file| *file != "trainer_state.json") {
        let path = from.join(file);
        if path.is_file() {
            fs::copy(&path, directory.path().join(file))?;
        }
    }
    directory.publish().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept_without_what_a_training_goes_on_from() -> Result<()> {
        let place = tempfile::tempdir()?;
        let (job, run) = (place.path().join("job"), place.path().join("run"));
        let save = |step: u64| -> Result<()> {
            let directory = run.join(format!("trainings/1/checkpoints/step-{step:06}"));
            fs::create_dir_all(&directory)?;
            for file in ["adapter_config.json", "adapter_model.safetensors", "training_state.json"] {
                fs::write(directory.join(file), step.to_string())?;
            }
            Ok(())
        };
        save(0)?;
        assert!(keep(&job, &run).is_empty(), "nothing is learned yet");
        save(9)?;
        save(18)?;
        assert_eq!(keep(&job, &run), [9, 18]);
        save(27)?;
        save(36)?;
        assert_eq!(keep(&job, &run), [27, 36]);
        assert_eq!(kept(&job).iter().map(|(step, _)| *step).collect::<Vec<_>>(), [18, 27, 36]);
        let newest = &kept(&job)[2].1;
        assert_eq!(fs::read_to_string(newest.join("adapter_config.json"))?, "36");
        assert!(!newest.join("training_state.json").exists());
        assert_eq!(name("ft-m-1", 36), "ft-m-1:ckpt-step-36");
        Ok(())
    }
}
