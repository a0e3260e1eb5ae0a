//! What a strategy is called, which options it takes, and how it reports a failure.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A strategy's answer to [`crate::table::METHOD_DESCRIBE`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// Name that users type, e.g. `lora`.
    pub name: String,
    /// Version of the plugin's crate.
    pub version: String,
    /// One line for `homeroom plugins list`.
    pub doc: String,
    /// Options in the order in which they are shown.
    pub options: Vec<OptionSpec>,
}

/// One option of a strategy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptionSpec {
    /// Name, by PEFT's vocabulary where PEFT has one.
    pub name: String,
    /// Type.
    pub kind: OptionKind,
    /// Value when the user gives none; null where the strategy derives it.
    pub default: Value,
    /// One line: what turning it does.
    pub doc: String,
}

/// Type of an option's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptionKind {
    /// A whole number, zero or more.
    Int,
    /// A number.
    Float,
    /// True or false.
    Bool,
    /// A text.
    String,
    /// A text, or a list of texts.
    StringOrList,
    /// A table from text to number.
    Map,
}

impl OptionKind {
    /// Whether `value` is of this type. Null is: it stands for "not given".
    pub fn admits(self, value: &Value) -> bool {
        match self {
            _ if value.is_null() => true,
            Self::Int => value.as_u64().is_some(),
            Self::Float => value.is_number(),
            Self::Bool => value.is_boolean(),
            Self::String => value.is_string(),
            Self::StringOrList => {
                value.is_string() || value.as_array().is_some_and(|list| list.iter().all(Value::is_string))
            }
            Self::Map => value.as_object().is_some_and(|map| map.values().all(Value::is_number)),
        }
    }

    /// The type in words, for messages.
    pub fn words(self) -> &'static str {
        match self {
            Self::Int => "a whole number, zero or more",
            Self::Float => "a number",
            Self::Bool => "true or false",
            Self::String => "a text",
            Self::StringOrList => "a text or a list of texts",
            Self::Map => "a table from text to number",
        }
    }
}

/// What is wrong with options, by their declaration: unknown names, with the nearest known one, and wrong types.
pub fn option_problems(specs: &[OptionSpec], given: &Map<String, Value>) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, value) in given {
        match specs.iter().find(|spec| spec.name == *name) {
            Some(spec) if spec.kind.admits(value) => {}
            Some(spec) => problems.push(format!("`{name}` is {value}, it takes {}", spec.kind.words())),
            None => {
                let near = nearest(name, specs.iter().map(|spec| spec.name.as_str()));
                let hint = near.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
                problems.push(format!("unknown option `{name}`{hint}"));
            }
        }
    }
    problems
}

/// Why a call failed, and where in the author's source when that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginError {
    /// What is wrong; lower case, no full stop.
    pub message: String,
    /// Place in the plugin's source.
    pub at: Option<Source>,
}

/// A place in a plugin's source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// File as the compiler saw it.
    pub file: String,
    /// Line, from 1.
    pub line: u32,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// The candidate nearest to `word` by edit distance, letter case aside, when it is near enough to be what was meant.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let bound = 1 + word.chars().count() / 4;
    candidates
        .into_iter()
        .map(|candidate| (edit_distance(&word, &candidate.to_lowercase()), candidate))
        .filter(|(distance, _)| *distance <= bound)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours cost 1.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let change = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = change.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_found_and_a_far_one_is_not() {
        let known = ["lora_alpha", "lora_dropout", "r"];
        assert_eq!(nearest("lora_alhpa", known), Some("lora_alpha"));
        assert_eq!(nearest("lora_droput", known), Some("lora_dropout"));
        assert_eq!(nearest("LORA_Alpha", known), Some("lora_alpha"));
        assert_eq!(nearest("temperature", known), None);
    }

    #[test]
    fn null_stands_for_an_option_that_was_not_given() {
        assert!(OptionKind::Int.admits(&Value::Null));
        assert!(!OptionKind::Int.admits(&serde_json::json!(-1)));
        assert!(!OptionKind::Int.admits(&serde_json::json!(1.5)));
        assert!(OptionKind::Map.admits(&serde_json::json!({"q_proj": 4})));
    }
}
