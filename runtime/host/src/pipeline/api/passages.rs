//! `read_passages`: plain text and Markdown as rows of a passage each.

use std::io::Read;
use std::path::Path;

use anyhow::Context;
use homeroom_engine::data::whole_text;
use mlua::{Lua, Value};
use serde_json::json;

use super::Session;
use super::dataset::{Dataset, Row, RowFile, Text, size_of_rows};
use super::options::Options;
use super::spec::verb;
use crate::pipeline::errors::Failure;
use crate::progress::thousands;

/// Longest text: a book has a few megabytes.
const TEXT_BYTES_MAX: usize = 64 << 20;
/// Most words of a passage where nothing is said.
const MAX_WORDS: usize = 200;
/// Characters of a heading that a row has.
const HEADING_MAX: usize = 200;
/// Fewest words of a passage where nothing is said.
const MIN_WORDS: usize = 20;

/// Reads a text as rows of a passage each.
pub fn read_passages(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("read_passages"), argument)?;
    let (path, file) = session.places.open(&options.needed_text("path")).context("read_passages")?;
    let max_words = options.whole("max_words").map_or(MAX_WORDS, |words| words as usize);
    let min_words = options.whole("min_words").map_or(MIN_WORDS, |words| words as usize).min(max_words);
    let text = text_of(&path, file).context("read_passages")?;
    let source = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let found = passages(&text, max_words, min_words, &mut |passage| {
        session.clock().check()?;
        session.hold(lua, passage.text.len() + passage.headings.iter().map(String::len).sum::<usize>() + 64)
    })?;
    let file = RowFile::new(&path, "line");
    let rows = found.iter().map(|(passage, _)| {
        let heading = passage.headings.join(" > ");
        let row = json!({"text": passage.text, "heading": heading, "source": source, "line": passage.line});
        Ok(Row { file: file.clone(), line: passage.line, text: Text::hold(lua, session, row.to_string())? })
    });
    let rows = rows.collect::<Result<Vec<_>, Failure>>()?;
    let held = session.hold(lua, size_of_rows(rows.len()))?;
    if session.dry {
        session.would(
            lua,
            format!("read    {}: {} passages", path.display(), thousands(rows.len())),
            json!({"verb": "read_passages", "path": path, "rows": rows.len()}),
        )?;
    }
    Ok(Value::UserData(lua.create_userdata(Dataset::made(rows, held))?))
}

/// The text of a file.
fn text_of(path: &Path, file: impl Read) -> anyhow::Result<String> {
    let text = whole_text(path, file, TEXT_BYTES_MAX).map_err(|error| {
        // What is said to do is for rows.
        let told = error.to_string();
        anyhow::anyhow!("{}\nhint: save it as plain text in UTF-8", told.lines().next().unwrap_or_default())
    })?;
    Ok(text.replace("\r\n", "\n"))
}

/// Consecutive paragraphs below one heading.
#[derive(Debug, PartialEq)]
struct Passage {
    text: String,
    /// The headings above it, the outermost first.
    headings: Vec<String>,
    /// The line on which it begins, from 1.
    line: usize,
}

/// Cuts a text into passages of at most so many words; those with fewer than `min_words` are left out.
/// `hold` is called with each before it is kept, and what it returns is kept beside it.
fn passages<H>(
    text: &str,
    max_words: usize,
    min_words: usize,
    hold: &mut dyn FnMut(&Passage) -> Result<H, Failure>,
) -> Result<Vec<(Passage, H)>, Failure> {
    let mut found: Vec<(Passage, H)> = Vec::new();
    let mut count = 0;
    let mut keep = |passage: Option<Passage>, count: usize| -> Result<(), Failure> {
        let Some(passage) = passage.filter(|_| count >= min_words.max(1)) else { return Ok(()) };
        let held = hold(&passage)?;
        found.push((passage, held));
        Ok(())
    };
    // Headings that are open, by their level.
    let mut headings: Vec<(usize, String)> = Vec::new();
    let mut begun: Option<Passage> = None;
    for block in blocks(text) {
        if let Some((level, title)) = heading(&block.text) {
            keep(begun.take(), count)?;
            headings.retain(|(above, _)| *above < level);
            headings.push((level, title.chars().take(HEADING_MAX).collect()));
            continue;
        }
        for (part, line) in parts(&block, max_words) {
            let words = words(&part);
            match begun.as_mut().filter(|_| count + words <= max_words) {
                Some(passage) => {
                    passage.text.push_str("\n\n");
                    passage.text.push_str(&part);
                    count += words;
                }
                None => {
                    keep(begun.take(), count)?;
                    let headings = headings.iter().map(|(_, title)| title.clone()).collect();
                    begun = Some(Passage { text: part, headings, line });
                    count = words;
                }
            }
        }
    }
    keep(begun, count)?;
    Ok(found)
}

fn words(text: &str) -> usize {
    text.split_whitespace().count()
}

/// Lines between two blank ones, or a fenced block of code.
struct Block {
    text: String,
    line: usize,
}

fn blocks(text: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut open: Option<Block> = None;
    let mut fence: Option<&str> = None;
    for (index, line) in text.lines().enumerate() {
        let trimmed = line.trim();
        let marks = ["```", "~~~"].into_iter().find(|marks| trimmed.starts_with(marks));
        let is_heading = fence.is_none() && heading(line).is_some();
        if is_heading || fence.is_none() && trimmed.is_empty() {
            found.extend(open.take());
        }
        match (fence, marks) {
            (None, Some(marks)) => fence = Some(marks),
            (Some(begun), Some(marks)) if begun == marks => fence = None,
            _ => {}
        }
        if trimmed.is_empty() && fence.is_none() {
            continue;
        }
        match &mut open {
            Some(block) => {
                block.text.push('\n');
                block.text.push_str(line.trim_end());
            }
            None => open = Some(Block { text: line.trim_end().to_owned(), line: index + 1 }),
        }
        if is_heading {
            found.extend(open.take());
        }
    }
    found.extend(open);
    found
}

/// Level and title of a heading of Markdown, `# Title`.
fn heading(line: &str) -> Option<(usize, String)> {
    let level = line.bytes().take_while(|byte| *byte == b'#').count();
    let rest = &line[level..];
    let is_heading = (1..=6).contains(&level) && !line.contains('\n') && rest.starts_with([' ', '\t']);
    let title = rest.trim().trim_end_matches('#').trim_end();
    (is_heading && !title.is_empty()).then(|| (level, title.to_owned()))
}

/// A block in parts of at most so many words: cut between sentences, and within one that is longer between words. With the line on which
/// each begins.
fn parts(block: &Block, max_words: usize) -> Vec<(String, usize)> {
    if words(&block.text) <= max_words {
        return vec![(block.text.clone(), block.line)];
    }
    let mut found: Vec<(String, usize)> = Vec::new();
    let mut line = block.line;
    let mut count = 0;
    let mut begins_anew = true;
    for piece in block.text.split_inclusive(char::is_whitespace) {
        let is_word = !piece.trim().is_empty();
        if is_word && (begins_anew || count == max_words) {
            found.push((String::new(), line));
            count = 0;
            begins_anew = false;
        }
        if let Some((part, _)) = found.last_mut() {
            part.push_str(piece);
        }
        count += usize::from(is_word);
        line += piece.matches('\n').count();
        // A sentence ends here, and the next may not fit.
        let ends = piece
            .trim_end()
            .trim_end_matches(['"', '\'', ')', '”', '’', '»'])
            .ends_with(['.', '!', '?', '…', '。', '！', '？']);
        begins_anew |= ends && count * 4 >= max_words * 3;
    }
    found.iter_mut().for_each(|(part, _)| part.truncate(part.trim_end().len()));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str, max_words: usize, min_words: usize) -> Vec<(String, String, usize)> {
        let passages = passages(text, max_words, min_words, &mut |_| Ok(())).unwrap_or_default().into_iter();
        passages.map(|(passage, ())| (passage.headings.join(">"), passage.text, passage.line)).collect()
    }

    #[test]
    fn a_passage_is_whole_paragraphs_below_one_heading() {
        let text = "Before any heading.\n\n# Water\n\nOne two.\nThree.\n\nFour five six.\n## Ice ##\nSeven.\n\n#no heading\n\n# Air\n\nEight.\n";
        let expected = [
            ("", "Before any heading.", 1),
            ("Water", "One two.\nThree.\n\nFour five six.", 5),
            ("Water>Ice", "Seven.\n\n#no heading", 10),
            ("Air", "Eight.", 16),
        ];
        let expected = expected.map(|(heading, text, line)| (heading.to_owned(), text.to_owned(), line));
        assert_eq!(texts(text, 6, 1), expected);
        assert_eq!(texts(text, 6, 2).len(), 3, "one word is less than two");
        assert_eq!(texts("", 6, 1), []);
        assert_eq!(texts("\n \n# Only a heading\n", 6, 1), []);
    }

    #[test]
    fn a_long_paragraph_is_cut_between_sentences_and_loses_no_word() {
        let sentence = "Ünder the sea live fish (and whales). ";
        let text = sentence.repeat(9);
        let cut = texts(&text, 17, 1);
        assert!(
            cut.len() > 3 && cut.iter().all(|(_, text, _)| words(text) <= 17 && text.ends_with("whales).")),
            "{cut:?}"
        );
        let joined: Vec<&str> = cut.iter().flat_map(|(_, text, _)| text.split_whitespace()).collect();
        assert_eq!(joined, text.split_whitespace().collect::<Vec<_>>());
        // A sentence without an end is cut between words, and lines are counted on.
        let endless = "word ".repeat(7) + "\n" + &"next ".repeat(7);
        let cut = texts(&endless, 5, 1);
        assert_eq!(
            cut.iter().map(|(_, text, line)| (words(text), *line)).collect::<Vec<_>>(),
            [(5, 1), (5, 1), (4, 2)]
        );
    }

    #[test]
    fn code_keeps_its_blank_lines_and_what_looks_like_a_heading() {
        let text = "See:\n\n```sh\n# a comment\n\nls\n```\nAfter.\n";
        assert_eq!(texts(text, 50, 1), [(String::new(), text.trim_end().to_owned(), 1)]);
    }

    #[test]
    fn what_is_no_text_is_refused_by_its_name() {
        for (raw, expected) in [
            (&b"%PDF-1.7 \xff"[..], "t.md: a PDF file\nhint: save it as plain text in UTF-8"),
            (b"PK\x03\x04 word/document", "a Word document"),
            (b"good\nbad \xe4\n", "t.md: line 2: it is not UTF-8"),
            (b"a\0b", "t.md: not text in UTF-8"),
        ] {
            let error = format!("{:#}", text_of(Path::new("t.md"), raw).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
        assert_eq!(text_of(Path::new("t"), &b"\xef\xbb\xbfa\r\nb"[..]).unwrap(), "a\nb");
        assert_eq!(text_of(Path::new("t"), &b"\xff\xfea\0\xe4\0"[..]).unwrap(), "aä");
    }
}
