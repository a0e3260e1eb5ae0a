//! Keys of providers.

/// Characters in a row that give a key away: providers quote the beginning or the end of a wrong one.
const TELLING: usize = 12;

/// A text that is never printed, not even by `Debug` of what holds it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Makes a secret.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// Returns the text, to be sent and not kept.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Returns the number of bytes at the end of `text` that may be the beginning of the secret or of a telling part of it.
    pub fn begun(&self, text: &str) -> usize {
        let all: Vec<(usize, char)> = text.char_indices().collect();
        let secret: Vec<char> = self.0.chars().collect();
        let telling = TELLING.min(secret.len());
        let from = all.len().saturating_sub(telling.saturating_sub(1));
        let begun = (from..all.len()).find(|&from| {
            let tail: Vec<char> = all[from..].iter().map(|(_, c)| *c).collect();
            secret.windows(tail.len()).any(|part| part == tail)
        });
        begun.map_or(0, |begun| text.len() - all[begun].0)
    }

    /// Returns `text` without the secret or any telling part of it. Cut a text after it was scrubbed, never before: half a key is not
    /// found.
    pub fn scrub(&self, text: &str) -> String {
        let secret: Vec<char> = self.0.chars().collect();
        let telling = TELLING.min(secret.len());
        if telling == 0 {
            return text.to_owned();
        }
        let text: Vec<char> = text.chars().collect();
        let mut scrubbed = String::with_capacity(text.len());
        let mut at = 0;
        while at < text.len() {
            let part = secret.windows(telling).position(|part| text[at..].starts_with(part));
            match part {
                Some(from) => {
                    scrubbed.push_str("[key]");
                    at += text[at..].iter().zip(&secret[from..]).take_while(|(a, b)| a == b).count();
                }
                None => {
                    scrubbed.push(text[at]);
                    at += 1;
                }
            }
        }
        scrubbed
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_printed() {
        let secret = Some(Secret::new("sk-123".into()));
        assert_eq!(format!("{secret:?}"), "Some(Secret(…))");
        assert_eq!(secret.map(|secret| secret.scrub("wrong key: sk-123!")).as_deref(), Some("wrong key: [key]!"));
        assert_eq!(Secret::new(String::new()).scrub("as it is"), "as it is");
    }

    #[test]
    fn the_beginning_of_it_is_seen_before_it_is_whole() {
        let secret = Secret::new("sk-proj-0123456789".into());
        for (text, want) in [("say sk-proj", 7), ("say", 0), ("hello", 1), ("é0123", 4), ("", 0), ("sk-proj-0123 x", 0)]
        {
            assert_eq!(secret.begun(text), want, "{text}");
        }
    }

    #[test]
    fn nor_is_a_telling_part_of_it() {
        let secret = Secret::new("sk-proj-0123456789abcdefghijklmnopqrstu".into());
        for (text, want) in [
            ("Incorrect: sk-proj-0123456789abc", "Incorrect: [key]"),
            ("it ends in jklmnopqrstu.", "it ends in [key]."),
            ("sk-proj-0123456789abcdefghijklmnopqrstusk-proj-0123456789abcdefghijklmnopqrstu", "[key][key]"),
            ("é sk-proj-**** ü", "é sk-proj-**** ü"),
            ("0123456789ab and 0123456789a", "[key] and 0123456789a"),
        ] {
            assert_eq!(secret.scrub(text), want);
        }
    }
}
