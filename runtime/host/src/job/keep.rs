//! Results that must not be lost: one whose place cannot take it, and one whose run ended badly.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use homeroom_engine::files::{Kept, NewDirectory};

use super::{Job, Outcome};

/// What is done when something has the name of a result by then.
#[derive(Clone, Copy)]
pub enum Taken<'a> {
    /// It is replaced.
    Replaced,
    /// It stays, and the result is kept beside it.
    Stays,
    /// It stays, and the result takes another name beside it.
    GivenUp(&'a dyn Fn() -> Option<PathBuf>),
}

impl Outcome {
    /// Saves at a place; nothing is there until all of it is. A result that its place cannot take, as when the disk is full, goes to
    /// the directory for temporary files.
    ///
    /// # Errors
    /// When it is not where it should be; the message says where it is instead.
    pub fn save(&self, job: &Job, place: &Path, taken: Taken<'_>, parent: Option<&str>) -> Result<PathBuf> {
        let place = &std::path::absolute(place)?;
        let error = match self.attempt(job, place, taken, parent) {
            Ok(path) => return Ok(path),
            Err(Unsaved { error, whole: true }) => return Err(error),
            Err(Unsaved { error, whole: false }) => error,
        };
        let aside = || -> Result<PathBuf> {
            let directory = tempfile::Builder::new().prefix("homeroom-kept-").tempdir();
            let directory = directory
                .map_err(|error| anyhow!("{}: cannot write here: {}", std::env::temp_dir().display(), error.kind()))?;
            let name = place.file_name().context("the result has no name")?;
            let saved = self.attempt(job, &directory.path().join(name), Taken::Stays, parent);
            let saved = saved.map_err(|unsaved| unsaved.error)?;
            let _ = directory.keep();
            Ok(saved)
        };
        match aside() {
            Ok(kept) => {
                bail!("{error:#}\nhint: the result is whole in {}; move it to where there is room", kept.display())
            }
            Err(other) if format!("{other:#}") == format!("{error:#}") => Err(error),
            Err(other) => bail!("{error:#}; nor can it be kept elsewhere: {other:#}"),
        }
    }

    fn attempt(&self, job: &Job, place: &Path, taken: Taken<'_>, parent: Option<&str>) -> Result<PathBuf, Unsaved> {
        let lost = |error| Unsaved { error, whole: false };
        let mut directory = NewDirectory::start(place).map_err(lost)?;
        directory.replaces = matches!(taken, Taken::Replaced);
        self.write(job, &directory, parent).map_err(lost)?;
        let published = match taken {
            Taken::GivenUp(another) => directory.publish_or(another),
            Taken::Replaced | Taken::Stays => directory.publish(),
        };
        published.map_err(|error| Unsaved { whole: error.downcast_ref::<Kept>().is_some(), error })
    }

    /// Saves what a run that failed had learned before, beside the place where its result would have gone: that keeps what it has.
    /// Returns what the user is told.
    pub fn save_beside(&self, job: &Job, place: &Path) -> String {
        let (step, loss) = self.report.steps.last().map_or((0, f64::NAN), |step| (step.step, step.loss));
        let older = if place.exists() { format!("; {} is as it was", place.display()) } else { String::new() };
        match self.save(job, &beside(place, step), Taken::Stays, None) {
            Ok(path) => {
                let flag = if job.now().0.is_whole_model() { "--model-name" } else { "--init-from" };
                let path = path.display();
                format!(
                    "what it had learned by step {step} (loss {loss:.4}) is saved in {path}{older}\nhint: `homeroom eval --model-dir {path}` measures it, and {flag} {path} goes on from it"
                )
            }
            Err(error) => format!("what it had learned by step {step} (loss {loss:.4}) is not saved{older}: {error:#}"),
        }
    }
}

/// A result that is not where it should be.
struct Unsaved {
    error: anyhow::Error,
    /// Whether it is whole where the error says.
    whole: bool,
}

/// A place beside another that nothing is at: `NAME-step-STEP`, or that with a number.
fn beside(place: &Path, step: u64) -> PathBuf {
    let mut name = place.file_name().map(OsString::from).unwrap_or_default();
    name.push(format!("-step-{step}"));
    let first = place.with_file_name(&name);
    let others = (2..).map(|number| {
        let mut name = name.clone();
        name.push(format!("-{number}"));
        place.with_file_name(name)
    });
    std::iter::once(first).chain(others).find(|place| !place.exists()).expect("numbers do not end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_takes_the_place_of_nothing() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let at = |name: &str| directory.path().join(name);
        assert_eq!(beside(&at("tutor"), 7), at("tutor-step-7"));
        for (taken, free) in [("tutor-step-7", "tutor-step-7-2"), ("tutor-step-7-2", "tutor-step-7-3")] {
            std::fs::write(at(taken), "")?;
            assert_eq!(beside(&at("tutor"), 7), at(free));
        }
        Ok(())
    }
}
