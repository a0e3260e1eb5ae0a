//! Pseudonyms: what is logged and counted in the place of a person's name.
//!
//! A pseudonym is HMAC-SHA256 (RFC 2104) of key and name under a secret of the home, so that whoever has a log or a file of counters, and not the
//! secret, finds no name in it by trying all. People of two keys have two pseudonyms, also if both programs call them by one name.

use std::fmt::{self, Debug, Formatter};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use homeroom_engine::files::{Lock, make_directory, replace_file};
use sha2::{Digest as _, Sha256};

use crate::hex::hex;
use crate::progress::line;
use crate::{random, registry};

/// The file of the secret, in `serve/` in the data directory.
const FILE: &str = "pseudonyms.secret";
/// Bytes of the secret.
const SECRET_BYTES: usize = 32;
/// Bytes of a block of SHA-256.
const BLOCK_BYTES: usize = 64;
/// Bytes of a pseudonym.
const BYTES: usize = 8;

/// What makes pseudonyms.
pub struct Pseudonyms {
    secret: [u8; SECRET_BYTES],
}

impl Debug for Pseudonyms {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("Pseudonyms")
    }
}

impl Default for Pseudonyms {
    /// With a secret that ends with this value.
    fn default() -> Self {
        let mut secret = [0; SECRET_BYTES];
        if let Err(error) = getrandom::fill(&mut secret) {
            line(format_args!(
                "warning: pseudonyms of people can be guessed: the system has no random numbers: {error}"
            ));
        }
        Self { secret }
    }
}

impl Pseudonyms {
    /// With the secret of the data directory, which is made if there is none. If it cannot be read, which is told, with one that ends with
    /// this value.
    pub fn of_home() -> Self {
        let made = registry::data_directory().map(|data| Self::at(&data.join("serve").join(FILE)));
        made.unwrap_or_else(|| Ok(Self::default())).unwrap_or_else(|error| {
            line(format_args!("warning: people have new pseudonyms until the server ends: {error:#}"));
            Self::default()
        })
    }

    /// With the secret of a file, which is made if it is not there.
    ///
    /// # Errors
    /// When it cannot be read or written, others can read it, or it is no secret.
    fn at(path: &Path) -> Result<Self> {
        let directory = path.parent().context("a file has a directory")?;
        make_directory(directory)?;
        let _lock = Lock::take(directory, &mut |note| line(note))?;
        let place = || format!("{}: the secret of pseudonyms cannot be read", path.display());
        if !path.try_exists().with_context(place)? {
            let secret = random::bytes()?;
            replace_file(path, &secret)?;
            return Ok(Self { secret });
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let shown = path.display();
            let mode = std::fs::metadata(path).with_context(place)?.mode();
            ensure!(
                mode & 0o077 == 0,
                "{shown}: others than its owner can read it\nhint: remove it, and a new one is made"
            );
        }
        let bytes = std::fs::read(path).with_context(place)?;
        let secret = bytes.try_into().ok();
        let secret = secret.with_context(|| {
            format!(
                "{}: this is not the secret that `homeroom serve` writes\nhint: remove it, and a new one is made",
                path.display()
            )
        })?;
        Ok(Self { secret })
    }

    /// The pseudonym of a person, whom the program with a key calls so.
    pub fn of(&self, key: Option<&str>, user: &str) -> String {
        // No name of a key has a zero in it.
        let named = [key.unwrap_or_default().as_bytes(), b"\0", user.as_bytes()].concat();
        hex(&hmac(&self.secret, &named)[..BYTES])
    }
}

/// HMAC-SHA256 under a key of at most a block: `H((K ⊕ opad) ‖ H((K ⊕ ipad) ‖ message))`.
fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    let pad = |with: u8| {
        let mut block = [with; BLOCK_BYTES];
        block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
        block
    };
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test cases 1 and 2 of RFC 4231.
    #[test]
    fn hmac_is_that_of_the_rfc() {
        for (key, message, wanted) in [
            (&[0x0b; 20][..], "Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
            (
                b"Jefe",
                "what do ya want for nothing?",
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
        ] {
            assert_eq!(hex(&hmac(key, message.as_bytes())), wanted);
        }
    }

    #[test]
    fn a_person_has_one_pseudonym_for_as_long_as_the_home_has_its_secret() -> Result<()> {
        let place = tempfile::tempdir()?;
        let path = place.path().join("serve").join(FILE);
        let first = Pseudonyms::at(&path)?;
        let anna = first.of(Some("moodle"), "anna");
        assert!(anna.len() == 16 && anna.bytes().all(|byte| byte.is_ascii_hexdigit()), "{anna}");
        assert_eq!(Pseudonyms::at(&path)?.of(Some("moodle"), "anna"), anna);
        for (key, user) in [(Some("webui"), "anna"), (None, "anna"), (Some("moodle"), "ann"), (None, "moodle\0anna")] {
            assert_ne!(first.of(key, user), anna, "{key:?} {user}");
        }
        assert_ne!(hex(&Sha256::digest("anna")[..8]), anna, "nobody can compute it without the secret");
        assert_ne!(Pseudonyms::default().of(Some("moodle"), "anna"), anna);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644))?;
            assert!(Pseudonyms::at(&path).is_err_and(|error| error.to_string().contains("hint: remove it")));
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
        }
        std::fs::write(&path, "short")?;
        assert!(Pseudonyms::at(&path).is_err_and(|error| error.to_string().contains("hint: remove it")));
        std::fs::remove_file(&path)?;
        assert_ne!(Pseudonyms::at(&path)?.of(Some("moodle"), "anna"), anna, "a new secret");
        Ok(())
    }
}
