//! `create_handler`: an entry of `handlers.toml`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, read_text, replace_file};
use mlua::{Lua, Value as LuaValue};
use serde_json::json;
use toml_edit::{Item, Table, TableLike, Value, value};

use super::Session;
use super::model::{ModelSpec, NOT_NAMED};
use super::options::Options;
use super::spec::verb;
use crate::handler::config::{Config, handlers_in};
use crate::models::not_there;
use crate::pipeline::errors::{Failure, said};
use crate::pipeline::places::Place;
use crate::registry;
use crate::toml_problems::document;

/// U+FEFF, which some editors put at the beginning of a file.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Has a model answer under a name, or in a dry run says that it would.
pub fn create_handler(lua: &Lua, session: &Session, argument: LuaValue) -> Result<LuaValue, Failure> {
    let options = Options::read(verb("create_handler"), argument)?;
    let name = options.needed_text("name");
    let spec = ModelSpec::read(session, options.get("model").unwrap_or(&LuaValue::Nil))?;
    // A name of the registry or the hub goes into the file as it is; anything else as the path that it means here.
    let model = spec.adapter.clone().unwrap_or_else(|| spec.base.clone());
    let given = match options.get("model") {
        Some(LuaValue::Table(table)) => {
            table.raw_get::<LuaValue>("name")?.as_string().map(|name| name.to_string_lossy())
        }
        _ => None,
    };
    let model = given.unwrap_or(model);
    let model = match session.locate(&model)? {
        _ if session.dry_saved.borrow().contains_key(&model) => model,
        Some(place) if registry::place(&model).is_ok_and(|saved| saved == place.path) => model,
        Some(Place { hub_name: Some(name), .. }) => name.to_string(),
        Some(place) => place.path.display().to_string(),
        None => return Err(said(format!("create_handler: {}", not_there(Path::new(&model), NOT_NAMED)))),
    };
    if session.dry {
        let file = check(&name, &model)?;
        session.would(
            lua,
            format!("write   [handlers.{name}] in {}: {model}", file.display()),
            json!({"verb": "create_handler", "name": name, "model": model, "output": file}),
        )?;
    } else {
        let file = write(&name, &model)?;
        session.tell(format_args!("handler   {name}   {model}, in {}", file.display()));
        session.handler.replace(Some(name.clone()));
    }
    let table = lua.create_table()?;
    table.set("name", name)?;
    table.set("kind", "local")?;
    table.set("model", model)?;
    Ok(LuaValue::Table(table))
}

/// The file that says which handlers there are.
///
/// # Errors
/// When there is no data directory.
pub fn file() -> Result<PathBuf> {
    let data = registry::data_directory().context("there is no data directory; set HOMEROOM_HOME")?;
    Ok(handlers_in(&data))
}

/// Has `name` answered by a local model. Everything else in the file stays as it is, comments too.
///
/// # Errors
/// As [`check`], and when the file cannot be written.
pub fn write(name: &str, model: &str) -> Result<PathBuf> {
    let path = file()?;
    // From the reading to the writing.
    let _lock = registry::lock()?;
    replace_file(&path, edited(&path, name, model)?.as_bytes())?;
    Ok(path)
}

/// Says whether [`write`] would do so.
///
/// # Errors
/// When the file cannot be read, has a route or a handler of that name that is not local, or would have problems.
pub fn check(name: &str, model: &str) -> Result<PathBuf> {
    let path = file()?;
    edited(&path, name, model)?;
    Ok(path)
}

/// The file's text with the handler in it.
fn edited(path: &Path, name: &str, model: &str) -> Result<String> {
    ensure!(
        registry::is_name(name),
        "`{name}` is not a handler's name: up to 64 small letters, digits, dots, dashes and underscores, beginning with a letter or digit"
    );
    let whole = if path.exists() { read_text(path, SMALL_FILE_BYTES_MAX)? } else { String::new() };
    let edited = with_handler(path, &whole, name, model)?;
    Config::parse(path, &edited)
        .context("create_handler: the file is left as it is, since with the handler it would be refused")?;
    Ok(edited)
}

fn with_handler(path: &Path, whole: &str, name: &str, model: &str) -> Result<String> {
    let place = path.display();
    let text = whole.strip_prefix(BYTE_ORDER_MARK).unwrap_or(whole);
    // Of a text that is not TOML the parser quotes a line, which may hold a key.
    let mut document = match (document(text), Config::parse(path, text)) {
        (Ok(document), _) => document.into_mut(),
        (Err(_), Err(problems)) => return Err(problems),
        (Err(_), Ok(_)) => bail!("{place}: cannot be edited"),
    };
    let routes = document.get("routes").and_then(Item::as_table_like);
    if routes.is_some_and(|routes| routes.contains_key(name)) {
        bail!("{place}: a route has the name `{name}` already; choose another name");
    }
    let handlers = document.entry("handlers").or_insert_with(|| {
        let mut table = Table::new();
        table.set_implicit(true);
        Item::Table(table)
    });
    let handlers = handlers.as_table_like_mut().ok_or_else(|| anyhow!("{place}: `handlers` is no table"))?;
    let handler = handlers.entry(name).or_insert_with(|| Item::Table(Table::new()));
    let handler = handler.as_table_like_mut().ok_or_else(|| anyhow!("{place}: `handlers.{name}` is no table"))?;
    match handler.get("kind").map(|kind| kind.as_str().unwrap_or_default().to_owned()) {
        None => {}
        Some(kind) if kind == "local" => {}
        Some(kind) => bail!("{place}: handler `{name}` is there already, of kind `{kind}`; choose another name"),
    }
    if handler.get("model").and_then(Item::as_str) != Some(model) {
        // They were said of the other model.
        handler.remove("base_model");
        handler.remove("any_base");
    }
    set(handler, "kind", "local");
    set(handler, "model", model);
    let mut edited = document.to_string();
    // The library writes line feeds only.
    if text.contains("\r\n") && text.matches('\n').count() == text.matches("\r\n").count() {
        edited = edited.replace("\r\n", "\n").replace('\n', "\r\n");
    }
    if text.len() < whole.len() {
        edited.insert(0, BYTE_ORDER_MARK);
    }
    Ok(edited)
}

/// Sets a key; the comment behind its value stays.
fn set(table: &mut dyn TableLike, key: &str, text: &str) {
    match table.get_mut(key).and_then(Item::as_value_mut) {
        Some(old) => {
            let decor = old.decor().clone();
            *old = Value::from(text);
            *old.decor_mut() = decor;
        }
        None => {
            table.insert(key, value(text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(text: &str, name: &str, model: &str) -> Result<String> {
        with_handler(Path::new("h.toml"), text, name, model)
    }

    #[test]
    fn what_else_is_in_the_file_stays_as_it_is() -> Result<()> {
        let before = "\u{feff}# é\r\n[handlers.t]\r\nkind = 'local' # k\r\nmodel  =  \"alt\"   # ü\r\ncompute = \"f32\"\r\n\r\n[handlers.u]\r\nkind = \"local\"\r\nmodel = \"u\"\r\n";
        let wanted = before.replace("\"alt\"", "\"neu\"").replace("'local'", "\"local\"");
        assert_eq!(after(before, "t", "neu")?, wanted);
        // Lines of both kinds: no more than the new ones are other.
        let mixed = after("[handlers.t]\nkind = \"local\" # x\r\nmodel = \"m\"\n", "t", "m")?;
        assert!(mixed.contains("# x"), "{mixed:?}");
        assert_eq!(after("", "t", "m")?, "[handlers.t]\nkind = \"local\"\nmodel = \"m\"\n");
        Ok(())
    }

    #[test]
    fn what_was_said_of_another_model_goes_with_it() -> Result<()> {
        let before =
            "[handlers.t]\nkind = \"local\"\nmodel = \"a\"\nbase_model = \"b\"\nany_base = true\ncompute = \"f32\"\n";
        assert_eq!(after(before, "t", "a")?, before);
        assert_eq!(after(before, "t", "é")?, "[handlers.t]\nkind = \"local\"\nmodel = \"é\"\ncompute = \"f32\"\n");
        Ok(())
    }

    #[test]
    fn a_file_that_would_be_refused_is_not_written() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("handlers.toml");
        for (text, wanted) in [
            (
                "[handlers.a]\nkind=\"local\"\nmodel=\"m\"\n[routes.t]\nhandlers=[\"a\"]\n",
                "a route has the name `t` already",
            ),
            ("[handlers.t]\nkind=\"local\"\nkey=\"sk-REAL\"\n", "`key`: unknown key"),
            ("[handlers.a]\nkey=sk-REAL\n", "line 2: a text stands in quotes"),
            ("[handlers]\nt=1\n", "`handlers.t` is no table"),
            ("handlers=1\n", "`handlers` is no table"),
            ("[handlers.t]\nkind=\"openai\"\n", "of kind `openai`"),
        ] {
            std::fs::write(&path, text)?;
            let message = format!("{:#}", edited(&path, "t", "m").expect_err(text));
            assert!(message.contains(wanted) && !message.contains("REAL"), "{message}");
            assert!(!message.contains("TOML parse error"), "{message}");
        }
        Ok(())
    }
}
