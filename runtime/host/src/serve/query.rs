//! What an address says: an id, and what stands behind the `?`.

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;
use axum::http::{StatusCode, Uri};

use super::reply::Refusal;
use crate::toml_problems::near;

/// The id in the address.
pub struct Id(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let id = Path::<String>::from_request_parts(parts, state).await;
        id.map(|Path(id)| Self(id)).map_err(|_| refused("id", "the id in the address is not UTF-8"))
    }
}

/// The parameters of a request, decoded.
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Reads the parameters. One that is not among `known` is refused by name; `metadata[…]` is known where `metadata` is.
    ///
    /// # Errors
    /// When one is unknown, given twice or not UTF-8.
    pub fn read(uri: &Uri, known: &[&str]) -> Result<Self, Refusal> {
        let mut found: Vec<(String, String)> = Vec::new();
        for pair in uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (Some(name), Some(value)) = (decoded(name), decoded(value)) else {
                return Err(Refusal::new(StatusCode::BAD_REQUEST, "a parameter of the address is not UTF-8"));
            };
            let base = name.split('[').next().unwrap_or_default();
            if !known.contains(&base) {
                let shown: String = name.chars().take(80).collect();
                let message = format!("`{shown}`: unknown parameter, {}", near(&shown, known));
                return Err(refused(&shown, message));
            }
            if found.iter().any(|(other, _)| *other == name) {
                return Err(refused(&name, format!("`{name}`: given twice")));
            }
            found.push((name, value));
        }
        Ok(Self(found))
    }

    /// The value of a parameter.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The parameters `name[key]`, by their keys.
    pub fn keyed<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().filter_map(move |(known, value)| {
            let key = known.strip_prefix(name)?.strip_prefix('[')?.strip_suffix(']')?;
            Some((key, value.as_str()))
        })
    }

    /// How many entries of a list are wanted.
    ///
    /// # Errors
    /// When it is no whole number from 1 to `most`.
    pub fn limit(&self, usual: usize, most: usize) -> Result<usize, Refusal> {
        let Some(given) = self.get("limit") else { return Ok(usual) };
        let limit = given.parse().ok().filter(|limit| (1..=most).contains(limit));
        limit.ok_or_else(|| refused("limit", format!("`limit`: should be a whole number from 1 to {most}")))
    }
}

/// The part of a list, in its order, that comes after the entry `after`, and whether there is more behind it.
///
/// # Errors
/// When there is no such entry.
pub fn page<T>(
    all: Vec<T>,
    id: impl Fn(&T) -> &str,
    after: Option<&str>,
    limit: usize,
) -> Result<(Vec<T>, bool), Refusal> {
    let from = match after {
        None => 0,
        Some(after) => match all.iter().position(|entry| id(entry) == after) {
            Some(at) => at + 1,
            None => return Err(refused("after", "`after`: the list has no entry of this id")),
        },
    };
    let more = all.len() > from.saturating_add(limit);
    Ok((all.into_iter().skip(from).take(limit).collect(), more))
}

/// The refusal of a parameter or field.
pub fn refused(param: &str, message: impl Into<String>) -> Refusal {
    Refusal { param: Some(param.to_owned()), ..Refusal::new(StatusCode::BAD_REQUEST, message) }
}

/// A text without its percent signs; `None`: it is not UTF-8.
fn decoded(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).and_then(|byte| char::from(*byte).to_digit(16));
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        match (byte, digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
                continue;
            }
            (b'+', ..) => out.push(b' '),
            _ => out.push(*byte),
        }
        at += 1;
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(query: &str) -> Result<Query, String> {
        let uri: Uri = format!("/v1/files?{query}").parse().expect("an address");
        Query::read(&uri, &["limit", "after", "metadata"]).map_err(|refusal| refusal.message)
    }

    #[test]
    fn parameters_are_decoded_and_unknown_ones_named() {
        let query = read("limit=5&after=file%2D1+x&metadata%5Bclass%5D=7b").expect("they are known");
        assert_eq!((query.limit(20, 100).ok(), query.get("after")), (Some(5), Some("file-1 x")));
        assert_eq!(query.keyed("metadata").collect::<Vec<_>>(), [("class", "7b")]);
        for (wrong, words) in [
            ("limt=1", "`limt`: unknown parameter, did you mean `limit`?"),
            ("limit=1&limit=2", "given twice"),
            ("after=%ff", "UTF-8"),
        ] {
            assert!(read(wrong).err().is_some_and(|message| message.contains(words)), "{wrong}");
        }
        for wrong in ["0", "101", "-1", "x", ""] {
            assert!(read(&format!("limit={wrong}")).expect("known").limit(20, 100).is_err(), "{wrong}");
        }
        assert!(read("after=%4&limit=%").is_ok());
    }

    #[test]
    fn a_page_begins_behind_an_entry() {
        let all = || vec!["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let page = |after, limit| page(all(), |id| id, after, limit).map_err(|refusal| refusal.message);
        assert_eq!(page(None, 2), Ok((vec!["a".to_owned(), "b".to_owned()], true)));
        assert_eq!(page(Some("b"), 2), Ok((vec!["c".to_owned()], false)));
        assert_eq!(page(Some("c"), 2), Ok((vec![], false)));
        assert!(page(Some("d"), 2).is_err());
    }
}
