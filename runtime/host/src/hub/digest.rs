//! Digests by which the hub names files: SHA-256 of large ones, git's blob hash (SHA-1) of small ones.

use anyhow::{Result, bail};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use crate::hex::hex;

/// A file's digest in hexadecimal. It is its name among the blobs, too.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Digest {
    /// Of the file's bytes; 64 digits.
    Sha256(String),
    /// Of `blob SIZE\0` and the file's bytes; 40 digits.
    Git(String),
}

impl Digest {
    /// Reads a SHA-256.
    ///
    /// # Errors
    /// When it is none.
    pub fn sha256(text: &str) -> Result<Self> {
        Ok(Self::Sha256(hexadecimal(text, 64)?))
    }

    /// Reads git's hash of a blob.
    ///
    /// # Errors
    /// When it is none.
    pub fn git(text: &str) -> Result<Self> {
        Ok(Self::Git(hexadecimal(text, 40)?))
    }

    /// The digits.
    pub fn name(&self) -> &str {
        match self {
            Self::Sha256(name) | Self::Git(name) => name,
        }
    }
}

fn hexadecimal(text: &str, digits: usize) -> Result<String> {
    if text.len() != digits || !text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c)) {
        bail!("a digest is not {digits} hexadecimal digits");
    }
    Ok(text.to_owned())
}

/// Computes a digest as bytes come.
pub(super) enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Hasher {
    /// Begins a digest of the kind of another, for a file of so many bytes.
    pub(super) fn like(digest: &Digest, size: u64) -> Self {
        match digest {
            Digest::Sha256(_) => Self::Sha256(Sha256::new()),
            Digest::Git(_) => Self::Git(Sha1::new_with_prefix(format!("blob {size}\0"))),
        }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Git(hasher) => hasher.update(bytes),
        }
    }

    /// The digits.
    pub(super) fn finish(self) -> String {
        match self {
            Self::Sha256(hasher) => hex(&hasher.finalize()),
            Self::Git(hasher) => hex(&hasher.finalize()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf 'hello\n' | sha256sum`, and `| git hash-object --stdin`.
    #[test]
    fn digests_are_those_of_sha256sum_and_git() -> Result<()> {
        for digest in [
            Digest::sha256("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03")?,
            Digest::git("ce013625030ba8dba906f756967f9e9ca394464a")?,
        ] {
            let mut hasher = Hasher::like(&digest, 6);
            hasher.update(b"hel");
            hasher.update(b"lo\n");
            assert_eq!(hasher.finish(), digest.name());
        }
        Ok(())
    }

    #[test]
    fn what_is_no_digest_becomes_no_file_name() {
        for bad in
            ["", "../../x", "CE013625030ba8dba906f756967f9e9ca394464a", "ce013625030ba8dba906f756967f9e9ca394464"]
        {
            assert!(Digest::git(bad).is_err() && Digest::sha256(bad).is_err(), "{bad}");
        }
    }
}
