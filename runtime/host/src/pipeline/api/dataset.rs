//! Datasets: rows that a script picks, orders and rewrites, held as the JSON text that they were.
//!
//! Nothing is tokenised here; a model that uses the rows does that, by the same encoder as for a file.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::data::{Example, OnLongRow, Problems, check_row, read_texts};
use homeroom_engine::model::BaseModel;
use homeroom_engine::order;
use mlua::{IntoLuaMulti, Lua, MetaMethod, MultiValue, UserData, UserDataMethods, Value};
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

use super::options::{Options, words};
use super::spec::{METHODS, verb};
use super::value::{to_json, to_lua};
use super::{Failure, Session, guarded, said, session};
use crate::models;
use crate::pipeline::sandbox::{message, shown};

/// Most rows that a dataset holds: a script that doubles one in a loop is stopped before memory is out.
const ROWS_MAX: usize = 1 << 26;

/// One row.
#[derive(Clone)]
struct Row {
    /// The file it comes from.
    file: Arc<Path>,
    /// Its line there.
    line: usize,
    /// One JSON object.
    text: Arc<str>,
}

impl Row {
    fn json(&self) -> Json {
        serde_json::from_str(&self.text).expect("rows were checked when they were read or made")
    }

    fn place(&self) -> String {
        format!("{} line {}", shown(&self.file), self.line)
    }
}

/// Rows, and how they are to be encoded. Copies share the rows.
#[derive(Clone)]
pub struct Dataset {
    rows: Rc<Vec<Row>>,
    max_seq_len: Option<usize>,
    on_long_row: OnLongRow,
}

/// The rows of a dataset as tokens.
pub struct Encoded {
    /// What is trained or evaluated on.
    pub examples: Vec<Example>,
    /// Digest of the rows.
    pub digest: String,
    /// Rows left out as too long.
    pub skipped: usize,
    /// Examples cut as too long.
    pub truncated: usize,
}

impl Encoded {
    /// Tokens of all examples.
    pub fn tokens(&self) -> usize {
        self.examples.iter().map(|example| example.ids.len()).sum()
    }
}

impl Dataset {
    /// Reads a file and checks its rows.
    ///
    /// # Errors
    /// When it cannot be read, or rows are refused; all of them in one message.
    pub fn read(path: &Path, max_seq_len: Option<usize>, on_long_row: OnLongRow) -> Result<Self> {
        let file: Arc<Path> = path.into();
        let rows = read_texts(path)?;
        let rows = rows.into_iter().map(|(line, text)| Row { file: file.clone(), line, text: text.into() });
        Ok(Self { rows: Rc::new(rows.collect()), max_seq_len, on_long_row })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The rows as examples of a model.
    ///
    /// # Errors
    /// When there are none, or rows are refused; all of them in one message.
    pub fn encode(&self, model: &BaseModel) -> Result<Encoded> {
        ensure!(!self.rows.is_empty(), "the dataset has no rows");
        let encoder = models::encoder(model, self.max_seq_len, self.on_long_row).map_err(in_lua_words)?;
        let mut problems: BTreeMap<&Path, Problems> = BTreeMap::new();
        let (mut examples, mut skipped, mut truncated) = (Vec::new(), 0, 0);
        let mut hasher = Sha256::new();
        for row in self.rows.iter() {
            hasher.update(row.text.as_bytes());
            hasher.update(b"\n");
            match check_row(&row.text).and_then(|checked| encoder.examples(row.line, &checked)) {
                Ok(None) => skipped += 1,
                Ok(Some((mut kept, cut))) => {
                    truncated += cut;
                    examples.append(&mut kept);
                }
                Err(problem) => problems.entry(&row.file).or_default().add(row.line, problem),
            }
        }
        for (file, problems) in problems {
            problems.into_result(file).map_err(in_lua_words)?;
        }
        ensure!(!examples.is_empty(), "no rows are left, all {} are longer than `max_seq_len`", self.rows.len());
        let hex: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Encoded { examples, digest: format!("sha256:{hex}"), skipped, truncated })
    }

    /// Parts the rows by chance.
    ///
    /// # Errors
    /// When there are fewer than two.
    pub fn split(&self, eval: f64, seed: u64) -> Result<(Self, Self)> {
        let (train, eval) = order::split(self.len(), eval, seed)?;
        Ok((self.pick(&train), self.pick(&eval)))
    }

    fn of(&self, rows: Vec<Row>) -> Self {
        Self { rows: Rc::new(rows), ..*self }
    }

    fn pick(&self, indices: &[usize]) -> Self {
        self.of(indices.iter().map(|index| self.rows[*index].clone()).collect())
    }

    /// What a script says of each row: a function's answer, or a field's value.
    fn keys(&self, lua: &Lua, session: &Session, name: &str, by: &Value) -> Result<Vec<Json>, Failure> {
        let key = |row: &Row| match by {
            Value::String(field) => Ok(row.json().get(field.to_string_lossy()).cloned().unwrap_or_default()),
            by => to_json(&call(lua, session, by, row)?).map_err(|failure| failure.within(&format!("{name}: by"))),
        };
        self.rows.iter().map(key).collect()
    }
}

/// The engine's hints name the flags of the command line.
fn in_lua_words(error: anyhow::Error) -> anyhow::Error {
    let mut text = format!("{error:#}").replace("--max-seq-len", "max_seq_len");
    for choice in ["truncate", "skip"] {
        text = text.replace(&format!("--on-long-row {choice}"), &format!("on_long_row = \"{choice}\""));
    }
    anyhow::anyhow!(text)
}

/// Calls a script's function with a row. An error in it names the row.
fn call(lua: &Lua, session: &Session, function: &Value, row: &Row) -> Result<Value, Failure> {
    let function = function.as_function().context("the caller saw that it is a function")?;
    let table = to_lua(lua, &row.json())?;
    let _running = session.clock.resume();
    function.call::<Value>(table).map_err(|error| {
        // A script that is ended has no row at fault.
        match session.clock.check() {
            Err(ended) => ended.into(),
            Ok(()) => Failure::Lua(mlua::Error::runtime(format!("{} (row: {})", message(&error), row.place()))),
        }
    })
}

fn function<'v>(name: &str, value: &'v Value) -> Result<&'v Value, Failure> {
    match value {
        Value::Function(_) => Ok(value),
        other => Err(said(format!("{name}: it takes a function from a row, not {}", words(other)))),
    }
}

type Method = fn(&Lua, &Session, &Dataset, Value) -> Result<MultiValue, Failure>;

fn one(lua: &Lua, value: impl mlua::IntoLua) -> Result<MultiValue, Failure> {
    Ok(value.into_lua(lua)?.into_lua_multi(lua)?)
}

fn filter(lua: &Lua, session: &Session, data: &Dataset, keeps: Value) -> Result<MultiValue, Failure> {
    let keeps = function("filter", &keeps)?;
    let mut rows = Vec::new();
    for row in data.rows.iter() {
        match call(lua, session, keeps, row)? {
            Value::Boolean(true) => rows.push(row.clone()),
            Value::Boolean(false) | Value::Nil => {}
            other => {
                return Err(said(format!("filter: the function returned {}, not true or false", words(&other))));
            }
        }
    }
    one(lua, data.of(rows))
}

fn map(lua: &Lua, session: &Session, data: &Dataset, change: Value) -> Result<MultiValue, Failure> {
    let change = function("map", &change)?;
    let mut rows = Vec::new();
    for row in data.rows.iter() {
        let changed = match call(lua, session, change, row)? {
            Value::Nil => continue,
            value @ Value::Table(_) => {
                to_json(&value).map_err(|failure| failure.within(&format!("map: {}", row.place())))?
            }
            other => return Err(said(format!("map: the function returned {}, not a row or nil", words(&other)))),
        };
        let text: Arc<str> = in_order_of(&row.json(), changed).to_string().into();
        if let Err(problem) = check_row(&text) {
            return Err(said(format!("map: the new row is refused: {problem} (row: {})", row.place())));
        }
        rows.push(Row { text, ..row.clone() });
    }
    one(lua, data.of(rows))
}

/// A row with its fields, and what is in them, in the order that they had: Lua keeps none, and templates print what they get.
fn in_order_of(old: &Json, new: Json) -> Json {
    let (Json::Object(before), Json::Object(mut after)) = (old, new.clone()) else {
        return if *old == new { old.clone() } else { new };
    };
    let mut fields = serde_json::Map::new();
    for (name, value) in before {
        // A whole number that was written as 1.0 comes back as 1.
        if let Some(changed) = after.shift_remove(name) {
            fields.insert(name.clone(), if *value == changed { value.clone() } else { in_order_of(value, changed) });
        }
    }
    fields.extend(after);
    Json::Object(fields)
}

fn split(lua: &Lua, _: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("split"), options)?;
    let (train, eval) = data.split(options.number("eval").unwrap_or_default(), options.seed())?;
    Ok((train, eval).into_lua_multi(lua)?)
}

fn bucket(lua: &Lua, session: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("bucket"), options)?;
    let quantiles = options.numbers("quantiles");
    if !quantiles.is_sorted_by(|a, b| a < b) {
        return Err(said("bucket: `quantiles` should ascend"));
    }
    let keys = data.keys(lua, session, "bucket", options.get("by").unwrap_or(&Value::Nil))?;
    let mut numbers = Vec::new();
    for (key, row) in keys.iter().zip(data.rows.iter()) {
        match key.as_f64() {
            Some(number) => numbers.push(number),
            None => return Err(said(format!("bucket: `by` gives {key}, not a number (row: {})", row.place()))),
        }
    }
    let mut order: Vec<usize> = (0..data.len()).collect();
    // Stable: rows of equal numbers stay in order.
    order.sort_by(|a, b| numbers[*a].partial_cmp(&numbers[*b]).unwrap_or(Ordering::Equal));
    let table = lua.create_table()?;
    let ends = quantiles.iter().map(|quantile| (quantile * order.len() as f64).round() as usize);
    let mut first = 0;
    for end in ends.chain([order.len()]) {
        table.raw_push(data.pick(&order[first..end]))?;
        first = end;
    }
    one(lua, table)
}

fn sample(lua: &Lua, _: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("sample"), options)?;
    let count = options.whole("n").unwrap_or_default() as usize;
    one(lua, data.pick(&order::sample(data.len(), count, options.seed())))
}

fn shuffle(lua: &Lua, _: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("shuffle"), options)?;
    one(lua, data.pick(&order::shuffled(data.len(), options.seed())))
}

fn concat(lua: &Lua, _: &Session, data: &Dataset, other: Value) -> Result<MultiValue, Failure> {
    let wrong = || said(format!("concat: it takes a dataset, not {}", words(&other)));
    let other = other.as_userdata().ok_or_else(wrong)?.borrow::<Dataset>().map_err(|_| wrong())?;
    let count = data.len() + other.len();
    if count > ROWS_MAX {
        return Err(said(format!("concat: {count} rows are too many for one dataset")));
    }
    one(lua, data.of(data.rows.iter().chain(other.rows.iter()).cloned().collect()))
}

fn dedupe(lua: &Lua, session: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("dedupe"), options)?;
    let mut seen = HashSet::new();
    let kept: Vec<usize> = match options.get("by") {
        Some(by) => {
            let keys = data.keys(lua, session, "dedupe", by)?;
            (0..data.len()).filter(|index| seen.insert(sorted(&keys[*index]).to_string())).collect()
        }
        None => (0..data.len()).filter(|index| seen.insert(sorted(&data.rows[*index].json()).to_string())).collect(),
    };
    one(lua, data.pick(&kept))
}

/// JSON with its keys in one order, so that equal values have equal texts.
fn sorted(value: &Json) -> Json {
    match value {
        Json::Array(items) => items.iter().map(sorted).collect(),
        Json::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().map(|(name, field)| (name.clone(), sorted(field))).collect();
            fields.sort_by(|a, b| a.0.cmp(&b.0));
            Json::Object(fields.into_iter().collect())
        }
        plain => plain.clone(),
    }
}

fn len(lua: &Lua, _: &Session, data: &Dataset, _: Value) -> Result<MultiValue, Failure> {
    one(lua, data.len())
}

fn rows(lua: &Lua, _: &Session, data: &Dataset, _: Value) -> Result<MultiValue, Failure> {
    let table = lua.create_table_with_capacity(data.len(), 0)?;
    for row in data.rows.iter() {
        table.raw_push(to_lua(lua, &row.json())?)?;
    }
    one(lua, table)
}

const CALLS: [(&str, Method); 10] = [
    ("filter", filter),
    ("map", map),
    ("split", split),
    ("bucket", bucket),
    ("sample", sample),
    ("concat", concat),
    ("shuffle", shuffle),
    ("dedupe", dedupe),
    ("len", len),
    ("rows", rows),
];

impl UserData for Dataset {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        for (name, call) in CALLS {
            methods.add_method(name, move |lua, data, argument: Value| {
                let session = session(lua)?;
                guarded(lua, &session, || call(lua, &session, data, argument))
            });
        }
        methods.add_meta_method(MetaMethod::Len, |_, data, ()| Ok(data.len()));
        methods.add_meta_method(MetaMethod::ToString, |_, data, ()| Ok(format!("dataset of {} rows", data.len())));
        methods.add_meta_method(MetaMethod::Index, |lua, _, name: Value| {
            let session = session(lua)?;
            guarded(lua, &session, || {
                let name = name.to_string().unwrap_or_default();
                let near = homeroom_abi::describe::nearest(&name, METHODS.iter().map(|method| method.name));
                let near = near.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
                Err::<Value, _>(said(format!("a dataset has no `{name}`{near}")))
            })
        });
    }
}

/// `refuse`, `truncate` or `skip`.
///
/// # Errors
/// When it is another word.
pub fn on_long_row(word: &str) -> Result<OnLongRow> {
    Ok(match word {
        "refuse" => OnLongRow::Refuse,
        "truncate" => OnLongRow::Truncate,
        "skip" => OnLongRow::Skip,
        other => bail!("`{other}` is no way to treat a long row"),
    })
}
