//! The words of a text, as rows are compared by.

use super::personal::is_ideograph;

/// Signs around a word that are no part of it. Those that are computed with are: `3 - 2` is not `3 + 2`.
const AROUND: &[char] = &[
    '.', ',', ';', ':', '!', '?', '"', '\'', '(', ')', '[', ']', '{', '}', '…', '«', '»', '„', '“', '”', '‘', '’', '¿',
    '¡', '`', '。', '，', '、', '？', '！', '「', '」',
];

/// Calls `each` with every word of a text, in small letters, without the punctuation around it. Of scripts without spaces each letter is one.
pub(super) fn words(text: &str, mut each: impl FnMut(&str)) {
    let mut lower = String::new();
    for word in text.split_whitespace() {
        let trimmed = word.trim_matches(AROUND);
        let word = if trimmed.is_empty() { continue } else { trimmed };
        lower.clear();
        lower.extend(word.chars().flat_map(char::to_lowercase));
        if !lower.chars().any(is_ideograph) {
            each(&lower);
            continue;
        }
        let mut from = 0;
        for (at, c) in lower.char_indices().filter(|(_, c)| is_ideograph(*c) || AROUND.contains(c)) {
            if from < at {
                each(&lower[from..at]);
            }
            from = at + c.len_utf8();
            if is_ideograph(c) {
                each(&lower[at..from]);
            }
        }
        if from < lower.len() {
            each(&lower[from..]);
        }
    }
}
