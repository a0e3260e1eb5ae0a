//! `homeroom new`: a pipeline to start from.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use homeroom_engine::files::NewDirectory;
use serde_json::{Value, json};

use super::Done;
use crate::interrupt;
use crate::pipeline::reference;
use crate::plugin::Search;
use crate::plugin::Trust;
use crate::progress::line;
use crate::{pipeline, registry};

const SCRIPT: &str = include_str!("new/pipeline.lua");
const CONFIG: &str = include_str!("new/pipeline.toml");
const ROWS: &str = include_str!("new/rows.jsonl");

/// Where the model that comes with the repository is, below it.
const POCKET: &str = "runtime/pocket/model";

/// Arguments of `new`.
#[derive(Args)]
pub struct Arguments {
    /// Name of the pipeline, and of its directory, which must not be there
    #[arg(value_name = "NAME")]
    name: String,
}

/// Writes a directory with a script, the file that declares it, sample rows, and what editors complete from; and checks it.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let name = &arguments.name;
    ensure!(
        registry::is_name(name),
        "`{}` is not a name: up to 64 small letters, digits, dots, dashes and underscores, beginning with a letter or digit",
        crate::terminal::cell(name)
    );
    let place = Path::new(name);
    ensure!(place.symlink_metadata().is_err(), "{name}: something is there already; choose another name");
    interrupt::end_at_once()?;
    let pocket = pocket();
    let mut directory = NewDirectory::start(place)?;
    directory.replaces = false;
    for path in [".vscode", "types"] {
        directory.subdirectory(Path::new(path)).with_context(|| directory.cannot_write(path))?;
    }
    for (path, text) in files(name, pocket.as_deref())? {
        directory.write(&path, text.as_bytes())?;
    }
    directory.publish()?;
    let config = place.join(format!("{name}.toml"));
    pipeline::check_file(&config, &[], Search::new(&[], Trust::default()))?;
    line(format_args!("pipeline  {name}/   {name}.lua, {name}.toml, rows.jsonl, and types for editors"));
    let model = match pocket {
        Some(pocket) => {
            line(format_args!("model     {}   another with --set model=MODEL", pocket.display()));
            ""
        }
        // Any small one will do to begin with.
        None => " --set model=HuggingFaceTB/SmolLM2-135M-Instruct",
    };
    line(format_args!("next      homeroom run {}{model}", config.display()));
    Ok(Done::Whole)
}

/// The files, by their paths in the directory.
fn files(name: &str, pocket: Option<&Path>) -> Result<Vec<(String, String)>> {
    let model = match pocket {
        Some(pocket) => format!("default = {}", json!(pocket.to_str().context("a path is no text")?)),
        None => "required = true".to_owned(),
    };
    let named = |text: &str| text.replace("NAME", name);
    let pretty = |value: &Value| format!("{value:#}\n");
    let luals = json!({
        "runtime.version": "Lua 5.1",
        // What Luau has beyond Lua 5.1.
        "runtime.nonstandardSymbol": ["+=", "-=", "*=", "/=", "continue"],
        "workspace.library": ["types"],
    });
    let prefixed = luals.as_object().into_iter().flatten().map(|(key, value)| (format!("Lua.{key}"), value.clone()));
    let mut vscode: serde_json::Map<String, Value> = prefixed.collect();
    vscode.insert("luau-lsp.types.definitionFiles".to_owned(), json!(["types/homeroom.d.luau"]));
    vscode.insert("luau-lsp.platform.type".to_owned(), json!("standard"));
    Ok(vec![
        (format!("{name}.lua"), named(SCRIPT)),
        // The name of `--set NAME=VALUE` is none of these.
        (format!("{name}.toml"), named(CONFIG).replace("MODEL", &model)),
        ("rows.jsonl".to_owned(), ROWS.to_owned()),
        ("types/homeroom.meta.lua".to_owned(), reference::lua_ls()),
        ("types/homeroom.d.luau".to_owned(), reference::luau()),
        (".luarc.json".to_owned(), pretty(&luals)),
        (".luaurc".to_owned(), pretty(&json!({"languageMode": "nonstrict"}))),
        (".vscode/settings.json".to_owned(), pretty(&Value::Object(vscode))),
    ])
}

/// The pocket model of the repository that the program was built in, if it is there.
fn pocket() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?.canonicalize().ok()?;
    let model = |directory: &Path| directory.join(POCKET);
    program.ancestors().map(model).find(|model| model.join("config.json").is_file())
}
