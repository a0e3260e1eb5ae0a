//! Which fields of a request which kind of handler can do. What it cannot do is refused by name.

use super::anthropic::ApiVersion;
use super::{HandlerError, Part, Request, ResponseFormat, Role, ToolChoice};

/// A field of a request that not every handler can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Pictures in messages.
    Images,
    /// Calls of tools and their results in messages.
    ToolMessages,
    /// A text instead of a conversation.
    Prompt,
    /// `max_tokens`.
    MaxTokens,
    /// `temperature`.
    Temperature,
    /// `top_k`.
    TopK,
    /// `top_p`.
    TopP,
    /// `min_p`.
    MinP,
    /// `repetition_penalty`.
    RepetitionPenalty,
    /// `frequency_penalty`.
    FrequencyPenalty,
    /// `presence_penalty`.
    PresencePenalty,
    /// `logit_bias`.
    LogitBias,
    /// `seed`.
    Seed,
    /// `stop`.
    Stop,
    /// More than one choice.
    N,
    /// `logprobs` and `top_logprobs`.
    Logprobs,
    /// `tools`.
    Tools,
    /// A choice of tools other than what is meant without one.
    ToolChoice,
    /// `parallel_tool_calls`.
    ParallelToolCalls,
    /// `response_format` of type `json_object`.
    JsonObject,
    /// `response_format` of type `json_schema`.
    JsonSchema,
    /// `reasoning_effort`.
    ReasoningEffort,
}

/// A kind of handler, as far as fields are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A model of this machine.
    Local,
    /// An endpoint of OpenAI's API.
    OpenAi,
    /// Anthropic's API, in one of its versions.
    Anthropic(ApiVersion),
}

/// Returns true if a kind of handler can do a field. An endpoint is sent all that it may know, and refuses by itself.
pub fn supports(backend: Backend, field: Field) -> bool {
    let (local, openai, anthropic) = match field {
        Field::Images => (false, true, true),
        Field::ToolMessages => (true, true, true),
        Field::Prompt => (true, true, false),
        Field::MaxTokens => (true, true, true),
        Field::Temperature => (true, true, true),
        Field::TopK => (true, true, true),
        Field::TopP => (true, true, true),
        Field::MinP => (true, true, false),
        Field::RepetitionPenalty => (true, true, false),
        Field::FrequencyPenalty => (true, true, false),
        Field::PresencePenalty => (true, true, false),
        Field::LogitBias => (true, true, false),
        Field::Seed => (true, true, false),
        Field::Stop => (true, true, true),
        Field::N => (true, true, false),
        Field::Logprobs => (true, true, false),
        Field::Tools => (true, true, true),
        Field::ToolChoice => (true, true, true),
        Field::ParallelToolCalls => (true, true, true),
        Field::JsonObject => (true, true, false),
        Field::JsonSchema => (true, true, true),
        Field::ReasoningEffort => (false, true, true),
    };
    // The newer version steers no draw.
    let steered = matches!(field, Field::Temperature | Field::TopK | Field::TopP);
    match backend {
        Backend::Local => local,
        Backend::OpenAi => openai,
        Backend::Anthropic(ApiVersion::V2023) => anthropic,
        Backend::Anthropic(ApiVersion::V2026) => anthropic && !steered,
    }
}

impl Field {
    /// OpenAI's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Images | Self::ToolMessages => "messages",
            Self::Prompt => "prompt",
            Self::MaxTokens => "max_tokens",
            Self::Temperature => "temperature",
            Self::TopK => "top_k",
            Self::TopP => "top_p",
            Self::MinP => "min_p",
            Self::RepetitionPenalty => "repetition_penalty",
            Self::FrequencyPenalty => "frequency_penalty",
            Self::PresencePenalty => "presence_penalty",
            Self::LogitBias => "logit_bias",
            Self::Seed => "seed",
            Self::Stop => "stop",
            Self::N => "n",
            Self::Logprobs => "logprobs",
            Self::Tools => "tools",
            Self::ToolChoice => "tool_choice",
            Self::ParallelToolCalls => "parallel_tool_calls",
            Self::JsonObject | Self::JsonSchema => "response_format",
            Self::ReasoningEffort => "reasoning_effort",
        }
    }

    /// Returns true if it only steers how tokens are drawn: an answer without it is drawn otherwise, and is no other kind of answer.
    pub fn steers_the_draw(self) -> bool {
        match self {
            Self::Temperature
            | Self::TopK
            | Self::TopP
            | Self::MinP
            | Self::RepetitionPenalty
            | Self::FrequencyPenalty
            | Self::PresencePenalty
            | Self::Seed => true,
            Self::Images
            | Self::ToolMessages
            | Self::Prompt
            | Self::MaxTokens
            | Self::LogitBias
            | Self::Stop
            | Self::N
            | Self::Logprobs
            | Self::Tools
            | Self::ToolChoice
            | Self::ParallelToolCalls
            | Self::JsonObject
            | Self::JsonSchema
            | Self::ReasoningEffort => false,
        }
    }

    /// The words of a refusal.
    fn refusal(self) -> String {
        match self {
            Self::Images => "pictures cannot be read by this model; send text alone".to_owned(),
            Self::ToolMessages => "this model has no tools, so that it can read neither calls nor results".to_owned(),
            Self::Prompt => "this model answers conversations; use /v1/chat/completions".to_owned(),
            Self::N => "this model gives one answer to a request; `n` should be 1".to_owned(),
            Self::JsonObject => {
                "`response_format`: this model cannot be held to `json_object`; leave it out".to_owned()
            }
            Self::JsonSchema => "`response_format`: this model cannot be held to a schema; leave it out".to_owned(),
            field => format!("`{}` is not supported by this model; leave it out", field.name()),
        }
    }
}

impl Request {
    /// The fields that it gives, and that not every handler can do.
    pub fn given(&self) -> Vec<Field> {
        // Without `..`: a further field of a request is a further line here.
        let Self {
            messages,
            prompt,
            max_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            logit_bias,
            seed,
            stop,
            n,
            logprobs,
            tools,
            tool_choice,
            parallel_tool_calls,
            response_format,
            reasoning_effort,
        } = self;
        let is_image = |part: &Part| matches!(part, Part::Image { .. });
        let has_images = messages.iter().flat_map(|message| &message.parts).any(is_image);
        let of_tools = messages.iter().any(|message| message.role == Role::Tool || !message.tool_calls.is_empty());
        // Without tools, none are called; with them, as the model likes.
        let is_usual = match tool_choice {
            None => true,
            Some(ToolChoice::None) => tools.is_empty(),
            Some(ToolChoice::Auto) => !tools.is_empty(),
            Some(ToolChoice::Required | ToolChoice::Named(_)) => false,
        };
        let all = [
            (Field::Images, has_images),
            (Field::ToolMessages, of_tools),
            (Field::Prompt, prompt.is_some()),
            (Field::MaxTokens, max_tokens.is_some()),
            (Field::Temperature, temperature.is_some()),
            (Field::TopK, top_k.is_some()),
            (Field::TopP, top_p.is_some()),
            (Field::MinP, min_p.is_some()),
            (Field::RepetitionPenalty, repetition_penalty.is_some()),
            (Field::FrequencyPenalty, frequency_penalty.is_some()),
            (Field::PresencePenalty, presence_penalty.is_some()),
            (Field::LogitBias, !logit_bias.is_empty()),
            (Field::Seed, seed.is_some()),
            (Field::Stop, !stop.is_empty()),
            (Field::N, n.is_some_and(|n| n != 1)),
            (Field::Logprobs, logprobs.is_some()),
            (Field::Tools, !tools.is_empty()),
            (Field::ToolChoice, !is_usual),
            (Field::ParallelToolCalls, parallel_tool_calls.is_some() && !tools.is_empty()),
            (Field::JsonObject, matches!(response_format, Some(ResponseFormat::JsonObject))),
            (Field::JsonSchema, matches!(response_format, Some(ResponseFormat::JsonSchema { .. }))),
            (Field::ReasoningEffort, reasoning_effort.as_ref().is_some_and(|effort| effort != "none")),
        ];
        all.into_iter().filter_map(|(field, given)| given.then_some(field)).collect()
    }

    /// Refuses the first field that a kind of handler cannot do.
    ///
    /// # Errors
    /// Names the field.
    pub fn check_for(&self, backend: Backend) -> Result<(), HandlerError> {
        self.fit(backend, false).map(drop)
    }

    /// Returns the fields that are to be left out for a kind of handler: with `drops`, those that it cannot do and that only steer the
    /// draw.
    ///
    /// # Errors
    /// Names the first field that it cannot do and that is not left out.
    pub fn fit(&self, backend: Backend, drops: bool) -> Result<Vec<Field>, HandlerError> {
        let (dropped, refused): (Vec<Field>, Vec<Field>) = (self.given().into_iter())
            .filter(|field| !supports(backend, *field))
            .partition(|field| drops && field.steers_the_draw());
        match refused.first() {
            Some(field) => Err(HandlerError::invalid(field.name(), field.refusal())),
            None => Ok(dropped),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Kind, Message, Tool};
    use super::*;

    const ANTHROPIC: Backend = Backend::Anthropic(ApiVersion::V2026);

    #[test]
    fn what_a_handler_cannot_do_is_refused_by_name() {
        let fine = Request { n: Some(1), tool_choice: Some(ToolChoice::None), ..Request::default() };
        assert!(fine.given().is_empty() && fine.check_for(Backend::Local).is_ok());
        let image = Message {
            parts: vec![Part::Image { url: "data:,".into(), detail: None }],
            ..Message::new(Role::User, "look")
        };
        for (request, backend, param) in [
            (Request { messages: vec![image], ..Request::default() }, Backend::Local, "messages"),
            (Request { logprobs: Some(0), ..Request::default() }, ANTHROPIC, "logprobs"),
            (Request { n: Some(2), ..Request::default() }, ANTHROPIC, "n"),
            (Request { temperature: Some(1.0), ..Request::default() }, ANTHROPIC, "temperature"),
        ] {
            let refused = request.check_for(backend).expect_err(param);
            assert_eq!(refused.kind, Kind::InvalidRequest { param: Some(param.into()) });
        }
        let drawn = Request { temperature: Some(0.0), seed: Some(1), n: Some(1), ..Request::default() };
        assert_eq!(drawn.fit(ANTHROPIC, true), Ok(vec![Field::Temperature, Field::Seed]));
        assert!(Request { n: Some(2), ..drawn }.fit(ANTHROPIC, true).is_err(), "what is more than the draw is refused");
        let tools = Request { tools: vec![Tool::default()], tool_choice: Some(ToolChoice::Auto), ..Request::default() };
        assert_eq!(tools.given(), [Field::Tools]);
        let forced = Request { tool_choice: Some(ToolChoice::Required), ..tools };
        assert_eq!(forced.given(), [Field::Tools, Field::ToolChoice]);
    }
}
