//! `save_model`, and what of a trained model goes into the registry: its files by their names, and nothing else that lies beside them.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use homeroom_engine::adapt::adapter::{CONFIG_FILE, HOMEROOM_FILE, is_adapter};
use homeroom_engine::files::{NewDirectory, named_templates, result_files};
use mlua::{Lua, Value};
use serde_json::{Value as Json, json};

use super::model::ModelSpec;
use super::options::Options;
use super::spec::verb;
use super::stored::{Made, stored};
use super::{Session, identity};
use crate::pipeline::errors::{Failure, said, short};
use crate::private;
use crate::registry;

/// Saves a trained model under a name, or in a dry run says that it would.
pub fn save_model(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("save_model"), argument)?;
    let name = options.needed_text("name");
    let place = registry::place(&name)?;
    let mut spec = ModelSpec::read(session, options.get("model").unwrap_or(&Value::Nil))?;
    let Some(adapter) = spec.adapter.clone() else {
        return Err(said("save_model: this model was not trained; `fine_tune` returns one that was"));
    };
    let saved = session.dry_saved.borrow().get(&adapter).cloned();
    let is_imagined = session.imagines(&adapter) || session.dry && saved.is_some();
    let from = if is_imagined { None } else { Some(trained(session, &adapter)?) };
    if session.dry {
        spec.adapter = saved.map_or(Some(adapter), |saved| saved.adapter);
        session.would(
            lua,
            format!("save    {name}: {}", place.display()),
            json!({"verb": "save_model", "name": name, "output": place}),
        )?;
        session.dry_saved.borrow_mut().insert(name.clone(), spec.clone());
    } else {
        let from = from.context("only a dry run imagines models")?;
        stored(lua, session, verb("save_model"), &options, Json::Null, || {
            let replaces = if place.exists() { "   (in place of the model of that name)" } else { "" };
            let directory = NewDirectory::start(&place)?;
            copy(&from, directory.path())?;
            directory.publish()?;
            session.tell(format_args!("saved     {name}   {}{replaces}", place.display()));
            Ok(Made { result: json!({"name": name, "path": place}), files: identity::model_files(&place)? })
        })?;
        session.note(json!({"event": "saved_model", "name": name, "path": place}));
        session.adaptations.borrow_mut().remove(&place);
        session.bases.borrow_mut().remove(&place);
        spec.adapter = Some(name.clone());
    }
    let table = spec.to_table(lua)?;
    table.set("name", name)?;
    table.set("path", place.display().to_string())?;
    Ok(Value::Table(table))
}

/// The directory of a trained model.
fn trained(session: &Session, adapter: &str) -> Result<PathBuf, Failure> {
    let Some(place) = session.locate(adapter)?.filter(|from| from.path.is_dir()) else {
        return Err(said(format!(
            "there is no trained model `{}`; `homeroom list-models` shows yours",
            short(adapter)
        )));
    };
    ensure_trained(&place.path)?;
    // What comes with the script may name a base that is none of its business; in the registry it would be the user's word.
    ModelSpec::named(session, adapter)?;
    Ok(place.path)
}

/// Refuses a directory that is no trained model.
///
/// # Errors
/// When neither file says that it is one.
pub fn ensure_trained(from: &Path) -> Result<()> {
    let trained = is_adapter(from) || from.join(HOMEROOM_FILE).exists();
    ensure!(trained, "{}: not a trained model: it has neither {CONFIG_FILE} nor {HOMEROOM_FILE}", from.display());
    Ok(())
}

/// Copies a trained model from the directory `from` into `to`, which becomes the user's alone, as the copies are.
///
/// # Errors
/// When one of its files is a link or no regular file, or one cannot be read or written.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(to, mode).with_context(|| to.display().to_string())?;
    }
    let templates = named_templates(from)?;
    if let Some(directory) = templates.first().and_then(|name| name.parent()) {
        create_private(&to.join(directory)).with_context(|| to.display().to_string())?;
    }
    for name in result_files().map(PathBuf::from).chain(templates) {
        let path = from.join(&name);
        let Ok(kind) = path.symlink_metadata() else { continue };
        ensure!(
            kind.is_file(),
            "{}: not a regular file, and only such are copied; put the file itself in its place",
            path.display()
        );
        let mut source = open(&path).with_context(|| format!("{}: cannot read", path.display()))?;
        let kind = source.metadata().with_context(|| path.display().to_string())?;
        ensure!(kind.is_file(), "{}: it has changed while it was copied", path.display());
        let mut write = || std::io::copy(&mut source, &mut create(&to.join(&name))?);
        write().with_context(|| format!("{}: cannot copy", path.display()))?;
    }
    Ok(())
}

/// Opens a file that is no link, without waiting for anybody.
fn open(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options.open(path)
}

fn create_private(directory: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(directory)
}

fn create(path: &Path) -> std::io::Result<File> {
    let mut options = private::options();
    options.write(true).create_new(true);
    options.open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chat_templates_of_a_result_are_copied_and_nothing_beside_them() -> Result<()> {
        let [from, to] = [tempfile::tempdir()?, tempfile::tempdir()?];
        let templates = from.path().join("additional_chat_templates");
        std::fs::create_dir(&templates)?;
        for (path, text) in
            [("config.json", "{}"), ("notes.txt", "mine"), ("additional_chat_templates/tool_use.jinja", "ü")]
        {
            std::fs::write(from.path().join(path), text)?;
        }
        std::fs::write(templates.join("notes.txt"), "mine")?;
        copy(from.path(), to.path())?;
        let copied = to.path().join("additional_chat_templates");
        assert_eq!(std::fs::read_to_string(copied.join("tool_use.jinja"))?, "ü");
        assert!(!copied.join("notes.txt").exists() && !to.path().join("notes.txt").exists());
        #[cfg(unix)]
        {
            let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&copied)?.permissions());
            assert_eq!(mode & 0o777, 0o700);
            // A link in the place of a template, or of all of them, is not followed.
            std::fs::remove_dir_all(&copied)?;
            std::fs::remove_file(to.path().join("config.json"))?;
            std::os::unix::fs::symlink(templates.join("notes.txt"), templates.join("rag.jinja"))?;
            let message = format!("{:#}", copy(from.path(), to.path()).expect_err("it is a link"));
            assert!(message.contains("rag.jinja: not a regular file"), "{message}");
        }
        Ok(())
    }
}
