//! Addresses of machines in texts that are passed on: whoever reads those has no business with where things are.

use std::net::{IpAddr, Ipv4Addr};

/// Endings of files: `rows.jsonl:3` is a file's line, and hosts have other endings.
const FILES: [&str; 5] = ["jsonl", "json", "csv", "tsv", "gz"];

/// Returns true if a word is the address of a machine: its number in the net, with or without a port, or its name with a port.
pub fn is_machine(word: &str) -> bool {
    let word = word.trim_end_matches(['.', ':', '!', '?']);
    let host = word.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).map(|(host, _)| host);
    let is_address = |text: &str| {
        text.contains("::") && text.parse::<IpAddr>().is_ok()
            || text.split(':').any(|part| part.parse::<Ipv4Addr>().is_ok())
    };
    let is_named = |host: &str| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        let ending = host.rsplit_once('.').map(|(_, ending)| ending);
        host == "localhost"
            || host.chars().all(is_plain)
                && ending.is_some_and(|ending| {
                    ending.starts_with(|c: char| c.is_ascii_alphabetic()) && !FILES.contains(&ending)
                })
    };
    is_address(word) || host.is_some_and(|host| is_address(host) || is_named(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_told_from_lines_times_and_numbers() {
        for (word, wanted) in [
            ("10.0.0.7", true),
            ("10.0.0.7:8000", true),
            ("tcp:10.0.0.7:8000:", true),
            ("::1", true),
            ("fe80::1", true),
            ("localhost:8080", true),
            ("gpu3.school.lan:8000.", true),
            ("rows.jsonl:3", false),
            ("12:30", false),
            ("3.5:1", false),
            ("0.7", false),
            ("messages.0.content:", false),
            ("localhost", false),
            ("std::vector", false),
            ("", false),
        ] {
            assert_eq!(is_machine(word), wanted, "{word}");
        }
    }
}
