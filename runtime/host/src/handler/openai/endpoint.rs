//! Where an endpoint is, and how it is asked.

use std::time::Duration;

use ureq::http::Uri;

use crate::handler::{HandlerError, Kind, Secret};

/// Longest name, id or reason of a provider that is passed on, and longest message, in characters.
const NAME_LIMIT: usize = 200;
const MESSAGE_LIMIT: usize = 400;

/// Where an endpoint is and how it is asked.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The handler's name, by which answers say who gave them.
    pub name: String,
    /// The address that `/chat/completions` follows.
    pub base_url: BaseUrl,
    /// The model, in the provider's words.
    pub model: String,
    /// The key, if it wants one.
    pub api_key: Option<Secret>,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest silence, before the first word and between two.
    pub read_timeout: Duration,
    /// Longest time for a whole answer.
    pub answer_timeout: Duration,
    /// What the provider calls the longest answer: `max_tokens`, or `max_completion_tokens` where that is refused.
    pub max_tokens_param: String,
}

impl Endpoint {
    /// A provider's text as it is passed on: without the key, without control characters, not longer than `limit` characters. Only
    /// what was scrubbed is cut.
    fn clean(&self, text: &str, limit: usize) -> String {
        let text: String = text.chars().filter(|c| !c.is_control() && !is_invisible(*c)).collect();
        let text = self.api_key.as_ref().map_or(text.clone(), |key| key.scrub(&text));
        text.chars().take(limit).collect()
    }

    /// An id, a name, a reason of the provider.
    pub(super) fn name_of(&self, text: &str) -> String {
        self.clean(text, NAME_LIMIT)
    }

    /// Text of an answer that comes in pieces: all of it but the key, which may be cut into pieces, too. `held` is what may still become
    /// the key.
    pub(super) fn content(&self, held: &mut String, piece: &str, is_last: bool) -> String {
        let Some(key) = &self.api_key else { return piece.to_owned() };
        held.push_str(piece);
        let text = key.scrub(held);
        let waits = if is_last { 0 } else { key.begun(&text) };
        *held = text[text.len() - waits..].to_owned();
        text[..text.len() - waits].to_owned()
    }

    /// `message` with what was wrong where.
    pub(super) fn error(&self, kind: Kind, message: &str) -> HandlerError {
        let kind = match kind {
            Kind::InvalidRequest { param } => Kind::InvalidRequest { param: param.map(|param| self.name_of(&param)) },
            other => other,
        };
        HandlerError::new(kind, format!("{}: {}", self.base_url.text, self.clean(message, MESSAGE_LIMIT)))
    }
}

/// Whether a character shows nothing and could hide a key from whoever looks for it.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// An address that is one: `http://` or `https://`, a host, a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl {
    pub(super) text: String,
    host: String,
    encrypted: bool,
}

impl BaseUrl {
    /// Reads an address.
    ///
    /// # Errors
    /// When it is none; says why.
    pub fn parse(text: &str) -> Result<Self, String> {
        let example = "it should be like https://api.example.com/v1";
        let uri: Uri = text.trim_end_matches('/').parse().map_err(|_| format!("not an address; {example}"))?;
        let encrypted = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(format!("an address begins with https:// or http://; {example}")),
        };
        let authority = uri.authority().ok_or_else(|| format!("the address has no host; {example}"))?;
        if authority.as_str().contains('@') {
            return Err("a name or password in the address would be printed; use api_key".to_owned());
        }
        let host = authority.host().trim_matches(['[', ']']).to_ascii_lowercase();
        if host.is_empty() {
            return Err(format!("the address has no host; {example}"));
        }
        if uri.query().is_some() || text.contains('#') {
            return Err("the address ends before `?` and `#`".to_owned());
        }
        let text = text.trim_end_matches('/').to_owned();
        if text.ends_with("/chat/completions") {
            return Err("leave /chat/completions away: it is added".to_owned());
        }
        Ok(Self { text, host, encrypted })
    }

    /// Whether it is this machine.
    pub fn is_loopback(&self) -> bool {
        let address = self.host.parse::<std::net::IpAddr>();
        self.host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }

    /// The host.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether what is sent there can be read on the way.
    pub fn can_be_overheard(&self) -> bool {
        !self.encrypted && !self.is_loopback()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_checked_before_it_is_used() -> Result<(), String> {
        for (good, loopback) in [
            ("https://api.example.com/v1", false),
            ("https://api.example.com/v1/", false),
            ("http://localhost:8080/v1", true),
            ("http://127.0.0.2:8080/v1", true),
            ("http://[::1]:8080", true),
            ("http://10.0.0.5:8000/v1", false),
            ("http://localhost.example.com", false),
            ("http://127.0.0.1.example.com", false),
        ] {
            assert_eq!(BaseUrl::parse(good)?.is_loopback(), loopback, "{good}");
        }
        for bad in [
            "",
            "api.example.com",
            "ftp://a/b",
            "https://",
            "https://me:secret@a/v1",
            "https://a/v1?key=1",
            "https://a/v1#x",
            "https://a/v1/chat/completions",
            "https://a b/",
        ] {
            assert!(BaseUrl::parse(bad).is_err(), "{bad}");
        }
        Ok(())
    }
}
