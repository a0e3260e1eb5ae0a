//! Whose an answer is, as it is written down.

use serde::{Deserialize, Serialize};

/// Whose an answer is: of a key, and of the person whom a program with that key names. Where neither is known, all callers of this
/// machine are the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Person {
    /// The name of the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The person, in the program's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

impl Person {
    /// Returns true if a name is this person's: in the program's words, or the key's that nobody else has.
    pub fn is(&self, name: &str) -> bool {
        match &self.user {
            Some(user) => user == name,
            None => self.key.as_deref() == Some(name),
        }
    }
}
