//! Tokens that end an answer besides those that a model's files name: a base names the end of a text, but what is tuned on it ends
//! its turns as the chat template does.

use super::Control;

/// Ends of texts, turns and messages in whatever model has them.
///
/// Source: the names behind `special_eog_ids` in llama.cpp's `llama-vocab.cpp`, but for those between the files of a repository.
const ALWAYS: [&str; 15] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<eos>",
    "<|return|>",
    "<|call|>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
];
/// Names with another meaning in some models: gpt-oss ends a thought with the first, and HTML a line through text with the second.
const UNLESS_WRITTEN: [&str; 2] = ["<|end|>", "</s>"];

/// The first control token in what a template writes behind an answer.
pub(super) fn end_of_turn(behind: &str, control: &[Control]) -> Option<u32> {
    let found = control.iter().filter_map(|c| Some((behind.find(&c.text)?, std::cmp::Reverse(c.text.len()), c.id)));
    found.min().map(|(.., id)| id)
}

/// Control tokens that end an answer by their names. `written`: what the chat template may write.
pub(super) fn known<'a>(control: &'a [Control], written: &'a str) -> impl Iterator<Item = u32> + 'a {
    let ends = move |name: &str| ALWAYS.contains(&name) || UNLESS_WRITTEN.contains(&name) && !written.contains(name);
    control.iter().filter(move |c| ends(&c.text)).map(|c| c.id)
}

/// What to say of a template without an [`end_of_turn`].
pub(super) fn without_end(behind: &str) -> String {
    let written = match behind.trim() {
        "" => "nothing behind an answer".to_owned(),
        text => format!("{text:?} behind an answer, which holds no control token"),
    };
    format!(
        "its chat template writes {written}: a model that is tuned on chats does not learn where to end; \
         write `{{{{ eos_token }}}}` there"
    )
}
