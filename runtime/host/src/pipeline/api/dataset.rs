//! Datasets: rows that a script picks, orders and rewrites, held as the JSON text that they were.
//!
//! Nothing is tokenised here; a model that uses the rows does that, by the same encoder as for a file.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use homeroom_engine::data::order;
use homeroom_engine::data::report::{Each, PLACES_NAMED, Part, Places, Report, Reread, Survey};
use homeroom_engine::data::{
    Columns, EncodedRows, Encoder, Group, OnBadRow, OnLongRow, Problem, Problems, Reading, check_row, encode_texts,
    read_texts,
};
use homeroom_engine::files::{Spill, Spilled};
use homeroom_engine::models::BaseModel;
use homeroom_engine::train::objective::Kind;
use mlua::{Lua, Value};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Session;
use super::options::Options;
use super::spec::verb;
use super::value::to_lua;
use crate::data_report;
use crate::models;
use crate::pipeline::bytecode::hex;
use crate::pipeline::clock::{Clock, Ended};
use crate::pipeline::errors::Failure;
use crate::pipeline::limits::Held;
use crate::pipeline::places::OpenRows;
use crate::pipeline::sandbox::shown;
use crate::progress::thousands;

/// Bytes of the texts of files that stay in memory.
const HELD_BYTES: usize = 32 << 20;
/// What a text takes beside its bytes, and a dataset beside its rows.
const OVERHEAD_BYTES: usize = 96;

/// Reads files of rows, and holds some of them out.
pub fn prepare_dataset(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("prepare_dataset"), argument)?;
    let mut opened = OpenRows::default();
    let paths = options.names("path");
    for path in &paths {
        let OpenRows { files, held_out, notes } = session.places.open_rows(path).context("prepare_dataset")?;
        opened.files.extend(files);
        opened.held_out.extend(held_out);
        notes.iter().for_each(|note| session.tell(format_args!("note: {note}")));
    }
    let columns = options.columns("columns").context("prepare_dataset: `columns`")?.unwrap_or_default();
    let system = options.text("system").filter(|text| !text.trim().is_empty());
    let reading = Reading { columns, system, on_bad_row: options.word("on_bad_row").unwrap_or_default() };
    let how = How {
        max_seq_len: options.whole("max_seq_len").map(|tokens| tokens as usize),
        on_long_row: options.word("on_long_row").unwrap_or(OnLongRow::Refuse),
        on_bad_row: reading.on_bad_row,
    };
    let first = opened.files.first().map(|(path, _)| path.clone()).unwrap_or_default();
    let path = if paths.len() == 1 && opened.files.len() == 1 { first } else { PathBuf::from(paths.join(", ")) };
    let data = Dataset::read(lua, session, opened.files, &reading, how)?;
    let share = options.number("eval").filter(|share| *share > 0.0);
    let (rows, table) = (data.len(), lua.create_table()?);
    let (train, eval) = match share {
        _ if !opened.held_out.is_empty() => {
            if share.is_some() {
                session.tell(
                    "note: the folder has held-out rows, which are evaluated on in place of a share of the others",
                );
            }
            (data, Some(Dataset::read(lua, session, opened.held_out, &reading, how)?))
        }
        Some(share) => {
            let parted = data.split(lua, session, share, options.seed());
            let (train, eval) = parted.map_err(|failure| failure.within(&path.display().to_string()))?;
            drop(data);
            (train, Some(eval))
        }
        None => (data, None),
    };
    let held_out = eval.as_ref().map_or(0, Dataset::len);
    let report = report(session, &train, eval.as_ref()).context("prepare_dataset")?;
    for line in data_report::lines(&report) {
        session.tell(line);
    }
    table.set("train", train)?;
    table.set("eval", eval)?;
    table.set("report", to_lua(lua, &serde_json::to_value(&report).context("a report is JSON")?)?)?;
    if session.dry {
        session.would(
            lua,
            format!("read    {}: {} rows, {held_out} held out", path.display(), thousands(rows)),
            json!({"verb": "prepare_dataset", "path": path, "rows": rows, "held_out": held_out}),
        )?;
    }
    Ok(Value::Table(table))
}

/// What rows are like, without a model.
fn report(session: &Session, train: &Dataset, eval: Option<&Dataset>) -> Result<Report> {
    let check = || Ok(session.clock().check()?);
    let survey =
        Survey { encoder: None, context: usize::MAX, hold_out: None, shown: 0, named: PLACES_NAMED, check: &check };
    Ok(survey.run(&Parts { train, eval })?.0)
}

/// Datasets on both sides of a split.
struct Parts<'a> {
    train: &'a Dataset,
    eval: Option<&'a Dataset>,
}

impl Reread for Parts<'_> {
    fn each(&self, each: &mut Each<'_>) -> Result<()> {
        for (part, data) in [(Part::Train, Some(self.train)), (Part::HeldOut, self.eval)] {
            for row in data.iter().flat_map(|data| data.rows()) {
                each(part, row.line, check_row(row.text.json()))?;
            }
        }
        Ok(())
    }

    fn places(&self) -> Places {
        Places::counted_in(self.train.rows().first().map_or("line", |row| row.file.unit.get()))
    }
}

/// One row.
#[derive(Clone)]
pub(super) struct Row {
    /// Where it comes from.
    pub(super) file: Rc<RowFile>,
    /// Its line there, or its row.
    pub(super) line: usize,
    /// What is in it.
    pub(super) text: Text,
}

/// A file of rows, shared by all of them.
pub(super) struct RowFile {
    path: Box<Path>,
    /// What its rows are counted by: "line" or "row".
    unit: Cell<&'static str>,
}

impl RowFile {
    pub(super) fn new(path: &Path, unit: &'static str) -> Rc<Self> {
        Rc::new(Self { path: path.into(), unit: Cell::new(unit) })
    }
}

/// Rows whose places are counted at once while they are read.
const ROWS_COUNTED: usize = 4096;

/// One JSON object. Copies share it.
#[derive(Clone)]
pub(super) struct Text(Place);

#[derive(Clone)]
enum Place {
    Held(Rc<(Box<str>, Held)>),
    /// In a temporary file.
    Spilled {
        file: Arc<Spilled>,
        at: u64,
        len: u32,
    },
}

/// The rows of a dataset, in order.
struct Rows {
    rows: Vec<Row>,
    _held: Held,
}

impl Row {
    /// Its file and line.
    pub(super) fn place(&self) -> String {
        format!("{} {} {}", shown(&self.file.path), self.file.unit.get(), self.line)
    }
}

/// How rows are to be encoded.
#[derive(Clone, Copy, Debug)]
pub struct How {
    max_seq_len: Option<usize>,
    on_long_row: OnLongRow,
    on_bad_row: OnBadRow,
}

impl How {
    /// Where nothing was said: what is wrong is refused.
    const PLAIN: Self = Self { max_seq_len: None, on_long_row: OnLongRow::Refuse, on_bad_row: OnBadRow::Refuse };
}

/// Rows, and how they are to be encoded. Copies share the rows.
#[derive(Clone)]
pub struct Dataset {
    rows: Rc<Rows>,
    how: How,
}

impl Dataset {
    /// Reads files and checks their rows.
    ///
    /// # Errors
    /// When one cannot be read, rows are refused (all of a file in one message), they are more than the program may hold, or the
    /// script is to end.
    pub fn read(
        lua: &Lua,
        session: &Session,
        files: Vec<(PathBuf, File)>,
        reading: &Reading,
        how: How,
    ) -> Result<Self, Failure> {
        let (mut rows, mut counted) = (Vec::new(), Vec::new());
        let (mut spill, mut left) = (Spill::default(), HELD_BYTES);
        let spilled = spill.spilled().clone();
        for (path, file) in files {
            let name = RowFile::new(&path, "line");
            let size = file.metadata().with_context(|| path.display().to_string())?.len();
            let mut failure = None;
            let file = Watched { file: file.take(size), clock: session.clock() };
            let read = read_texts(&path, file, reading, |line, text| {
                let text = match left.checked_sub(text.len()) {
                    Some(rest) => {
                        left = rest;
                        Text::hold(lua, session, text)
                    }
                    // The rest is spilled, too: a short one in memory between long ones would be no help.
                    None => {
                        left = 0;
                        let at = spill.append(text.as_bytes())?;
                        Ok(Text(Place::Spilled { file: spilled.clone(), at, len: text.len() as u32 }))
                    }
                };
                let row = text.and_then(|text| {
                    rows.push(Row { file: name.clone(), line, text });
                    if rows.len().is_multiple_of(ROWS_COUNTED) {
                        counted.push(session.hold(lua, size_of_rows(ROWS_COUNTED))?);
                    }
                    Ok(())
                });
                match row {
                    Ok(()) => Ok(()),
                    Err(error) => {
                        failure = Some(error);
                        Err(anyhow!("the program may not hold more"))
                    }
                }
            });
            if let Some(failure) = failure {
                return Err(failure);
            }
            let (recognised, left_out) = read.map_err(in_lua_words)?;
            name.unit.set(recognised.unit);
            if let Some(words) = recognised.words {
                session.tell(format_args!("data      {}   {words}", shown(&path)));
            }
            left_out.iter().for_each(|note| session.tell(note));
        }
        spill.finish()?;
        drop(counted);
        let held = session.hold(lua, size_of_rows(rows.len()))?;
        Ok(Self { rows: Rc::new(Rows { rows, _held: held }), how })
    }

    /// A dataset of rows that no file of rows has, to be encoded as if nothing was said. `held`: what they take.
    pub(super) fn made(rows: Vec<Row>, held: Held) -> Self {
        Self { rows: Rc::new(Rows { rows, _held: held }), how: How::PLAIN }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows().len()
    }

    /// The rows, in order.
    pub(super) fn rows(&self) -> &[Row] {
        &self.rows.rows
    }

    /// How its rows become tokens of a model.
    ///
    /// # Errors
    /// When the model does not take rows of that length.
    pub(super) fn encoder<'m>(&self, model: &'m BaseModel) -> Result<Encoder<'m>> {
        models::encoder(model, self.how.max_seq_len, self.how.on_long_row).map_err(in_lua_words)
    }

    /// The rows as examples of a model, from which it is to learn by an objective.
    ///
    /// # Errors
    /// When there are none, rows are refused (all of them in one message), or the script is to end.
    pub fn encode(&self, session: &Session, model: &BaseModel, objective: Kind) -> Result<EncodedRows> {
        ensure!(!self.rows().is_empty(), "the dataset has no rows");
        let on_bad_row = self.how.on_bad_row;
        let encoder = self.encoder(model)?;
        let mut bad: BTreeMap<&Path, Problems> = BTreeMap::new();
        let mut problems: BTreeMap<&Path, Problems> = BTreeMap::new();
        let texts = self.rows().iter().map(|row| {
            session.clock().check()?;
            Ok((row.line, row.text.json().to_owned()))
        });
        let refused = |place: usize, problem: Problem| {
            let row = &self.rows()[place];
            let is_left_out = on_bad_row == OnBadRow::Skip && !problem.is_long();
            let of = if is_left_out { &mut bad } else { &mut problems };
            of.entry(&row.file.path).or_insert_with(|| Problems::by(row.file.unit.get())).add(row.line, problem);
        };
        let mark = |groups: &mut [Group]| objective.mark(groups);
        let encoded = encode_texts(texts, encoder, objective.rows(), objective.name(), mark, refused)?;
        for (file, problems) in problems {
            problems.into_result(file).map_err(in_lua_words)?;
        }
        for (file, problems) in bad {
            if encoded.groups.is_empty() {
                problems.into_result(file).map_err(in_lua_words)?;
            } else {
                let rows = self.rows().iter().filter(|row| *row.file.path == *file).count();
                session.tell(problems.note(file, rows));
            }
        }
        ensure!(!encoded.groups.is_empty(), "no rows are left, all {} are longer than `max_seq_len`", self.len());
        Ok(encoded)
    }

    /// What tells it from any other: its rows, in order, and how they are to be encoded.
    ///
    /// # Errors
    /// When the script is to end.
    pub fn identity(&self, clock: &Clock) -> Result<String, Ended> {
        let mut hash = Sha256::new();
        let How { max_seq_len, on_long_row, on_bad_row } = self.how;
        hash.update(format!("{max_seq_len:?} {on_long_row:?} {on_bad_row:?}\n"));
        for row in self.rows() {
            clock.check()?;
            hash.update(row.text.json().as_bytes());
            hash.update(b"\n");
        }
        Ok(format!("sha256:{}", hex(&hash.finalize())))
    }

    /// Parts the rows by chance.
    ///
    /// # Errors
    /// When there are fewer than two, or the program may not hold more.
    pub fn split(&self, lua: &Lua, session: &Session, eval: f64, seed: u64) -> Result<(Self, Self), Failure> {
        let (train, eval) = order::split(self.len(), eval, seed)?;
        Ok((self.pick(lua, session, &train)?, self.pick(lua, session, &eval)?))
    }

    /// A dataset of other rows. `held`: what they take.
    pub(super) fn of(&self, rows: Vec<Row>, held: Held) -> Self {
        Self { rows: Rc::new(Rows { rows, _held: held }), how: self.how }
    }

    /// A dataset of the rows at these places, in this order.
    ///
    /// # Errors
    /// When the program may not hold more.
    pub(super) fn pick(&self, lua: &Lua, session: &Session, indices: &[usize]) -> Result<Self, Failure> {
        let held = session.hold(lua, size_of_rows(indices.len()))?;
        Ok(self.of(indices.iter().map(|index| self.rows()[*index].clone()).collect(), held))
    }
}

impl Text {
    /// Holds a text.
    ///
    /// # Errors
    /// When the program may not hold more.
    pub(super) fn hold(lua: &Lua, session: &Session, json: String) -> Result<Self, Failure> {
        let held = session.hold(lua, json.len() + OVERHEAD_BYTES)?;
        Ok(Self(Place::Held(Rc::new((json.into(), held)))))
    }

    /// The object.
    pub(super) fn json(&self) -> &str {
        match &self.0 {
            Place::Held(held) => &held.0,
            Place::Spilled { file, at, len } => {
                let bytes = file.bytes(*at..*at + u64::from(*len));
                std::str::from_utf8(bytes).expect("it was spilled as text to a file that nobody else has")
            }
        }
    }
}

/// What so many rows take beside their texts, in bytes.
pub(super) fn size_of_rows(count: usize) -> usize {
    count.saturating_mul(size_of::<Row>()).saturating_add(OVERHEAD_BYTES)
}

/// A file that is read until the script is to end.
struct Watched<'a> {
    file: io::Take<File>,
    clock: &'a Clock,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.clock.check().map_err(io::Error::other)?;
        self.file.read(buffer)
    }
}

/// The engine's hints name the flags of the command line.
fn in_lua_words(error: anyhow::Error) -> anyhow::Error {
    let mut text = format!("{error:#}").replace("--max-seq-len", "max_seq_len");
    text = text.replace("--on-bad-row skip", "on_bad_row = \"skip\"").replace("`--system`", "`system`");
    while let Some(at) = text.find("`--columns ") {
        let (before, after) = (&text[..at], &text[at + "`--columns ".len()..]);
        let Some((columns, rest)) = after.split_once('`') else { break };
        let columns = columns.trim_matches('"').parse::<Columns>().unwrap_or_default();
        let pairs: Vec<String> = columns.iter().map(|(role, name)| format!("{} = {name:?}", role.name())).collect();
        text = format!("{before}`columns = {{ {} }}`{rest}", pairs.join(", "));
    }
    for choice in ["truncate", "skip"] {
        text = text.replace(&format!("--on-long-row {choice}"), &format!("on_long_row = \"{choice}\""));
    }
    anyhow!(text)
}
