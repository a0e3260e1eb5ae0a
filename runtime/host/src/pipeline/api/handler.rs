//! `create_handler`: an entry of `handlers.toml`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, read_text, replace_file};
use toml_edit::{DocumentMut, Item, Table, value};

use crate::registry;

/// The file that says which handlers there are.
///
/// # Errors
/// When there is no data directory.
pub fn file() -> Result<PathBuf> {
    let data = registry::data_directory().context("there is no data directory; set HOMEROOM_HOME")?;
    Ok(data.join("handlers.toml"))
}

/// Has `name` answered by a local model. Everything else in the file stays as it is, comments too.
///
/// # Errors
/// When the file cannot be read as TOML or written, or has a handler of that name that is not local.
pub fn write(name: &str, model: &str) -> Result<PathBuf> {
    ensure!(
        registry::is_name(name),
        "`{name}` is not a handler's name: up to 64 small letters, digits, dots, dashes and underscores, beginning with a letter or digit"
    );
    let path = file()?;
    // From the reading to the writing.
    let _lock = registry::lock()?;
    let place = || path.display().to_string();
    let text = if path.exists() { read_text(&path, SMALL_FILE_BYTES_MAX)? } else { String::new() };
    let mut document: DocumentMut = text.parse().with_context(place)?;
    let handlers = document.entry("handlers").or_insert_with(|| {
        let mut table = Table::new();
        table.set_implicit(true);
        Item::Table(table)
    });
    let handlers = handlers.as_table_like_mut().with_context(|| format!("{}: `handlers` is no table", place()))?;
    let handler = handlers.entry(name).or_insert_with(|| Item::Table(Table::new()));
    let handler = handler.as_table_like_mut().with_context(|| format!("{}: `handlers.{name}` is no table", place()))?;
    match handler.get("kind").map(|kind| kind.as_str().unwrap_or_default().to_owned()) {
        None => {}
        Some(kind) if kind == "local" => {}
        Some(kind) => bail!("{}: handler `{name}` is there already, of kind `{kind}`; choose another name", place()),
    }
    handler.insert("kind", value("local"));
    handler.insert("model", value(model));
    replace_file(&path, document.to_string().as_bytes())?;
    Ok(path)
}
