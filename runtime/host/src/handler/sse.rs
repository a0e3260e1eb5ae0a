//! Server-sent events, as much of them as streams of answers use.
//!
//! Crates that read them do so from asynchronous streams and without a bound on a line; this is read by a thread that blocks.
//!
//! Source: <https://html.spec.whatwg.org/multipage/server-sent-events.html>, section 9.2.6.

use std::io::{self, BufRead, ErrorKind};

/// Longest line and longest event, in bytes: more is no answer but an attack or a mistake.
const LIMIT: usize = 1 << 20;

/// The `data` of each event of a stream. Comments, other fields and events without data are skipped.
pub struct Events<R> {
    reader: R,
    /// The last line ended in CR: an LF that comes next belongs to it.
    after_cr: bool,
    over: bool,
}

impl<R: BufRead> Events<R> {
    /// Reads events.
    pub fn new(reader: R) -> Self {
        Self { reader, after_cr: false, over: false }
    }

    /// The next line without its end, which may be LF, CRLF or CR; `None` at the end of the stream. As the standard has it, what is not
    /// UTF-8 becomes U+FFFD.
    fn line(&mut self) -> io::Result<Option<String>> {
        let mut line = Vec::new();
        loop {
            let bytes = match self.reader.fill_buf() {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                bytes => bytes?,
            };
            if bytes.is_empty() {
                return Ok((!line.is_empty()).then(|| String::from_utf8_lossy(&line).into_owned()));
            }
            if std::mem::take(&mut self.after_cr) && bytes[0] == b'\n' {
                self.reader.consume(1);
                continue;
            }
            let end = memchr::memchr2(b'\r', b'\n', bytes);
            line.extend_from_slice(&bytes[..end.unwrap_or(bytes.len())]);
            self.after_cr = end.is_some_and(|end| bytes[end] == b'\r');
            let read = end.map_or(bytes.len(), |end| end + 1);
            self.reader.consume(read);
            if line.len() > LIMIT {
                return Err(io::Error::new(ErrorKind::InvalidData, "a line of the answer is too long"));
            }
            if end.is_some() {
                return Ok(Some(String::from_utf8_lossy(&line).into_owned()));
            }
        }
    }

    fn event(&mut self) -> io::Result<Option<String>> {
        let mut data = String::new();
        loop {
            let Some(line) = self.line()? else {
                // The standard drops an event without its empty line; some servers end their last one so.
                self.over = true;
                return Ok(Some(data).filter(|data| !data.is_empty()));
            };
            if line.is_empty() && !data.is_empty() {
                return Ok(Some(data));
            }
            // A byte order mark may stand before the first line.
            let line = line.trim_start_matches('\u{feff}');
            let Some(value) = line.strip_prefix("data:") else { continue };
            let value = value.strip_prefix(' ').unwrap_or(value);
            if data.len() + value.len() > LIMIT {
                return Err(io::Error::new(ErrorKind::InvalidData, "an event of the answer is too long"));
            }
            if !data.is_empty() {
                data.push('\n');
            }
            data.push_str(value);
        }
    }
}

impl<R: BufRead> Iterator for Events<R> {
    type Item = io::Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let event = self.event();
        self.over |= event.is_err();
        event.transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However the bytes are cut on their way.
    fn check(text: impl AsRef<[u8]>, want: &[&str]) {
        let text = text.as_ref();
        for cut in 1..=text.len() + 1 {
            let events: io::Result<Vec<String>> = Events::new(io::BufReader::with_capacity(cut, text)).collect();
            assert_eq!(events.expect("it can be read"), want, "{text:?} in pieces of {cut}");
        }
    }

    #[test]
    fn events_are_their_data() {
        check("", &[]);
        check("data: a\n\ndata:b\n\n", &["a", "b"]);
        check(": ping\n\nevent: x\nid: 3\ndata: a\n: ping\ndata: b\n\n", &["a\nb"]);
        check("data: a\n\ndata: [DONE]", &["a", "[DONE]"]);
        check("retry: 3\n\nother: b\n\ndatum: c\n\n", &[]);
        check("data: é🦊\n\n", &["é🦊"]);
    }

    #[test]
    fn a_line_ends_in_lf_crlf_or_cr() {
        check("data: a\r\n\r\ndata:  b\r\n\r\n", &["a", " b"]);
        check("data: a\r\rdata: b\rdata: c\r\r", &["a", "b\nc"]);
        check("data: a\n\r\ndata: b\r\n\rdata: c", &["a", "b", "c"]);
    }

    #[test]
    fn events_without_data_are_none() {
        check("\n\n\ndata\n\ndata:\n\ndata: \n\ndata: a\n\n", &["a"]);
    }

    #[test]
    fn a_byte_order_mark_and_bytes_that_are_not_utf8_lose_nothing_else() {
        check("\u{feff}data: a\n\n", &["a"]);
        check(b"data: a\xff\xe2\x82b\n\n", &["a\u{fffd}\u{fffd}b"]);
    }

    #[test]
    fn a_line_without_end_is_an_error_and_no_memory() {
        let mut endless = Events::new(io::BufReader::new(io::repeat(b'x')));
        assert!(endless.next().expect("an item").is_err());
        assert!(endless.next().is_none());
        let lines = "data: x\n".repeat(LIMIT);
        assert!(Events::new(lines.as_bytes()).next().expect("an item").is_err());
    }
}
