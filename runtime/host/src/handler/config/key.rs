//! Keys of providers: a file names the environment variable that holds one.

use std::env::VarError;

use toml::Spanned;
use toml::de::DeValue;

use crate::handler::Secret;
use crate::toml_problems::Problems;

/// Longest part of a variable's name that may hold small letters and digits: longer ones are keys.
const NAME_PART_MAX: usize = 16;

/// Reads the key that a variable holds.
pub(super) fn read(variable: &str) -> Result<Secret, String> {
    key_of(variable, std::env::var(variable))
}

/// The key that a variable holds.
fn key_of(variable: &str, value: Result<String, VarError>) -> Result<Secret, String> {
    let why = match value.as_ref().map(|key| key.trim()) {
        Err(VarError::NotPresent) | Ok("") => {
            return Err(format!("api_key: the environment variable {variable} is not set; export {variable}=…"));
        }
        Err(VarError::NotUnicode(_)) => "it is not UTF-8",
        Ok(key) if !key.is_ascii() => "it has a character that is not ASCII",
        Ok(key) if !key.chars().all(|c| c.is_ascii_graphic()) => "keys have no spaces",
        Ok(key) => return Ok(Secret::new(key.to_owned())),
    };
    Err(format!("api_key: what the environment variable {variable} holds is not a key: {why}"))
}

/// Reads `api_key = { env = "…" }`: the variable's name.
pub(super) fn variable<'a>(problems: &mut Problems<'a>, value: &Spanned<DeValue<'a>>) -> Option<String> {
    let Some(table) = value.get_ref().as_table() else {
        problems.at(
            value.span(),
            "`api_key`: a key does not belong in the file; put it into an environment variable and name that: { env = \"NAME\" }",
        );
        return None;
    };
    problems.unknown_keys(table, &["env"]);
    let Some(env) = table.get("env") else {
        problems.at(value.span(), "`api_key`: should be { env = \"NAME\" }");
        return None;
    };
    let name = problems.text("env", env)?;
    if !is_variable(&name) {
        problems.at(
            env.span(),
            "`env`: should be the name of an environment variable, such as OPENAI_API_KEY, and not the key itself",
        );
        return None;
    }
    Some(name)
}

/// Returns true if a text is a variable's name and does not look like a key.
fn is_variable(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let holds = |part: &str, kind: fn(&char) -> bool| part.chars().any(|c| kind(&c));
    let is_key = |part: &str| {
        part.len() > NAME_PART_MAX && holds(part, char::is_ascii_lowercase) && holds(part, char::is_ascii_digit)
    };
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(plain)
        && !name.split('_').any(is_key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_key_is_said_in_its_own_words() {
        for (value, wanted) in [
            (Ok("sk-a b".to_owned()), "holds is not a key: keys have no spaces"),
            (Ok("sk-\u{1b}".to_owned()), "holds is not a key: keys have no spaces"),
            (Ok("sk-é".to_owned()), "holds is not a key: it has a character that is not ASCII"),
            (Err(VarError::NotUnicode("sk-".into())), "holds is not a key: it is not UTF-8"),
            (Ok(" \n".to_owned()), "is not set; export A_KEY=…"),
            (Err(VarError::NotPresent), "is not set; export A_KEY=…"),
        ] {
            let why = key_of("A_KEY", value).expect_err("it is no key");
            assert!(why.contains(wanted) && !why.contains("sk-"), "{why}");
        }
        assert_eq!(key_of("A_KEY", Ok(" sk-1\n".to_owned())), Ok(Secret::new("sk-1".to_owned())));
    }

    #[test]
    fn a_key_is_no_name_of_a_variable() {
        assert!(["OPENAI_API_KEY", "_a", "my_openai_key_2", "Schluessel"].into_iter().all(is_variable));
        assert!(!["", "1A", "A-B", "Ä", "a=b"].into_iter().any(is_variable));
    }
}
