//! Whether the hub may be asked at all.

use std::sync::OnceLock;

static ASKED: OnceLock<String> = OnceLock::new();

/// Has this process ask the hub for nothing from now on. `reason` is what a message calls it: `--offline`.
pub fn set_offline(reason: &str) {
    ASKED.get_or_init(|| reason.to_owned());
}

/// Why the hub is not asked; `None`: it may be. Besides [`set_offline`], Python's variables say so.
pub fn offline() -> Option<&'static str> {
    let is_set = |name: &&str| std::env::var(name).is_ok_and(|value| is_yes(&value));
    let variable = || ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(is_set);
    ASKED.get().map(String::as_str).or_else(variable)
}

/// As `huggingface_hub` reads its variables.
pub(super) fn is_yes(value: &str) -> bool {
    ["1", "on", "yes", "true"].iter().any(|yes| yes.eq_ignore_ascii_case(value))
}
