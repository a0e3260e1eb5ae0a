//! An endpoint's address and settings, and the texts that it sends as they are passed on.

use std::time::Duration;

use ureq::http::Uri;

use crate::address::is_machine;
use crate::handler::{HandlerError, Kind, Secret};

/// Longest name, id or reason, and longest message of a provider that is passed on, in characters.
const NAME_LIMIT: usize = 200;
const MESSAGE_LIMIT: usize = 400;

/// An endpoint and its settings.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The handler's name.
    pub name: String,
    /// Its address, without `/chat/completions`, `/messages` or `/embeddings`.
    pub base_url: BaseUrl,
    /// The model, by the provider's name for it.
    pub model: String,
    /// The key, if it asks for one.
    pub api_key: Option<Secret>,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest silence, before the first token and between two.
    pub read_timeout: Duration,
    /// Longest time for a whole answer.
    pub answer_timeout: Duration,
}

impl Endpoint {
    /// Returns a provider's text without the key and control characters, cut to `limit` characters. It is cut last: half a key is not
    /// found.
    fn clean(&self, text: &str, limit: usize) -> String {
        let text: String = text.chars().filter(|c| !c.is_control() && !is_invisible(*c)).collect();
        let text = self.api_key.as_ref().map_or(text.clone(), |key| key.scrub(&text));
        text.chars().take(limit).collect()
    }

    /// Returns an id, a name or a reason of the provider as it is passed on.
    pub(in crate::handler) fn name_of(&self, text: &str) -> String {
        self.clean(text, NAME_LIMIT)
    }

    /// Returns the text of an answer without the key. Both may come in pieces: `held` is the end that may be the beginning of the key.
    pub(in crate::handler) fn content(&self, held: &mut String, piece: &str, is_last: bool) -> String {
        let Some(key) = &self.api_key else { return piece.to_owned() };
        held.push_str(piece);
        let text = key.scrub(held);
        let waits = if is_last { 0 } else { key.begun(&text) };
        *held = text[text.len() - waits..].to_owned();
        text[..text.len() - waits].to_owned()
    }

    /// Makes an error that names the address to whoever runs this machine, and to nobody else.
    pub(in crate::handler) fn error(&self, kind: Kind, message: &str) -> HandlerError {
        let kind = match kind {
            Kind::InvalidRequest { param } => Kind::InvalidRequest { param: param.map(|param| self.name_of(&param)) },
            other => other,
        };
        HandlerError::of(&self.name, kind, format!("{}: {}", self.base_url.text, self.clean(message, MESSAGE_LIMIT)))
    }

    /// Makes the error of a refusal in the provider's `words`, with `more` for whoever runs this machine. Whoever asked reads the words if
    /// the request itself is refused, since they say what is wrong with it, but no address or path in them.
    pub(in crate::handler) fn refused(&self, kind: Kind, words: &str, more: &str) -> HandlerError {
        let is_of_request = matches!(kind, Kind::InvalidRequest { .. } | Kind::ContextLength);
        let error = self.error(kind, &format!("{words}{more}"));
        if !is_of_request {
            return error;
        }
        let words = without_places(&self.clean(words, MESSAGE_LIMIT), &self.base_url.host);
        let message = format!("{}: {words}", Kind::InvalidRequest { param: None }.told(&self.name));
        HandlerError { message, ..error }
    }
}

/// Beginnings of paths of files, as servers have them in their messages. Others may be places in the request.
const ROOTS: [&str; 14] = [
    "/app/",
    "/data/",
    "/etc/",
    "/home/",
    "/mnt/",
    "/models/",
    "/opt/",
    "/root/",
    "/srv/",
    "/tmp/",
    "/Users/",
    "/usr/",
    "/var/",
    "/workspace/",
];

/// A text with `[address]` and `[path]` for addresses, names of the provider's host and of machines behind it, and paths of files.
fn without_places(text: &str, host: &str) -> String {
    let is_inner = |c: char| c.is_alphanumeric() || "/:\\.-_~%?&=#@[]+".contains(c);
    let place = |word: &str| {
        let lower = word.to_lowercase();
        let is_provider = lower.contains("://") || lower.contains("www.") || !host.is_empty() && lower.contains(host);
        if is_provider || word.split(|c: char| "/\\%?&=#@[]+".contains(c)).any(is_machine) {
            return Some("[address]");
        }
        let is_drive = word.as_bytes().get(1..3) == Some(b":\\");
        (is_drive || ROOTS.iter().any(|root| word.contains(root))).then_some("[path]")
    };
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|c| !is_inner(c)).unwrap_or(rest.len());
        let (word, behind) = rest.split_at(end);
        // A full stop or a colon behind it is not of it.
        let bare = word.trim_end_matches(['.', ':', '?']);
        match place(bare) {
            Some(instead) => {
                out.push_str(instead);
                out.push_str(&word[bare.len()..]);
            }
            None => out.push_str(word),
        }
        let between = behind.find(is_inner).unwrap_or(behind.len());
        out.push_str(&behind[..between]);
        rest = &behind[between..];
    }
    out
}

/// Returns true if a character is invisible: one in a key would hide it from the search for keys.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// A checked address: `http://` or `https://`, a host, a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl {
    pub(in crate::handler) text: String,
    host: String,
    encrypted: bool,
}

impl BaseUrl {
    /// Reads an address.
    ///
    /// # Errors
    /// When it is not an address; says why.
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
            return Err("a name or password in the address would be printed; leave it out and use api_key".to_owned());
        }
        let host = authority.host().trim_matches(['[', ']']).to_ascii_lowercase();
        if host.is_empty() {
            return Err(format!("the address has no host; {example}"));
        }
        // The library takes any digits.
        let port = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
        if !port.is_empty() && authority.port_u16().is_none_or(|port| port == 0) {
            return Err("the address's port should be from 1 to 65535".to_owned());
        }
        if uri.query().is_some() || text.contains('#') {
            return Err("an address with `?` or `#` is not supported; leave out what begins there".to_owned());
        }
        let text = text.trim_end_matches('/').to_owned();
        if let Some(path) = ["/chat/completions", "/completions", "/messages", "/embeddings"]
            .into_iter()
            .find(|path| text.ends_with(path))
        {
            return Err(format!("leave out {path}: it is added"));
        }
        Ok(Self { text, host, encrypted })
    }

    /// Returns true if it is this machine.
    pub fn is_loopback(&self) -> bool {
        let address = self.host.parse::<std::net::IpAddr>();
        self.host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }

    /// The host.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Returns true if what is sent there can be read on the way.
    pub fn can_be_overheard(&self) -> bool {
        !self.encrypted && !self.is_loopback()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_provider_are_told_without_its_places() {
        for (words, want) in [
            ("temperature should be at most 2.", "temperature should be at most 2."),
            ("/messages/0/content: too long", "/messages/0/content: too long"),
            ("See https://docs.example.com/errors?x=1#y.", "See [address]."),
            ("api.example.com:443 says: no", "[address] says: no"),
            ("backend 10.0.0.7:8000 says no", "backend [address] says no"),
            ("no answer of 10.0.0.7.", "no answer of [address]."),
            ("gpu3.school.lan:8000: out of memory", "[address]: out of memory"),
            ("node=gpu3.school.lan:8000/v1, peer [fe80::1]:80", "[address], peer [address]"),
            ("localhost:8001 is gone", "[address] is gone"),
            (
                "messages.0.content.1: 3.5:1 is wrong, gpt-4.1 has 0.7",
                "messages.0.content.1: 3.5:1 is wrong, gpt-4.1 has 0.7",
            ),
            ("rows.jsonl:3 is cut", "rows.jsonl:3 is cut"),
            ("(www.example.org) 'max_tokens': 5 > 3", "([address]) 'max_tokens': 5 > 3"),
            ("cannot read \"/home/anna/m.gguf\": no", "cannot read \"[path]\": no"),
            ("C:\\Users\\anna\\m.gguf", "[path]"),
            ("é: ü 5/3 and 10:30", "é: ü 5/3 and 10:30"),
            ("", ""),
        ] {
            assert_eq!(without_places(words, "api.example.com"), want);
        }
    }

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
            "https://a/v1/embeddings/",
            "https://a b/",
            "https://a:99999/v1",
            "https://a:0/v1",
            "https://a:/v1",
            "http://[::1]:65536",
        ] {
            assert!(BaseUrl::parse(bad).is_err(), "{bad}");
        }
        Ok(())
    }
}
