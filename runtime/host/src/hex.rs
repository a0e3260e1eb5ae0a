//! Bytes as text: hexadecimal.

use std::fmt::Write;

/// Bytes in hexadecimal, in small letters.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes what is written");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_two_digits() {
        assert_eq!((hex(&[]), hex(&[0, 9, 0xa0, 0xff])), (String::new(), "0009a0ff".to_owned()));
    }
}
