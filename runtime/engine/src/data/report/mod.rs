//! What rows are like before anything is learned from them: how long they are, what stands twice, what stands on both sides of a split,
//! what teaches nothing, and what is likely personal.
//!
//! Rows are read once; a second time where some may be nearly alike, to compare these exactly. Of a row are kept about a hundred
//! bytes: three hashes of 64 bits, twelve of 32 bits, its line, and its share of the pairs to compare. Its text is not.

mod alike;
mod checks;
mod lengths;
pub mod personal;
mod said;
mod source;
mod words;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use rayon::prelude::*;
use serde::Serialize;

use self::alike::{Alike, BandList, Bands, Comparison, bands, candidates};
use self::lengths::Lengths;
pub use self::lengths::{Bin, Summary};
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

/// What is kept of a row.
struct Kept {
    whole: u64,
    asked: u64,
    answered: u64,
    line: u32,
    /// Its number among all rows of the source, those that are refused as well.
    number: u32,
    part: Part,
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
        if let Some((share, seed)) = self.hold_out.filter(|_| first.kept.len() > 1) {
            for row in order::split(first.kept.len(), share, seed)?.1 {
                first.kept[row].part = Part::HeldOut;
            }
            first.shown.iter_mut().for_each(|(row, shown)| shown.place.part = first.kept[*row].part);
        }
        let mut report = first.report();
        let FirstReading { kept, bands, shown, mut findings, .. } = first;
        let unique = exact(&kept, &mut findings);
        asked(&kept, &mut findings);
        let part = |row: u32| kept[row as usize].part;
        let mut comparison = Comparison::new(candidates(&bands.finish()?, |row| unique[row as usize], part));
        drop(unique);
        if !comparison.is_empty() {
            self.compare(&kept, source, &mut comparison)?;
        }
        near(&kept, &comparison.alike, &mut findings);
        report.comparison_cut = comparison.is_cut();
        let count = |part: Part| kept.iter().filter(|row| row.part == part).count();
        // Rows that are refused or left out count where they stand.
        report.rows += count(Part::Train);
        report.held_out += count(Part::HeldOut);
        report.findings = findings.into_list();
        report.places = source.places();
        for row in report.findings.iter_mut().flat_map(|finding| &mut finding.rows) {
            row.in_file = report.places.in_file(row.place);
            row.like_in_file = row.like.and_then(|like| report.places.in_file(like));
        }
        Ok((report, shown.into_iter().map(|(_, shown)| shown).collect()))
    }

    /// Reads the rows again, and compares those that may be alike.
    fn compare(&self, kept: &[Kept], source: &dyn Reread, comparison: &mut Comparison) -> Result<()> {
        let needed: Vec<bool> = (0..kept.len()).map(|row| comparison.needs(row as u32)).collect();
        let (mut row, mut number, mut bytes) = (0, 0, 0);
        let mut batch: Vec<(u32, Row)> = Vec::new();
        let mut flush = |batch: &mut Vec<(u32, Row)>| {
            let grams: Vec<(u32, Vec<u64>)> =
                std::mem::take(batch).into_par_iter().map(|(row, content)| (row, Said::grams_of(&content))).collect();
            grams.into_iter().for_each(|(row, grams)| comparison.row(row, grams));
        };
        source.each(&mut |_, _, content| {
            if kept.get(row).is_some_and(|kept| kept.number == number) {
                // A row of a file that was changed meanwhile may be refused by now.
                if let (true, Ok(content)) = (needed[row], content) {
                    bytes += said::bytes(&content);
                    batch.push((row as u32, content));
                }
                row += 1;
            }
            number += 1;
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
    kept: Vec<Kept>,
    bands: BandList,
    shown: Vec<(usize, Shown)>,
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
    /// Rows so far.
    number: u32,
    /// Rows of conversations without a system message; they count if others have one.
    without_system: Vec<Place>,
    without_system_count: usize,
}

impl FirstReading {
    fn new(named: usize) -> Self {
        Self {
            kept: Vec::new(),
            bands: BandList::default(),
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
            number: 0,
            without_system: Vec::new(),
            without_system_count: 0,
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
            self.number += 1;
            match row {
                Ok((_, _, _, Encoded::Refused(problem))) | Err(problem) => self.refuse(place, &problem),
                Ok((form, said, bands, encoded)) => self.keep(survey, place, form, &said, bands, encoded)?,
            }
        }
        Ok(())
    }

    fn refuse(&mut self, place: Place, problem: &Problem) {
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
                return Ok(());
            }
            if self.shown.len() < survey.shown {
                self.shown.push((self.kept.len(), Shown { place, groups }));
            }
        }
        *self.forms.entry(form).or_default() += 1;
        self.with_system += usize::from(said.has_system);
        self.several_turns += usize::from(said.answers > 1);
        self.with_tools += usize::from(said.has_tools);
        self.words.add(said.words);
        if !said.has_system {
            self.without_system_count += 1;
            if self.without_system.len() < survey.named {
                self.without_system.push(place);
            }
        }
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
        bands.map(|bands| self.bands.push(row, bands)).transpose()?;
        let Said { whole, asked, answered, .. } = *said;
        self.kept.push(Kept {
            whole,
            asked,
            answered,
            line: place.line as u32,
            number: self.number - 1,
            part: place.part,
        });
        Ok(())
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
        if self.with_system > 0 && self.without_system_count > 0 {
            let rows = self.without_system.iter();
            let rows = rows.map(|place| Instance::at(*place));
            let tally = Tally { count: self.without_system_count, rows: rows.collect() };
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

impl Kept {
    fn place(&self) -> Place {
        Place { part: self.part, line: self.line as usize }
    }
}

/// Finds rows that say the same, and marks those that say what none before them says.
fn exact(kept: &[Kept], findings: &mut Findings) -> Vec<bool> {
    let mut order: Vec<u32> = (0..kept.len() as u32).collect();
    order.sort_unstable_by_key(|row| (kept[*row as usize].whole, *row));
    let mut unique = vec![true; kept.len()];
    let mut found: Vec<(u32, u32)> = Vec::new();
    for group in
        order.chunk_by(|a, b| kept[*a as usize].whole == kept[*b as usize].whole).filter(|group| group.len() > 1)
    {
        let trained = group.iter().copied().find(|row| kept[*row as usize].part == Part::Train);
        let mut first = [trained, None];
        for row in group {
            let part = kept[*row as usize].part;
            match (first[part as usize], part, trained) {
                (_, Part::HeldOut, Some(trained)) => found.push((*row, trained)),
                (Some(earlier), ..) if earlier != *row => found.push((*row, earlier)),
                (Some(_), ..) => continue,
                (None, ..) => {
                    first[part as usize] = Some(*row);
                    continue;
                }
            }
            unique[*row as usize] = false;
        }
    }
    found.sort_unstable();
    for (row, earlier) in found {
        let (row, earlier) = (&kept[row as usize], &kept[earlier as usize]);
        let check = if row.part == earlier.part { "duplicates" } else { "leaks" };
        findings.pair(check, row.place(), earlier.place(), None);
    }
    unique
}

/// Finds rows that ask the same and answer otherwise.
fn asked(kept: &[Kept], findings: &mut Findings) {
    let mut order: Vec<u32> = (0..kept.len() as u32).filter(|row| kept[*row as usize].asked != 0).collect();
    order.sort_unstable_by_key(|row| (kept[*row as usize].asked, *row));
    let mut found: Vec<(u32, u32)> = Vec::new();
    for group in
        order.chunk_by(|a, b| kept[*a as usize].asked == kept[*b as usize].asked).filter(|group| group.len() > 1)
    {
        let row = |row: &u32| &kept[*row as usize];
        let trained: Vec<u32> = group.iter().copied().filter(|at| row(at).part == Part::Train).collect();
        let Some(first) = trained.first() else {
            // All are held out: the others are compared with the first.
            let differs = |at: &&u32| row(at).answered != row(&group[0]).answered;
            found.extend(group.iter().filter(differs).map(|at| (*at, group[0])));
            continue;
        };
        let differs = |at: &&u32| row(at).answered != row(first).answered;
        found.extend(trained.iter().filter(differs).map(|at| (*at, *first)));
        // One that answers as any row to train on does is a leak already.
        let mut answers: Vec<u64> = trained.iter().map(|at| row(at).answered).collect();
        answers.sort_unstable();
        let held = group.iter().filter(|at| row(at).part == Part::HeldOut);
        let held = held.filter(|at| answers.binary_search(&row(at).answered).is_err());
        found.extend(held.map(|at| (*at, *first)));
    }
    found.sort_unstable();
    for (row, earlier) in found {
        let (row, earlier) = (&kept[row as usize], &kept[earlier as usize]);
        let check = if row.part == earlier.part { "conflicts" } else { "leaked_prompts" };
        findings.pair(check, row.place(), earlier.place(), None);
    }
}

/// Tells of rows that are nearly alike: each once, beside the one that is most like it.
fn near(kept: &[Kept], alike: &[Alike], findings: &mut Findings) {
    let mut best: BTreeMap<(u32, bool), (u32, f64)> = BTreeMap::new();
    for Alike { row, earlier, similarity } in alike {
        let leaks = kept[*row as usize].part != kept[*earlier as usize].part;
        // It is the held-out one that should not be there.
        let (row, other) = match leaks && kept[*row as usize].part == Part::Train {
            true => (*earlier, *row),
            false => (*row, *earlier),
        };
        let best = best.entry((row, leaks)).or_insert((other, *similarity));
        if *similarity > best.1 {
            *best = (other, *similarity);
        }
    }
    for ((row, leaks), (other, similarity)) in best {
        let check = if leaks { "near_leaks" } else { "near_duplicates" };
        let similarity = Some((1e3 * similarity).round() / 1e3);
        findings.pair(check, kept[row as usize].place(), kept[other as usize].place(), similarity);
    }
}
