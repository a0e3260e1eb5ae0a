//! What a report can find: names, what they mean, and what to do. Where OpenAI's data validator for fine-tuning has a name, it is that.

use crate::data::problem::{
    BAD_ROW, MIXED, NO_EMBEDDING, NO_TEMPLATE, NOT_JSON, NOT_RENDERED, NOT_UTF8, NOTHING, OTHER_OBJECTIVE, OTHER_ROWS,
    Problem, TOO_LONG, UNKNOWN_ROW,
};

use super::Level;
use super::personal;

/// A check by its name.
pub(super) struct Check {
    pub name: &'static str,
    pub level: Level,
    /// One, in words.
    one: &'static str,
    /// Several.
    many: &'static str,
    pub advice: &'static str,
}

impl Check {
    /// What was found, in words.
    pub fn words(&self, count: usize) -> String {
        match count {
            1 => format!("1 {}", self.one),
            count => format!("{} {}", crate::data::problem::thousands(count), self.many),
        }
    }
}

macro_rules! checks {
    ($($name:literal $level:ident $one:literal $many:literal $advice:literal;)*) => {
        const CHECKS: &[Check] = &[$(Check { name: $name, level: Level::$level, one: $one, many: $many, advice: $advice }),*];
    };
}

checks! {
    "not_json" Error "line is no JSON" "lines are no JSON" "write one JSON object a line";
    "not_utf8" Error "line is not UTF-8" "lines are not UTF-8" "save the file as UTF-8";
    "data_type" Error "row is no JSON object" "rows are no JSON objects" "write each row as an object, `{\"messages\": [...]}`";
    "missing_messages_list" Error "row has no form that is known" "rows have no form that is known"
        "give each `messages`, `prompt` and `completion`, or `text`";
    "mixed_forms" Error "row has another form than those before" "rows have other forms than those before" "make files of one form each";
    "message_missing_key" Error "row has a message without a role or content" "rows have messages without a role or content"
        "give each message `role` and `content`";
    "unrecognized_role" Error "row has an unknown role" "rows have unknown roles" "the roles are system, developer, user, assistant and tool";
    "missing_content" Error "row has a message whose content is no text" "rows have messages whose content is no text" "write the content as a string";
    "example_missing_assistant_message" Error "row has no message of the assistant" "rows have no message of the assistant"
        "end each row with what the model is to answer";
    "nothing_to_train_on" Error "row teaches nothing" "rows teach nothing" "fill in the answers, or take the rows out";
    "malformed_row" Error "row is malformed" "rows are malformed" "see the first message";
    "no_template" Error "row needs a chat template, and the model has none" "rows need a chat template, and the model has none"
        "choose an instruction-tuned model, or write `prompt` and `completion`";
    "refused_by_template" Error "row is refused by the chat template" "rows are refused by the chat template" "see the first message";
    "double_bos" Error "row begins with two BOS tokens" "rows begin with two BOS tokens" "take one out of the chat template, or out of the rows";
    "too_long" Error "row is longer than the limit" "rows are longer than the limit"
        "allow more with --max-seq-len, or choose --on-long-row truncate or skip";
    "no_embedding" Error "row has a token that the model does not know" "rows have tokens that the model does not know" "take the token out";
    "wrong_objective" Error "row is for another objective" "rows are for another objective" "choose what is learned with --objective";
    "leaks" Warning "held-out row stands among the rows to train on" "held-out rows stand among the rows to train on"
        "take them out of one of the two: what is measured on them is memory";
    "near_leaks" Warning "held-out row is nearly the same as a row to train on" "held-out rows are nearly the same as rows to train on"
        "take them out of one of the two";
    "leaked_prompts" Warning "held-out row asks what a row to train on asks, and answers otherwise" "held-out rows ask what rows to train on ask, and answer otherwise"
        "ask each question on one side only";
    "conflicts" Warning "row asks what an earlier one asks, and answers otherwise" "rows ask what earlier ones ask, and answer otherwise"
        "decide on one answer, unless several are right";
    "duplicates" Warning "row says what an earlier one says" "rows say what earlier ones say" "keep one of each: rows that stand twice weigh twice";
    "near_duplicates" Warning "row is nearly the same as an earlier one" "rows are nearly the same as earlier ones"
        "look at them, and keep one of each if they teach the same";
    "truncated" Warning "row is cut, and its end is not learned" "rows are cut, and their ends are not learned" "allow more with --max-seq-len, or shorten them";
    "skipped" Warning "row is left out as too long" "rows are left out as too long" "allow more with --max-seq-len, or shorten them";
    "longer_than_context" Warning "row is longer than the model can read" "rows are longer than the model can read" "shorten them, or choose a model with a longer context";
    "prompt_too_long" Warning "prompt fills the limit, and leaves no room for the answer" "prompts fill the limit, and leave no room for answers" "shorten what is asked";
    "empty_turns" Warning "row has a turn that says nothing" "rows have turns that say nothing" "fill them in, or take the rows out";
    "answer_repeats_prompt" Warning "answer repeats the question" "answers repeat the question" "check whether columns were exchanged";
    "missing_bos" Warning "row begins without the BOS that the model's texts begin with" "rows begin without the BOS that the model's texts begin with"
        "have the chat template write `{{ bos_token }}` first";
    "no_end_of_turn" Warning "row has an answer without an end, so that the model does not learn where to stop"
        "rows have answers without an end, so that the model does not learn where to stop" "have the chat template end the assistant's turns with a control token";
    "end_not_stopping" Warning "row has an answer that ends with a token at which the model does not stop"
        "rows have answers that end with a token at which the model does not stop" "add the token to `eos_token_id` in the model's generation_config.json";
    "n_missing_system" Note "row has no system message, while others have" "rows have no system message, while others have"
        "give all rows the one that the model is served with, or none";
    "n_missing_user" Note "row has no message of the user" "rows have no message of the user" "check that this is meant";
}

/// What is done about personal data.
const PERSONAL_ADVICE: &str = "take them out (`homeroom preview FILE --redact OUT`, or `redact` in a pipeline), unless all agreed that the model may learn and repeat them";

/// A finding of a kind, in words, with what to do.
pub(super) fn described(name: &str, count: usize) -> (Level, String, &'static str) {
    if let Some(check) = CHECKS.iter().find(|check| check.name == name) {
        return (check.level, check.words(count), check.advice);
    }
    let words = personal::kinds().find(|(kind, _)| *kind == name).map_or(name, |(_, words)| words);
    let rows = if count == 1 {
        "1 row has".to_owned()
    } else {
        format!("{} rows have", crate::data::problem::thousands(count))
    };
    (Level::Warning, format!("{rows} likely {words}"), PERSONAL_ADVICE)
}

/// The place of a check in a report.
pub(super) fn place(name: &str) -> usize {
    let personal = || personal::kinds().position(|(kind, _)| kind == name).map_or(usize::MAX, |at| CHECKS.len() + at);
    CHECKS.iter().position(|check| check.name == name).unwrap_or_else(personal)
}

/// The check that a refused row failed.
pub(super) fn of_problem(problem: &Problem) -> &'static str {
    let detail = problem.to_string();
    let says = |text: &str| detail.contains(text);
    match problem.kind() {
        NOT_JSON => "not_json",
        NOT_UTF8 => "not_utf8",
        UNKNOWN_ROW if detail.starts_with("not an object") => "data_type",
        UNKNOWN_ROW => "missing_messages_list",
        MIXED => "mixed_forms",
        NOTHING if says("no assistant message") => "example_missing_assistant_message",
        NOTHING => "nothing_to_train_on",
        BAD_ROW if says("role: ") || says("unknown role") => "unrecognized_role",
        BAD_ROW if says("no `role`") || says("no `content`") => "message_missing_key",
        BAD_ROW if says("content: ") => "missing_content",
        NO_TEMPLATE => "no_template",
        NOT_RENDERED if says("two BOS") => "double_bos",
        NOT_RENDERED => "refused_by_template",
        TOO_LONG => "too_long",
        NO_EMBEDDING => "no_embedding",
        OTHER_OBJECTIVE | OTHER_ROWS => "wrong_objective",
        _ => "malformed_row",
    }
}
