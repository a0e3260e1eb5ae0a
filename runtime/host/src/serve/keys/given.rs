//! The key that a request brings, in any of the ways in which programs send one.

use axum::http::{HeaderMap, header};
use base64::prelude::*;

/// Headers that are a key and nothing else: Azure's and Anthropic's.
const PLAIN: [&str; 2] = ["api-key", "x-api-key"];
/// Longest header that is looked at, in bytes.
const HEADER_BYTES_MAX: usize = 1024;

/// Returns the key of a request, if it brings one: `Authorization: Bearer KEY`, `Authorization: Basic` with the key as the password (and any
/// name), `api-key` or `x-api-key`. Two that differ are refused: two readers of the same request could take different ones.
///
/// # Errors
/// What is wrong with them. The message quotes nothing.
pub fn key(headers: &HeaderMap) -> Result<Option<String>, &'static str> {
    let authorization = headers.get_all(header::AUTHORIZATION).iter().map(|value| authorized(text(value)?));
    let plain = PLAIN.iter().flat_map(|name| headers.get_all(*name)).map(|value| Ok(text(value)?.trim().to_owned()));
    let mut found: Option<String> = None;
    for key in authorization.chain(plain) {
        let key = key?;
        if found.as_ref().is_some_and(|found| *found != key) {
            return Err("the request brings two keys that differ; send one");
        }
        found = Some(key);
    }
    Ok(found.filter(|key| !key.is_empty()))
}

fn text(value: &axum::http::HeaderValue) -> Result<&str, &'static str> {
    let text = value.to_str().ok().filter(|text| text.len() <= HEADER_BYTES_MAX);
    text.ok_or("the header with the key is no short line of ASCII")
}

/// The key in the header `Authorization`.
fn authorized(value: &str) -> Result<String, &'static str> {
    let (scheme, rest) = value.trim().split_once(' ').unwrap_or((value.trim(), ""));
    let rest = rest.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Ok(rest.to_owned());
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return Err("the header `Authorization` should be `Bearer KEY`, or `Basic` with the key as the password");
    }
    // Padding may be missing.
    let decoded =
        BASE64_STANDARD_NO_PAD.decode(rest.trim_end_matches('=')).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let decoded = decoded.ok_or("the header `Authorization: Basic` is not base64 of name:password")?;
    match decoded.split_once(':') {
        // `curl -u KEY:` has it before the colon.
        Some((name, "")) => Ok(name.to_owned()),
        Some((_, password)) => Ok(password.to_owned()),
        None => Err("the header `Authorization: Basic` is not base64 of name:password"),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn check(headers: &[(&'static str, &str)], wanted: Result<Option<&str>, &str>) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::from_static(name), HeaderValue::from_bytes(value.as_bytes()).expect("a value"));
        }
        match (key(&map), wanted) {
            (Ok(key), Ok(wanted)) => assert_eq!(key.as_deref(), wanted, "{headers:?}"),
            (Err(why), Err(words)) => assert!(why.contains(words), "{headers:?}: {why}"),
            (got, wanted) => panic!("{headers:?}: {got:?} and not {wanted:?}"),
        }
    }

    #[test]
    fn a_key_comes_in_any_of_four_ways() {
        for good in [
            ("authorization", "Bearer k-1"),
            ("authorization", "bearer   k-1 "),
            ("authorization", "Basic bWU6ay0x"),
            ("authorization", "Basic bWU6ay0x=="),
            // k-1 and no password.
            ("authorization", "basic ay0xOg=="),
            ("api-key", "k-1"),
            ("x-api-key", " k-1 "),
        ] {
            check(&[good], Ok(Some("k-1")));
        }
        check(&[("authorization", "Bearer k-1"), ("x-api-key", "k-1"), ("api-key", "k-1")], Ok(Some("k-1")));
        for none in [&[][..], &[("authorization", "Bearer")], &[("authorization", "Bearer ")], &[("api-key", "")]] {
            check(none, Ok(None));
        }
    }

    #[test]
    fn two_that_differ_and_what_is_no_key_are_refused() {
        let bearer = ("authorization", "Bearer k-1");
        for other in [
            ("x-api-key", "k-2"),
            ("api-key", ""),
            ("authorization", "Bearer k-2"),
            ("authorization", "Basic bWU6ay0y"),
        ] {
            check(&[bearer, other], Err("differ"));
            check(&[other, bearer], Err("differ"));
        }
        for (value, words) in [
            ("Digest k-1", "should be `Bearer KEY`"),
            ("k-1", "should be `Bearer KEY`"),
            ("Basic k-1", "not base64"),
            ("Basic bWU", "not base64"),
            ("Basic /w==", "not base64"),
            ("Basic A", "not base64"),
            ("Bearer k\u{e9}", "no short line of ASCII"),
            (&"x".repeat(1025), "no short line of ASCII"),
        ] {
            check(&[("authorization", value)], Err(words));
        }
    }
}
