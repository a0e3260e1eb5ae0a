//! What a conversation is rendered with besides its messages.

use serde_json::Value as Json;

/// What a conversation is rendered with besides its messages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Given<'a> {
    /// The tools that the assistant may call: a list.
    pub tools: Option<&'a Json>,
    /// The documents that it may draw on: a list of objects, as a rule with `title` and `text`.
    pub documents: Option<&'a Json>,
    /// What the template reads besides, by name, such as `enable_thinking`: an object, as `chat_template_kwargs` of a row. Those of
    /// [`RESERVED`] are not read from it.
    pub variables: Option<&'a Json>,
}

/// Variables that are given to a template by other means.
pub const RESERVED: [&str; 5] = ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"];

impl<'a> From<Option<&'a Json>> for Given<'a> {
    fn from(tools: Option<&'a Json>) -> Self {
        Self { tools, ..Self::default() }
    }
}

impl<'a> Given<'a> {
    /// All that may hold what somebody typed.
    pub(crate) fn values(self) -> impl Iterator<Item = &'a Json> {
        self.tools.into_iter().chain(self.documents).chain(self.variables)
    }

    /// The same with each value changed.
    pub(super) fn each(self, change: impl Fn(&Json) -> Json) -> Changed {
        Changed {
            tools: self.tools.map(&change),
            documents: self.documents.map(&change),
            variables: self.variables.map(&change),
        }
    }
}

/// A [`Given`] with values of its own.
pub(super) struct Changed {
    tools: Option<Json>,
    documents: Option<Json>,
    variables: Option<Json>,
}

impl Changed {
    pub(super) fn as_given(&self) -> Given<'_> {
        Given { tools: self.tools.as_ref(), documents: self.documents.as_ref(), variables: self.variables.as_ref() }
    }
}
