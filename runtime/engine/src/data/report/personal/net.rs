//! Addresses on the net.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use super::number::Place;

/// Ends of names of files, which stand where an address has its country or kind.
const FILE_ENDINGS: [&str; 18] = [
    "png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "css", "js", "ts", "json", "html", "py", "rs", "lua", "txt",
    "tgz", "zip",
];

/// The e-mail address around an `@`.
pub(super) fn email(text: &str, at: usize) -> Option<Range<usize>> {
    let of_name = |c: char| c.is_alphanumeric() || "._%+-".contains(c);
    let name = text[..at].rsplit(|c| !of_name(c)).next()?;
    let name = name.trim_start_matches(|c: char| !c.is_alphanumeric());
    let of_host = |c: char| c.is_alphanumeric() || c == '.' || c == '-';
    let rest = &text[at + 1..];
    let host = &rest[..rest.find(|c| !of_host(c)).unwrap_or(rest.len())];
    let host = host.trim_end_matches(['.', '-']);
    let (domain, ending) = host.rsplit_once('.')?;
    let is_ending = (2..=24).contains(&ending.chars().count()) && ending.chars().all(char::is_alphabetic);
    let is_domain = domain.split('.').all(|label| !label.is_empty() && !label.starts_with('-'));
    let end = at + 1 + host.len();
    // `git@host.org:name` is a place of code.
    let is_path = text[end..].strip_prefix(':').is_some_and(|rest| rest.starts_with(|c: char| c.is_alphanumeric()));
    let good = !name.is_empty() && name.len() <= 64 && !name.ends_with('.') && is_ending && is_domain && !is_path;
    let is_file = FILE_ENDINGS.contains(&ending.to_ascii_lowercase().as_str());
    (good && !is_file).then(|| at - name.len()..end)
}

const SCHEMES: [&str; 7] = ["https", "http", "ftps", "sftp", "ftp", "wss", "ws"];
/// Hosts that name no place of anybody's.
const NO_HOSTS: [&str; 5] = ["localhost", "127.0.0.1", "0.0.0.0", "www.w3.org", "[::1]"];

/// The address around a `://`.
pub(super) fn url(text: &str, at: usize) -> Option<Range<usize>> {
    let before = &text[..at];
    let letters = before.len() - before.trim_end_matches(|c: char| c.is_ascii_alphanumeric()).len();
    let scheme = before[at - letters..].to_ascii_lowercase();
    SCHEMES.contains(&scheme.as_str()).then_some(())?;
    let end = end_of_url(text, at + 3)?;
    let host = &text[at + 3..end];
    let host = &host[..host.find(['/', '?', '#', ':']).unwrap_or(host.len())];
    (!NO_HOSTS.contains(&host)).then_some(at - letters..end)
}

/// An address that begins with `www.`.
pub(super) fn bare_url(text: &str, at: usize) -> Option<Range<usize>> {
    let prefix = text.get(at..at + 4)?;
    if !prefix.eq_ignore_ascii_case("www.") || text[..at].ends_with(|c: char| c.is_alphanumeric() || "./@".contains(c))
    {
        return None;
    }
    let end = end_of_url(text, at + 4)?;
    (text[at + 4..end].contains('.') && !NO_HOSTS.contains(&&text[at..end])).then_some(at..end)
}

/// Longest address that is taken for one.
const URL_BYTES_MAX: usize = 2 << 10;

fn end_of_url(text: &str, from: usize) -> Option<usize> {
    let rest = &text[from..text.floor_char_boundary(from.saturating_add(URL_BYTES_MAX))];
    if !rest.starts_with(|c: char| c.is_alphanumeric() || c == '[') {
        return None;
    }
    let ends = |c: char| c.is_whitespace() || c.is_control() || "<>\"{}|\\^`'«»“”„".contains(c);
    let mut url = &rest[..rest.find(ends).unwrap_or(rest.len())];
    // No opening bracket stands among what is taken off.
    let has_open = url.contains('(');
    loop {
        let shorter = url.trim_end_matches(['.', ',', ';', ':', '!', '?', '*', '_', ']']);
        let shorter = match shorter.strip_suffix(')') {
            Some(inner) if !has_open => inner,
            _ => shorter,
        };
        if shorter.len() == url.len() {
            break;
        }
        url = shorter;
    }
    (!url.is_empty()).then(|| from + url.len())
}

/// Words before a version or a section, which is numbered as an address is.
const NUMBERED: [&str; 11] =
    ["version", "v", "section", "sec.", "§", "chapter", "kapitel", "abschnitt", "release", "build", "capítulo"];

/// Where an address of IPv4 that begins here ends. Addresses of no single machine are none.
pub(super) fn ip4(text: &str, at: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let of_address = |byte: &u8| byte.is_ascii_digit() || *byte == b'.';
    let run = bytes[at..].iter().take(16).take_while(|byte| of_address(byte)).count();
    let address = text[at..at + run].trim_end_matches('.');
    let parsed: Ipv4Addr = address.parse().ok()?;
    let end = at + address.len();
    let octets = parsed.octets();
    let nobody = parsed.is_loopback() || parsed.is_unspecified() || octets[0] == 255 || octets[0] == 0;
    // Sections and versions are numbered so.
    let is_section = octets.iter().all(|octet| *octet < 10) && !is_resolver(octets);
    let goes_on = text[end..].starts_with(|c: char| c.is_alphanumeric() || c == '_' || c == '-')
        || text[end..].strip_prefix('.').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let is_numbered = {
        // The longest of the words has fourteen bytes.
        let near = &text[text.floor_char_boundary(at.saturating_sub(32))..at];
        let before = near.trim_end().to_lowercase();
        NUMBERED.iter().any(|word| before.ends_with(word))
    };
    (!nobody && !is_section && !goes_on && !is_numbered).then_some(end)
}

/// Well-known name servers have such numbers.
fn is_resolver(octets: [u8; 4]) -> bool {
    matches!(octets, [8, 8, 8, 8] | [8, 8, 4, 4] | [9, 9, 9, 9])
}

/// Where an address of IPv6 that begins here ends: at least four groups, one with a digit, so that no name in code is one.
pub(super) fn ip6(text: &str, at: usize) -> Option<usize> {
    let bytes = &text.as_bytes()[at..];
    if !bytes.iter().take(5).any(|byte| *byte == b':') {
        return None;
    }
    let run = bytes.iter().take(46).take_while(|byte| byte.is_ascii_hexdigit() || **byte == b':').count();
    let address = &text[at..at + run];
    let address = if address.ends_with("::") { address } else { address.trim_end_matches(':') };
    let parsed: Ipv6Addr = address.parse().ok()?;
    let groups = address.split(':').filter(|group| !group.is_empty()).count();
    let place = Place::new(text, at)?;
    let ends = !text[at + address.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_');
    let good = groups >= 4 && address.bytes().any(|byte| byte.is_ascii_digit()) && !parsed.is_loopback();
    (good && ends && !place.text[..at].ends_with(':')).then(|| at + address.len())
}
