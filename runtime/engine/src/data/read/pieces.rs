//! Text in another encoding, made into UTF-8 a piece at a time, as a reader.

use std::io::{self, Read};

/// Bytes that are read at once.
const PIECE_BYTES: usize = 8192;

/// What makes pieces of text.
pub(super) trait Pieces {
    /// Appends more text; nothing: there is no more.
    fn more(&mut self, made: &mut Vec<u8>) -> io::Result<()>;
}

/// The text that pieces come to.
pub(super) struct Joined<P> {
    pieces: P,
    /// The last piece, and how much of it was asked for.
    made: Vec<u8>,
    at: usize,
}

impl<P: Pieces> Joined<P> {
    pub fn new(pieces: P) -> Self {
        Self { pieces, made: Vec::new(), at: 0 }
    }
}

impl<P: Pieces> Read for Joined<P> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.made.len() {
            self.at = 0;
            self.made.clear();
            self.pieces.more(&mut self.made)?;
        }
        let count = buffer.len().min(self.made.len() - self.at);
        buffer[..count].copy_from_slice(&self.made[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// Appends bytes that are read; zero: there are no more.
pub(super) fn read_more(mut from: impl Read, bytes: &mut Vec<u8>) -> io::Result<usize> {
    let held = bytes.len();
    bytes.resize(held + PIECE_BYTES, 0);
    let read = loop {
        match from.read(&mut bytes[held..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => break read,
        }
    };
    bytes.truncate(held + *read.as_ref().unwrap_or(&0));
    read
}
