//! Vectors of texts: what is asked, what comes back, and an embedding model of this machine.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use homeroom_engine::block::Compute;
use homeroom_engine::embedding::{EmbeddingModel, Tokens, encoder_type};

use super::limit::{Gate, Limits};
use super::local::{LONG, LONG_BYTES, OFFLINE, turn};
use super::{Context, EventStream, Handler, HandlerError, Kind, Request};
use crate::models::{ModelRef, here, locate};

/// A request for the vectors of texts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EmbedRequest {
    /// The texts; at least one.
    pub input: Vec<Input>,
    /// Wanted width of the vectors; `None`: the model's own.
    pub dimensions: Option<usize>,
    /// A text that is longer than the model reads is refused instead of cut.
    pub refuse_long: bool,
}

/// One text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// As it was written.
    Text(String),
    /// As tokens of the model's own tokenizer, its special tokens included.
    Tokens(Vec<u32>),
}

/// Vectors of texts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Embeddings {
    /// The model that made them, by the provider's name for it.
    pub model: String,
    /// The handler that made them, by our name for it.
    pub handler: String,
    /// Width of a vector.
    pub dimensions: usize,
    /// The vectors of all texts in their order, one behind the other.
    pub values: Vec<f32>,
    /// Tokens that were read, special tokens included; `None` where the provider did not say.
    pub prompt_tokens: Option<u64>,
    /// Texts of which only the beginning was read.
    pub truncated: usize,
}

/// What a handler gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gives {
    /// Answers to conversations.
    Answers,
    /// Vectors of texts.
    Vectors,
    /// One or the other: a provider knows which.
    Either,
}

/// Tokens that one request computes before the next has its turn. A search of one question waits for that much, and not for all of a book
/// that is being indexed.
const TURN_TOKENS: usize = 4096;

/// Requests take turns without an end to their number: how many there are is bounded by whoever lets them in.
const TURNS: Limits = Limits { running: 1, waiting: usize::MAX };

/// An embedding model of this machine.
///
/// It is not loaded anew when its files change, as a chat model is: vectors of two models cannot be compared, and an index of the first
/// would be searched with those of the second.
pub struct Embedder {
    name: String,
    model: EmbeddingModel,
    turns: Arc<Gate>,
}

impl Embedder {
    /// Loads a model under a name.
    ///
    /// # Errors
    /// As [`EmbeddingModel::load`], and when something is asked of it that only chat models have.
    pub fn load(name: impl Into<String>, reference: &ModelRef, compute: Compute) -> Result<Self> {
        let path = locate(&reference.name, OFFLINE)?.path;
        let place = || reference.name.display().to_string();
        ensure!(reference.base_model.is_none(), "{}: an embedding model has no base model", place());
        let f32 = matches!(compute, Compute::Auto | Compute::F32 | Compute::Plain);
        ensure!(f32, "{}: an embedding model computes in f32; leave `compute` out", place());
        let model = EmbeddingModel::load(&path).with_context(place)?;
        Ok(Self { name: name.into(), model, turns: Gate::new(TURNS) })
    }

    /// Returns true if a model of this machine, by name or path, is an embedding model.
    pub fn is_meant(name: &Path) -> bool {
        here(name).ok().flatten().is_some_and(|located| encoder_type(&located.path).is_some())
    }

    fn tokens(&self, at: usize, input: &Input, context: &Context) -> Result<Tokens, HandlerError> {
        context.check()?;
        let tokens = match input {
            Input::Text(text) => {
                let turn = (text.len() > LONG_BYTES).then(|| turn(&LONG, context)).transpose()?;
                let tokens = self.model.tokens(text);
                drop(turn);
                tokens
            }
            Input::Tokens(ids) => self.model.given_tokens(ids),
        };
        tokens.map_err(|error| HandlerError::invalid("input", format!("input {at}: {error:#}{}", hint(input))))
    }
}

/// What to do about tokens that are refused.
fn hint(input: &Input) -> &'static str {
    match input {
        Input::Text(_) => "",
        Input::Tokens(_) => {
            "; send texts instead (LangChain's OpenAIEmbeddings does with check_embedding_ctx_length=False)"
        }
    }
}

impl Handler for Embedder {
    fn stream(&self, _: &Request, _: &Context) -> Result<EventStream, HandlerError> {
        let message = format!("`{}` is an embedding model, which answers no conversation", self.name);
        Err(HandlerError::invalid("model", message))
    }

    fn gives(&self) -> Gives {
        Gives::Vectors
    }

    fn embed(&self, request: &EmbedRequest, context: &Context) -> Result<Embeddings, HandlerError> {
        let own = self.model.dimensions();
        if let Some(wanted) = request.dimensions.filter(|wanted| *wanted != own) {
            let message = format!("`dimensions` is {wanted}, and this model's vectors have {own}; leave it out");
            return Err(HandlerError::invalid("dimensions", message));
        }
        let mut texts = Vec::new();
        for (at, input) in request.input.iter().enumerate() {
            let tokens = self.tokens(at, input, context)?;
            if tokens.truncated && request.refuse_long {
                let message =
                    format!("input {at} is longer than the {} tokens that the model reads", self.model.max_tokens());
                return Err(HandlerError::new(Kind::ContextLength, message));
            }
            texts.push(tokens);
        }
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|text| texts[*text].ids.len());
        let mut values = vec![0.0; texts.len() * own];
        let mut rest = order.as_slice();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(turn_of(rest, &texts));
            rest = later;
            let place = Gate::enter(&self.turns, context)?;
            let ids: Vec<&[u32]> = now.iter().map(|text| texts[*text].ids.as_slice()).collect();
            let vectors = self.model.embed(&ids).map_err(|error| HandlerError::internal(&error))?;
            drop(place);
            for (text, vector) in now.iter().zip(vectors) {
                values[text * own..(text + 1) * own].copy_from_slice(&vector);
            }
        }
        Ok(Embeddings {
            model: self.name.clone(),
            handler: self.name.clone(),
            dimensions: own,
            values,
            prompt_tokens: Some(texts.iter().map(|text| text.ids.len() as u64).sum()),
            truncated: texts.iter().filter(|text| text.truncated).count(),
        })
    }
}

/// How many of the texts that are left are embedded in one turn; at least one.
fn turn_of(left: &[usize], texts: &[Tokens]) -> usize {
    let mut tokens = 0;
    let fits = left.iter().take_while(|text| {
        tokens += texts[**text].ids.len();
        tokens <= TURN_TOKENS
    });
    fits.count().max(1)
}
