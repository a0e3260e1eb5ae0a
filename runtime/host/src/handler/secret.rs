//! Keys of providers.

/// A text that is never printed: neither as itself nor inside of what holds it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// A secret.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text, to be sent and not kept.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// `text` without the secret: providers quote a wrong key in their refusal.
    pub fn scrub(&self, text: &str) -> String {
        if self.0.is_empty() { text.to_owned() } else { text.replace(&self.0, "[key]") }
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
}
