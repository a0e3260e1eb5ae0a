//! Where a result goes, and what it may replace there: nothing but the run's own result of an earlier end, and with `--overwrite` what
//! stood there when the run began.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Result;
use homeroom_engine::adapt::adapter::read_manifest;
use homeroom_engine::files::replaceable;
use sha2::{Digest, Sha256};

use super::arguments::Arguments;
use crate::command::rows::is_input;
use crate::hex::hex;
use crate::models::last_part;
use crate::registry;

/// What is at the place of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing.
    Nothing,
    /// What the run itself left there when it was interrupted.
    Own,
    /// What stood there when the run was begun with `--overwrite`.
    Claimed,
    /// What somebody has put there, or put something into.
    Other,
}

/// Looks at a place. `token`: the run's; `claim`: what [`contents`] was when it began, if it may replace that.
pub(super) fn standing(place: &Path, token: Option<&str>, claim: Option<&str>) -> Standing {
    let Some(contents) = contents(place) else { return Standing::Nothing };
    if replaceable(place).is_err() {
        return Standing::Other;
    }
    let written = read_manifest(place).ok().flatten();
    let written = written.as_ref().and_then(|manifest| manifest.training["run_token"].as_str());
    if written.is_some() && written == token {
        Standing::Own
    } else if claim == Some(&contents) {
        Standing::Claimed
    } else {
        Standing::Other
    }
}

/// What tells the contents of a place from any other: a digest of its files' names, sizes and times; `None`: nothing is there.
pub(super) fn contents(place: &Path) -> Option<String> {
    let about = std::fs::symlink_metadata(place).ok()?;
    let mut entries = vec![format!("{:?}", about.file_type())];
    let list = |directory: &Path| std::fs::read_dir(directory).into_iter().flatten().flatten();
    // Results have directories of templates, which have none.
    for entry in list(place).flat_map(|entry| list(&entry.path()).chain([entry])) {
        let time = entry.metadata().ok().and_then(|about| Some((about.len(), about.modified().ok()?)));
        let (len, time) = time.unwrap_or((0, SystemTime::UNIX_EPOCH));
        entries.push(format!("{:?} {len} {time:?}", entry.path().strip_prefix(place)));
    }
    entries.sort();
    Some(hex(&Sha256::digest(entries.join("\n"))))
}

/// Where the result goes: what was named, or a name after the training file.
///
/// # Errors
/// When a name is none that a model may have, or there is no data directory.
pub(super) fn place(arguments: &Arguments) -> Result<PathBuf> {
    match (&arguments.output_dir, &arguments.name) {
        (Some(directory), _) => Ok(directory.clone()),
        (None, Some(name)) => {
            let place = registry::place(name)?;
            registry::note_ambiguous(Path::new(name), &place);
            Ok(place)
        }
        (None, None) => free_place(arguments),
    }
}

/// The place of a name that is free now.
///
/// # Errors
/// When there is no data directory.
pub(super) fn free_place(arguments: &Arguments) -> Result<PathBuf> {
    let model = last_part(&arguments.model_name).unwrap_or_default();
    let file = arguments.training_file.iter().find(|path| !is_input(path));
    let named_after: Vec<&Path> = file.map(PathBuf::as_path).into_iter().chain([Path::new(&model)]).collect();
    registry::place(&registry::free_name(&named_after)?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use anyhow::Result;

    use super::*;

    #[test]
    fn a_run_replaces_what_is_its_own_or_stood_there_when_it_began_and_nothing_else() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let place = directory.path().join("tutor");
        assert_eq!(standing(&place, Some("mine"), None), Standing::Nothing);
        fs::create_dir(&place)?;
        fs::write(place.join("adapter_config.json"), "{}")?;
        let claim = contents(&place);
        assert_eq!(standing(&place, Some("mine"), claim.as_deref()), Standing::Claimed);
        assert_eq!(standing(&place, Some("mine"), None), Standing::Other);
        // Another result by then.
        fs::write(place.join("adapter_config.json"), "{ }")?;
        assert_eq!(standing(&place, Some("mine"), claim.as_deref()), Standing::Other);
        // Whatever is the user's.
        fs::write(place.join("thesis.txt"), "years")?;
        let claim = contents(&place);
        assert_eq!(standing(&place, Some("mine"), claim.as_deref()), Standing::Other);
        Ok(())
    }
}
