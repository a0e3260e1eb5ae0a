//! What is said where names do not tell what is what, with what to type.

use homeroom_abi::describe::nearest;
use serde_json::{Map, Value as Json};

use super::super::columns::Role;
use super::super::names::{plain, role_of, sure_names};
use super::super::problem::{Problem, UNKNOWN_ROW};
use super::mapping::Unclear;

/// What is said of a table whose columns are not clear, with what to type.
pub(super) fn unclear_header(unclear: Unclear, names: &[&str], second: Option<&[&str]>) -> String {
    let shown = names.iter().filter(|name| !name.is_empty()).copied().collect::<Vec<_>>();
    match unclear {
        Unclear::Missing(role, name) => {
            let near = nearest(&name, shown.iter().copied()).map(|near| format!(", did you mean `{near}`?"));
            let near = near.unwrap_or_else(|| format!("; the columns are {}", listed(&shown)));
            format!("no column `{name}`, which is to be `{}`{near}", role.name())
        }
        Unclear::Ambiguous(role, several) if plain(&several[0]) == plain(&several[1]) => {
            let at = names.iter().position(|name| *name == several[0]).unwrap_or(0);
            format!(
                "two columns are named `{}`\nhint: rename one of them, or say by its number which is the {}, such as `{}`",
                several[0],
                thing(role),
                flag(&format!("{}={}", role.name(), at + 1))
            )
        }
        Unclear::Ambiguous(role, several) => {
            format!(
                "{} may each be the {}\nhint: `{}` says which it is",
                listed(&several),
                thing(role),
                flag(&format!("{}={}", role.name(), several[0]))
            )
        }
        unclear => {
            let found = match &unclear {
                Unclear::Half(role, name) => Some((*role, name.as_str())),
                _ => None,
            };
            let guess = guess(&shown, found, second, names);
            let what = match found {
                Some((role, name)) if matches!(role, Role::Prompt | Role::Completion) => {
                    let other = if role == Role::Prompt { Role::Completion } else { Role::Prompt };
                    format!("`{name}` is the {}, and no column is named as the {}; ", thing(role), thing(other))
                }
                _ => "no column is named as a question or an answer; ".to_owned(),
            };
            let numbers = if shown.len() >= 2 && found.is_none() {
                "; where the first row is no header, `--columns prompt=1,completion=2` does"
            } else {
                ""
            };
            let hint = match guess {
                Some(guess) => format!("\nhint: `{}` says which is which{numbers}", flag(&guess)),
                None if shown.len() == 1 => {
                    format!("\nhint: `{}` learns it as text", flag(&format!("text={}", shown[0])))
                }
                None => "\nhint: a table has a column of questions and one of answers, such as `Question` and `Answer`, or one of `text`".to_owned(),
            };
            format!("{what}the first row has {}{hint}", listed(&shown))
        }
    }
}

/// What a user may type for columns with such names.
fn guess(shown: &[&str], found: Option<(Role, &str)>, second: Option<&[&str]>, names: &[&str]) -> Option<String> {
    let is_number = |name: &str| {
        let at = names.iter().position(|other| *other == name);
        let below = at.zip(second).and_then(|(at, second)| second.get(at).copied()).unwrap_or("");
        below.trim().replace(',', ".").parse::<f64>().is_ok() || below.trim().is_empty()
    };
    let mut free: Vec<&str> =
        shown.iter().copied().filter(|name| found.is_none_or(|(_, found)| found != *name)).collect();
    // Words, rather than numbers and empty cells.
    if free.iter().filter(|name| !is_number(name)).count() >= if found.is_some() { 1 } else { 2 } {
        free.retain(|name| !is_number(name));
    }
    let mut take = |role: Role| {
        let near = free.iter().position(|name| nearest(&plain(name), sure_names(role)).is_some());
        (!free.is_empty()).then(|| free.remove(near.unwrap_or(0)))
    };
    let (prompt, completion) = match found {
        Some((Role::Prompt, name)) => (name, take(Role::Completion)?),
        Some((Role::Completion, name)) => (take(Role::Prompt)?, name),
        Some(_) => return None,
        None => {
            let prompt = take(Role::Prompt)?;
            (prompt, take(Role::Completion)?)
        }
    };
    Some(format!("prompt={prompt},completion={completion}"))
}

/// The flag as it is typed: with quotes where a shell would part it.
pub(super) fn flag(columns: &str) -> String {
    let is_plain = columns.chars().all(|c| c.is_alphanumeric() || "=,_-.".contains(c));
    if is_plain { format!("--columns {columns}") } else { format!("--columns \"{columns}\"") }
}

fn thing(role: Role) -> &'static str {
    match role {
        Role::Prompt => "question",
        Role::Completion => "answer",
        Role::System => "system message",
        _ => role.name(),
    }
}

pub(super) fn listed<S: AsRef<str>>(names: &[S]) -> String {
    let mut shown: Vec<String> = names.iter().take(8).map(|name| format!("`{}`", short(name.as_ref()))).collect();
    if names.len() > 8 {
        shown.push("…".to_owned());
    }
    shown.join(", ")
}

pub(super) fn short(name: &str) -> String {
    let name = name.replace('\n', " ");
    if name.chars().count() <= 40 { name } else { name.chars().take(39).chain(['…']).collect() }
}

pub(super) fn ambiguous(role: Role, names: &[String]) -> Problem {
    let detail = format!(
        "{} may each be the {}; `{}` says which it is",
        listed(names),
        thing(role),
        flag(&format!("{}={}", role.name(), names[0]))
    );
    Problem::new(UNKNOWN_ROW, detail)
}

pub(super) fn half(role: Role, name: &str, names: &[&str]) -> String {
    format!("`{name}` is to be `{}`, which says too little by itself; the row has {}", role.name(), listed(names))
}

/// The problem of an unknown row, with what to type where that can be told.
pub(super) fn with_columns(problem: Problem, fields: &Map<String, Json>) -> Problem {
    let texts: Vec<&str> = fields.iter().filter(|(_, value)| value.is_string()).map(|(key, _)| key.as_str()).collect();
    let detail = problem.to_string();
    if texts.len() < 2 || detail.contains(';') || !detail.starts_with(UNKNOWN_ROW) {
        return problem;
    }
    let of = |role: Role| texts.iter().find(|name| role_of(name).is_some_and(|(of, _)| of == role)).copied();
    let found = of(Role::Prompt)
        .map(|name| (Role::Prompt, name))
        .or_else(|| of(Role::Completion).map(|name| (Role::Completion, name)));
    match guess(&texts, found, None, &[]) {
        Some(guess) => Problem::new(UNKNOWN_ROW, format!("{detail}; `{}` says which is which", flag(&guess))),
        None => problem,
    }
}
