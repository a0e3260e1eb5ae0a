//! Vectors of texts: what is asked, what comes back, and an embedding model of this machine.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use homeroom_engine::embedding::{EmbeddingModel, Tokens, each_aside, encoder_type};
use homeroom_engine::run::compute::Compute;

use super::local::{LONG, LONG_BYTES, OFFLINE, turn};
use super::turns::{Turn, Turns};
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

/// An embedding model of this machine.
///
/// It is not loaded anew when its files change, as a chat model is: vectors of two models cannot be compared, and an index of the first
/// would be searched with those of the second.
pub struct Embedder {
    name: String,
    model: EmbeddingModel,
    turns: Turns,
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
        Ok(Self { name: name.into(), model, turns: Turns::default() })
    }

    /// Returns true if a model of this machine, by name or path, is an embedding model.
    pub fn is_meant(name: &Path) -> bool {
        here(name).ok().flatten().is_some_and(|located| encoder_type(&located.path).is_some())
    }

    /// Makes tokens of all texts, in turns.
    fn tokens<'a>(
        &self,
        request: &EmbedRequest,
        mut turn: Turn<'a>,
        context: &Context,
    ) -> Result<(Vec<Tokens>, Turn<'a>), HandlerError> {
        let (mut texts, mut rest) = (Vec::new(), request.input.as_slice());
        while !rest.is_empty() {
            turn = turn.go_on(context)?;
            let (now, later) = rest.split_at(share(rest));
            let at = request.input.len() - rest.len();
            rest = later;
            let made = each_aside(now, |input| self.tokens_of(input, context));
            for (at, (input, tokens)) in (at..).zip(now.iter().zip(made)) {
                let refused = |error| {
                    let whole = format!("input {at}: {error:#}{}", hint(input));
                    let place = self.model.path.display().to_string();
                    HandlerError::invalid("input", whole.replace(&place, "the model")).with_detail(whole)
                };
                let tokens = tokens?.map_err(refused)?;
                if tokens.truncated && request.refuse_long {
                    let most = self.model.max_tokens();
                    let message = format!("input {at} is longer than the {most} tokens that the model reads");
                    return Err(HandlerError::new(Kind::ContextLength, message));
                }
                texts.push(tokens);
            }
        }
        Ok((texts, turn))
    }

    fn tokens_of(&self, input: &Input, context: &Context) -> Result<Result<Tokens>, HandlerError> {
        Ok(match input {
            Input::Text(text) => {
                let _alone = (text.len() > LONG_BYTES).then(|| self::turn(&LONG, context)).transpose()?;
                self.model.tokens(text)
            }
            Input::Tokens(ids) => self.model.given_tokens(ids),
        })
    }
}

/// Bytes of the texts of a short request: about those of one pass.
const SHORT_BYTES: usize = 2 << 10;

/// Returns true for a request that a single pass or two answer, such as a question to search for.
fn is_short(texts: &[Input]) -> bool {
    // A text of no bytes has its special tokens.
    texts.iter().map(|text| bytes(text) + 8).sum::<usize>() <= SHORT_BYTES
}

fn bytes(input: &Input) -> usize {
    match input {
        Input::Text(text) => text.len(),
        Input::Tokens(ids) => size_of_val(ids.as_slice()),
    }
}

/// How many of the texts that are left are made tokens of at once; at least one.
fn share(left: &[Input]) -> usize {
    let mut sum = 0;
    let fits = left.iter().take_while(|input| {
        sum += bytes(input);
        sum <= LONG_BYTES
    });
    fits.count().max(1)
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
        let (texts, mut turn) = self.tokens(request, self.turns.enter(is_short(&request.input), context)?, context)?;
        let mut values = vec![0.0; texts.len() * own];
        let mut left: Vec<usize> = (0..texts.len()).collect();
        while !left.is_empty() {
            turn = turn.go_on(context)?;
            let ids: Vec<&[u32]> = left.iter().map(|text| texts[*text].ids.as_slice()).collect();
            let vectors = self.model.embed_while(&ids, || !turn.over() && context.check().is_ok());
            let mut vectors = vectors.map_err(|error| HandlerError::internal(&error))?.into_iter();
            left.retain(|text| match vectors.next().flatten() {
                Some(vector) => {
                    values[text * own..(text + 1) * own].copy_from_slice(&vector);
                    false
                }
                None => true,
            });
        }
        drop(turn);
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
