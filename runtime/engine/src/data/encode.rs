//! Rows as token sequences, with what is trained.

use std::str::FromStr;

use anyhow::Error;
use serde::Serialize;
use serde_json::Value as Json;

use super::group::Group;
use super::problem::{BAD_ROW, NO_EMBEDDING, NO_TEMPLATE, NOT_RENDERED, NOTHING, Problem, TOO_LONG, thousands};
use super::row::RowKind;
use super::{Example, Row};
use crate::text::template::{ChatTemplate, Given, Rendered};
use crate::text::tokenizer::Tokenizer;
use crate::text::tokens::{token_starts, tokenize};
use crate::words::value_of;

/// What happens to a row with more tokens than `max_seq_len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLongRow {
    /// The file is refused and the row named.
    Refuse,
    /// Its first `max_seq_len` tokens are kept, if something among them is trained.
    Truncate,
    /// It is left out.
    Skip,
}

impl FromStr for OnLongRow {
    type Err = Error;

    fn from_str(word: &str) -> anyhow::Result<Self> {
        value_of(word, &[("refuse", Self::Refuse), ("truncate", Self::Truncate), ("skip", Self::Skip)])
    }
}

/// How rows become token sequences.
#[derive(Clone, Copy)]
pub struct Encoder<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The model's chat template; without one there are no conversations.
    pub template: Option<&'a ChatTemplate>,
    /// Tokens that the model has an embedding for: those with an id below.
    pub embeddings: usize,
    /// Tokens an example may have.
    pub max_seq_len: usize,
    /// What to do with a longer one.
    pub on_long_row: OnLongRow,
}

/// Ids, and for each whether it is trained.
type Sequence = (Vec<u32>, Vec<bool>);

enum Fitted {
    Kept { sequences: Vec<Sequence>, cut: usize },
    Skipped,
}

impl Encoder<'_> {
    /// The examples that a row becomes, and how many of them were cut; `None`: it is left out as too long.
    ///
    /// # Errors
    /// Why it is refused. Rows that judge answers are: see [`Encoder::groups`].
    pub fn examples(&self, line: usize, row: &Row) -> Result<Option<(Vec<Example>, usize)>, Problem> {
        RowKind::Demonstration.check(row.kind(), "sft")?;
        self.sequences(line, row)
    }

    /// The same as groups: what is weighed together. Two answers to a prompt are one, and so is each example of another row.
    ///
    /// # Errors
    /// Why the row is refused.
    pub fn groups(&self, line: usize, row: &Row) -> Result<Option<(Vec<Group>, usize)>, Problem> {
        let Some((examples, cut)) = self.sequences(line, row)? else { return Ok(None) };
        let groups = match row {
            Row::Preference { .. } => vec![Group::new(examples, None)],
            Row::Rated { label, .. } => vec![Group::new(examples, Some(*label))],
            _ => examples.into_iter().map(|example| Group::new(vec![example], None)).collect(),
        };
        Ok(Some((groups, cut)))
    }

    fn sequences(&self, line: usize, row: &Row) -> Result<Option<(Vec<Example>, usize)>, Problem> {
        let Fitted::Kept { sequences, cut } = self.fit(self.encode(row)?)? else { return Ok(None) };
        for (ids, _) in &sequences {
            let known = self.tokenizer.check_embedded(ids, self.embeddings);
            known.map_err(|error| Problem::new(NO_EMBEDDING, error.to_string()))?;
        }
        let examples = sequences.into_iter().map(|(ids, trained)| Example::new(ids, trained, line));
        Ok(Some((examples.collect(), cut)))
    }

    /// The sequences of a row, of any length.
    ///
    /// A conversation is rendered by the chat template, and what is typed in it stays text. Strings are taken as they
    /// are: a special token in `text` is that token, and one tokenisation covers prompt and completion.
    fn encode(&self, row: &Row) -> Result<Vec<Sequence>, Problem> {
        let sequences = match row {
            Row::Messages { messages, tools, documents, variables } => {
                let (tools, documents, variables) = (tools.as_ref(), documents.as_ref(), variables.as_ref());
                self.encode_messages(messages, Given { tools, documents, variables })?
            }
            Row::PromptCompletion { system, prompt, completion, tools, variables } => match self.template {
                Some(_) => {
                    let said = |role: &str, text: &str| serde_json::json!({"role": role, "content": text});
                    let (prompt, completion) = self.without_ends(prompt, completion);
                    if completion.is_empty() {
                        return Err(Problem::new(
                            NOTHING,
                            format!("{NOTHING}: `completion` is no more than the token that ends it"),
                        ));
                    }
                    let mut messages = Vec::with_capacity(3);
                    messages.extend(system.as_ref().map(|text| said("system", text)));
                    messages.extend([said("user", prompt), said("assistant", completion)]);
                    let (tools, variables) = (tools.as_ref(), variables.as_ref());
                    self.encode_messages(&messages, Given { tools, variables, ..Given::default() })?
                }
                None if system.is_some() => {
                    let detail = "`system` needs a chat template, and the model has none";
                    return Err(Problem::new(NO_TEMPLATE, detail));
                }
                None if tools.is_some() => {
                    let detail = "`tools` need a chat template, and the model has none";
                    return Err(Problem::new(NO_TEMPLATE, detail));
                }
                None if variables.is_some() => {
                    let detail = "`chat_template_kwargs` are for a chat template, and the model has none";
                    return Err(Problem::new(NO_TEMPLATE, detail));
                }
                None => vec![self.encode_text(&format!("{prompt}{completion}"), prompt.len())?],
            },
            Row::Text(text) => vec![self.encode_text(text, 0)?],
            Row::Preference { chosen, rejected } => {
                vec![self.answer("chosen", chosen)?, self.answer("rejected", rejected)?]
            }
            Row::Rated { answer, .. } => vec![self.answer("completion", answer)?],
        };
        match sequences.iter().all(|(_, trained)| trained.contains(&true)) {
            true => Ok(sequences),
            false => {
                let detail = format!("{NOTHING}: no token lies wholly in what is to be learned");
                Err(Problem::new(NOTHING, detail))
            }
        }
    }

    /// The one sequence of a row with one answer, which stands under `key`.
    fn answer(&self, key: &str, row: &Row) -> Result<Sequence, Problem> {
        let [sequence] = <[Sequence; 1]>::try_from(self.encode(row)?).map_err(|sequences| {
            let detail = format!(
                "the chat template writes the {} answers of `{key}` each behind a prompt of its own; keep one, and put what comes before it into `prompt`",
                sequences.len()
            );
            Problem::new(NOT_RENDERED, detail)
        })?;
        Ok(sequence)
    }

    fn encode_messages(&self, messages: &[Json], given: Given<'_>) -> Result<Vec<Sequence>, Problem> {
        let Some(template) = self.template else {
            let detail = "`messages` need a chat template, and the model has none";
            return Err(Problem::new(NO_TEMPLATE, detail));
        };
        let problem = |e: anyhow::Error| {
            let detail = format!("{e:#}");
            let kind = if detail.starts_with(NOTHING) { NOTHING } else { NOT_RENDERED };
            Problem::new(kind, detail)
        };
        let control = self.tokenizer.control_in(messages, given).map_err(problem)?;
        let texts: Vec<Rendered> = template.render_for_training(messages, given, &control).map_err(problem)?;
        texts.iter().map(|text| tokenize(text, self.tokenizer).map_err(problem)).collect()
    }

    /// Prompt and completion without the BOS and EOS that they are typed with: the chat template writes its own. Of the ends that is
    /// the tokenizer's own and the template's; what ends an answer in other models is text here, as in `messages`.
    fn without_ends<'t>(&self, prompt: &'t str, completion: &'t str) -> (&'t str, &'t str) {
        // Where no tokenizer adds it, it opens a turn (SmolLM2), and is text like any other that is typed.
        let bos = self.tokenizer.bos_token.as_deref().filter(|_| self.tokenizer.add_bos);
        let end_of_turn = self.tokenizer.end_of_turn.and_then(|id| self.tokenizer.token(id));
        let mut ends = self.tokenizer.eos_token.iter().chain(&end_of_turn);
        let ended = ends.find_map(|end| completion.trim_end().strip_suffix(end.as_str()));
        (bos.and_then(|bos| prompt.strip_prefix(bos)).unwrap_or(prompt), ended.unwrap_or(completion))
    }

    /// Tokenises `text`, with BOS if the tokenizer adds it, and appends EOS. What starts at byte `from` or later is
    /// trained, EOS too. A BOS or EOS that the text has already is not doubled, nor is an EOS that white space follows.
    fn encode_text(&self, text: &str, from: usize) -> Result<Sequence, Problem> {
        let fail = |detail: String| Problem::new(BAD_ROW, detail);
        let mut encoded = self.tokenizer.encode(text, true).map_err(|e| fail(format!("{e:#}")))?;
        let eos_ids = &self.tokenizer.eos_ids;
        let Some(eos) = self.tokenizer.eos_id else {
            return Err(fail("the tokenizer has no EOS token to end the text with".into()));
        };
        // What the tokenizer adds is off the text.
        let bos = self.tokenizer.bos_id;
        if encoded.offsets.first() == Some(&(0, 0)) && encoded.ids.iter().take_while(|id| Some(**id) == bos).count() > 1
        {
            encoded.ids.remove(0);
            encoded.offsets.remove(0);
        }
        if encoded.offsets.last() == Some(&(0, 0)) && encoded.ids.last().is_some_and(|id| eos_ids.contains(id)) {
            encoded.ids.pop();
            encoded.offsets.pop();
        }
        let starts = token_starts(&encoded);
        let mut trained: Vec<bool> = starts.iter().map(|&start| start >= from).collect();
        let mut ids = encoded.ids;
        if from > 0 && !trained.contains(&true) {
            let detail = format!(
                "{NOTHING}: the completion begins inside the prompt's last token; end the prompt without a space and begin the completion with it"
            );
            return Err(Problem::new(NOTHING, detail));
        }
        let ended = last_word(&ids, self.tokenizer).filter(|&at| at > 0 && trained[at] && eos_ids.contains(&ids[at]));
        if ended.is_none() {
            ids.push(eos);
            trained.push(true);
        }
        trained[0] = false;
        Ok((ids, trained))
    }

    /// Whether an example, which was not cut, ends in a trained turn without an end token: [`end_of_turn`].
    pub fn is_endless(&self, example: &Example) -> bool {
        end_of_turn(example, self.tokenizer).is_none()
    }

    fn fit(&self, mut sequences: Vec<Sequence>) -> Result<Fitted, Problem> {
        let limit = self.max_seq_len;
        let longest = sequences.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0);
        if longest <= limit {
            return Ok(Fitted::Kept { sequences, cut: 0 });
        }
        match self.on_long_row {
            OnLongRow::Skip => Ok(Fitted::Skipped),
            OnLongRow::Refuse => {
                let (longest, limit) = (thousands(longest), thousands(limit));
                let detail = format!("{longest} tokens, the limit is {limit}");
                Err(Problem::new(TOO_LONG, detail))
            }
            OnLongRow::Truncate => {
                let mut cut = 0;
                for (ids, trained) in sequences.iter_mut().filter(|(ids, _)| ids.len() > limit) {
                    cut += 1;
                    ids.truncate(limit);
                    trained.truncate(limit);
                    if !trained.contains(&true) {
                        let limit = thousands(limit);
                        let detail = format!("{NOTHING}: no trained token among the first {limit}");
                        return Err(Problem::new(NOTHING, detail));
                    }
                }
                Ok(Fitted::Kept { sequences, cut })
            }
        }
    }
}

/// The token that ends the last trained turn of an example, from which a model learns to stop: the last trained token, white space
/// aside, if it is control.
pub fn end_of_turn(example: &Example, tokenizer: &Tokenizer) -> Option<u32> {
    let end = example.trained.iter().rposition(|trained| *trained)? + 1;
    let at = last_word(&example.ids[..end], tokenizer).filter(|at| example.trained[*at])?;
    let id = example.ids[at];
    let control = tokenizer.control_tokens().binary_search_by_key(&id, |control| control.id).is_ok();
    (control || tokenizer.eos_ids.contains(&id)).then_some(id)
}

/// Where the last token stands that is not white space.
fn last_word(ids: &[u32], tokenizer: &Tokenizer) -> Option<usize> {
    let is_space = |id: u32| tokenizer.decode(&[id], false).is_ok_and(|text| text.trim().is_empty());
    ids.iter().rposition(|id| !is_space(*id))
}
