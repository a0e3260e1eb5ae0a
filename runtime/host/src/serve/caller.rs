//! Who asks: the key that a request came with, and the person for whom a program with that key asks.

use axum::http::{Extensions, HeaderMap, StatusCode};

use super::reply::Refusal;
use crate::memory::Person;

/// The header by which Open WebUI names the person who asks.
pub const USER_ID: &str = "x-openwebui-user-id";
/// Longest name of a person, in bytes.
const USER_BYTES_MAX: usize = 256;

/// Who asks. It is in the extensions of every request that was let in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// The name of the key; `None` where none is wanted. Whatever is kept of a request belongs to this name.
    pub key: Option<String>,
    /// The person for whom a program asks, in the program's words: only of a key that is trusted to say so, or where no key is wanted.
    pub user: Option<String>,
    /// Whether the program may name a person.
    forwards: bool,
}

impl Caller {
    /// The caller with a key, which may be trusted to name people.
    pub fn new(key: Option<String>, forwards: bool) -> Self {
        Self { key, user: None, forwards }
    }

    /// The caller of a request.
    pub fn of(extensions: &Extensions) -> Self {
        extensions.get::<Self>().cloned().unwrap_or_default()
    }

    /// The same, with the person whom the headers name.
    ///
    /// # Errors
    /// When they name two, or the name is too long.
    pub fn with_headers(mut self, headers: &HeaderMap) -> Result<Self, Refusal> {
        let mut names = headers.get_all(USER_ID).iter();
        let (first, second) = (names.next(), names.next());
        if second.is_some_and(|second| Some(second) != first) {
            return Err(Refusal::new(StatusCode::BAD_REQUEST, format!("`{USER_ID}` names two people")));
        }
        let name = first.map(|name| String::from_utf8_lossy(name.as_bytes()).into_owned());
        self.take(name.as_deref(), USER_ID)?;
        Ok(self)
    }

    /// The same, with the person whom the field `user` of the body names, if no header did.
    ///
    /// # Errors
    /// When the name is too long.
    pub fn with_user(mut self, user: Option<&str>) -> Result<Self, Refusal> {
        if self.user.is_none() {
            self.take(user, "user")?;
        }
        Ok(self)
    }

    fn take(&mut self, user: Option<&str>, field: &str) -> Result<(), Refusal> {
        let Some(user) = user.map(str::trim).filter(|user| self.forwards && !user.is_empty()) else { return Ok(()) };
        if user.len() > USER_BYTES_MAX {
            let message = format!("`{field}` is {} bytes long, at most {USER_BYTES_MAX} name a person", user.len());
            let refusal = Refusal::new(StatusCode::BAD_REQUEST, message);
            return Err(Refusal { param: Some(field.to_owned()), ..refusal });
        }
        self.user = Some(user.to_owned());
        Ok(())
    }
}

impl From<Caller> for Person {
    fn from(caller: Caller) -> Self {
        Self { key: caller.key, user: caller.user }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_is_trusted_names_a_person() {
        let mut headers = HeaderMap::new();
        headers.insert(USER_ID, "u-1".parse().expect("a value"));
        let user = |forwards, body| {
            let caller = Caller::new(Some("moodle".into()), forwards).with_headers(&headers);
            caller
                .and_then(|caller| caller.with_user(body))
                .map(|caller| caller.user)
                .map_err(|refusal| refusal.message)
        };
        assert_eq!(user(true, None), Ok(Some("u-1".into())));
        assert_eq!(user(true, Some("other")), Ok(Some("u-1".into())), "the header goes before the body");
        assert_eq!(user(false, Some("other")), Ok(None));
        let of_body = |body| Caller::new(None, true).with_user(body).map(|caller| caller.user).map_err(|no| no.message);
        assert_eq!(of_body(Some(" é ")), Ok(Some("é".into())));
        assert_eq!(of_body(Some(" ")), Ok(None));
        assert!(of_body(Some(&"x".repeat(257))).expect_err("it is long").contains("257 bytes"));
        headers.append(USER_ID, "u-2".parse().expect("a value"));
        assert!(Caller::new(None, true).with_headers(&headers).is_err());
    }
}
