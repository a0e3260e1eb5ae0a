//! Whether bytes are a whole ELF library for this machine. The dynamic linker does not ask: a truncated file raises SIGBUS in
//! it, or loads and fails later.
//!
//! Source of the layout: System V ABI, chapter 4, <https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html>.

use anyhow::{Context, Result, bail, ensure};

/// Checks the header, that every program segment and the section table lie within the file, and that what is mapped is in order.
///
/// # Errors
/// When the bytes are no ELF library, one for another machine, or a truncated or damaged one.
pub fn check(bytes: &[u8]) -> Result<()> {
    ensure!(bytes.len() >= 64, "not a library: {} bytes", bytes.len());
    ensure!(bytes.starts_with(b"\x7fELF"), "not a library: it does not begin as an ELF file does");
    ensure!(bytes[4] == 2 && bytes[5] == 1, "not a 64-bit little-endian library");
    ensure!(number(bytes, 16, 2) == 3, "not a shared library");
    let machine = number(bytes, 18, 2);
    let expected = match std::env::consts::ARCH {
        "x86_64" => 62,
        "aarch64" => 183,
        "riscv64" => 243,
        _ => machine,
    };
    ensure!(machine == expected, "built for another processor (ELF machine {machine}, this is {expected})");
    let length = bytes.len() as u64;
    let within = |offset: u64, size: u64| offset.checked_add(size).is_some_and(|end| end <= length);
    let table = |offset: usize, entry_at: usize, count_at: usize| {
        (number(bytes, offset, 8), number(bytes, entry_at, 2), number(bytes, count_at, 2))
    };
    let (segments, segment_size, segment_count) = table(32, 54, 56);
    let (sections, section_size, section_count) = table(40, 58, 60);
    if !within(sections, section_size * section_count) || !within(segments, segment_size * segment_count) {
        bail!("truncated: its tables end beyond its {length} bytes");
    }
    // What the linker insists on; it ends the process, or reads beyond its memory, where it does not ask.
    ensure!(segment_count > 0 && segment_size == 56, "not a library: it has no program segments");
    let headers = (0..segment_count).map(|segment| Segment::at(bytes, (segments + segment * segment_size) as usize));
    let headers: Vec<Segment> = headers.collect();
    for (segment, header) in headers.iter().enumerate() {
        if !within(header.offset, header.file_size) {
            bail!("truncated: segment {segment} ends beyond its {length} bytes");
        }
        let end = header.address.checked_add(header.memory_size);
        ensure!(
            end.is_some_and(|end| end <= SPAN_MAX),
            "damaged: segment {segment} takes memory up to {:#x} + {:#x}",
            header.address,
            header.memory_size
        );
    }
    let loaded = || headers.iter().filter(|header| header.kind == LOAD);
    ensure!(
        loaded().all(|header| header.file_size <= header.memory_size),
        "damaged: a segment is larger in the file than in memory"
    );
    ensure!(loaded().is_sorted_by_key(|header| header.address), "damaged: its segments are not in order");
    let dynamic = headers.iter().find(|header| header.kind == DYNAMIC);
    let dynamic = dynamic.context("not a library: it has no dynamic table")?;
    let end = dynamic.address + dynamic.memory_size;
    let mapped = loaded().any(|header| header.address <= dynamic.address && end <= header.address + header.memory_size);
    ensure!(mapped && dynamic.address.is_multiple_of(8), "damaged: its dynamic table is in no segment");
    Ok(())
}

/// Addresses that a library may span.
const SPAN_MAX: u64 = 1 << 32;
const LOAD: u64 = 1;
const DYNAMIC: u64 = 2;

/// A program header.
struct Segment {
    kind: u64,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

impl Segment {
    fn at(bytes: &[u8], header: usize) -> Self {
        Self {
            kind: number(bytes, header, 4),
            offset: number(bytes, header + 8, 8),
            address: number(bytes, header + 16, 8),
            file_size: number(bytes, header + 32, 8),
            memory_size: number(bytes, header + 40, 8),
        }
    }
}

/// A little-endian number of `size` bytes. Callers have checked that it lies within.
fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
    bytes[at..at + size].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A library of one segment, which is its dynamic table, too.
    fn library() -> Vec<u8> {
        let mut bytes = vec![0; 64 + 2 * 56 + 64];
        let mut put = |at: usize, size: usize, value: u64| {
            bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        };
        put(0, 8, u64::from_le_bytes(*b"\x7fELF\x02\x01\x01\0"));
        put(16, 2, 3);
        put(
            18,
            2,
            if cfg!(target_arch = "aarch64") {
                183
            } else if cfg!(target_arch = "riscv64") {
                243
            } else {
                62
            },
        );
        for (at, size, value) in [(32, 8, 64), (40, 8, 64), (54, 2, 56), (56, 2, 2), (58, 2, 64), (60, 2, 0)] {
            put(at, size, value);
        }
        for (header, kind) in [(64, LOAD), (120, DYNAMIC)] {
            for (at, size, value) in [(0, 4, kind), (8, 8, 176), (16, 8, 176), (32, 8, 64), (40, 8, 64)] {
                put(header + at, size, value);
            }
        }
        bytes
    }

    #[test]
    fn headers_that_lie_are_refused_by_what_is_wrong() {
        check(&library()).expect("it is in order");
        for (at, size, value, words) in [
            (40, 8, u64::MAX, "truncated"),
            (40, 8, 1 << 40, "truncated"),
            (60, 2, 0xFFFF, "truncated"),
            (32, 8, u64::MAX - 10, "truncated"),
            (56, 2, 0xFFFF, "truncated"),
            (56, 2, 0, "no program segments"),
            (54, 2, 8, "no program segments"),
            (54, 2, 0xFFFF, "truncated"),
            (64 + 8, 8, u64::MAX, "segment 0 ends beyond"),
            (64 + 32, 8, 1 << 62, "segment 0 ends beyond"),
            (64 + 40, 8, u64::MAX, "segment 0 takes memory"),
            (64 + 16, 8, u64::MAX - 63, "segment 0 takes memory"),
            (64 + 40, 8, 8, "larger in the file"),
            (120 + 40, 8, 1 << 20, "its dynamic table is in no segment"),
            (120 + 16, 8, 177, "its dynamic table is in no segment"),
            (120, 4, 7, "no dynamic table"),
        ] {
            let mut bytes = library();
            bytes[at..at + size].copy_from_slice(&u64::to_le_bytes(value)[..size]);
            let error = check(&bytes).expect_err(words).to_string();
            assert!(error.contains(words), "{at}: no `{words}` in: {error}");
        }
    }

    /// Any byte of the headers may be anything: it is refused or taken, and nothing is read beyond the end.
    #[test]
    fn no_header_makes_the_check_itself_fail() {
        let whole = library();
        for at in 0..whole.len() {
            for value in [0, 1, 0x7F, 0x80, 0xFF] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let _ = check(&bytes);
                let _ = check(&bytes[..at]);
            }
        }
    }
}
