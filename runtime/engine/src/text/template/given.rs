//! What a conversation is rendered with besides its messages.

use serde_json::Value as Json;

/// What a conversation is rendered with besides its messages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Given<'a> {
    /// The tools that the assistant may call: a list.
    pub tools: Option<&'a Json>,
    /// The documents that it may draw on: a list of objects, as a rule with `title` and `text`.
    pub documents: Option<&'a Json>,
}

impl<'a> From<Option<&'a Json>> for Given<'a> {
    fn from(tools: Option<&'a Json>) -> Self {
        Self { tools, documents: None }
    }
}

impl<'a> Given<'a> {
    /// All that may hold what somebody typed.
    pub(crate) fn values(self) -> impl Iterator<Item = &'a Json> {
        self.tools.into_iter().chain(self.documents)
    }

    /// The same with each value changed.
    pub(super) fn each(self, change: impl Fn(&Json) -> Json) -> Changed {
        Changed { tools: self.tools.map(&change), documents: self.documents.map(&change) }
    }
}

/// A [`Given`] with values of its own.
pub(super) struct Changed {
    tools: Option<Json>,
    documents: Option<Json>,
}

impl Changed {
    pub(super) fn as_given(&self) -> Given<'_> {
        Given { tools: self.tools.as_ref(), documents: self.documents.as_ref() }
    }
}
