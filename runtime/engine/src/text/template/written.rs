//! What a chat template writes by itself, whatever the conversation.

use super::{ChatTemplate, Given};

/// Texts that a chat template may write by itself: its strings, and plain conversations. `source` is taken whole where it
/// is no template.
pub(crate) fn written_by(source: &str, bos: Option<&str>, eos: Option<&str>) -> String {
    let Ok(template) = ChatTemplate::new(source, bos, eos) else {
        return source.to_owned();
    };
    let mut written = template.written.clone();
    let message = |role: &str| serde_json::json!({"role": role, "content": "a"});
    let (user, assistant) = (message("user"), message("assistant"));
    let conversations = [
        vec![message("system"), user.clone(), assistant.clone(), user.clone()],
        vec![user.clone(), assistant.clone(), message("tool"), assistant],
        vec![user],
    ];
    for messages in conversations {
        written.push('\0');
        written.push_str(&template.render(&messages, None, true).unwrap_or_default());
    }
    written
}

/// What a chat template writes behind an assistant's text that is the last; `None` where it refuses a plain conversation or leaves
/// that text out.
pub(crate) fn behind_answer(source: &str, bos: Option<&str>, eos: Option<&str>) -> Option<String> {
    // No template writes this word by itself.
    const ANSWER: &str = "xqzwkv";
    let template = ChatTemplate::new(source, bos, eos).ok()?;
    let messages = [("user", "a"), ("assistant", ANSWER)]
        .map(|(role, content)| serde_json::json!({"role": role, "content": content}));
    let text = template.run(&messages, Given::default(), false, "").ok()?;
    text.rsplit_once(ANSWER).map(|(_, behind)| behind.to_owned())
}
