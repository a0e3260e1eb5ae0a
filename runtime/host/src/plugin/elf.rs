//! Whether bytes are a whole ELF library for this machine. The dynamic linker does not ask: a truncated file raises SIGBUS in
//! it, or loads and fails later.
//!
//! Source of the layout: System V ABI, chapter 4, <https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html>.

use anyhow::{Result, bail, ensure};

/// Checks the header, and that every program segment and the section table lie within the file.
///
/// # Errors
/// When the bytes are no ELF library, one for another machine, or a truncated one.
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
    ensure!(segment_count > 0 && segment_size >= 56, "not a library: it has no program segments");
    for segment in 0..segment_count {
        let header = (segments + segment * segment_size) as usize;
        if !within(number(bytes, header + 8, 8), number(bytes, header + 32, 8)) {
            bail!("truncated: segment {segment} ends beyond its {length} bytes");
        }
    }
    Ok(())
}

/// A little-endian number of `size` bytes. Callers have checked that it lies within.
fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
    bytes[at..at + size].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
