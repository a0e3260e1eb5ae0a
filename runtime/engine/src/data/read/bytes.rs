//! The bytes of a file as text in UTF-8: unpacked where they are gzip, and without a byte-order mark; UTF-16 with one becomes UTF-8.

use std::io::{self, BufReader, Cursor, Read};
use std::path::Path;

use anyhow::{Context, Result, bail};
use flate2::bufread::MultiGzDecoder;

use super::kind::{is_gzip, refuse_other};
use super::pieces::{Joined, Pieces, read_more};

/// What is looked at to tell what a file is.
const HEAD_BYTES: usize = 1 << 16;

/// A text, and what it begins with.
pub(in crate::data) struct Text<'a> {
    /// Its first bytes, which are read again from `rest`.
    pub head: Vec<u8>,
    /// Whether that is all of it.
    pub is_whole: bool,
    /// Whether a byte-order mark said that it is UTF-8.
    pub is_marked: bool,
    /// All of it.
    pub bytes: BufReader<Box<dyn Read + 'a>>,
}

/// Opens a text. `name` is what messages call it.
///
/// # Errors
/// When it cannot be read, or is something else, such as a workbook: says what to do with that.
pub(in crate::data) fn text<'a>(name: &Path, bytes: impl Read + 'a) -> Result<Text<'a>> {
    let place = || name.display().to_string();
    let (head, bytes) = peek(Box::new(bytes)).with_context(place)?;
    let (head, bytes) = match is_gzip(&head) {
        true => peek(Box::new(Unpacked(MultiGzDecoder::new(BufReader::new(bytes))))).with_context(place)?,
        false => (head, bytes),
    };
    let (head, bytes) = match head.as_slice() {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => {
            bail!("{}: text in UTF-32\nhint: save it as UTF-8", name.display())
        }
        [0xff, 0xfe, ..] => peek(Box::new(Joined::new(Utf16::new(bytes, u16::from_le_bytes)))).with_context(place)?,
        [0xfe, 0xff, ..] => peek(Box::new(Joined::new(Utf16::new(bytes, u16::from_be_bytes)))).with_context(place)?,
        _ => (head, bytes),
    };
    let is_marked = head.starts_with(b"\xef\xbb\xbf");
    let (head, bytes) = match head.strip_prefix(b"\xef\xbb\xbf") {
        Some(_) => {
            let mut bytes = bytes;
            bytes.read_exact(&mut [0; 3]).with_context(place)?;
            peek(bytes).with_context(place)?
        }
        None => (head, bytes),
    };
    refuse_other(name, &head)?;
    let is_whole = head.len() < HEAD_BYTES;
    Ok(Text { head, is_whole, is_marked, bytes: BufReader::with_capacity(HEAD_BYTES, bytes) })
}

/// The first bytes, and all of them.
fn peek<'a>(mut bytes: Box<dyn Read + 'a>) -> io::Result<(Vec<u8>, Box<dyn Read + 'a>)> {
    let mut head = Vec::new();
    bytes.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head)?;
    let all = Cursor::new(head.clone()).chain(bytes);
    Ok((head, Box::new(all)))
}

/// What was packed. An archive that is cut off or damaged says so.
struct Unpacked<R>(MultiGzDecoder<R>);

impl<R: io::BufRead> Read for Unpacked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::other("the gzip file is cut off: fetch or copy it again"),
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
                io::Error::other("the gzip file is damaged: fetch or copy it again")
            }
            _ => error,
        })
    }
}

/// UTF-16 as UTF-8.
struct Utf16<R> {
    bytes: R,
    unit: fn([u8; 2]) -> u16,
    /// Bytes that were read and are no text yet: half a unit, or the first half of a pair.
    left: Vec<u8>,
    /// Bytes before those of `left`.
    before: u64,
}

impl<R: Read> Utf16<R> {
    fn new(bytes: R, unit: fn([u8; 2]) -> u16) -> Self {
        Self { bytes, unit, left: Vec::new(), before: 0 }
    }
}

impl<R: Read> Pieces for Utf16<R> {
    fn more(&mut self, made: &mut Vec<u8>) -> io::Result<()> {
        let wrong = |at: u64, what: &str| {
            let message = format!("not UTF-16, {what} at byte {}: save the file as UTF-8", at + 1);
            io::Error::new(io::ErrorKind::InvalidData, message)
        };
        while made.is_empty() {
            let read = read_more(&mut self.bytes, &mut self.left)?;
            let is_end = read == 0;
            let units: Vec<u16> = self.left.chunks_exact(2).map(|pair| (self.unit)([pair[0], pair[1]])).collect();
            // The second half of a pair may not be here yet.
            let waits = units.last().is_some_and(|last| (0xd800..0xdc00).contains(last)) && !is_end;
            let units = &units[..units.len() - usize::from(waits)];
            let mut taken = 0;
            for unit in char::decode_utf16(units.iter().copied()) {
                let Ok(c) = unit else { return Err(wrong(self.before + taken, "half a character")) };
                taken += 2 * c.len_utf16() as u64;
                // The mark at the beginning is no text.
                if !(c == '\u{feff}' && self.before == 0 && taken == 2) {
                    made.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                }
            }
            self.left.drain(..taken as usize);
            self.before += taken;
            if is_end {
                return if self.left.is_empty() { Ok(()) } else { Err(wrong(self.before, "an odd byte")) };
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    /// Gives one byte at a time, as a slow pipe does.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = 1.min(buffer.len());
            self.0.read(&mut buffer[..count])
        }
    }

    fn read(bytes: &[u8]) -> Result<String> {
        let mut out = String::new();
        text(Path::new("f"), Slow(bytes))?.bytes.read_to_string(&mut out)?;
        Ok(out)
    }

    fn utf16(text: &str, bytes: fn(u16) -> [u8; 2]) -> Vec<u8> {
        format!("\u{feff}{text}").encode_utf16().flat_map(bytes).collect()
    }

    #[test]
    fn the_same_text_is_read_however_it_is_stored() {
        // Longer than what is looked at first, with pairs of units at each offset.
        let long = "größe 😀 ".repeat(9000) + "x" + &"😀".repeat(20_000);
        for expected in ["", "a", "né 😀", &long] {
            let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
            packed.write_all(expected.as_bytes()).unwrap();
            let packed = packed.finish().unwrap();
            let twice = [packed.clone(), packed.clone()].concat();
            assert_eq!(read(expected.as_bytes()).unwrap(), expected);
            assert_eq!(read(format!("\u{feff}{expected}").as_bytes()).unwrap(), expected);
            assert_eq!(read(&utf16(expected, u16::to_le_bytes)).unwrap(), expected);
            assert_eq!(read(&utf16(expected, u16::to_be_bytes)).unwrap(), expected);
            assert_eq!(read(&packed).unwrap(), expected);
            assert_eq!(read(&twice).unwrap(), expected.repeat(2), "members of one file");
        }
    }

    #[test]
    fn text_that_is_cut_off_or_broken_is_refused() {
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all("né".repeat(500).as_bytes()).unwrap();
        let packed = packed.finish().unwrap();
        let told = |bytes: &[u8]| format!("{:#}", read(bytes).unwrap_err());
        assert_eq!(told(&packed[..packed.len() - 3]), "f: the gzip file is cut off: fetch or copy it again");
        let mut damaged = packed;
        let at = damaged.len() - 6;
        damaged[at] ^= 1;
        assert_eq!(told(&damaged), "f: the gzip file is damaged: fetch or copy it again");
        let odd = [&utf16("ab", u16::to_le_bytes)[..], b"c"].concat();
        assert_eq!(told(&odd), "f: not UTF-16, an odd byte at byte 7: save the file as UTF-8");
        let lone = [0xff, 0xfe, 0x61, 0, 0x00, 0xd8, 0x62, 0];
        assert_eq!(told(&lone), "f: not UTF-16, half a character at byte 5: save the file as UTF-8");
        let lone = [0xff, 0xfe, 0x61, 0, 0x00, 0xd8];
        assert_eq!(told(&lone), "f: not UTF-16, half a character at byte 5: save the file as UTF-8");
        assert!(told(&[0xff, 0xfe, 0, 0, 0x61, 0, 0, 0]).starts_with("f: text in UTF-32"));
    }
}
