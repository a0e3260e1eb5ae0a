//! What a request is given where it says nothing: a system prompt, and settings of the draw.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, ensure};

use super::Wrapper;
use super::kept::Kept;
use crate::handler::{Completion, Context, EventStream, Handler, HandlerError, Message, Request, Role};

/// Values for what a request does not say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Defaults {
    /// The system prompt of a conversation that has none.
    pub system: Option<System>,
    /// Longest answer, in tokens.
    pub max_tokens: Option<usize>,
    /// Temperature.
    pub temperature: Option<f64>,
    /// Share of the probability that is drawn from. It goes with the temperature: a request that says one of them gets neither.
    pub top_p: Option<f64>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
}

/// Where a system prompt stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum System {
    /// In the file of handlers.
    Text(String),
    /// In a file of its own, which is read anew when it changes.
    File(PathBuf),
}

impl Defaults {
    /// Returns true if there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The key of the first, if there is one.
    pub(super) fn key(&self) -> Option<&'static str> {
        let Self { system, max_tokens, temperature, top_p, stop } = self;
        let system = system.as_ref().map(|system| match system {
            System::Text(_) => "system",
            System::File(_) => "system_file",
        });
        system
            .or(max_tokens.map(|_| "max_tokens"))
            .or(temperature.map(|_| "temperature"))
            .or(top_p.map(|_| "top_p"))
            .or((!stop.is_empty()).then_some("stop"))
    }

    /// They, in words.
    pub(super) fn described(&self) -> Vec<String> {
        let Self { system, max_tokens, temperature, top_p, stop } = self;
        let system = system.as_ref().map(|system| match system {
            System::Text(_) => "system prompt".to_owned(),
            System::File(path) => format!("system prompt of {}", path.display()),
        });
        let numbers = [
            max_tokens.map(|most| format!("max_tokens {most}")),
            temperature.map(|temperature| format!("temperature {temperature}")),
            top_p.map(|top_p| format!("top_p {top_p}")),
            (!stop.is_empty()).then(|| format!("{} stop texts", stop.len())),
        ];
        system.into_iter().chain(numbers.into_iter().flatten()).collect()
    }
}

/// [`Defaults`], with the files that they name.
pub struct Defaulting {
    defaults: Defaults,
    file: Option<Kept<String>>,
}

impl Defaulting {
    /// Reads the files.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn load(defaults: Defaults) -> Result<Self> {
        let file = match &defaults.system {
            Some(System::File(path)) => Some(Kept::read(path, system)?),
            _ => None,
        };
        Ok(Self { defaults, file })
    }

    /// A request with what it does not say.
    fn filled(&self, request: &Request) -> Request {
        let Defaults { system, max_tokens, temperature, top_p, stop } = &self.defaults;
        let mut request = request.clone();
        let system = match (&self.file, system) {
            (Some(file), _) => Some(file.now().to_string()),
            (None, Some(System::Text(text))) => Some(text.clone()),
            (None, _) => None,
        };
        let has_system = request.messages.iter().any(|message| matches!(message.role, Role::System | Role::Developer));
        if let Some(system) = system.filter(|_| !has_system) {
            request.messages.insert(0, Message::new(Role::System, system));
        }
        request.max_tokens = request.max_tokens.or(*max_tokens);
        if request.temperature.is_none() && request.top_p.is_none() {
            (request.temperature, request.top_p) = (*temperature, *top_p);
        }
        if request.stop.is_empty() {
            request.stop.clone_from(stop);
        }
        request
    }
}

fn system(text: &str) -> Result<String> {
    let text = text.trim();
    ensure!(!text.is_empty(), "it is empty, and should hold a system prompt");
    Ok(text.to_owned())
}

impl Wrapper for Defaulting {
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError> {
        inner.stream(&self.filled(request), context)
    }

    fn complete(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<Completion, HandlerError> {
        inner.complete(&self.filled(request), context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_keeps_what_it_says() -> Result<()> {
        let defaults = Defaults {
            system: Some(System::Text("Be kind.".into())),
            max_tokens: Some(5),
            temperature: Some(0.3),
            top_p: Some(0.8),
            stop: vec!["END".into()],
        };
        assert!(!defaults.is_empty() && Defaults::default().is_empty());
        let defaulting = Defaulting::load(defaults)?;
        let silent = Request { messages: vec![Message::new(Role::User, "hi")], ..Request::default() };
        let filled = defaulting.filled(&silent);
        assert_eq!(filled.messages, [Message::new(Role::System, "Be kind."), Message::new(Role::User, "hi")]);
        assert_eq!((filled.max_tokens, filled.temperature, filled.top_p), (Some(5), Some(0.3), Some(0.8)));
        assert_eq!(filled.stop, ["END"]);
        let says = Request {
            messages: vec![Message::new(Role::Developer, "Be brief."), Message::new(Role::User, "hi")],
            max_tokens: Some(9),
            top_p: Some(0.5),
            stop: vec!["x".into()],
            ..Request::default()
        };
        assert_eq!(defaulting.filled(&says), says);
        Ok(())
    }
}
