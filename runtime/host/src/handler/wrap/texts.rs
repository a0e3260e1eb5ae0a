//! The texts of a message, for what reads or changes all of them.

use crate::handler::Message;

/// Changes each text of a message.
pub(super) fn each_text(message: &mut Message, mut change: impl FnMut(&mut String)) {
    change(&mut message.content);
    message.parts.iter_mut().for_each(change);
}

/// Whether any text of a message is one that is looked for.
pub(super) fn has_text(message: &Message, mut is: impl FnMut(&str) -> bool) -> bool {
    // Parts of which only the whole has it are parts of that.
    is(&message.content) || message.parts.iter().any(|part| is(part))
}
