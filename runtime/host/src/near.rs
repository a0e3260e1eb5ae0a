//! The nearest of what there is, for names and files that are wrong by a letter.

use std::fmt::Display;
use std::path::Path;

use anyhow::{Result, bail};
use homeroom_abi::describe::nearest;
use homeroom_engine::files::broken_link;

use crate::hub::{HubName, cache};
use crate::registry;

/// Refuses a file or directory that is not there, and names the nearest that is beside its place.
///
/// # Errors
/// When nothing is there.
pub fn exists(path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    if let Some(link) = broken_link(path) {
        bail!("{}: {link}", path.display());
    }
    bail!("{}: no such file or directory{}", path.display(), did_you_mean(file_beside(path)));
}

/// The file or directory beside a path's place whose name is nearest to the path's.
pub fn file_beside(path: &Path) -> Option<String> {
    // Of a single letter all others are near.
    let name = path.file_name()?.to_str().filter(|name| name.chars().count() > 1)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let entries = std::fs::read_dir(parent.unwrap_or(Path::new("."))).ok()?;
    let names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    let near = nearest(name, names.iter().map(String::as_str).filter(|other| *other != name))?;
    Some(parent.map_or_else(|| near.to_owned(), |parent| parent.join(near).display().to_string()))
}

/// The model of the registry, or else the one in Hugging Face's cache, or else the file beside a path's place, that is nearest to what
/// was typed.
pub fn model(name: &Path) -> Option<String> {
    let cached = || name.to_str().and_then(HubName::parse).and_then(|name| cached(&name));
    let registered = || {
        let names = registry::names().ok()?;
        let near =
            nearest(name.to_str()?, names.iter().map(String::as_str).filter(|other| Some(*other) != name.to_str()))?;
        Some(near.to_owned())
    };
    registered().or_else(cached).or_else(|| file_beside(name))
}

/// The model in Hugging Face's cache, or a shared store, whose name is nearest to one that is not there.
pub fn cached(name: &HubName) -> Option<String> {
    let cached = cache::list().ok()?;
    let whole = cached.iter().filter(|cached| cached.current().is_some()).map(|cached| cached.repo.as_str());
    let others: Vec<&str> = whole.filter(|repo| *repo != name.repo).collect();
    let same_but_for_case = others.iter().find(|repo| repo.eq_ignore_ascii_case(&name.repo)).copied();
    same_but_for_case.or_else(|| nearest(&name.repo, others)).map(str::to_owned)
}

/// `, did you mean X?`, or nothing.
pub fn did_you_mean(near: Option<impl Display>) -> String {
    near.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default()
}
