//! Calls of the `tokenizers` library, which trusts what a file says.

use anyhow::{Context, Result, anyhow, ensure};

use crate::guard::quietly;

/// Runs the library, which trusts lengths and names that a damaged `tokenizer.json` controls: a panic
/// over them is that file's error.
pub(super) fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let done = quietly(run).context("the tokenizer is damaged: its parts do not fit each other")?;
    done.map_err(|e| anyhow!(e))
}

/// Texts that a tokenizer is tried with: what its parts do not agree on shows when they run.
const TRIALS: [&str; 4] =
    ["", "a 1\n<é", "The  quick (brown) fox\t§ 12345 日本語 🦊e\u{301}", "<|im_start|>user\nhello<|im_end|>"];
/// Most tokens for each byte of a text that is tried, and those that stand around it.
const TRIAL_TOKENS_MAX: usize = 100;

/// Encodes and decodes short texts.
///
/// # Errors
/// When one fails, or comes to too many tokens.
pub(super) fn try_out(inner: &tokenizers::Tokenizer) -> Result<()> {
    for text in TRIALS {
        let ids = guarded(|| inner.encode(text, true))?.get_ids().to_vec();
        let most = TRIAL_TOKENS_MAX * (text.len() + 1);
        ensure!(ids.len() <= most, "it makes {} tokens of {text:?}, at most {most} are allowed", ids.len());
        guarded(|| inner.decode(&ids, true))?;
    }
    Ok(())
}
