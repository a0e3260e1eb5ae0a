//! Which models of the hub may be used here: `allowed-bases.txt`, at the top of a store that is shared (`$HOMEROOM_BASES`) and in
//! `$HOMEROOM_HOME`. A line is a name, in which `*` stands for any letters: `Qwen/*`. Where several files are, each must allow a name, so
//! that nobody can widen what the keeper of a store has said.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::files::{is_named, read_text};

use super::stores;
use crate::registry::data_directory;

/// Name of the file.
const FILE: &str = "allowed-bases.txt";
/// Longest file, in bytes.
const BYTES_MAX: u64 = 1 << 20;

/// Refuses a repository (`owner/name`) that is not on every list.
///
/// # Errors
/// When it is not, and when a list is there and cannot be read.
pub fn check(repo: &str) -> Result<()> {
    let places = stores::shared().into_iter().chain(data_directory());
    places.map(|place| place.join(FILE)).try_for_each(|list| check_in(&list, repo))
}

/// Refuses a path that leads into a cache or a shared store, to a model that [`check`] refuses. Any other path is allowed.
///
/// # Errors
/// As [`check`].
pub fn check_path(path: &Path) -> Result<()> {
    let absolute = std::path::absolute(path).ok();
    // A file of a snapshot is a link to its blob: where the link is and where it leads both count.
    let beside = absolute.as_deref().and_then(|path| Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?)));
    let stores: Vec<_> = stores::stores().iter().filter_map(|store| store.canonicalize().ok()).collect();
    for real in [path.canonicalize().ok(), beside].into_iter().flatten() {
        let inside = stores.iter().filter_map(|store| real.strip_prefix(store).ok()?.iter().next()?.to_str());
        inside.filter_map(stores::repo_of).try_for_each(|repo| check(&repo))?;
    }
    Ok(())
}

/// As [`check`], of a model that is to be downloaded. A shared store that is not there may have a list.
///
/// # Errors
/// As [`check`], and when a shared store is not there.
pub(super) fn check_download(repo: &str) -> Result<()> {
    check(repo)?;
    for store in stores::shared() {
        ensure!(
            store.is_dir(),
            "HOMEROOM_BASES: {} is not there, so it is not known which models may be downloaded\nhint: mount it, or correct the variable",
            store.display()
        );
    }
    Ok(())
}

fn check_in(list: &Path, repo: &str) -> Result<()> {
    if !is_named(list)? {
        return Ok(());
    }
    let text = read_text(list, BYTES_MAX).context("which models may be used is not known, so none is")?;
    if allows(&text, repo) {
        return Ok(());
    }
    let list = list.display();
    bail!("{repo}: not allowed here, as no line of {list} has it\nhint: whoever keeps that file can add `{repo}`")
}

fn allows(text: &str, repo: &str) -> bool {
    let lines = text.trim_start_matches('\u{feff}').lines();
    let lines = lines.map(|line| line.split('#').next().unwrap_or_default().trim()).filter(|line| !line.is_empty());
    // The hub does not tell large letters from small ones.
    let repo = repo.to_ascii_lowercase();
    lines.map(str::to_ascii_lowercase).any(|line| matches(line.as_bytes(), repo.as_bytes()))
}

/// Whether a pattern, in which `*` stands for any bytes, is all of a text. Takes at most the product of their lengths.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == text[t] => (p, t) = (p + 1, t + 1),
            // The last `*` takes one byte more.
            _ => match &mut star {
                Some((at, taken)) => {
                    *taken += 1;
                    (p, t) = (*at + 1, *taken);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_allows_what_it_matches_from_its_beginning_to_its_end() {
        let list =
            "\u{feff}# bases of the school\nQwen/Qwen2.5-*\n  HuggingFaceTB/SmolLM2-135M   # small\n*/*-Math*\n\n";
        for good in [
            "Qwen/Qwen2.5-0.5B-Instruct",
            "qwen/qwen2.5-",
            "HuggingFaceTB/SmolLM2-135M",
            "a/b-Math",
            "a/x-Math-y-Math-z",
        ] {
            assert!(allows(list, good), "{good}");
        }
        for bad in ["Qwen/Qwen2", "xQwen/Qwen2.5-1", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/Math", "small", "#", ""]
        {
            assert!(!allows(list, bad), "{bad}");
        }
        assert!(!allows("", "a/b") && !allows("# a/b", "a/b") && allows("*", "a/b"));
    }

    #[test]
    fn a_list_that_cannot_be_read_allows_nothing() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let list = dir.path().join(FILE);
        check_in(&list, "a/b")?;
        std::fs::write(&list, [0xff])?;
        assert!(check_in(&list, "a/b").is_err());
        std::fs::remove_file(&list)?;
        std::fs::create_dir(&list)?;
        assert!(check_in(&list, "a/b").is_err());
        Ok(())
    }
}
