//! Mixtures of datasets: `interleave` with shares, and `replay` of what was learned before.

use anyhow::Result;
use homeroom_engine::data::order;
use mlua::{AnyUserData, Lua, MultiValue, Value};

use super::Session;
use super::dataset::{Dataset, Row, size_of_rows};
use super::methods::{ROWS_MAX, one};
use super::options::Options;
use super::spec::verb;
use crate::pipeline::errors::{Failure, said};

/// Takes the rows of several datasets by turns, so that everywhere in the result each has its share.
pub fn interleave(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("interleave"), argument)?;
    let lists = datasets(&options)?;
    let mut shares = options.numbers("shares");
    if shares.is_empty() {
        shares.resize(lists.len(), 1.0);
    }
    if shares.len() != lists.len() {
        return Err(said(format!("interleave: {} `shares` for {} datasets; each has one", shares.len(), lists.len())));
    }
    if let Some(empty) = lists.iter().position(|list| list.len() == 0) {
        return Err(said(format!("interleave: dataset {} has no rows", empty + 1)));
    }
    let all = options.text("stopping_strategy").is_some_and(|word| word == "all_exhausted");
    let mut taken = vec![0; lists.len()];
    let mut left = lists.len();
    let mut rows: Vec<Row> = Vec::new();
    let mut room = lists.iter().map(Dataset::len).sum::<usize>();
    let mut held = session.hold(lua, size_of_rows(room))?;
    for list in order::mixture(&shares) {
        session.clock().check()?;
        if rows.len() == room {
            room *= 2;
            held = session.hold(lua, size_of_rows(room))?;
        }
        let of_list = lists[list].rows();
        // The first that has no more ends it; or the last, while the others begin anew.
        if taken[list] == of_list.len() && !all {
            break;
        }
        rows.push(of_list[taken[list] % of_list.len()].clone());
        taken[list] += 1;
        left -= usize::from(taken[list] == of_list.len());
        if all && left == 0 {
            break;
        }
        if rows.len() > ROWS_MAX {
            return Err(said(format!(
                "interleave: more than {ROWS_MAX} rows are too many for one dataset; give the small shares to small datasets"
            )));
        }
    }
    Ok(Value::UserData(lua.create_userdata(lists[0].of(rows, held))?))
}

fn datasets(options: &Options) -> Result<Vec<Dataset>, Failure> {
    let table = options.get("datasets").and_then(Value::as_table);
    let table = table.ok_or_else(|| said("interleave: `datasets` should be a list of datasets"))?;
    let data = table.sequence_values::<AnyUserData>().map(|data| Ok(data?.borrow::<Dataset>()?.clone()));
    Ok(data.collect::<mlua::Result<_>>()?)
}

/// Spreads rows of what was learned before among those of a dataset.
pub(super) fn replay(lua: &Lua, session: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("replay"), options)?;
    let before = options.dataset("rows").ok_or_else(|| said("replay: `rows` should be a dataset"))?;
    let share = options.number("share").unwrap_or(0.1);
    let wanted = (share / (1.0 - share) * data.len() as f64).round();
    if before.len() == 0 && wanted > 0.0 {
        return Err(said("replay: `rows` has no rows"));
    }
    if wanted + data.len() as f64 > ROWS_MAX as f64 {
        return Err(said(format!("replay: {wanted} more rows are too many for one dataset")));
    }
    let wanted = wanted as usize;
    let count = data.len() + wanted;
    let held = session.hold(lua, size_of_rows(count))?;
    // Where more are wanted than there are, all of them come as often as is needed, and some once more.
    let mut drawn = Vec::with_capacity(wanted);
    for round in 0.. {
        session.clock().check()?;
        let left = wanted - drawn.len();
        if left == 0 {
            break;
        }
        let seed = options.seed().wrapping_add(round);
        let mut rows = order::shuffled(before.len(), seed);
        rows.truncate(left);
        drawn.extend(rows);
    }
    let (mut new, mut old) = (data.rows().iter(), drawn.iter().map(|index| &before.rows()[*index]));
    let mut rows = Vec::with_capacity(count);
    for place in 0..count {
        session.clock().check()?;
        // As many of the old ones behind each place as lines up with their share.
        let old_by_now = (place + 1) * wanted / count;
        let old_before = place * wanted / count;
        let next = if old_by_now > old_before { old.next() } else { new.next() };
        rows.extend(next.cloned());
    }
    one(lua, data.of(rows, held))
}
