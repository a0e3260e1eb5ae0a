//! What rows are like before anything is learned from them: how long they are, what stands twice, what stands on both sides of a split,
//! what teaches nothing, and what is likely personal.
//!
//! Rows are read once; a second time where some may be nearly alike, to compare these exactly. Of a row are kept three hashes of 64 bits
//! and twelve of 32 bits, spilled to files where rows are many, and in memory its line and its share of the pairs to compare. Its text
//! is not.

mod alike;
mod checks;
mod kept;
mod lengths;
pub mod personal;
mod records;
mod said;
mod source;
mod words;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use rayon::prelude::*;
use serde::Serialize;

use self::alike::{Alike, Banded, Bands, Comparison, Nearest, banded, bands, candidates};
use self::kept::{AllHashes, HashList, Kept};
use self::lengths::Lengths;
pub use self::lengths::{Bin, Summary};
use self::records::Records;
use self::said::Said;
pub use self::source::{Each, Files, Places, Reread};
use super::encode::{Encoder, OnLongRow};
use super::order;
use super::preview::{Beginning, End, beginning, end};
use super::problem::thousands;
use super::{Example, Group, Problem, Row};

/// Rows that are gone through at once.
const BATCH_ROWS: usize = 512;
/// Bytes of text after which a batch is closed.
const BATCH_BYTES: usize = 8 << 20;
/// Places that are named of a finding where not all are wanted.
pub const PLACES_NAMED: usize = 8;

/// Which rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Those to train on.
    Train = 0,
    /// Those to measure on.
    HeldOut = 1,
}

/// How serious a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// A training refuses the file.
    Error,
    /// Something to look at.
    Warning,
    /// Something to know.
    Note,
}

/// Where a row stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// In which rows.
    pub part: Part,
    /// Its line, counted from 1.
    pub line: usize,
}

/// Where a row stands in its file, where rows come from several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InFile {
    /// The file.
    pub file: PathBuf,
    /// Its line there, or its row.
    pub line: usize,
}

/// A row of a finding.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Instance {
    /// Where it stands.
    #[serde(flatten)]
    pub place: Place,
    /// The same in its file, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_file: Option<InFile>,
    /// The row that it is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub like: Option<Place>,
    /// Where that stands in its file, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub like_in_file: Option<InFile>,
    /// The share of runs of five words that both have, where that is what was compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub similarity: Option<f64>,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

impl Instance {
    fn at(place: Place) -> Self {
        Self { place, in_file: None, like: None, like_in_file: None, similarity: None, detail: None }
    }
}

/// One kind of thing that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// The check's name.
    pub check: &'static str,
    /// How serious it is.
    pub level: Level,
    /// Rows that have it.
    pub count: usize,
    /// What was found, in words.
    pub what: String,
    /// What to do.
    #[serde(rename = "do")]
    pub advice: &'static str,
    /// The first of the rows.
    pub rows: Vec<Instance>,
}

/// What rows are like.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Rows that were read, those to train on.
    pub rows: usize,
    /// Held-out rows that were read.
    pub held_out: usize,
    /// Rows that are refused, of both.
    pub refused: usize,
    /// Rows that are left out as too long, of both.
    pub skipped: usize,
    /// Rows by form.
    pub forms: BTreeMap<&'static str, usize>,
    /// Rows with a system message.
    pub with_system: usize,
    /// Rows with more than one turn of the assistant.
    pub several_turns: usize,
    /// Rows with tools.
    pub with_tools: usize,
    /// Tokens of the sequences that rows become, before any is cut; none without a model.
    pub tokens: Option<Summary>,
    /// Trained tokens among them.
    pub trained_tokens: Option<usize>,
    /// Tokens before the first trained one.
    pub prompt_tokens: Option<Summary>,
    /// Words of rows, system messages aside.
    pub words: Option<Summary>,
    /// What was found, the most serious first.
    pub findings: Vec<Finding>,
    /// Whether there were more rows that may be nearly alike than were compared.
    pub comparison_cut: bool,
    /// What places are called.
    #[serde(skip)]
    pub places: Places,
}

/// A row that is shown.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Where it stands.
    pub place: Place,
    /// What it becomes.
    pub groups: Vec<Group>,
}

/// How rows are gone through.
pub struct Survey<'a> {
    /// Measures tokens, and refuses, cuts or leaves out long rows as a training would; none without a model.
    pub encoder: Option<Encoder<'a>>,
    /// Tokens that the model can read.
    pub context: usize,
    /// The share of the rows that is held out, and the seed.
    pub hold_out: Option<(f64, u64)>,
    /// Rows to keep for showing.
    pub shown: usize,
    /// Places to name of each finding, such as [`PLACES_NAMED`].
    pub named: usize,
    /// Called between batches.
    ///
    /// An error ends it.
    pub check: &'a dyn Fn() -> Result<()>,
}

/// What a row is as tokens.
enum Encoded {
    None,
    Refused(Problem),
    Row { groups: Vec<Group>, tokens: Tokens },
}

#[derive(Default)]
struct Tokens {
    longest: usize,
    over_limit: bool,
    no_room: bool,
    doubled: bool,
    missing: bool,
    ends: Option<End>,
}

#[derive(Default)]
struct Tally {
    count: usize,
    rows: Vec<Instance>,
}

/// Findings while they are gathered.
struct Findings {
    found: BTreeMap<&'static str, Tally>,
    /// Places to name of each.
    named: usize,
}

impl Findings {
    fn add(&mut self, check: &'static str, instance: impl FnOnce() -> Instance) {
        let tally = self.found.entry(check).or_default();
        tally.count += 1;
        if tally.rows.len() < self.named {
            tally.rows.push(instance());
        }
    }

    fn at(&mut self, check: &'static str, place: Place) {
        self.add(check, || Instance::at(place));
    }

    fn pair(&mut self, check: &'static str, place: Place, like: Place, similarity: Option<f64>) {
        self.add(check, || Instance { like: Some(like), similarity, ..Instance::at(place) });
    }

    fn into_list(self) -> Vec<Finding> {
        let mut findings: Vec<Finding> = self
            .found
            .into_iter()
            .map(|(check, Tally { count, rows })| {
                let (level, what, advice) = checks::described(check, count);
                Finding { check, level, count, what, advice, rows }
            })
            .collect();
        findings.sort_by_key(|finding| (finding.level, checks::place(finding.check)));
        findings
    }
}

impl Survey<'_> {
    /// Goes through rows, and returns what they are like and the first of them that are not refused.
    ///
    /// # Errors
    /// When they cannot be read, or `check` ends it. What is wrong with single rows is in the report.
    pub fn run(&self, source: &dyn Reread) -> Result<(Report, Vec<Shown>)> {
        let mut first = FirstReading::new(self.named);
        let mut batch = Vec::new();
        let mut bytes = 0;
        source.each(&mut |part, line, row| {
            bytes += row.as_ref().map_or(0, said::bytes);
            batch.push((Place { part, line }, row));
            if batch.len() >= BATCH_ROWS || bytes >= BATCH_BYTES {
                (self.check)()?;
                bytes = 0;
                first.take(self, std::mem::take(&mut batch))?;
            }
            Ok(())
        })?;
        first.take(self, batch)?;
        self.finish(first, source)
    }

    fn finish(&self, mut first: FirstReading, source: &dyn Reread) -> Result<(Report, Vec<Shown>)> {
        let mut report = first.report();
        let FirstReading { mut kept, hashes, bands, mut shown, mut findings, .. } = first;
        if let Some((share, seed)) = self.hold_out.filter(|_| kept.len() > 1) {
            order::held_out(kept.len(), share, seed)?.into_iter().for_each(|row| kept.hold_out(row));
            shown.iter_mut().for_each(|(row, shown)| shown.place.part = kept.part(*row));
        }
        let hashes = hashes.finish()?;
        let unique = exact(&kept, &hashes, &mut findings);
        asked(&kept, &hashes, &mut findings);
        drop(hashes);
        let candidates = candidates(&bands.finish()?, |row| unique[row as usize], |row| kept.part(row));
        let mut comparison = Comparison::new(candidates);
        drop(unique);
        if !comparison.is_empty() {
            self.compare(&kept, source, &mut comparison)?;
        }
        report.comparison_cut = comparison.is_cut();
        near(&kept, comparison.alike, &mut findings);
        // Rows that are refused or left out count where they stand.
        report.rows += kept.count(Part::Train);
        report.held_out += kept.count(Part::HeldOut);
        report.findings = findings.into_list();
        report.places = source.places();
        for row in report.findings.iter_mut().flat_map(|finding| &mut finding.rows) {
            row.in_file = report.places.in_file(row.place);
            row.like_in_file = row.like.and_then(|like| report.places.in_file(like));
        }
        Ok((report, shown.into_iter().map(|(_, shown)| shown).collect()))
    }

    /// Reads the rows again, and compares those that may be alike.
    fn compare(&self, kept: &Kept, source: &dyn Reread, comparison: &mut Comparison) -> Result<()> {
        let needed: Vec<bool> = (0..kept.len()).map(|row| comparison.needs(row as u32)).collect();
        let (mut number, mut bytes) = (kept.numbers(), 0);
        let mut batch: Vec<(u32, Row)> = Vec::new();
        let mut flush = |batch: &mut Vec<(u32, Row)>| {
            let grams: Vec<(u32, Vec<u64>)> =
                std::mem::take(batch).into_par_iter().map(|(row, content)| (row, Said::grams_of(&content))).collect();
            grams.into_iter().for_each(|(row, grams)| comparison.row(row, grams, |row| kept.part(row)));
        };
        source.each(&mut |_, _, content| {
            // A row of a file that was changed meanwhile may be refused by now.
            if let (Some(row), Ok(content)) = (number().filter(|row| needed[*row]), content) {
                bytes += said::bytes(&content);
                batch.push((row as u32, content));
            }
            if batch.len() >= BATCH_ROWS || bytes >= BATCH_BYTES {
                (self.check)()?;
                bytes = 0;
                flush(&mut batch);
            }
            Ok(())
        })?;
        flush(&mut batch);
        Ok(())
    }
}

/// A row as tokens, however many they are.
fn encoded(encoder: Option<Encoder<'_>>, line: usize, row: &Row) -> Encoded {
    let Some(encoder) = encoder else { return Encoded::None };
    let limit = encoder.max_seq_len;
    let whole = Encoder { max_seq_len: usize::MAX, on_long_row: OnLongRow::Refuse, ..encoder };
    let groups = match whole.groups(line, row) {
        Ok(groups) => groups.map_or_else(Vec::new, |(groups, _)| groups),
        Err(problem) => return Encoded::Refused(problem),
    };
    let mut tokens = Tokens::default();
    for example in groups.iter().flat_map(|group| &group.sequences) {
        let Example { ids, trained, .. } = example;
        tokens.longest = tokens.longest.max(ids.len());
        tokens.over_limit |= ids.len() > limit;
        tokens.no_room |= !trained.iter().take(limit).any(|trained| *trained);
        tokens.doubled |= beginning(example, encoder.tokenizer) == Beginning::Doubled;
        tokens.missing |= beginning(example, encoder.tokenizer) == Beginning::Missing;
        let end = end(example, encoder.tokenizer);
        if tokens.ends.is_none_or(|worst| worst == End::Stops || end == End::None) {
            tokens.ends = Some(end);
        }
    }
    Encoded::Row { groups, tokens }
}

/// What the first reading gathers.
struct FirstReading {
    kept: Kept,
    hashes: HashList,
    bands: Records<{ size_of::<Banded>() / size_of::<u32>() }>,
    shown: Vec<(u32, Shown)>,
    findings: Findings,
    refused: [usize; 2],
    skipped: [usize; 2],
    forms: BTreeMap<&'static str, usize>,
    with_system: usize,
    several_turns: usize,
    with_tools: usize,
    tokens: Lengths,
    prompt_tokens: Lengths,
    words: Lengths,
    trained_tokens: usize,
    encodes: bool,
}

impl FirstReading {
    fn new(named: usize) -> Self {
        Self {
            kept: Kept::default(),
            hashes: HashList::default(),
            bands: Records::default(),
            shown: Vec::new(),
            findings: Findings { found: BTreeMap::new(), named },
            refused: [0; 2],
            skipped: [0; 2],
            forms: BTreeMap::new(),
            with_system: 0,
            several_turns: 0,
            with_tools: 0,
            tokens: Lengths::default(),
            prompt_tokens: Lengths::default(),
            words: Lengths::default(),
            trained_tokens: 0,
            encodes: false,
        }
    }

    fn take(&mut self, survey: &Survey<'_>, batch: Vec<(Place, Result<Row, Problem>)>) -> Result<()> {
        let encoder = survey.encoder;
        self.encodes = encoder.is_some();
        let seen: Vec<_> = batch
            .into_par_iter()
            .map(|(place, row)| {
                let row = row.map(|row| {
                    let said = Said::of(&row);
                    let bands = bands(&said.grams);
                    (form(&row), Said { grams: Vec::new(), ..said }, bands, encoded(encoder, place.line, &row))
                });
                (place, row)
            })
            .collect();
        for (place, row) in seen {
            match row {
                Ok((_, _, _, Encoded::Refused(problem))) | Err(problem) => self.refuse(place, &problem),
                Ok((form, said, bands, encoded)) => self.keep(survey, place, form, &said, bands, encoded)?,
            }
        }
        Ok(())
    }

    fn refuse(&mut self, place: Place, problem: &Problem) {
        self.kept.leave_out();
        self.refused[place.part as usize] += 1;
        let detail = Some(problem.to_string());
        self.findings.add(checks::of_problem(problem), || Instance { detail, ..Instance::at(place) });
    }

    fn keep(
        &mut self,
        survey: &Survey<'_>,
        place: Place,
        form: &'static str,
        said: &Said,
        bands: Option<Bands>,
        encoded: Encoded,
    ) -> Result<()> {
        if let Encoded::Row { groups, tokens } = encoded {
            let on_long = survey.encoder.map_or(OnLongRow::Refuse, |encoder| encoder.on_long_row);
            if !self.fits(survey, place, &groups, &tokens, on_long) {
                self.kept.leave_out();
                return Ok(());
            }
            if self.shown.len() < survey.shown {
                self.shown.push((self.kept.len() as u32, Shown { place, groups }));
            }
        }
        *self.forms.entry(form).or_default() += 1;
        self.with_system += usize::from(said.has_system);
        self.several_turns += usize::from(said.answers > 1);
        self.with_tools += usize::from(said.has_tools);
        self.words.add(said.words);
        for (check, holds) in [
            ("empty_turns", said.empty_turns > 0),
            ("answer_repeats_prompt", said.echoes),
            ("n_missing_user", !said.has_user),
        ] {
            if holds {
                self.findings.at(check, place);
            }
        }
        for (kind, _) in &said.personal {
            self.findings.at(kind, place);
        }
        let row = self.kept.len() as u32;
        bands.map(|bands| self.bands.push(banded(row, &bands))).transpose()?;
        self.kept.push(place, said.has_system);
        self.hashes.push(said)
    }

    /// Counts the tokens of a row; false: it is refused, or left out as too long.
    fn fits(
        &mut self,
        survey: &Survey<'_>,
        place: Place,
        groups: &[Group],
        tokens: &Tokens,
        on_long: OnLongRow,
    ) -> bool {
        for group in groups {
            for example in &group.sequences {
                self.tokens.add(example.ids.len());
                self.prompt_tokens.add(example.prompt());
                self.trained_tokens += example.trained.iter().filter(|trained| **trained).count();
            }
        }
        if tokens.longest > survey.context {
            self.findings.at("longer_than_context", place);
        }
        if tokens.over_limit {
            match on_long {
                OnLongRow::Refuse => {
                    self.refused[place.part as usize] += 1;
                    let detail = format!("{} tokens", thousands(tokens.longest));
                    let instance = || Instance { detail: Some(detail), ..Instance::at(place) };
                    self.findings.add("too_long", instance);
                    return false;
                }
                OnLongRow::Skip => {
                    self.skipped[place.part as usize] += 1;
                    self.findings.at("skipped", place);
                    return false;
                }
                OnLongRow::Truncate if tokens.no_room => {
                    self.refused[place.part as usize] += 1;
                    self.findings.at("nothing_to_train_on", place);
                    self.findings.at("prompt_too_long", place);
                    return false;
                }
                OnLongRow::Truncate => self.findings.at("truncated", place),
            }
        }
        for (check, holds) in [
            ("double_bos", tokens.doubled),
            ("missing_bos", tokens.missing),
            ("no_end_of_turn", tokens.ends == Some(End::None)),
            ("end_not_stopping", tokens.ends == Some(End::GoesOn)),
        ] {
            if holds {
                self.findings.at(check, place);
            }
        }
        true
    }

    fn report(&mut self) -> Report {
        // Without it alike everywhere, it is as it should be.
        let without_system = self.kept.len() - self.with_system;
        if self.with_system > 0 && without_system > 0 {
            let rows = self.kept.without_system().take(self.findings.named).map(Instance::at);
            let tally = Tally { count: without_system, rows: rows.collect() };
            self.findings.found.insert("n_missing_system", tally);
        }
        Report {
            rows: self.refused[0] + self.skipped[0],
            held_out: self.refused[1] + self.skipped[1],
            refused: self.refused[0] + self.refused[1],
            skipped: self.skipped[0] + self.skipped[1],
            forms: std::mem::take(&mut self.forms),
            with_system: self.with_system,
            several_turns: self.several_turns,
            with_tools: self.with_tools,
            tokens: self.tokens.summary(),
            trained_tokens: self.encodes.then_some(self.trained_tokens),
            prompt_tokens: self.prompt_tokens.summary(),
            words: self.words.summary(),
            findings: Vec::new(),
            comparison_cut: false,
            places: Places::default(),
        }
    }
}

fn form(row: &Row) -> &'static str {
    match row {
        Row::Messages { .. } => "messages",
        Row::PromptCompletion { .. } => "prompt_completion",
        Row::Text(_) => "text",
        Row::Preference { .. } => "preference",
        Row::Rated { .. } => "rated",
    }
}

/// Finds rows that say the same, and marks those that say what none before them says.
fn exact(kept: &Kept, hashes: &AllHashes, findings: &mut Findings) -> Vec<bool> {
    let mut unique = vec![true; kept.len()];
    let mut found: Vec<(u32, u32)> = Vec::new();
    hashes.shared(
        |hashes| Some(hashes.whole),
        |group| {
            let trained = group.iter().map(|at| at.row).find(|row| kept.part(*row) == Part::Train);
            let mut first = [trained, None];
            for row in group.iter().map(|at| at.row) {
                let part = kept.part(row);
                match (first[part as usize], part, trained) {
                    (_, Part::HeldOut, Some(trained)) => found.push((row, trained)),
                    (Some(earlier), ..) if earlier != row => found.push((row, earlier)),
                    (Some(_), ..) => continue,
                    (None, ..) => {
                        first[part as usize] = Some(row);
                        continue;
                    }
                }
                unique[row as usize] = false;
            }
        },
    );
    tell_pairs(kept, found, ["duplicates", "leaks"], findings);
    unique
}

/// Finds rows that ask the same and answer otherwise.
fn asked(kept: &Kept, hashes: &AllHashes, findings: &mut Findings) {
    let mut found: Vec<(u32, u32)> = Vec::new();
    hashes.shared(
        |hashes| Some(hashes.asked).filter(|asked| *asked != 0),
        |group| {
            let of_part = |part: Part| group.iter().filter(move |at| kept.part(at.row) == part);
            let Some(first) = of_part(Part::Train).next() else {
                // All are held out: the others are compared with the first.
                let differ = group.iter().filter(|at| at.answered != group[0].answered);
                found.extend(differ.map(|at| (at.row, group[0].row)));
                return;
            };
            let differ = of_part(Part::Train).filter(|at| at.answered != first.answered);
            found.extend(differ.map(|at| (at.row, first.row)));
            // One that answers as any row to train on does is a leak already.
            let mut answers: Vec<u64> = of_part(Part::Train).map(|at| at.answered).collect();
            answers.sort_unstable();
            let held = of_part(Part::HeldOut).filter(|at| answers.binary_search(&at.answered).is_err());
            found.extend(held.map(|at| (at.row, first.row)));
        },
    );
    tell_pairs(kept, found, ["conflicts", "leaked_prompts"], findings);
}

/// Tells of rows, each beside an earlier one, by the check for two rows of one part or that for rows of both.
fn tell_pairs(kept: &Kept, mut found: Vec<(u32, u32)>, [in_one, across]: [&'static str; 2], findings: &mut Findings) {
    found.sort_unstable();
    for (row, earlier) in found {
        let check = if kept.part(row) == kept.part(earlier) { in_one } else { across };
        findings.pair(check, kept.place(row), kept.place(earlier), None);
    }
}

/// Tells of rows that are nearly alike: each once, beside the one that is most like it.
fn near(kept: &Kept, alike: Nearest, findings: &mut Findings) {
    for (check, rows) in ["near_duplicates", "near_leaks"].into_iter().zip(alike.into_lists()) {
        for Alike { row, other, similarity } in rows {
            let similarity = Some((1e3 * similarity).round() / 1e3);
            findings.pair(check, kept.place(row), kept.place(other), similarity);
        }
    }
}
