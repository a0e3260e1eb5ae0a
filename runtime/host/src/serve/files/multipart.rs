//! Forms as browsers and SDKs send them with files: `multipart/form-data`.
//!
//! Source: RFC 7578. Parts are read as they come: of the body no more is in memory than a piece and what may be the beginning of a
//! boundary.

use std::io::{self, Read};

use memchr::memmem;

/// Longest head of a part, in bytes.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Longest boundary: RFC 2046, section 5.1.1.
const BOUNDARY_BYTES_MAX: usize = 70;
/// Bytes that are read at once.
const PIECE: usize = 64 << 10;

/// What is wrong with a form.
#[derive(Debug)]
pub enum Wrong {
    /// It is no form, in words.
    Form(String),
    /// It cannot be read any further.
    Read(io::Error),
}

impl From<io::Error> for Wrong {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

fn wrong(words: &str) -> Wrong {
    Wrong::Form(words.to_owned())
}

/// What a part says of itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Head {
    /// The field's name.
    pub name: String,
    /// The file's, if it is one.
    pub filename: Option<String>,
}

/// The boundary that a header `content-type` names.
pub fn boundary(content_type: &str) -> Option<String> {
    let (kind, rest) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let found = parameters(rest).into_iter().find(|(name, _)| name == "boundary").map(|(_, value)| value)?;
    (!found.is_empty() && found.len() <= BOUNDARY_BYTES_MAX && found.is_ascii()).then_some(found)
}

/// A form that is read from its beginning to its end.
pub struct Multipart<R> {
    reader: R,
    /// Line break and boundary.
    delimiter: Vec<u8>,
    /// What was read and not given.
    buffer: Vec<u8>,
    ended: bool,
    /// The buffer begins behind a boundary.
    at_head: bool,
}

impl<R: Read> Multipart<R> {
    /// A form with this boundary.
    pub fn new(reader: R, boundary: &str) -> Self {
        let delimiter = format!("\r\n--{boundary}").into_bytes();
        // The first boundary stands at the beginning of the body, or behind words for people.
        Self { reader, delimiter, buffer: b"\r\n".to_vec(), ended: false, at_head: false }
    }

    /// The next part. What was not read of the one before is passed over.
    ///
    /// # Errors
    /// When the form breaks off, or a head is malformed or too long.
    pub fn next_part(&mut self) -> Result<Option<Head>, Wrong> {
        if !self.at_head {
            self.read_part(|_| Ok(()))?;
        }
        self.at_head = false;
        while self.buffer.len() < 2 && self.fill()? {}
        if self.buffer.starts_with(b"--") {
            return Ok(None);
        }
        let end = loop {
            if let Some(end) = memmem::find(&self.buffer, b"\r\n\r\n") {
                break end;
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(wrong("the head of a part is too long"));
            }
            if !self.fill()? {
                return Err(wrong("it breaks off in the head of a part"));
            }
        };
        if end > HEAD_BYTES_MAX {
            return Err(wrong("the head of a part is too long"));
        }
        let head =
            String::from_utf8(self.buffer[..end].to_vec()).map_err(|_| wrong("the head of a part is not UTF-8"))?;
        // The line break that ends the head may be the one of a boundary that follows at once.
        self.buffer.drain(..end + 2);
        let of_head = parsed(&head)?;
        if !self.buffer.starts_with(&self.delimiter) {
            self.need(self.delimiter.len())?;
        }
        if !self.buffer.starts_with(&self.delimiter) {
            self.buffer.drain(..2);
        }
        Ok(Some(of_head))
    }

    /// Gives the bytes of the part to `take`, in pieces.
    ///
    /// # Errors
    /// When the form breaks off, or as `take`.
    pub fn read_part(&mut self, mut take: impl FnMut(&[u8]) -> Result<(), Wrong>) -> Result<(), Wrong> {
        loop {
            if let Some(at) = memmem::find(&self.buffer, &self.delimiter) {
                take(&self.buffer[..at])?;
                self.buffer.drain(..at + self.delimiter.len());
                self.at_head = true;
                return Ok(());
            }
            // The rest may be the beginning of a boundary.
            let sure = self.buffer.len().saturating_sub(self.delimiter.len() - 1);
            take(&self.buffer[..sure])?;
            self.buffer.drain(..sure);
            if !self.fill()? {
                return Err(wrong("it breaks off before its last boundary"));
            }
        }
    }

    /// The bytes of a field that is no file.
    ///
    /// # Errors
    /// When it is longer than `most`, is no text, or as [`Multipart::read_part`].
    pub fn text(&mut self, most: usize) -> Result<String, Wrong> {
        let mut bytes = Vec::new();
        self.read_part(|piece| {
            if bytes.len() + piece.len() > most {
                return Err(wrong("a field is too long"));
            }
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        String::from_utf8(bytes).map_err(|_| wrong("a field is not UTF-8"))
    }

    fn need(&mut self, bytes: usize) -> Result<(), Wrong> {
        while self.buffer.len() < bytes && self.fill()? {}
        Ok(())
    }

    fn fill(&mut self) -> Result<bool, Wrong> {
        if self.ended {
            return Ok(false);
        }
        let from = self.buffer.len();
        self.buffer.resize(from + PIECE, 0);
        let read = loop {
            match self.reader.read(&mut self.buffer[from..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        self.buffer.truncate(from + *read.as_ref().unwrap_or(&0));
        self.ended = read? == 0;
        Ok(!self.ended)
    }
}

/// The name of the field and the file in the head of a part.
fn parsed(head: &str) -> Result<Head, Wrong> {
    for line in head.split("\r\n") {
        let Some((name, value)) = line.split_once(':') else { continue };
        if !name.trim().eq_ignore_ascii_case("content-disposition") {
            continue;
        }
        let (kind, rest) = value.split_once(';').unwrap_or((value, ""));
        if !kind.trim().eq_ignore_ascii_case("form-data") {
            break;
        }
        let mut parameters = parameters(rest);
        let mut take = |wanted: &str| {
            let at = parameters.iter().position(|(name, _)| name == wanted)?;
            Some(parameters.swap_remove(at).1)
        };
        if let Some(name) = take("name") {
            return Ok(Head { name, filename: take("filename") });
        }
        break;
    }
    Err(wrong("a part does not say which field it is"))
}

/// Parameters of a header: `name=value` or `name="value"`, with a `;` between two.
fn parameters(text: &str) -> Vec<(String, String)> {
    let (mut found, mut rest) = (Vec::new(), text);
    while let Some((name, value)) = rest.split_once('=') {
        let name = name.trim_matches([' ', '\t', ';']).to_ascii_lowercase();
        let value = value.trim_start();
        let (value, after) = match value.strip_prefix('"') {
            Some(quoted) => unquoted(quoted),
            None => {
                let (value, after) = value.split_once(';').unwrap_or((value, ""));
                (value.trim().to_owned(), after)
            }
        };
        found.push((name, value));
        rest = after;
    }
    found
}

/// A text in quotes, whose first is gone, and what follows it. Browsers write `%22` for a quote, other programs `\"`.
fn unquoted(text: &str) -> (String, &str) {
    let mut out = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return (out.replace("%22", "\""), &text[at + 1..]),
            '\\' if text[at + 1..].starts_with(['"', '\\']) => out.extend(letters.next().map(|(_, letter)| letter)),
            letter => out.push(letter),
        }
    }
    (out, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORM: &[u8] = b"for people\r\n--xx\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--xx  \r\ncontent-disposition: form-data; name=\"file\"; filename=\"a \\\"b%22.jsonl\"\r\nContent-Type: application/octet-stream\r\n\r\n{\"a\":1}\r\n--x\r\n\r\n--xx\r\nContent-Disposition: form-data; name=\"empty\"\r\n\r\n\r\n--xx--\r\n";

    /// Gives so many bytes at once.
    struct Dripping<'a>(&'a [u8], usize);

    impl Read for Dripping<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(self.0.len()).min(buffer.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn all(form: &[u8], piece: usize) -> Result<Vec<(Head, Vec<u8>)>, Wrong> {
        let mut form = Multipart::new(Dripping(form, piece), "xx");
        let mut parts = Vec::new();
        while let Some(head) = form.next_part()? {
            let mut bytes = Vec::new();
            form.read_part(|piece| {
                bytes.extend_from_slice(piece);
                Ok(())
            })?;
            parts.push((head, bytes));
        }
        Ok(parts)
    }

    #[test]
    fn a_form_is_read_however_it_comes() -> Result<(), Wrong> {
        for piece in [1, 2, 3, 7, 64, 10_000] {
            let parts = all(FORM, piece)?;
            let head =
                |name: &str, filename: Option<&str>| Head { name: name.into(), filename: filename.map(str::to_owned) };
            let wanted = [
                (head("purpose", None), b"fine-tune".to_vec()),
                (head("file", Some("a \"b\".jsonl")), b"{\"a\":1}\r\n--x\r\n".to_vec()),
                (head("empty", None), Vec::new()),
            ];
            assert_eq!(parts, wanted, "{piece}");
        }
        Ok(())
    }

    #[test]
    fn a_form_that_is_cut_anywhere_is_refused() {
        // The last line break may be missing.
        for cut in 0..FORM.len() - 4 {
            assert!(matches!(all(&FORM[..cut], 5), Err(Wrong::Form(_))), "{cut}");
        }
    }

    #[test]
    fn heads_are_bounded_and_say_their_field() {
        let long = format!("--xx\r\nX: {}\r\n\r\n", "y".repeat(HEAD_BYTES_MAX));
        for (form, words) in [
            (long.as_str(), "too long"),
            ("--xx\r\nX: 1\r\n\r\nz\r\n--xx--", "which field"),
            ("--xx\r\nContent-Disposition: attachment; name=\"a\"\r\n\r\nz\r\n--xx--", "which field"),
            ("--xx\r\n\r\nz\r\n--xx--", "which field"),
        ] {
            let Err(Wrong::Form(seen)) = all(form.as_bytes(), 9) else { panic!("{form}") };
            assert!(seen.contains(words), "{seen}");
        }
        assert_eq!(boundary("multipart/form-data; boundary=\"a b\"").as_deref(), Some("a b"));
        assert_eq!(boundary("Multipart/Form-Data; charset=x; boundary=ab").as_deref(), Some("ab"));
        for none in
            ["multipart/form-data", "application/json", "multipart/form-data; boundary=", "multipart/mixed; boundary=a"]
        {
            assert_eq!(boundary(none), None, "{none}");
        }
        assert_eq!(boundary(&format!("multipart/form-data; boundary={}", "x".repeat(71))), None);
    }
}
