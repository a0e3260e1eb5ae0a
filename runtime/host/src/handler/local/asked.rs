//! A request, made ready for the engine: the prompt's tokens, and how each choice is drawn.

use homeroom_engine::inference::Ask;
use homeroom_engine::inference::generate::{Sampling, prompt_ids_given};
use homeroom_engine::models::BaseModel;
use homeroom_engine::text::block_end::BlockEnd;
use homeroom_engine::text::template::Given;

use super::calls::Calls;
use super::formats::{self, Format};
use super::grammar::Held;
use super::tools::{Conversation, conversation};
use super::{DEFAULT_MAX_TOKENS, DEFAULT_TEMPERATURE, DEFAULT_TOP_P, Generation, LONG, LONG_BYTES, turn};
use crate::handler::{Context, HandlerError, Kind, Prompt, Request, Tool, ToolChoice, random};

/// Bytes of a conversation for each token of the context from which on it cannot fit: no text has so long tokens on an average. Making
/// tokens of it only to find that out would take minutes and gigabytes.
const BYTES_PER_TOKEN_MAX: usize = 48;
/// Control tokens within calls, besides those that they begin and end with.
const ARGS: &str = "[ARGS]";

/// A request, made ready.
pub(super) struct Asked {
    pub prompt: Vec<u32>,
    /// One for each choice.
    pub asks: Vec<Ask>,
    pub block_end: Vec<BlockEnd>,
    pub stop: Vec<String>,
    /// How the calls of each choice are found, if tools are offered.
    pub calls: Vec<Option<Calls>>,
    /// Control tokens that calls are written with: their ids and texts.
    pub marks: Vec<(u32, String)>,
    /// The answer ends with its first call.
    pub one_call: bool,
    /// Whether tokens come with their log-probabilities.
    pub logprobs: bool,
}

/// Makes a request ready.
///
/// # Errors
/// When it does not fit the model; names the field.
pub(super) fn asked(generation: &Generation, request: &Request, context: &Context) -> Result<Asked, HandlerError> {
    let model = generation.model();
    let limit = model.architecture.max_position_embeddings;
    check_bytes(request, limit)?;
    check_bias(request, model)?;
    let template = model.template.as_ref();
    let format = formats::of_source(template.map_or("", |template| template.tool_source()));
    let held = Held::of(request, format);
    let mut prompt = match &request.prompt {
        Some(prompt) => text_ids(model, prompt)?,
        None => {
            let writes_tools = template.is_some_and(|template| template.writes_tools());
            conversation_ids(model, request, conversation(request, writes_tools), context)?
        }
    };
    let block_end = || match request.prompt {
        Some(_) => Ok(BlockEnd::default()),
        None => BlockEnd::behind(&prompt, &model.tokenizer, template),
    };
    let internal = |error: anyhow::Error| HandlerError::internal(&error);
    let mut block_ends =
        (0..request.choices()).map(|_| block_end()).collect::<Result<Vec<_>, _>>().map_err(internal)?;
    // What is held to a form begins at once: a block of thinking that the prompt opens is closed, and a call's mark is written.
    if !matches!(held, Held::Free) {
        let closing = block_ends[0].closing().map(|closing| format!("{closing}\n\n")).unwrap_or_default();
        let prefix = if matches!(held, Held::Call(_)) { format.prefix } else { "" };
        prompt.extend(behind(model, &(closing + prefix)).map_err(internal)?);
        block_ends.fill_with(BlockEnd::default);
    }
    if prompt.len() >= limit {
        let message = format!(
            "the conversation is {} tokens and leaves no room for an answer: the model's context is {limit}",
            prompt.len()
        );
        return Err(HandlerError::new(Kind::ContextLength, message));
    }
    let ask = |number: usize| -> Result<Ask, HandlerError> {
        let constraint = match &held {
            Held::Free => None,
            Held::Schema(schema, lenient, param) => Some(generation.grammars()?.schema(schema, *lenient, param)?),
            Held::Call(schema) => Some(generation.grammars()?.schema(schema, true, "tools")?),
            Held::Either(schema, lenient) => {
                Some(generation.grammars()?.schema(schema, *lenient, "response_format")?)
            }
        };
        Ok(Ask {
            sampling: sampling(request, context, number, limit),
            logit_bias: request.logit_bias.iter().map(|(id, bias)| (*id, *bias as f32)).collect(),
            logprobs: request.logprobs,
            constraint,
            shared: number == 0 && request.choices() > 1,
            background: context.is_background(),
        })
    };
    let asks = (0..request.choices()).map(ask).collect::<Result<Vec<_>, _>>()?;
    // All of the answer is JSON, in which a call is one without its marks.
    let forced = matches!(held, Held::Call(_) | Held::Either(..));
    let offered = !request.tools.is_empty() && request.tool_choice != Some(ToolChoice::None);
    let calls = || offered.then(|| calls(format, &request.tools, forced));
    Ok(Asked {
        prompt,
        asks,
        block_end: block_ends,
        stop: request.stop.clone(),
        calls: (0..request.choices()).map(|_| calls()).collect(),
        marks: if offered { marks(model, format) } else { Vec::new() },
        one_call: forced || request.parallel_tool_calls == Some(false),
        logprobs: request.logprobs.is_some(),
    })
}

fn calls(format: &'static Format, tools: &[Tool], forced: bool) -> Calls {
    if forced { Calls::begun(format, tools) } else { Calls::new(format, tools) }
}

fn check_bytes(request: &Request, limit: usize) -> Result<(), HandlerError> {
    let messages: usize = request.messages.iter().map(|message| message.content.len()).sum();
    let tools: usize = request.tools.iter().map(|tool| tool.json().to_string().len()).sum();
    let bytes = messages
        + tools
        + match &request.prompt {
            Some(Prompt::Text(text)) => text.len(),
            _ => 0,
        };
    if bytes / BYTES_PER_TOKEN_MAX > limit {
        let message =
            format!("the conversation is {bytes} bytes long, far beyond the model's context of {limit} tokens");
        return Err(HandlerError::new(Kind::ContextLength, message));
    }
    Ok(())
}

fn check_bias(request: &Request, model: &BaseModel) -> Result<(), HandlerError> {
    let vocab = model.architecture.vocab_size;
    match request.logit_bias.keys().find(|id| **id as usize >= vocab) {
        Some(id) => {
            let message = format!("`logit_bias`: there is no token {id}, the model knows {vocab}");
            Err(HandlerError::invalid("logit_bias", message))
        }
        None => Ok(()),
    }
}

/// The tokens of a conversation, ready for the model's turn.
fn conversation_ids(
    model: &BaseModel,
    request: &Request,
    conversation: Conversation,
    context: &Context,
) -> Result<Vec<u32>, HandlerError> {
    let bytes: usize = request.messages.iter().map(|message| message.content.len()).sum();
    let turn = (bytes > LONG_BYTES).then(|| turn(&LONG, context)).transpose()?;
    let given = Given { tools: conversation.tools.as_ref(), ..Given::default() };
    let prompt = prompt_ids_given(model, &conversation.messages, given);
    drop(turn);
    prompt.map_err(|error| wrong("messages", &error, model))
}

/// The error of a field that cannot be made tokens of. Where the model lies is not told to whoever asked.
fn wrong(param: &str, error: &anyhow::Error, model: &BaseModel) -> HandlerError {
    let whole = format!("{error:#}");
    let place = model.path.display().to_string();
    HandlerError::invalid(param, whole.replace(&place, "the model")).with_detail(whole)
}

/// The tokens of a text that is gone on with. Control tokens in it are text; who sends tokens may send those.
fn text_ids(model: &BaseModel, prompt: &Prompt) -> Result<Vec<u32>, HandlerError> {
    let wrong = |error: anyhow::Error| wrong("prompt", &error.context("`prompt`"), model);
    let tokenizer = &model.tokenizer;
    let mut ids = match prompt {
        Prompt::Tokens(ids) => ids.clone(),
        Prompt::Text(text) => {
            let bos = tokenizer.bos_id.filter(|_| tokenizer.add_bos);
            bos.into_iter().chain(tokenizer.encode_as_text(text).map_err(wrong)?).collect()
        }
    };
    if ids.is_empty() {
        ids.extend(tokenizer.bos_id.or(tokenizer.eos_id));
    }
    if ids.is_empty() {
        return Err(HandlerError::invalid("prompt", "`prompt`: the text is empty"));
    }
    tokenizer.check_embedded(&ids, model.architecture.vocab_size).map_err(wrong)?;
    Ok(ids)
}

/// The tokens of a text that stands behind a prompt. Control tokens in it are control.
fn behind(model: &BaseModel, text: &str) -> anyhow::Result<Vec<u32>> {
    let tokenizer = &model.tokenizer;
    if text.is_empty() {
        return Ok(Vec::new());
    }
    // SentencePiece puts a space before a text that it begins; behind a line break it does not.
    let line_break = tokenizer.encode("\n", false)?.ids;
    let ids = tokenizer.encode(&format!("\n{text}"), false)?.ids;
    match ids.strip_prefix(&line_break[..]) {
        Some(ids) => Ok(ids.to_vec()),
        None => Ok(tokenizer.encode(text, false)?.ids),
    }
}

/// The control tokens that a format's calls are written with.
fn marks(model: &BaseModel, format: &Format) -> Vec<(u32, String)> {
    let is_mark = |text: &str| format.opens.contains(&text) || format.closes == Some(text) || text == ARGS;
    let control = model.tokenizer.control_tokens().iter();
    control.filter(|control| is_mark(&control.text)).map(|control| (control.id, control.text.clone())).collect()
}

fn sampling(request: &Request, context: &Context, number: usize, limit: usize) -> Sampling {
    let neutral = Sampling::default();
    Sampling {
        max_tokens: context.tokens(request.max_tokens.or(Some(DEFAULT_MAX_TOKENS))).unwrap_or(limit).min(limit),
        temperature: request.temperature.unwrap_or(DEFAULT_TEMPERATURE),
        top_k: request.top_k.unwrap_or(neutral.top_k),
        top_p: request.top_p.unwrap_or(if request.temperature.is_none() { DEFAULT_TOP_P } else { neutral.top_p }),
        min_p: request.min_p.unwrap_or(neutral.min_p),
        repetition_penalty: request.repetition_penalty.unwrap_or(neutral.repetition_penalty),
        frequency_penalty: request.frequency_penalty.unwrap_or(neutral.frequency_penalty),
        presence_penalty: request.presence_penalty.unwrap_or(neutral.presence_penalty),
        seed: request.seed.map_or_else(random, i64::cast_unsigned).wrapping_add(number as u64),
    }
}
