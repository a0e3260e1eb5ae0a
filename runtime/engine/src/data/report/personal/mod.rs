//! Likely personal data in a text: addresses, telephone numbers, and numbers of persons and accounts that carry check digits.
//!
//! What is found is likely, not certain, and what is not found may be there: names of persons are not looked for. Where a number alone
//! says too little, a word before it has to say what it is, so that sums, years, dates, versions and book numbers are left alone.

mod identifiers;
mod net;
mod number;
mod phone;
mod redact;
#[cfg(test)]
mod tests;

use std::ops::Range;

use self::number::Place;
pub(super) use self::number::is_ideograph;
pub use self::redact::Redactor;

/// Something found in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What it is: one of the names of [`kinds`].
    pub kind: &'static str,
    /// Its bytes in the text.
    pub at: Range<usize>,
}

const EMAIL: &str = "email";
const PHONE: &str = "phone";
const URL: &str = "url";
const IP_ADDRESS: &str = "ip_address";
const IBAN: &str = "iban";
const CREDIT_CARD: &str = "credit_card";

/// All kinds by their names, with what several of them are called.
pub fn kinds() -> impl Iterator<Item = (&'static str, &'static str)> {
    let general = [
        (EMAIL, "e-mail addresses"),
        (PHONE, "telephone numbers"),
        (URL, "addresses on the net"),
        (IP_ADDRESS, "IP addresses"),
        (IBAN, "bank accounts (IBAN)"),
        (CREDIT_CARD, "card numbers"),
    ];
    general.into_iter().chain(identifiers::IDENTIFIERS.iter().map(|identifier| (identifier.kind, identifier.words)))
}

/// Finds what is likely personal in a text, in its order; no two overlap.
pub fn find(text: &str) -> Vec<Found> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let hit = match bytes[at] {
            b'@' => net::email(text, at).map(|at| Found { kind: EMAIL, at }),
            b':' if bytes[at..].starts_with(b"://") => net::url(text, at).map(|at| Found { kind: URL, at }),
            b'w' | b'W' => net::bare_url(text, at).map(|at| Found { kind: URL, at }),
            b'0'..=b'9' | b'+' | b'(' | b'A'..=b'Z' | b'a'..=b'f' | b':' => of_number(text, at),
            _ => None,
        };
        // An address may begin before what it was told by, never in what was found before.
        let taken = found.last().map_or(0, |last: &Found| last.at.end);
        match hit {
            Some(hit) if hit.at.start >= taken => {
                at = hit.at.end.max(at + 1);
                found.push(hit);
            }
            _ => at += 1,
        }
    }
    found
}

/// What begins here and is told by its digits.
fn of_number(text: &str, at: usize) -> Option<Found> {
    let place = Place::new(text, at)?;
    let first = text.as_bytes()[at];
    let of = |kind, end: Option<usize>| end.map(|end| Found { kind, at: at..end });
    if first.is_ascii_uppercase() {
        return of(IBAN, number::iban(text, at)).or_else(|| identifiers::find(&place)).or_else(|| ip6(text, at));
    }
    if first.is_ascii_lowercase() || first == b':' {
        return ip6(text, at);
    }
    if first.is_ascii_digit() {
        let hit = identifiers::find(&place).or_else(|| of(CREDIT_CARD, number::card(&place)));
        let hit = hit.or_else(|| of(IP_ADDRESS, net::ip4(text, at))).or_else(|| ip6(text, at));
        if hit.is_some() {
            return hit;
        }
    }
    of(PHONE, phone::find(&place))
}

fn ip6(text: &str, at: usize) -> Option<Found> {
    net::ip6(text, at).map(|end| Found { kind: IP_ADDRESS, at: at..end })
}
