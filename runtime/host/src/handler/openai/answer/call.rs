//! Calls of tools, as they come in pieces.

use serde_json::Value;

use crate::handler::provider::Endpoint;
use crate::handler::{Event, random};

/// Most calls of a choice, and most bytes of one that are gathered before its name is known.
const CALLS_MAX: usize = 128;
const BYTES_MAX: usize = 8 << 20;

/// The calls of a choice.
#[derive(Default)]
pub(super) struct Calls(Vec<Call>);

#[derive(Default)]
struct Call {
    /// The number that the provider has for it.
    index: Option<u64>,
    id: String,
    name: String,
    /// Arguments that were not told of yet; the end while it may be the beginning of the key.
    arguments: String,
    held: String,
    /// Its first piece was told of.
    told: bool,
}

impl Calls {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes a piece of a call.
    ///
    /// # Errors
    /// When a field is not understood, or there is more of it than any answer has; names it.
    pub(super) fn take(&mut self, piece: &Value) -> Result<(), &'static str> {
        let function = if piece["function"].is_object() { &piece["function"] } else { piece };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (index, id, name) = (piece["index"].as_u64(), text(&piece["id"]), text(&function["name"]));
        let at = match index {
            Some(_) => self.0.iter().position(|call| call.index == index),
            // Without a number, what has the id of the last one, or no id and no name, goes on with it.
            None => {
                let last = self.0.last();
                let goes_on =
                    last.is_some_and(|last| id == last.id && name.is_empty() || id.is_empty() && name.is_empty());
                goes_on.then(|| self.0.len() - 1)
            }
        };
        if at.is_none() && self.0.len() >= CALLS_MAX {
            return Err("index");
        }
        let at = at.unwrap_or_else(|| {
            self.0.push(Call { index, ..Call::default() });
            self.0.len() - 1
        });
        let call = &mut self.0[at];
        // Some servers repeat both with every piece.
        if call.id.is_empty() {
            call.id = id;
        }
        if !call.told && call.name != name {
            call.name.push_str(&name);
        }
        match &function["arguments"] {
            Value::Null => {}
            Value::String(text) => call.arguments.push_str(text),
            object @ Value::Object(_) => call.arguments.push_str(&object.to_string()),
            _ => return Err("arguments"),
        }
        if call.arguments.len() > BYTES_MAX {
            return Err("arguments");
        }
        if call.name.len() > BYTES_MAX {
            return Err("name");
        }
        Ok(())
    }

    /// Returns the events of what has come since. A call is told of when its name is known.
    pub(super) fn events(&mut self, choice: usize, endpoint: &Endpoint, is_last: bool) -> Vec<Event> {
        let mut events = Vec::new();
        let names = |call: &Call| call.told || !call.name.is_empty();
        let known = self.0.iter().take_while(|call| names(call)).count();
        for (index, call) in self.0.iter_mut().take(known).enumerate() {
            let arguments = endpoint.content(&mut call.held, &std::mem::take(&mut call.arguments), is_last);
            let (mut id, mut name) = (None, None);
            if !std::mem::replace(&mut call.told, true) {
                let given = endpoint.name_of(&call.id);
                id = Some(if given.is_empty() { format!("call_{:016x}", random()) } else { given });
                name = Some(endpoint.name_of(&call.name));
            }
            if id.is_some() || !arguments.is_empty() {
                events.push(Event::ToolCall { choice, index, id, name, arguments });
            }
        }
        events
    }
}
