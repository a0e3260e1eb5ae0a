//! The nearest of what there is, for names and files that are wrong by a letter.

use std::fmt::Display;
use std::path::Path;

use anyhow::{Result, bail};
use homeroom_abi::describe::nearest;
use homeroom_engine::files::broken_link;

use crate::hub::{HubName, cache};
use crate::registry;

/// Longest name that another is looked for, in bytes: that of a file or of a repository.
const NAME_BYTES_MAX: usize = 255;

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
    beside(path, &|_| true)
}

/// As [`file_beside`], of those that are meant.
fn beside(path: &Path, is_meant: &dyn Fn(&Path) -> bool) -> Option<String> {
    // Of a single letter all others are near, and a name can be no longer than a file's.
    let name = path.file_name()?.to_str()?;
    let name = Some(name).filter(|name| name.chars().count() > 1 && name.len() <= NAME_BYTES_MAX)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let entries = std::fs::read_dir(parent.unwrap_or(Path::new("."))).ok()?.flatten();
    let names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    // Few are looked at: those that are far from what was typed are none.
    let mut near: Vec<&str> = names.iter().map(String::as_str).filter(|other| *other != name).collect();
    near.retain(|other| nearest(name, [*other]).is_some() && is_meant(&parent.unwrap_or(Path::new(".")).join(other)));
    let near = nearest(name, near)?;
    Some(parent.map_or_else(|| near.to_owned(), |parent| parent.join(near).display().to_string()))
}

/// What is said beside "no such model": where to look for those that are here.
pub const LIST_HINT: &str = "\nhint: `homeroom list-models` shows those that are here";

/// The model that is nearest to what was typed: one with a name, see [`named_model`], or else a directory or file beside a path's place
/// that is a model.
pub fn model(name: &Path) -> Option<String> {
    named_model(name).or_else(|| beside(name, &is_model))
}

/// The model of the registry, of Hugging Face's cache or of a shared store whose name is nearest to what was typed. Where that has no
/// owner, it is compared with the part of a cached name that is behind the owner.
pub fn named_model(name: &Path) -> Option<String> {
    if let Some(name) = name.to_str().and_then(HubName::parse) {
        return cached(&name);
    }
    // Each by what is compared, and by what to type.
    let mut known: Vec<(String, String)> =
        registry::names().unwrap_or_default().into_iter().map(|name| (name.clone(), name)).collect();
    known.extend(whole().into_iter().filter_map(|repo| Some((repo.split_once('/')?.1.to_owned(), repo))));
    let typed = name.to_str().filter(|name| name.len() <= NAME_BYTES_MAX)?;
    let near = nearest(typed, known.iter().map(|(compared, _)| compared.as_str()))?;
    let (_, near) = known.iter().find(|(compared, _)| compared == near)?;
    (near != typed).then(|| near.clone())
}

/// Whether a directory or a file looks like a model.
pub fn is_model(path: &Path) -> bool {
    let holds = |file: &str| path.join(file).is_file();
    let is_gguf = |path: &Path| path.extension().is_some_and(|extension| extension == "gguf") && path.is_file();
    let holds_gguf = || {
        let mut entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.any(|entry| is_gguf(&entry.path()))
    };
    is_gguf(path) || holds("config.json") || holds("adapter_config.json") || path.is_dir() && holds_gguf()
}

/// The repositories on this machine of which a model is whole.
fn whole() -> Vec<String> {
    let cached = cache::list().unwrap_or_default();
    cached.into_iter().filter(|cached| cached.current().is_some()).map(|cached| cached.repo).collect()
}

/// The model in Hugging Face's cache, or a shared store, whose name is nearest to one that is not there.
pub fn cached(name: &HubName) -> Option<String> {
    let whole = whole();
    let others: Vec<&str> = whole.iter().map(String::as_str).filter(|repo| *repo != name.repo).collect();
    let same_but_for_case = others.iter().find(|repo| repo.eq_ignore_ascii_case(&name.repo)).copied();
    same_but_for_case.or_else(|| nearest(&name.repo, others)).map(str::to_owned)
}

/// `, did you mean X?`, or nothing.
pub fn did_you_mean(near: Option<impl Display>) -> String {
    near.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default()
}
