//! The tokens of a rendered text, and which of them are trained.

use anyhow::{Context, Result, ensure};

use super::control::Control;
use super::template::Rendered;
use super::tokenizer::{Encoded, Tokenizer};

/// Tokenises a rendered text: ids, and for each whether it is trained.
///
/// The text is encoded without added special tokens (templates write their own BOS). What is trained begins a token: the prompt
/// before it has the tokens that it is served with. A special token inside a literal span is replaced by the tokens of its
/// spelling. A token is trained when it starts inside a trained span: by position, never by id. The first token is never trained,
/// since nothing predicts it.
///
/// # Errors
/// When the tokenizer fails, begins the text with two BOS tokens, or can only spell a special token as itself.
pub fn tokenize(rendered: &Rendered, tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<bool>)> {
    // Sentencepiece puts a space before a text that it begins; behind a line break it does not. Few texts need it.
    let line_break = || tokenizer.encode_as_text("\n");
    let spell = |piece: &str| {
        let ids = tokenizer.encode_as_text(&format!("\n{piece}"))?;
        match ids.strip_prefix(&line_break()?[..]) {
            Some(ids) => Ok(ids.to_vec()),
            None => tokenizer.encode_as_text(piece),
        }
    };
    let encoded = encode_parted(rendered, tokenizer, line_break)?;
    let (ids, trained) = lay_out(rendered, &encoded, tokenizer.control_tokens(), tokenizer.unknown_ids(), spell)?;
    if let (Some(bos), [first, second, ..]) = (tokenizer.bos_id, &ids[..]) {
        ensure!(
            !(*first == bos && *second == bos),
            "the rendered text begins with two BOS tokens; remove one from the chat template"
        );
    }
    Ok((ids, trained))
}

/// Encodes a text at once, unless a token would reach from a prompt into its answer (two line breaks are one token of many
/// vocabularies): such a prompt is encoded without its answer.
fn encode_parted(
    rendered: &Rendered,
    tokenizer: &Tokenizer,
    line_break: impl Fn() -> Result<Vec<u32>>,
) -> Result<Encoded> {
    let text = &rendered.text;
    let whole = tokenizer.encode(text, false)?;
    let crossed = |at: &usize| whole.offsets.iter().any(|(from, to)| from < at && at < to);
    let mut cuts: Vec<usize> = rendered.trained.iter().map(|span| span.start).filter(crossed).collect();
    let Some(&first) = cuts.first() else { return Ok(whole) };
    cuts.push(text.len());
    let line_break = line_break()?;
    let mut parted = tokenizer.encode(&text[..first], false)?;
    for piece in cuts.windows(2) {
        let (start, piece) = (piece[0], &text[piece[0]..piece[1]]);
        let behind = tokenizer.encode(&format!("\n{piece}"), false)?;
        let (encoded, skipped, before) = match behind.ids.starts_with(&line_break) {
            true => (behind, line_break.len(), 1),
            false => (tokenizer.encode(piece, false)?, 0, 0),
        };
        parted.ids.extend(&encoded.ids[skipped..]);
        let place =
            |(from, to): &(usize, usize)| (start + from.saturating_sub(before), start + to.saturating_sub(before));
        parted.offsets.extend(encoded.offsets[skipped..].iter().map(place));
    }
    Ok(parted)
}

/// The tokenizer-free part of [`tokenize`].
pub(super) fn lay_out(
    rendered: &Rendered,
    encoded: &Encoded,
    control: &[Control],
    unknown: &[u32],
    spell: impl Fn(&str) -> Result<Vec<u32>>,
) -> Result<(Vec<u32>, Vec<bool>)> {
    let starts = token_starts(encoded);
    let mut ids = Vec::with_capacity(encoded.ids.len());
    let mut trained = Vec::with_capacity(encoded.ids.len());
    let (mut span, mut literal) = (rendered.trained.iter().peekable(), rendered.literal.iter().peekable());
    for (t, &id) in encoded.ids.iter().enumerate() {
        while span.next_if(|s| s.end <= starts[t]).is_some() {}
        let learn = span.peek().is_some_and(|s| s.start <= starts[t]);
        let (from, to) = encoded.offsets[t];
        while literal.next_if(|l| l.end <= from).is_some() {}
        let token = control.binary_search_by_key(&id, |c| c.id).ok().map(|at| &control[at]);
        // A normalizer or the vocabulary may make one of a text that does not spell it, which no template writes.
        let typed = token.is_some_and(|token| {
            literal.peek().is_some_and(|l| l.start < to)
                || !(unknown.contains(&id) || spells(&rendered.text, (from, to), &token.text))
        });
        if typed {
            ensure!(
                from < to,
                "the tokenizer's normalizer makes the control token {:?} of a text that is something else; remove that \
                 text from the messages",
                token.map_or("", |token| &token.text)
            );
            let piece = rendered
                .text
                .get(from..to)
                .with_context(|| format!("token {id} has offsets {from}..{to} off the text"))?;
            let spelled = spell(piece)?;
            ensure!(
                !spelled.contains(&id),
                "the tokenizer cannot spell {piece:?}, typed in a message, other than as the special token"
            );
            trained.extend(spelled.iter().map(|_| learn));
            ids.extend(spelled);
        } else {
            ids.push(id);
            trained.push(learn);
        }
    }
    if let Some(first) = trained.first_mut() {
        *first = false;
    }
    Ok((ids, trained))
}

/// Whether `token` stands in `text` where these bytes are, or partly there: offsets can be off by a prefix.
fn spells(text: &str, (from, to): (usize, usize), token: &str) -> bool {
    if text.get(from..to) == Some(token) {
        return true;
    }
    let boundary = |at: &usize| text.is_char_boundary(*at);
    let start = (0..=from.saturating_sub(token.len())).rev().find(boundary).unwrap_or(0);
    let end = ((to + token.len()).min(text.len())..text.len()).find(boundary).unwrap_or(text.len());
    text[start..end].match_indices(token).any(|(at, _)| start + at < to && start + at + token.len() > from)
}

/// Where each token's text starts, in bytes: tokenizers may leave white space before a token out of its offsets, but
/// it belongs to the token that follows.
pub(crate) fn token_starts(encoded: &Encoded) -> Vec<usize> {
    let mut covered = 0;
    let start = |&(from, to): &(usize, usize)| {
        let start = from.min(covered);
        covered = covered.max(to);
        start
    };
    encoded.offsets.iter().map(start).collect()
}
