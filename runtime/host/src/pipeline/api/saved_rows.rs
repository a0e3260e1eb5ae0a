//! `dataset` and `save_dataset`: rows that a script makes, and a file of them.

use std::path::Path;

use anyhow::{Context, Result};
use homeroom_engine::data::check_row;
use homeroom_engine::files::replace_file;
use mlua::{Lua, Value};
use serde_json::{Value as Json, json};

use super::Session;
use super::dataset::{Dataset, Row, RowFile, Text, size_of_rows};
use super::options::Options;
use super::spec::verb;
use super::stored::{Made, stored};
use super::value::{to_json, to_lua};
use crate::pipeline::errors::{Failure, said};
use crate::progress::thousands;
use crate::registry;

/// Makes a dataset of tables.
pub fn dataset(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("dataset"), argument)?;
    let table = options.get("rows").and_then(Value::as_table).context("`read` saw that a required option is there")?;
    // What messages call the place of a row.
    let file = RowFile::new(Path::new("`rows` of the script,"), "row");
    let mut rows = Vec::with_capacity(table.raw_len());
    for line in 1..=table.raw_len() {
        session.clock().check()?;
        let row = to_json(session.clock(), &table.raw_get::<Value>(line)?);
        let text = row.map_err(|failure| failure.within(&format!("dataset: row {line}")))?.to_string();
        if let Err(problem) = check_row(&text) {
            return Err(said(format!("dataset: row {line} is refused: {problem}")));
        }
        rows.push(Row { file: file.clone(), line, text: Text::hold(lua, session, text)? });
    }
    let held = session.hold(lua, size_of_rows(rows.len()))?;
    Ok(Value::UserData(lua.create_userdata(Dataset::made(rows, held))?))
}

/// What is in a file; none where there is none.
fn read_file(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Writes a dataset to a file of the user's, or in a dry run says that it would.
pub fn save_dataset(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("save_dataset"), argument)?;
    let name = options.needed_text("name");
    // The rules of names are those of models.
    registry::place(&name)?;
    let Some(data) = registry::data_directory() else {
        return Err(said("save_dataset: there is no data directory; set HOMEROOM_HOME"));
    };
    let path = data.join("datasets").join(format!("{name}.jsonl"));
    let rows = options.dataset("dataset").context("`read` saw that a required option is there")?;
    let result = json!({"name": name, "path": path, "rows": rows.len()});
    if session.dry {
        session.would(
            lua,
            format!("write   {}: {} rows", path.display(), thousands(rows.len())),
            json!({"verb": "save_dataset", "path": path, "rows": rows.len()}),
        )?;
        return Ok(to_lua(lua, &result)?);
    }
    let result = stored(lua, session, verb("save_dataset"), &options, Json::Null, || {
        let mut text = String::new();
        for row in rows.rows() {
            session.clock().check()?;
            text.push_str(row.text.json());
            text.push('\n');
        }
        let _lock = registry::lock()?;
        let replaces = match read_file(&path)? {
            Some(before) if before != text.as_bytes() => {
                // It may be one that somebody has worked on.
                let free = |number: &usize| !data.join("datasets").join(format!("{name}-{number}.jsonl")).exists();
                let number = (1..).find(free).unwrap_or(1);
                let kept = data.join("datasets").join(format!("{name}-{number}.jsonl"));
                replace_file(&kept, &before)?;
                format!("   (the file that had the name is {name}-{number}.jsonl now)")
            }
            _ => String::new(),
        };
        replace_file(&path, text.as_bytes())?;
        session.tell(format_args!("saved     {} rows   {}{replaces}", thousands(rows.len()), path.display()));
        Ok(Made { result, files: vec![path.clone()] })
    })?;
    Ok(to_lua(lua, &result)?)
}
