//! Server-sent events, as much of them as streams of answers use.
//!
//! Source: <https://html.spec.whatwg.org/multipage/server-sent-events.html>, section 9.2.6.

use std::io::{self, BufRead, Read};

/// Longest line and longest event, in bytes: more is no answer but an attack or a mistake.
const LIMIT: u64 = 1 << 20;

/// The `data` of each event of a stream. Comments and other fields are passed over.
pub struct Events<R> {
    reader: R,
    over: bool,
}

impl<R: BufRead> Events<R> {
    /// Reads events.
    pub fn new(reader: R) -> Self {
        Self { reader, over: false }
    }

    /// The next line without its end, which may be LF or CRLF; `None` at the end of the stream.
    fn line(&mut self) -> io::Result<Option<String>> {
        let mut line = Vec::new();
        let read = self.reader.by_ref().take(LIMIT).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(None);
        }
        if line.last() != Some(&b'\n') && read as u64 == LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line of the answer is too long"));
        }
        while line.last().is_some_and(|end| b"\r\n".contains(end)) {
            line.pop();
        }
        let line = String::from_utf8(line);
        line.map(Some).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the answer is not UTF-8"))
    }

    fn event(&mut self) -> io::Result<Option<String>> {
        let mut data: Option<String> = None;
        loop {
            let Some(line) = self.line()? else {
                // The standard drops an event without its empty line; some servers end their last one so.
                self.over = true;
                return Ok(data);
            };
            if line.is_empty() {
                match data.take() {
                    Some(data) => return Ok(Some(data)),
                    None => continue,
                }
            }
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            if field != "data" {
                continue;
            }
            let value = value.strip_prefix(' ').unwrap_or(value);
            match &mut data {
                None => data = Some(value.to_owned()),
                Some(data) if (data.len() + value.len()) as u64 <= LIMIT => {
                    data.push('\n');
                    data.push_str(value);
                }
                Some(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "an event is too long")),
            }
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

    fn check(text: &str, want: &[&str]) {
        let events: io::Result<Vec<String>> = Events::new(text.as_bytes()).collect();
        assert_eq!(events.expect("it can be read"), want, "{text:?}");
    }

    #[test]
    fn events_are_their_data() {
        check("", &[]);
        check("data: a\n\ndata:b\n\n", &["a", "b"]);
        check("data: a\r\n\r\ndata:  b\r\n\r\n", &["a", " b"]);
        check(": ping\n\nevent: x\nid: 3\ndata: a\n: ping\ndata: b\n\n", &["a\nb"]);
        check("\n\n\ndata\n\ndata:\n\n", &["", ""]);
        check("data: a\n\ndata: [DONE]", &["a", "[DONE]"]);
        check("retry: 3\n\nother: b\n\n", &[]);
    }

    #[test]
    fn a_line_without_end_is_an_error_and_no_memory() {
        let mut endless = Events::new(io::BufReader::new(io::repeat(b'x')));
        assert!(endless.next().expect("an item").is_err());
        assert!(endless.next().is_none());
    }
}
