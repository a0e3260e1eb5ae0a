//! What a client hears of a failure: the client's own file and line, and what is wrong there, and not where things are on this machine or whom it
//! asks. The log of the job and the server's messages have all of it.

use crate::address::is_machine;

/// Longest message, in characters.
const MESSAGE_MAX: usize = 2000;
/// What stands in the place of what is left out.
const REST: &str = "whoever runs the server finds the rest in its messages";

/// A message of this program for a client. `names`: paths of this machine, and what the client calls what is there. Any other part of the message
/// that names a path or an address is left out; parts are what stands between `: `, so that a path with spaces goes whole.
pub fn to_client(message: &str, names: &[(String, String)]) -> String {
    // A client may call a file as this machine calls a directory: its names are put in last.
    let mark = |number: usize| format!("\u{0}{number}\u{0}");
    let mut longest: Vec<(usize, &String)> = names.iter().map(|(path, _)| path).enumerate().collect();
    longest.sort_by_key(|(_, path)| std::cmp::Reverse(path.len()));
    let message = message.replace('\u{0}', "");
    let message =
        longest.into_iter().fold(message, |message, (number, path)| message.replace(path.as_str(), &mark(number)));
    let mut hides = false;
    let mut lines: Vec<String> = Vec::new();
    for line in message.lines() {
        let parts: Vec<&str> = line.split(": ").collect();
        let kept: Vec<&str> = parts.iter().copied().filter(|part| !leads_somewhere(part)).collect();
        hides |= kept.len() < parts.len();
        // What is left of advice would be misread.
        let is_advice = ["hint", "note", "help"].contains(&parts[0].trim());
        if kept.iter().any(|part| !part.trim().is_empty()) && !(is_advice && kept.len() < parts.len()) {
            lines.push(kept.join(": "));
        }
    }
    if lines.is_empty() {
        lines.push("the training failed on this machine".to_owned());
    }
    if hides {
        lines.push(REST.to_owned());
    }
    let told =
        names.iter().enumerate().fold(lines.join("\n"), |told, (number, (_, name))| told.replace(&mark(number), name));
    told.chars().take(MESSAGE_MAX).collect()
}

/// Returns true if a text names a path from a root, an address of the net or a machine's number.
fn leads_somewhere(text: &str) -> bool {
    let words =
        || text.split(|c: char| c.is_whitespace() || "\"'`()[]{}<>,;=".contains(c)).filter(|word| !word.is_empty());
    let is_path = |word: &str| {
        let drive = word.as_bytes();
        let is_drive =
            drive.len() > 2 && drive[0].is_ascii_alphabetic() && drive[1] == b':' && [b'\\', b'/'].contains(&drive[2]);
        let is_rooted = word.len() > 1 && ["/", "~/", "./", "../", "\\\\"].iter().any(|root| word.starts_with(root));
        is_drive || is_rooted || word.contains("://") || word.contains(":/")
    };
    words().any(|word| is_path(word) || is_machine(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(message: &str, wanted: &str) {
        let name = |path: &str, name: &str| (path.to_owned(), name.to_owned());
        let names = [
            name("/srv/home/files/file-1/content.jsonl", "rows.jsonl"),
            name("/srv/home", "tiny"),
            name("/srv/home/files/file-2/content.csv", "/etc/passwd.csv"),
        ];
        assert_eq!(to_client(message, &names), wanted, "{message}");
    }

    #[test]
    fn a_client_hears_of_its_file_and_line() {
        for (message, wanted) in [
            (
                "/srv/home/files/file-1/content.jsonl: line 3: bad\nhint: mend it",
                "rows.jsonl: line 3: bad\nhint: mend it",
            ),
            ("/srv/home/files/file-2/content.csv: line 1: no header", "/etc/passwd.csv: line 1: no header"),
            ("/srv/home: its context is 256 tokens", "tiny: its context is 256 tokens"),
            (
                "the loss is not finite in step 7; lower the learning rate",
                "the loss is not finite in step 7; lower the learning rate",
            ),
            ("a row of rows.jsonl:3 and/or 12:30 and 1/2: bad", "a row of rows.jsonl:3 and/or 12:30 and 1/2: bad"),
        ] {
            check(message, wanted);
        }
    }

    #[test]
    fn paths_and_addresses_stay_here() {
        let rest = |told: &str| format!("{told}\n{REST}");
        for (message, told) in [
            ("/srv/other/model.safetensors: cannot read: No such file", "cannot read: No such file"),
            ("cannot open `/home/Ada Lovelace/x y.json`: permission denied", "permission denied"),
            ("base: C:\\Users\\ada\\model: is gone", "base: is gone"),
            ("cannot reach https://hub.example/api: refused", "refused"),
            ("connect to 10.0.0.7:8080: refused", "refused"),
            ("connect to [fe80::1]:80: refused", "refused"),
            ("connect to cache.school.example:3128: refused", "refused"),
            ("~/models/tiny", "the training failed on this machine"),
            ("it is full\nhint: set HOMEROOM_HOME=/other/disk and start anew", "it is full"),
            ("hint: remove: /x", "the training failed on this machine"),
            ("file=/srv/x", "the training failed on this machine"),
        ] {
            check(message, &rest(told));
        }
        assert_eq!(to_client(&"x".repeat(5000), &[]).len(), MESSAGE_MAX);
    }
}
