//! Which column, or key, of a file is what: as a user says it, with `--columns prompt=Frage,completion=Antwort`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Error, Result, anyhow, bail, ensure};
use homeroom_abi::describe::nearest;
use serde::{Serialize, Serializer};

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// What is asked.
    Prompt,
    /// What the question is about; it stands behind the question, after a blank line.
    Input,
    /// What is answered, and learned.
    Completion,
    /// What the system message says: a persona.
    System,
    /// Text, all of it learned.
    Text,
    /// A conversation.
    Messages,
    /// The better of two answers.
    Chosen,
    /// The worse of two answers.
    Rejected,
    /// Whether an answer is a good one.
    Label,
    /// The tools that may be called.
    Tools,
}

/// All roles, by the names that a user gives them and rows have.
pub const ROLES: [(&str, Role); 10] = [
    ("prompt", Role::Prompt),
    ("input", Role::Input),
    ("completion", Role::Completion),
    ("system", Role::System),
    ("text", Role::Text),
    ("messages", Role::Messages),
    ("chosen", Role::Chosen),
    ("rejected", Role::Rejected),
    ("label", Role::Label),
    ("tools", Role::Tools),
];

impl Role {
    /// Its name.
    pub fn name(self) -> &'static str {
        ROLES.iter().find(|(_, role)| *role == self).map_or("", |(name, _)| name)
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let word = word.trim();
        if let Some((_, role)) = ROLES.iter().find(|(name, _)| *name == word) {
            return Ok(*role);
        }
        let names = ROLES.map(|(name, _)| name);
        match nearest(word, names) {
            Some(near) => bail!("`{word}` is nothing that a column can be, did you mean `{near}`?"),
            None => bail!("`{word}` is nothing that a column can be: {}", names.join(", ")),
        }
    }
}

/// What a user says of columns, by role: a header's name, a key, or the number of a column from 1 where a table has no header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns(Vec<(Role, String)>);

impl Columns {
    /// Of pairs of a role and a name.
    ///
    /// # Errors
    /// When a role is unknown or given twice, a name is empty, or one column is to be two things.
    pub fn of<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        let mut columns: Vec<(Role, String)> = Vec::new();
        for (role, name) in pairs {
            let (role, name) = (role.parse::<Role>()?, name.trim().to_owned());
            ensure!(!name.is_empty(), "`{}` names no column", role.name());
            ensure!(columns.iter().all(|(other, _)| *other != role), "`{}` is given twice", role.name());
            if let Some((other, _)) = columns.iter().find(|(_, other)| *other == name) {
                return Err(anyhow!("`{name}` cannot be both `{}` and `{}`", other.name(), role.name()));
            }
            columns.push((role, name));
        }
        Ok(Self(columns))
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those of which something is true.
    pub(super) fn only(&self, keep: impl Fn(Role, &str) -> bool) -> Self {
        Self(self.0.iter().filter(|(role, name)| keep(*role, name)).cloned().collect())
    }

    /// The pairs.
    pub fn iter(&self) -> impl Iterator<Item = (Role, &str)> {
        self.0.iter().map(|(role, name)| (*role, name.as_str()))
    }
}

impl FromStr for Columns {
    type Err = Error;

    /// Reads `prompt=Frage,completion=Antwort`. A comma parts two of them only where a role and `=` follow, since names have commas.
    fn from_str(text: &str) -> Result<Self> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        let mut rest = text;
        loop {
            let (role, after) = rest.split_once('=').ok_or_else(|| {
                anyhow!(
                    "it should be ROLE=COLUMN, such as prompt=Question,completion=Answer; `{}` has no `=`",
                    rest.trim()
                )
            })?;
            let ends = after.match_indices(',').map(|(at, _)| at);
            let end = ends.into_iter().find(|at| begins_pair(&after[at + 1..]));
            pairs.push((role, &after[..end.unwrap_or(after.len())]));
            match end {
                Some(end) => rest = &after[end + 1..],
                None => return Self::of(pairs),
            }
        }
    }
}

/// Whether a text goes on with a word and `=`, as another pair does.
fn begins_pair(text: &str) -> bool {
    let word = text.split_once('=').map(|(word, _)| word.trim());
    word.is_some_and(|word| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphabetic()))
}

impl fmt::Display for Columns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (role, name)) in self.iter().enumerate() {
            write!(f, "{}{}={name}", if index > 0 { "," } else { "" }, role.name())?;
        }
        Ok(())
    }
}

impl Serialize for Columns {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = (!self.is_empty()).then(|| self.to_string());
        text.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_read_as_they_are_written() {
        for (text, expected) in [
            ("prompt=Frage,completion=Antwort", "prompt=Frage,completion=Antwort"),
            (" prompt = Frage , completion= Antwort ", "prompt=Frage,completion=Antwort"),
            ("prompt=Question, please,completion=a = b", "prompt=Question, please,completion=a = b"),
            ("completion=2,prompt=1", "completion=2,prompt=1"),
        ] {
            let columns: Columns = text.parse().unwrap();
            assert_eq!(columns.to_string(), expected);
            assert_eq!(columns.to_string().parse::<Columns>().unwrap(), columns);
        }
        for (text, expected) in [
            ("Frage", "it should be ROLE=COLUMN, such as prompt=Question,completion=Answer; `Frage` has no `=`"),
            ("promt=Frage", "`promt` is nothing that a column can be, did you mean `prompt`?"),
            ("prompt=a,answr=b", "`answr` is nothing that a column can be"),
            ("prompt=a,prompt=b", "`prompt` is given twice"),
            ("prompt=,completion=b", "`prompt` names no column"),
            ("prompt=a,completion=a", "`a` cannot be both `prompt` and `completion`"),
        ] {
            let told = text.parse::<Columns>().unwrap_err().to_string();
            assert!(told.starts_with(expected), "{text}: {told}");
        }
    }
}
