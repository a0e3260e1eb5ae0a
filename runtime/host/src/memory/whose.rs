//! Whose data is asked for: a person is one of a key, as the programs of two keys may call two people by one name.

use std::collections::BTreeSet;

use anyhow::{Result, bail};

use super::person::Person;
use crate::terminal::cell;

/// Whose data is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Whose<'a> {
    /// The person in the program's words, or the name of a key of their own.
    pub name: &'a str,
    /// The name of the key; empty: those of no key. `None`: the only key that has a person of that name.
    pub key: Option<&'a str>,
}

impl Whose<'_> {
    /// Returns true if something is theirs; gathers the keys that have a person of that name.
    pub(super) fn takes(&self, person: &Person, keys: &mut BTreeSet<String>) -> bool {
        let key = person.key.as_deref().unwrap_or_default();
        let takes = person.is(self.name) && self.key.is_none_or(|asked| asked == key);
        if takes && !keys.contains(key) {
            keys.insert(key.to_owned());
        }
        takes
    }

    /// Checks that they are one person.
    pub(super) fn one_of(&self, keys: &BTreeSet<String>) -> Result<()> {
        if keys.len() > 1 {
            let named: Vec<String> = keys.iter().filter(|key| !key.is_empty()).map(|key| cell(key)).collect();
            let (without, hint) = match keys.contains("") {
                true => (", and one without a key", ", and --key \"\" the one without"),
                false => ("", ""),
            };
            bail!(
                "there is a `{}` of each of these keys: {}{without}\nhint: --key NAME says which{hint}",
                cell(self.name),
                named.join(", ")
            );
        }
        Ok(())
    }
}
