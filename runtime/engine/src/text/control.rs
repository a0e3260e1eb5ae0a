//! Control tokens: those that mean something to a model beyond their letters, such as the end of a turn. They are
//! control where the chat template writes them; where somebody types one inside a message, it is text.

/// A token that a text must not smuggle in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    /// What is typed to get it.
    pub text: String,
    /// Its id.
    pub id: u32,
    /// The tokenizer says that it is special. Others are control because the chat template writes them (`<tool_call>`);
    /// an assistant's message, which is the model's own, may hold those.
    pub special: bool,
}
