//! Where rows come from that a report is made of.

use std::cell::RefCell;
use std::path::PathBuf;

use anyhow::Result;

use super::{InFile, Part, Place};
use crate::data::read::{Reading, Source, read_rows};
use crate::data::{Problem, Row, RowKind};

/// Takes a row: in which part and on which line it stands.
pub type Each<'a> = dyn FnMut(Part, usize, Result<Row, Problem>) -> Result<()> + 'a;

/// Rows that can be read more than once, in the same order.
pub trait Reread {
    /// Calls `each` with every row.
    ///
    /// # Errors
    /// When they cannot be read, or one of `each`.
    fn each(&self, each: &mut Each<'_>) -> Result<()>;

    /// What their places are called, once they were read.
    fn places(&self) -> Places {
        Places::default()
    }
}

/// What places are called: of several files the lines are counted over all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places([Vec<Counted>; 2]);

/// A file, what its rows are counted in, and how many lines of files come before it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Counted {
    name: PathBuf,
    unit: &'static str,
    before: usize,
}

impl Places {
    /// Rows in memory, which are all counted in one unit.
    pub fn counted_in(unit: &'static str) -> Self {
        let all = || vec![Counted { name: PathBuf::new(), unit, before: 0 }];
        Self([all(), all()])
    }

    /// The files of a part. What is held out of files that are trained on stands there.
    fn of(&self, part: Part) -> &[Counted] {
        let own = &self.0[part as usize];
        if own.is_empty() { &self.0[Part::Train as usize] } else { own }
    }

    /// What rows of a part are counted in; none where that needs the name of a file.
    pub fn unit(&self, part: Part) -> Option<&'static str> {
        match self.of(part) {
            [] => Some("line"),
            [file] => Some(file.unit),
            _ => None,
        }
    }

    /// Where a place is in its file; none where there is one file.
    pub(super) fn in_file(&self, place: Place) -> Option<InFile> {
        let files = self.of(place.part);
        let file = files.iter().rev().find(|file| file.before < place.line).filter(|_| files.len() > 1)?;
        Some(InFile { file: file.name.clone(), line: place.line - file.before })
    }

    /// A place in words: "line 17", of several files "b.csv row 3".
    pub fn words(&self, place: Place) -> String {
        let files = self.of(place.part);
        match files.iter().rev().find(|file| file.before < place.line) {
            Some(Counted { name, unit, before }) if files.len() > 1 => {
                format!("{} {unit} {}", name.display(), place.line - before)
            }
            Some(Counted { unit, .. }) => format!("{unit} {}", place.line),
            None => format!("line {}", place.line),
        }
    }
}

/// The rows of files.
pub struct Files<'a> {
    /// Those to train on.
    training: &'a [Source],
    /// Those that are held out, in files of their own.
    held_out: &'a [Source],
    reading: &'a Reading,
    /// Lines of `training` that are held out, ascending.
    held_lines: &'a [usize],
    /// What is to be learned, and its name: rows of another kind are refused.
    kind: Option<(RowKind, &'a str)>,
    /// What was found of them.
    found: RefCell<Found>,
}

#[derive(Default)]
struct Found {
    places: Places,
    /// What they are, in words, where that is to be said.
    recognised: Vec<(PathBuf, Option<String>)>,
}

impl<'a> Files<'a> {
    /// Files to train on, and held-out ones of their own.
    pub fn new(training: &'a [Source], held_out: &'a [Source], reading: &'a Reading) -> Self {
        Self { training, held_out, reading, held_lines: &[], kind: None, found: RefCell::default() }
    }

    /// The same, of whose lines to train on these, ascending, are held out.
    pub fn without(self, held_lines: &'a [usize]) -> Self {
        Self { held_lines, ..self }
    }

    /// The same, of which rows of another kind are refused. The name is that of what learns from them.
    pub fn of_kind(self, kind: RowKind, objective: &'a str) -> Self {
        Self { kind: Some((kind, objective)), ..self }
    }

    /// What each file was found to be when it was read; `None`: JSONL with our own keys.
    pub fn recognised(&self) -> Vec<(PathBuf, Option<String>)> {
        self.found.borrow().recognised.clone()
    }
}

impl Reread for Files<'_> {
    fn each(&self, each: &mut Each<'_>) -> Result<()> {
        let mut found = Found::default();
        for (part, sources) in [(Part::Train, self.training), (Part::HeldOut, self.held_out)] {
            let mut before = 0;
            for source in sources {
                let wanted = self.kind.map(|(kind, _)| kind);
                let recognised = read_rows(&source.name, source.open()?, self.reading, wanted, &mut |number, row| {
                    let row = row.map(|(_, row)| row).and_then(|row| match self.kind {
                        Some((kind, objective)) => kind.check(row.kind(), objective).map(|()| row),
                        None => Ok(row),
                    });
                    let line = before + number;
                    let part = match part {
                        Part::Train if self.held_lines.binary_search(&line).is_ok() => Part::HeldOut,
                        part => part,
                    };
                    each(part, line, row)
                })?;
                let name = source.name.clone();
                found.places.0[part as usize].push(Counted { name, unit: recognised.unit, before });
                found.recognised.push((source.name.clone(), recognised.words));
                before += recognised.last;
            }
        }
        self.found.replace(found);
        Ok(())
    }

    fn places(&self) -> Places {
        self.found.borrow().places.clone()
    }
}
