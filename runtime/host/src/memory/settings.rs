//! `[memory]` of a file of handlers: what of conversations is kept, and for how long.

use toml::de::DeTable;

use crate::toml_problems::{Problems, near};

/// The keys of the table. None of their values is a secret.
pub const KEYS: [&str; 3] = ["content", "retention_days", "mib_max"];

/// What is kept of a conversation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Content {
    /// Nothing; of what was thought of an answer, the rating alone.
    #[default]
    None,
    /// All, with placeholders in the place of likely personal data.
    Redacted,
    /// All.
    Full,
}

const WORDS: [(&str, Content); 3] = [("none", Content::None), ("redacted", Content::Redacted), ("full", Content::Full)];

/// What `[memory]` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `content`.
    pub content: Content,
    /// `retention_days`: then it is removed.
    pub retention_days: u64,
    /// `mib_max`: when there is more, the oldest days make room.
    pub bytes_max: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { content: Content::None, retention_days: 30, bytes_max: 1 << 30 }
    }
}

impl Settings {
    /// Reads the table, if the file has one.
    pub fn read<'a>(problems: &mut Problems<'a>, root: &DeTable<'a>) -> Option<Self> {
        let value = root.get("memory")?;
        let Some(table) = value.get_ref().as_table() else {
            problems.wrong_type("memory", value, "a table, [memory]");
            return None;
        };
        problems.unknown_keys(table, &KEYS);
        let mut settings = Self::default();
        if let Some(value) = table.get("content")
            && let Some(word) = problems.text("content", value)
        {
            match WORDS.iter().find(|(known, _)| *known == word) {
                Some((_, content)) => settings.content = *content,
                None => {
                    let known = WORDS.map(|(known, _)| known);
                    problems.at(value.span(), format!("`content`: `{word}` is unknown, {}", near(&word, &known)));
                }
            }
        }
        let mut int = |key: &str, range| Some(problems.int(key, table.get(key)?, range)?.unsigned_abs());
        settings.retention_days = int("retention_days", 1..=3650).unwrap_or(settings.retention_days);
        settings.bytes_max = int("mib_max", 1..=1 << 20).map_or(settings.bytes_max, |mib| mib << 20);
        Some(settings)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn nothing_is_kept_unless_the_file_says_so() {
        let read = |text: &str| {
            let mut problems = Problems::new(Path::new("h.toml"), text);
            let root = problems.parse();
            let settings = Settings::read(&mut problems, &root);
            problems.into_result().map(|()| settings).map_err(|error| error.to_string())
        };
        assert_eq!(read(""), Ok(None));
        assert_eq!(read("[memory]\n"), Ok(Some(Settings::default())));
        let kept = Settings { content: Content::Redacted, retention_days: 90, bytes_max: 5 << 20 };
        assert_eq!(read("[memory]\ncontent = \"redacted\"\nretention_days = 90\nmib_max = 5\n"), Ok(Some(kept)));
        let all = read("[memory]\ncontent = \"ful\"\nretention_days = 0\nkeep = true\n").expect_err("it is wrong");
        for words in [
            "`ful` is unknown, did you mean `full`?",
            "`retention_days`: should be from 1 to 3650",
            "`keep`: unknown key",
        ] {
            assert!(all.contains(words), "{words}\n{all}");
        }
    }
}
