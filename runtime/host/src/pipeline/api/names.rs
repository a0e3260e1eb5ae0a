//! What can be said of a name or a path in a script before it is run.

use std::path::Path;

use homeroom_engine::adapt::adapter::is_adapter;

use super::model::{NOT_NAMED, fine_tuned};
use super::spec::{Kind, Opt};
use super::{Session, handler};
use crate::models::not_there;
use crate::pipeline::errors::short;
use crate::registry;

/// What is wrong with a text that a script gives for an option, as far as that can be told. `saved`: the names under which the
/// script itself saves models; `None`: they may be any.
pub fn named_problem(
    session: &Session,
    verb: &str,
    option: &Opt,
    text: &str,
    saved: Option<&[String]>,
) -> Option<String> {
    // It may be there by then.
    let is_made = || saved.is_none_or(|names| names.iter().any(|name| name == text));
    let problem = match (verb, option.name) {
        ("prepare_dataset", "path") => session.places.open(text).err().map(|error| format!("{error:#}")),
        ("load_model", "strategy") => session.search.find(text).err().map(|error| format!("{error:#}")),
        ("load_model", "name") => match session.locate(text) {
            Ok(Some(place)) if is_adapter(&place.path) => {
                Some(format!("`{}` is an adapter; `load_fine_tuned_model` describes it", short(text)))
            }
            Ok(Some(_)) => None,
            Ok(None) => (!is_made()).then(|| not_there(Path::new(text), NOT_NAMED)),
            Err(error) => Some(format!("{error:#}")),
        },
        ("load_fine_tuned_model", "name") if !is_made() => {
            fine_tuned(session, text).err().map(|error| format!("{error:#}"))
        }
        ("save_model", "name") => registry::place(text).err().map(|error| format!("{error:#}")),
        ("create_handler", "name") => handler::check(text, text).err().map(|error| format!("{error:#}")),
        (_, _) if option.kind == Kind::Model && !is_made() => match session.locate(text) {
            Ok(Some(_)) => None,
            Ok(None) => Some(not_there(Path::new(text), NOT_NAMED)),
            Err(error) => Some(format!("{error:#}")),
        },
        _ => None,
    };
    problem.map(|problem| format!("{verb}: {problem}"))
}
