//! Lists of words that a question or an answer must not have: the request is refused, or the word is replaced.
//!
//! Words are found whole, in any case, also across pieces of a stream: what may be the beginning of one is held back until it is known. A
//! list is no judgement of meaning: it finds what stands in it and nothing else.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, ensure};

use super::kept::Kept;
use super::rewritten::{Rewrite, Rewritten};
use super::texts::each_text;
use super::{Wrapper, whole};
use crate::handler::{
    Completion, Context, EmbedRequest, Embeddings, EventStream, Handler, HandlerError, Input, Prompt, Request, Role,
};

/// Longest word or phrase, in characters.
const WORD_MAX: usize = 200;

/// A list as a file of handlers describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WordsSpec {
    /// Where the words stand.
    pub source: Source,
    /// What is done about them.
    pub action: Action,
    /// Questions are searched: all messages but the assistant's.
    pub question: bool,
    /// Answers are searched.
    pub answer: bool,
}

impl WordsSpec {
    /// It, in words.
    pub(super) fn described(&self) -> String {
        let words = match &self.source {
            Source::List(words) => format!("{} words", words.len()),
            Source::File(path) => format!("words of {}", path.display()),
        };
        let places = match (self.question, self.answer) {
            (true, true) => "questions and answers",
            (true, false) => "questions",
            _ => "answers",
        };
        let done = if self.action == Action::Refuse { "refused" } else { "replaced" };
        format!("{words} {done} in {places}")
    }
}

/// Where the words of a list stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the file of handlers.
    List(Vec<String>),
    /// In a file of its own, one a line; it is read anew when it changes. Lines that begin with `#` are comments.
    File(PathBuf),
}

/// What is done about a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A question with it is refused; an answer ends before it, with the reason `content_filter`.
    Refuse,
    /// This stands in its place.
    Replace(String),
}

/// The words of a list, by their letters.
#[derive(Debug)]
pub struct List {
    nodes: Vec<Node>,
}

#[derive(Debug, Default)]
struct Node {
    next: HashMap<char, usize>,
    /// A word ends here.
    is_end: bool,
}

/// Whether a word begins at a place.
#[derive(Debug, PartialEq, Eq)]
enum Hit {
    None,
    /// One of so many bytes.
    Word(usize),
    /// That depends on what comes next.
    Open,
}

impl List {
    /// Takes words and phrases.
    ///
    /// # Errors
    /// When there is none, or one is too long.
    pub fn new<'w>(words: impl IntoIterator<Item = &'w str>) -> Result<Self> {
        let mut nodes = vec![Node::default()];
        for word in words {
            ensure!(word.chars().count() <= WORD_MAX, "a word is longer than {WORD_MAX} characters");
            let mut at = 0;
            for (nth, part) in word.split_whitespace().enumerate() {
                let space = (nth > 0).then_some(' ');
                for letter in space.into_iter().chain(part.chars().map(folded)) {
                    at = match nodes[at].next.get(&letter) {
                        Some(next) => *next,
                        None => {
                            nodes.push(Node::default());
                            let new = nodes.len() - 1;
                            nodes[at].next.insert(letter, new);
                            new
                        }
                    };
                }
            }
            nodes[at].is_end |= at > 0;
        }
        ensure!(nodes.len() > 1, "the list has no word");
        Ok(Self { nodes })
    }

    /// Whether a word begins at the beginning of a text, which goes on unless `is_last`. The longest counts.
    fn at(&self, text: &str, is_last: bool) -> Hit {
        let (mut at, mut hit, mut in_space) = (0, Hit::None, false);
        let mut letters = text.char_indices().peekable();
        while let Some((begin, letter)) = letters.next() {
            let letter_folded = folded(letter);
            match self.nodes[at].next.get(&letter_folded) {
                Some(next) => at = *next,
                // Any white space between two words is one.
                None if in_space && letter_folded == ' ' => continue,
                None => return hit,
            }
            in_space = letter_folded == ' ';
            if self.nodes[at].is_end {
                match letters.peek() {
                    Some((_, next)) if joins(letter, *next) => {}
                    None if !is_last => return Hit::Open,
                    _ => hit = Hit::Word(begin + letter.len_utf8()),
                }
            }
        }
        if is_last || self.nodes[at].next.is_empty() { hit } else { Hit::Open }
    }

    /// Whether a text has one of the words.
    fn is_in(&self, text: &str) -> bool {
        Search::new(self, None).search(text, true).1
    }

    /// A text with something else in the place of its words.
    fn replaced(&self, text: &str, with: &str) -> String {
        Search::new(self, Some(with)).search(text, true).0
    }
}

/// A letter in the form in which letters are compared. White space is one of them.
fn folded(letter: char) -> char {
    if letter.is_whitespace() {
        return ' ';
    }
    let mut lower = letter.to_lowercase();
    match (lower.next(), lower.next()) {
        (Some(lower), None) => lower,
        _ => letter,
    }
}

/// Whether two letters that stand beside each other belong to one word. Chinese and Japanese have no spaces between words.
fn joins(a: char, b: char) -> bool {
    let is_of_word = |c: char| {
        c.is_alphanumeric()
            && !matches!(c, '\u{2e80}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{20000}'..='\u{3ffff}')
    };
    is_of_word(a) && is_of_word(b)
}

/// A search through a text that comes in pieces.
struct Search<L> {
    list: L,
    with: Option<String>,
    held: String,
    /// The letter before what is held.
    before: Option<char>,
}

impl<L: AsRef<List>> Search<L> {
    fn new(list: L, with: Option<&str>) -> Self {
        Self { list, with: with.map(str::to_owned), held: String::new(), before: None }
    }

    fn search(&mut self, piece: &str, is_last: bool) -> (String, bool) {
        self.held.push_str(piece);
        let (mut out, mut at) = (String::with_capacity(self.held.len()), 0);
        while let Some(letter) = self.held[at..].chars().next() {
            let begins = self.before.is_none_or(|before| !joins(before, letter));
            let hit = if begins { self.list.as_ref().at(&self.held[at..], is_last) } else { Hit::None };
            let end = match (hit, &self.with) {
                (Hit::Open, _) => break,
                (Hit::Word(_), None) => return (out, true),
                (Hit::Word(bytes), Some(with)) => {
                    out.push_str(with);
                    at + bytes
                }
                (Hit::None, _) => {
                    out.push(letter);
                    at + letter.len_utf8()
                }
            };
            self.before = self.held[at..end].chars().next_back();
            at = end;
        }
        self.held.drain(..at);
        (out, false)
    }
}

impl Rewrite for Search<Arc<List>> {
    /// Returns the text that is known to have no word in it, and whether one comes behind it that is not replaced.
    fn push(&mut self, piece: &str, is_last: bool) -> (String, bool) {
        self.search(piece, is_last)
    }
}

impl AsRef<List> for List {
    fn as_ref(&self) -> &List {
        self
    }
}

/// A list, with the file that it names.
pub struct Watching {
    spec: WordsSpec,
    list: Held,
}

enum Held {
    Fixed(Arc<List>),
    File(Kept<List>),
}

impl Watching {
    /// Reads the words.
    ///
    /// # Errors
    /// When they cannot be read, or there are none.
    pub fn load(spec: WordsSpec) -> Result<Self> {
        let list = match &spec.source {
            Source::List(words) => Held::Fixed(Arc::new(List::new(words.iter().map(String::as_str))?)),
            Source::File(path) => {
                Held::File(Kept::read(path, |text| List::new(text.lines().filter(|line| !line.starts_with('#'))))?)
            }
        };
        Ok(Self { spec, list })
    }

    fn list(&self) -> Arc<List> {
        match &self.list {
            Held::Fixed(list) => list.clone(),
            Held::File(file) => file.now(),
        }
    }

    /// The request as it may be asked.
    fn asked(&self, request: &Request) -> Result<Request, HandlerError> {
        let (list, mut request, mut found) = (self.list(), request.clone(), false);
        let mut look = |text: &mut String| match &self.spec.action {
            Action::Refuse => found |= list.is_in(text),
            Action::Replace(with) => *text = list.replaced(text, with),
        };
        let asked = request.messages.iter_mut().filter(|message| message.role != Role::Assistant);
        asked.for_each(|message| each_text(message, &mut look));
        match &mut request.prompt {
            Some(Prompt::Text(text)) => look(text),
            Some(Prompt::Tokens(_)) => {
                let message = "the words of questions are looked at here, and ids of tokens are none; send a text";
                return Err(HandlerError::invalid("prompt", message));
            }
            None => {}
        }
        if found { Err(refused("messages")) } else { Ok(request) }
    }
}

/// The word itself is not said: whoever asks knows it, and others should not learn the list.
fn refused(param: &str) -> HandlerError {
    HandlerError::invalid(param, "it has a word that is not allowed here; say it in other words")
}

impl Wrapper for Watching {
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError> {
        if self.spec.answer && request.logprobs.is_some() {
            let message =
                "the words of answers are looked at here, and tokens would say what the text does not; leave it out";
            return Err(HandlerError::invalid("logprobs", message));
        }
        let stream = match self.spec.question {
            true => inner.stream(&self.asked(request)?, context)?,
            false => inner.stream(request, context)?,
        };
        if !self.spec.answer {
            return Ok(stream);
        }
        let (list, with) = (
            self.list(),
            match &self.spec.action {
                Action::Refuse => None,
                Action::Replace(with) => Some(with.clone()),
            },
        );
        Ok(Box::new(Rewritten::new(stream, move |_| Search::new(list.clone(), with.as_deref()))))
    }

    fn complete(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<Completion, HandlerError> {
        whole::complete(self, inner, request, context)
    }

    fn embed(
        &self,
        inner: &Arc<dyn Handler>,
        request: &EmbedRequest,
        context: &Context,
    ) -> Result<Embeddings, HandlerError> {
        let list = self.list();
        let has = |input: &Input| matches!(input, Input::Text(text) if list.is_in(text));
        // Vectors of a text with other words would not be those of the text.
        if self.spec.question && self.spec.action == Action::Refuse && request.input.iter().any(has) {
            return Err(refused("input"));
        }
        if self.spec.question && request.input.iter().any(|input| matches!(input, Input::Tokens(_))) {
            let message = "the words of texts are looked at here, and ids of tokens are none; send texts";
            return Err(HandlerError::invalid("input", message));
        }
        inner.embed(request, context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: [&str; 5] = ["Ärger", "two  words", "two", "坏话", "c++"];

    fn list() -> Arc<List> {
        Arc::new(List::new(WORDS).expect("there are words"))
    }

    #[test]
    fn words_are_found_whole_in_any_case_and_across_pieces() {
        for (text, want) in [
            ("no trouble", "no trouble"),
            ("ärger, ÄRGER! Ärgernis", "_, _! Ärgernis"),
            ("Two\n words and two wordsmiths", "_ and _ wordsmiths"),
            ("twofold two", "twofold _"),
            ("二坏话三", "二_三"),
            ("I know C++ and c+", "I know _ and c+"),
            ("two two  word", "_ _  word"),
            ("", ""),
        ] {
            assert_eq!(list().replaced(text, "_"), want);
            assert_eq!(list().is_in(text), text != want, "{text}");
            // However it is cut.
            for cut in (0..=text.len()).filter(|cut| text.is_char_boundary(*cut)) {
                for second in (cut..=text.len()).filter(|cut| text.is_char_boundary(*cut)) {
                    let mut search = Search::new(list(), Some("_"));
                    let pieces = [&text[..cut], &text[cut..second], &text[second..]];
                    let mut out: String = pieces.map(|piece| search.search(piece, false).0).concat();
                    out += &search.search("", true).0;
                    assert_eq!(out, want, "{pieces:?}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_a_word_is_not_held_back() {
        let mut search = Search::new(list(), None);
        assert_eq!(search.search("hello tw", false), ("hello ".into(), false));
        assert_eq!(search.search("ist two", false), ("twist ".into(), false));
        assert_eq!(search.search(" wor", false), (String::new(), false));
        assert_eq!(search.search("k", false), (String::new(), true));
    }

    /// As editors leave them: a byte order mark, line ends of Windows, empty lines, comments, spaces around a word.
    #[test]
    fn a_file_of_words_is_its_lines_with_words() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("words.txt");
        let load = |text: &str| -> Result<Watching> {
            std::fs::write(&path, text)?;
            let source = Source::File(path.clone());
            Watching::load(WordsSpec { source, action: Action::Refuse, question: true, answer: true })
        };
        for text in ["\u{feff}darn\r\n\r\n  \r\n# no\r\n two words \r\n", "\u{feff}# no\n\n\ndarn\n\ntwo  words"] {
            let list = load(text)?.list();
            assert!(list.is_in("darn it") && list.is_in("in two words"), "{text:?}");
            assert!(!list.is_in("# no") && !list.is_in("no") && !list.is_in("") && !list.is_in(" \n"), "{text:?}");
        }
        for empty in ["", "\n\n", "\u{feff}", "# one\n#two\n", "\u{feff}\r\n \r\n"] {
            assert!(load(empty).is_err(), "{empty:?}");
        }
        Ok(())
    }

    #[test]
    fn a_list_without_words_is_an_error() {
        assert!(List::new(["", " "]).is_err() && List::new(["x".repeat(201).as_str()]).is_err());
    }
}
