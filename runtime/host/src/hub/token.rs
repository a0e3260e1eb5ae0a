//! The token of the user's account at the hub.

use std::path::PathBuf;

use anyhow::{Result, bail};
use homeroom_engine::files::{is_named, read_text};

use super::offline::is_yes;
use super::stores::{home, variable};
use crate::handler::Secret;
use crate::progress::line;

/// Longest token file, in bytes.
const BYTES_MAX: u64 = 64 << 10;

/// A token, and where it is from.
#[derive(Clone, Debug)]
pub struct Token {
    pub(super) secret: Secret,
    /// The variable or the file, as messages call it.
    pub(super) from: String,
}

impl Token {
    /// Makes a token of what a variable or a file holds; `None` if that is empty.
    ///
    /// # Errors
    /// When it has characters that no token has: a header would take others from them.
    pub fn new(text: &str, from: &str) -> Result<Option<Self>> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(None);
        }
        if !text.bytes().all(|c| c.is_ascii_graphic()) {
            bail!("{from}: it holds characters that no token has\nhint: a token is one word, like hf_…");
        }
        Ok(Some(Self { secret: Secret::new(text.to_owned()), from: from.to_owned() }))
    }

    /// Looks in `$HF_TOKEN`, `$HUGGING_FACE_HUB_TOKEN`, the file `$HF_TOKEN_PATH`, and `token` in `$HF_HOME`, as Python does.
    ///
    /// # Errors
    /// When what is found is no token, or its file cannot be read.
    pub fn from_environment() -> Result<Option<Self>> {
        if std::env::var("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_ok_and(|value| is_yes(&value)) {
            return Ok(None);
        }
        for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
            if let Some(value) = std::env::var_os(name)
                && let Some(token) = Self::new(&value.to_string_lossy(), name)?
            {
                return Ok(Some(token));
            }
        }
        let file = variable("HF_TOKEN_PATH").or_else(|| Some(home()?.join("token")));
        file.map_or(Ok(None), Self::from_file)
    }

    fn from_file(file: PathBuf) -> Result<Option<Self>> {
        if !is_named(&file)? {
            return Ok(None);
        }
        let token = Self::new(&read_text(&file, BYTES_MAX)?, &file.display().to_string())?;
        if token.is_some() && is_read_by_others(&file) {
            let file = file.display();
            line(format_args!("note: {file}: others can read this token; `chmod 600 {file}` keeps it yours"));
        }
        Ok(token)
    }
}

#[cfg(unix)]
fn is_read_by_others(file: &std::path::Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(file).is_ok_and(|meta| meta.mode() & 0o044 != 0)
}

#[cfg(not(unix))]
fn is_read_by_others(_: &std::path::Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_word_and_is_not_printed() -> Result<()> {
        let token = Token::new(" hf_abc\n", "HF_TOKEN")?.expect("a token");
        assert_eq!(token.secret.expose(), "hf_abc");
        assert!(!format!("{token:?}").contains("hf_abc"));
        assert!(Token::new(" \n", "HF_TOKEN")?.is_none());
        for bad in ["hf_a\nx: y", "hf_a b", "hf_é", "a\0b"] {
            let error = Token::new(bad, "HF_TOKEN").expect_err("no token").to_string();
            assert!(!error.contains("hf_a"), "{error}");
        }
        Ok(())
    }
}
