//! Windows-1252 as UTF-8, as Excel saves a table as plain CSV.
//!
//! A text is taken for it from its first byte that is no ASCII on, where that is no UTF-8: one that has begun as UTF-8 is damaged. A byte
//! that Windows-1252 assigns nothing to stays as it is, so that it is refused where it stands.

use std::cell::Cell;
use std::io::{self, Read};

use super::pieces::{Joined, Pieces, read_more};

/// What the bytes from 0x80 to 0x9F are; NUL: nothing. Those behind are as in Latin-1.
const ASSIGNED: [char; 32] = [
    '€', '\0', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\0', 'Ž', '\0', '\0', '‘', '’', '“', '”', '•',
    '–', '—', '˜', '™', 'š', '›', 'œ', '\0', 'ž', 'Ÿ',
];

/// The character of a byte; `None`: there is none.
pub(super) fn character(byte: u8) -> Option<char> {
    match byte {
        0x80..0xa0 => Some(ASSIGNED[usize::from(byte) - 0x80]).filter(|c| *c != '\0'),
        byte => Some(char::from(byte)),
    }
}

/// What is known of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    /// So far it is either.
    Ascii,
    Utf8,
    Windows1252,
}

impl Encoding {
    /// What the first byte that is no ASCII says, and those behind it. `is_end`: nothing follows.
    fn of(bytes: &[u8], is_end: bool) -> Option<Self> {
        let Some(first) = bytes.iter().position(|byte| !byte.is_ascii()) else { return Some(Self::Ascii) };
        let rest = &bytes[first..bytes.len().min(first + 4)];
        match std::str::from_utf8(rest) {
            Ok(_) => Some(Self::Utf8),
            Err(error) if error.valid_up_to() > 0 => Some(Self::Utf8),
            // Half a character: what follows tells.
            Err(error) if error.error_len().is_none() && !is_end => None,
            Err(_) => Some(Self::Windows1252),
        }
    }
}

/// The beginning of a text as UTF-8, if it is Windows-1252.
pub(super) fn head(bytes: &[u8]) -> Option<Vec<u8>> {
    let is_other = Encoding::of(bytes, false) == Some(Encoding::Windows1252);
    is_other.then(|| {
        let mut made = Vec::new();
        transcode(bytes, &mut made);
        made
    })
}

fn transcode(bytes: &[u8], made: &mut Vec<u8>) {
    for byte in bytes {
        match character(*byte) {
            Some(c) => made.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            None => made.push(*byte),
        }
    }
}

/// A text as UTF-8, whichever of the two it is.
struct Windows1252<'e, R> {
    bytes: R,
    /// What it has turned out to be.
    encoding: &'e Cell<Encoding>,
    read: Vec<u8>,
    seen: Seen,
}

/// Reads a text as UTF-8. `encoding`: ASCII before it is read; tells later what it is.
pub(super) fn as_utf8<'e, R: Read>(bytes: R, encoding: &'e Cell<Encoding>) -> impl Read + use<'e, R> {
    Joined::new(Windows1252 { bytes, encoding, read: Vec::new(), seen: Seen::default() })
}

/// What a text in Windows-1252 holds: another encoding shows.
#[derive(Default)]
struct Seen {
    /// Characters beyond ASCII that are UTF-8, and bytes beyond ASCII that are not.
    utf8: usize,
    stray: usize,
    /// Letters of ASCII, and letters beyond.
    plain: usize,
    accented: usize,
}

impl Seen {
    fn add(&mut self, bytes: &[u8]) {
        for chunk in bytes.utf8_chunks() {
            self.utf8 += chunk.valid().chars().filter(|c| !c.is_ascii()).count();
            self.stray += chunk.invalid().len();
        }
        self.plain += bytes.iter().filter(|byte| byte.is_ascii_alphabetic()).count();
        self.accented += bytes.iter().filter(|byte| **byte >= 0xc0).count();
    }

    /// Why it is no such text, if it is none.
    fn other(&self) -> Option<&'static str> {
        if self.utf8 > self.stray {
            return Some(
                "most of it is UTF-8, and some bytes are not: it is damaged, or was put together of two files; save it as UTF-8",
            );
        }
        let letters = self.plain + self.accented;
        (self.accented > 20 && 3 * self.accented > letters)
            .then_some("it is neither UTF-8 nor Windows-1252, as most letters would have accents; save it as UTF-8")
    }
}

impl<R: Read> Pieces for Windows1252<'_, R> {
    fn more(&mut self, made: &mut Vec<u8>) -> io::Result<()> {
        loop {
            let count = read_more(&mut self.bytes, &mut self.read)?;
            if self.encoding.get() == Encoding::Ascii {
                let Some(encoding) = Encoding::of(&self.read, count == 0) else { continue };
                self.encoding.set(encoding);
            }
            match self.encoding.get() {
                Encoding::Windows1252 => {
                    self.seen.add(&self.read);
                    if let Some(other) = self.seen.other().filter(|_| count == 0) {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, other));
                    }
                    transcode(&self.read, made);
                }
                _ => made.extend_from_slice(&self.read),
            }
            self.read.clear();
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&[u8]]) -> (Vec<u8>, Encoding) {
        let encoding = Cell::new(Encoding::Ascii);
        let chained =
            pieces.iter().fold(Box::new(io::empty()) as Box<dyn Read>, |all, piece| Box::new(all.chain(*piece)));
        let mut made = Vec::new();
        as_utf8(chained, &encoding).read_to_end(&mut made).unwrap();
        (made, encoding.get())
    }

    #[test]
    fn a_text_is_windows_1252_where_its_first_foreign_byte_is_no_utf8() {
        let long = vec![b'a'; 9000];
        for (pieces, expected, encoding) in [
            (&[&b"plain"[..]][..], "plain".as_bytes(), Encoding::Ascii),
            (&[b"gr\xf6\xdfer \x80 5 \x93so\x94"], "größer € 5 “so”".as_bytes(), Encoding::Windows1252),
            (&[b"caf\xe9"], "café".as_bytes(), Encoding::Windows1252),
            // A character in two pieces, and one that does not go on.
            (&[b"caf\xc3", b"\xa9 ok"], "café ok".as_bytes(), Encoding::Utf8),
            (&[b"\xc9", b",x"], "É,x".as_bytes(), Encoding::Windows1252),
            // It has begun as UTF-8, and is damaged.
            (&[b"caf\xc3\xa9 \xe9"], b"caf\xc3\xa9 \xe9", Encoding::Utf8),
            // Nothing is assigned to this one.
            (&[b"\xe9\x81"], b"\xc3\xa9\x81", Encoding::Windows1252),
        ] {
            assert_eq!(read(pieces), (expected.to_vec(), encoding), "{pieces:?}");
        }
        let (made, encoding) = read(&[&long, b"\xe9"]);
        assert_eq!((made.len(), encoding), (9002, Encoding::Windows1252));
    }

    /// A table that is nearly UTF-8, or of another alphabet, would be learned as signs that nobody wrote.
    #[test]
    fn a_damaged_text_and_one_of_another_alphabet_are_refused() {
        let refusal = |bytes: &[u8]| {
            let encoding = Cell::new(Encoding::Ascii);
            let mut made = Vec::new();
            as_utf8(bytes, &encoding).read_to_end(&mut made).expect_err("it is refused").to_string()
        };
        let damaged = [b"first \x96 row,ok\n".as_slice(), "Größe,Länge,Höhe\n".as_bytes()].concat();
        assert!(refusal(&damaged).contains("most of it is UTF-8"));
        // Twenty-eight letters of Windows-1251, which are no Latin ones.
        let russian: Vec<u8> = (0xe0..0xfc).chain(*b",privet").collect();
        assert!(refusal(&russian).contains("most letters would have accents"));
    }
}
