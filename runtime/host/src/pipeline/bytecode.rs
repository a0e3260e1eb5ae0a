//! What Luau's compiler makes of a script, read back: which globals its functions name and at which line, and what tells one function
//! from another. The compiler knows scopes, types and strings better than a second parser would; nothing that is read here is run.
//!
//! The format is that of `lvmload.cpp` and `Bytecode.h` of the Luau that mlua is built with. Another version, and an operation that
//! is not known, is an error, which `--check` tells; the tests below read all scripts that are shipped.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, anyhow, bail, ensure};
use mlua::chunk::Compiler;
use sha2::{Digest, Sha256};

/// The version whose fields and operations are known here, of those that the compiler can write.
const VERSION: u8 = 9;
/// The last operation of that version. Of what comes behind it, nothing is known.
const OPERATION_MAX: u8 = 90;
/// Functions whose code is longer than so many words are not looked at for what they write.
const WORDS_MAX: usize = 1 << 14;
const LOADB: u8 = 3;
const MOVE: u8 = 6;
const GETGLOBAL: u8 = 7;
const SETGLOBAL: u8 = 8;
const SETUPVAL: u8 = 10;
const GETTABLE: u8 = 13;
const SETTABLE: u8 = 14;
const GETTABLEKS: u8 = 15;
const SETTABLEKS: u8 = 16;
const GETTABLEN: u8 = 17;
const SETTABLEN: u8 = 18;
const CALL: u8 = 21;
const RETURN: u8 = 22;
/// Jumps that are always taken.
const JUMPS: [u8; 5] = [23, 24, 59, 61, 76];
/// Jumps that may be taken.
const BRANCHES: [u8; 16] = [25, 26, 27, 28, 29, 30, 31, 32, 56, 57, 58, 77, 78, 79, 80, 88];
const JUMPX: u8 = 67;
const NEWTABLE: u8 = 53;
const DUPTABLE: u8 = 54;
/// Operations that leave the register of their first operand as it is, or have none.
const NO_RESULT: [u8; 27] =
    [0, 8, 10, 11, 14, 16, 18, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 55, 60, 68, 70, 73, 74, 75, 77, 78];
/// As [`NO_RESULT`], of comparisons with a constant.
const NO_RESULT_EITHER: [u8; 2] = [79, 80];
/// Functions of `table` that change a table.
const TABLE_WRITERS: [&str; 6] = ["clear", "freeze", "insert", "move", "remove", "sort"];
/// Globals that do so.
const WRITERS: [&str; 2] = ["rawset", "setmetatable"];
/// Operations with a second word, in the order of Luau's `getOpLength`.
const TWO_WORDS: [u8; 30] = [
    7, 8, 12, 15, 16, 20, 27, 28, 29, 30, 31, 32, 53, 55, 58, 60, 66, 74, 75, 77, 78, 79, 80, 83, 84, 85, 86, 87, 88,
    90,
];

/// How scripts are compiled to be run.
pub fn compiler() -> Compiler {
    Compiler::new().set_optimization_level(1).set_debug_level(1)
}

/// The functions of a script.
pub struct Functions {
    /// As they are written: each global is read by its name.
    plain: Protos,
    /// As they are run: a value that never changes is a constant of who takes it.
    run: Protos,
}

struct Protos {
    all: Vec<Proto>,
    main: usize,
}

struct Proto {
    /// Numbers of parameters and captured values, and whether it takes more.
    head: [u8; 3],
    captures: u8,
    code: Vec<u32>,
    lines: Vec<usize>,
    constants: Vec<Constant>,
    inner: Vec<usize>,
    line: usize,
    /// Registers of variables, and the words of code in which they are that.
    variables: Vec<(u32, std::ops::Range<usize>)>,
    /// Names of its variables.
    names: Vec<String>,
}

enum Constant {
    Text(Vec<u8>),
    Function(usize),
    /// Any other, as its bytes.
    Plain(Vec<u8>),
}

/// A global that a script reads or sets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Global {
    /// The first line that does so.
    pub line: usize,
    /// Its name.
    pub name: String,
    /// Whether it is set.
    pub is_set: bool,
}

/// A global with the fields that are read of it, at its line: `homeroom.log.info` is `homeroom`, `log`, `info`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// The line of the last field.
    pub line: usize,
    /// The global and its fields.
    pub path: Vec<String>,
}

/// The functions that begin at one line.
pub struct Source {
    /// Whether no other function begins there, within it or beside it: which of them a closure is cannot be told.
    pub is_alone: bool,
    /// Whether it or a function in it assigns to a captured variable.
    pub assigns: bool,
    /// Whether it may change a table that is not its own.
    pub writes: bool,
    /// Whether it may, as a callback, whose first parameter is the report, also change one that is not kept in `report.state`.
    pub writes_beside_state: bool,
    /// SHA-256 of their code, of the functions in them, and of all constants: comments, blank lines and names of variables aside.
    pub digest: String,
    /// Most values that one of them takes from around it.
    pub captures: u8,
    /// The globals that they name, each with its fields that they read; `None`: they may read any.
    pub globals: BTreeMap<String, Option<BTreeSet<String>>>,
}

impl Source {
    /// Fields of a global that they read; `None`: they may read any.
    pub fn fields(&self, global: &str) -> Option<BTreeSet<String>> {
        self.globals.get(global).cloned().unwrap_or_else(|| Some(BTreeSet::new()))
    }
}

impl Functions {
    /// Compiles a script and reads what came of it.
    ///
    /// # Errors
    /// When it is not Luau, or the compiler's format is not known.
    pub fn of(text: &str) -> Result<Self> {
        let read = |compiler: Compiler| {
            let bytes = compiler.compile(text).map_err(|error| anyhow!("{error}"))?;
            Reader { bytes: &bytes, at: 0 }.protos()
        };
        Ok(Self { plain: read(compiler().set_optimization_level(0).set_debug_level(2))?, run: read(compiler())? })
    }

    /// All globals that are named, in the order of lines; each once for reading and once for setting.
    pub fn globals(&self) -> Vec<Global> {
        let mut all: Vec<Global> = self.plain.all.iter().flat_map(Proto::globals).collect();
        all.sort();
        let mut seen = BTreeSet::new();
        all.retain(|global| seen.insert((global.name.clone(), global.is_set)));
        all
    }

    /// The line at which the script's own last `return` ends.
    pub fn last_return(&self) -> Option<usize> {
        let main = &self.plain.all[self.plain.main];
        main.operations().filter(|(at, _)| main.code[*at] as u8 == RETURN).last().map(|(at, _)| main.lines[at])
    }

    /// The functions that begin at a line; `None`: there is none.
    pub fn at(&self, line: usize) -> Option<Source> {
        let mut hash = Sha256::new();
        let mut captures = None;
        let (mut assigns, mut writes, mut beside_state) = (false, false, false);
        for index in self.run.beginning_at(line) {
            captures = captures.max(Some(self.run.all[index].captures));
            let callback = &self.run.all[index];
            self.run.visit(index, &mut |proto| {
                proto.digest(&mut hash);
                assigns |= proto.code_of(&[SETUPVAL]).next().is_some();
                writes |= proto.writes(false);
                // What functions in it get is no report, or not for sure.
                beside_state |= proto.writes(std::ptr::eq(proto, callback));
            });
        }
        let mut globals = BTreeMap::new();
        for index in self.plain.beginning_at(line) {
            self.plain.visit(index, &mut |proto| {
                for global in proto.globals() {
                    let more = proto.fields(&global.name).filter(|_| !global.is_set);
                    let all = globals.entry(global.name).or_insert_with(|| Some(BTreeSet::new()));
                    *all = all.take().zip(more).map(|(all, more)| all.union(&more).cloned().collect());
                }
            });
        }
        let mut calls = WRITERS.iter().any(|name| globals.contains_key(*name));
        if let Some(fields) = globals.get("table") {
            calls |= fields.as_ref().is_none_or(|all| all.iter().any(|name| writes_tables("table", name)));
        }
        let (writes, writes_beside_state) = (writes || calls, beside_state || calls);
        let is_alone = self.run.beginning_at(line).count() == 1;
        let (digest, captures) = (hex(&hash.finalize()), captures?);
        Some(Source { is_alone, assigns, writes, writes_beside_state, digest, captures, globals })
    }

    /// All globals with the fields that are read of each, as the compiler sees them: a local of that name is none.
    pub fn accesses(&self) -> Vec<Access> {
        self.plain.all.iter().flat_map(Proto::accesses).collect()
    }

    /// How many variables of a name the script declares.
    pub fn declared(&self, name: &str) -> usize {
        self.plain.all.iter().flat_map(|proto| &proto.names).filter(|declared| *declared == name).count()
    }
}

impl Protos {
    fn beginning_at(&self, line: usize) -> impl Iterator<Item = usize> {
        (0..self.all.len()).filter(move |index| *index != self.main && self.all[*index].line == line)
    }

    /// Visits a function and those in it.
    fn visit(&self, index: usize, each: &mut dyn FnMut(&Proto)) {
        let proto = &self.all[index];
        each(proto);
        let constants = proto.constants.iter().filter_map(|constant| match constant {
            Constant::Function(index) => Some(*index),
            _ => None,
        });
        let inner: BTreeSet<usize> = proto.inner.iter().copied().chain(constants).collect();
        inner.into_iter().for_each(|index| self.visit(index, each));
    }
}

impl Proto {
    /// What it does, without its line and the functions in it.
    fn digest(&self, hash: &mut Sha256) {
        hash.update(self.head);
        hash.update((self.code.len() as u64).to_le_bytes());
        self.code.iter().for_each(|word| hash.update(word.to_le_bytes()));
        for constant in &self.constants {
            let (tag, bytes) = match constant {
                Constant::Text(bytes) => (1, bytes.as_slice()),
                Constant::Plain(bytes) => (2, bytes.as_slice()),
                // It follows.
                Constant::Function(_) => (3, [].as_slice()),
            };
            hash.update([tag]);
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
    }

    /// Where each operation begins, and its second word if it has one.
    fn operations(&self) -> impl Iterator<Item = (usize, Option<u32>)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let here = at;
            let word = self.code.get(here)?;
            let second = if TWO_WORDS.contains(&(*word as u8)) { self.code.get(here + 1).copied() } else { None };
            at += 1 + usize::from(second.is_some());
            Some((here, second))
        })
    }

    /// Where operations of some kinds are.
    fn code_of<'a>(&'a self, kinds: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
        self.operations().map(|(at, _)| at).filter(|at| kinds.contains(&(self.code[*at] as u8)))
    }

    /// Whether it sets a field of a table that it did not make, and that is not within `state` of its first parameter, if that is a
    /// report. A table of which that cannot be told counts.
    fn writes(&self, gets_report: bool) -> bool {
        let mut sets = self.code_of(&[SETTABLE, SETTABLEKS, SETTABLEN]).peekable();
        if sets.peek().is_none() {
            return false;
        }
        if self.code.len() > WORDS_MAX {
            return true;
        }
        let flow = Flow { proto: self, before: self.predecessors(), report: gets_report && self.head[0] > 0 };
        sets.any(|at| {
            let register = self.code[at] >> 16 & 0xff;
            !flow.is_new(register, at, &mut BTreeSet::new()) && !flow.is_of_state(register, at, &mut BTreeSet::new())
        })
    }

    /// Of each word of code at which an operation begins, the operations that may have run just before it.
    fn predecessors(&self) -> Vec<Vec<usize>> {
        let mut before = vec![Vec::new(); self.code.len()];
        for (at, second) in self.operations() {
            let (word, operation) = (self.code[at], self.code[at] as u8);
            let next = at + 1 + usize::from(second.is_some());
            let by = |offset: i32| (at as i64 + 1 + i64::from(offset)) as usize;
            // Offsets are signed, in the upper half or the upper three quarters of the word.
            let target = match operation {
                LOADB => Some(by((word >> 24) as i32)).filter(|_| word >> 24 != 0),
                JUMPX => Some(by(word as i32 >> 8)),
                jump if JUMPS.contains(&jump) || BRANCHES.contains(&jump) => Some(by(word as i32 >> 16)),
                _ => None,
            };
            let always = operation == JUMPX || JUMPS.contains(&operation) || operation == LOADB && target.is_some();
            let falls = Some(next).filter(|_| !always && operation != RETURN);
            for to in target.into_iter().chain(falls) {
                if let Some(before) = before.get_mut(to) {
                    before.push(at);
                }
            }
        }
        before
    }

    /// Whether an operation may set a register.
    fn sets(&self, at: usize, register: u32) -> bool {
        let (word, operation) = (self.code[at], self.code[at] as u8);
        let first = word >> 8 & 0xff;
        match operation {
            // Names and calls leave their results from a register on.
            20 | CALL | 63 | 85 | 87 => first <= register,
            _ if NO_RESULT.contains(&operation) || NO_RESULT_EITHER.contains(&operation) => false,
            56..=59 | 61 | 76 => first <= register,
            _ => first == register,
        }
    }

    fn text(&self, constant: u32) -> Option<String> {
        match self.constants.get(constant as usize)? {
            Constant::Text(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            _ => None,
        }
    }

    fn globals(&self) -> impl Iterator<Item = Global> {
        self.operations().filter_map(|(at, second)| {
            let operation = self.code[at] as u8;
            let named = matches!(operation, GETGLOBAL | SETGLOBAL);
            let name = self.text(second.filter(|_| named)?)?;
            Some(Global { line: self.lines[at], name, is_set: operation == SETGLOBAL })
        })
    }

    fn accesses(&self) -> Vec<Access> {
        let operations: Vec<(usize, Option<u32>)> = self.operations().collect();
        let mut all = Vec::new();
        for (index, (at, second)) in operations.iter().enumerate() {
            if self.code[*at] as u8 != GETGLOBAL {
                continue;
            }
            let Some(name) = second.and_then(|text| self.text(text)) else { continue };
            let (mut path, mut line, mut register) = (vec![name], self.lines[*at], self.code[*at] >> 8 & 0xff);
            for (at, second) in &operations[index + 1..] {
                let is_field = self.code[*at] as u8 == GETTABLEKS && self.code[*at] >> 16 & 0xff == register;
                let Some(field) = second.filter(|_| is_field).and_then(|text| self.text(text)) else { break };
                // What is kept in a variable may be asked for other fields.
                (line, register) = (self.lines[*at], self.code[*at] >> 8 & 0xff);
                path.push(field);
            }
            all.push(Access { line, path });
        }
        all
    }

    /// Fields of a global that it reads; `None`: they may be any.
    fn fields(&self, global: &str) -> Option<BTreeSet<String>> {
        let operations: Vec<(usize, Option<u32>)> = self.operations().collect();
        let mut fields = BTreeSet::new();
        for (index, (at, second)) in operations.iter().enumerate() {
            let is_meant = self.code[*at] as u8 == GETGLOBAL
                && second.and_then(|constant| self.text(constant)).is_some_and(|name| name == global);
            if !is_meant {
                continue;
            }
            // GETGLOBAL A; GETTABLEKS _ B: the field of what is in the register.
            let (next, field) = operations.get(index + 1)?;
            let register = self.code[*at] >> 8 & 0xff;
            // A variable can be asked for more.
            let is_variable = self.variables.iter().any(|(other, code)| *other == register && code.contains(next));
            if self.code[*next] as u8 != GETTABLEKS || self.code[*next] >> 16 & 0xff != register || is_variable {
                return None;
            }
            fields.insert(self.text((*field)?)?);
        }
        Some(fields)
    }
}

/// Where the values of registers come from, on every way through a function.
struct Flow<'a> {
    proto: &'a Proto,
    /// See [`Proto::predecessors`].
    before: Vec<Vec<usize>>,
    /// Whether its first parameter is a report.
    report: bool,
}

/// Values that are being looked at, by register and place: what comes to itself again, in a loop, comes from elsewhere, too.
type Seen = BTreeSet<(u32, usize)>;

impl Flow<'_> {
    /// Whether the register holds a table that the function made, however it came to a word of code.
    fn is_new(&self, register: u32, before: usize, seen: &mut Seen) -> bool {
        !seen.insert((register, before))
            || self.all_sets(register, before, &mut |at| match at.map(|at| (at, self.proto.code[at])) {
                Some((_, word)) if [NEWTABLE, DUPTABLE].contains(&(word as u8)) => true,
                Some((at, word)) if word as u8 == MOVE => self.is_new(word >> 16 & 0xff, at, seen),
                // What lies in a table that it made may be anybody's.
                _ => false,
            })
    }

    /// Whether it holds `state` of the report, or what lies in that.
    fn is_of_state(&self, register: u32, before: usize, seen: &mut Seen) -> bool {
        !seen.insert((register, before))
            || self.all_sets(register, before, &mut |at| {
                let Some(at) = at else { return false };
                let (word, from) = (self.proto.code[at], self.proto.code[at] >> 16 & 0xff);
                let is_state = || {
                    let name = self.proto.code.get(at + 1).and_then(|text| self.proto.text(*text));
                    word as u8 == GETTABLEKS && name.is_some_and(|name| name == "state") && self.is_report(from, at)
                };
                match word as u8 {
                    MOVE => self.is_of_state(from, at, seen),
                    GETTABLE | GETTABLEKS | GETTABLEN => is_state() || self.is_of_state(from, at, seen),
                    _ => false,
                }
            })
    }

    /// Whether it holds the report: the first parameter, which nothing has set.
    fn is_report(&self, register: u32, before: usize) -> bool {
        self.report && register == 0 && self.all_sets(register, before, &mut |at| at.is_none())
    }

    /// Whether something is so of every operation that may have set the register last; `None`: it is as it was when the function was
    /// called.
    fn all_sets(&self, register: u32, before: usize, is_so: &mut dyn FnMut(Option<usize>) -> bool) -> bool {
        let (mut seen, mut todo) = (BTreeSet::new(), vec![before]);
        while let Some(place) = todo.pop() {
            if place == 0 && !is_so(None) {
                return false;
            }
            for at in &self.before[place] {
                if self.proto.sets(*at, register) {
                    if !is_so(Some(*at)) {
                        return false;
                    }
                } else if seen.insert(*at) {
                    todo.push(*at);
                }
            }
        }
        true
    }
}

/// Whether a function of a library changes a table that it is given.
pub fn writes_tables(library: &str, name: &str) -> bool {
    library == "table" && TABLE_WRITERS.contains(&name) || library.is_empty() && WRITERS.contains(&name)
}

/// Bytes that are read from the beginning.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn protos(mut self) -> Result<Protos> {
        let version = self.byte()?;
        if version == 0 {
            bail!("{}", String::from_utf8_lossy(&self.bytes[1..]));
        }
        ensure!(version == VERSION, "bytecode of version {version} is not known, only that of version {VERSION}");
        let types = self.byte()?;
        let texts = (0..self.number()?)
            .map(|_| {
                let length = self.number()?;
                Ok(self.take(length)?.to_vec())
            })
            .collect::<Result<Vec<_>>>()?;
        if types == 3 {
            while self.byte()? != 0 {
                self.number()?;
            }
        }
        let count = self.number()?;
        let protos = (0..count).map(|_| self.proto(&texts)).collect::<Result<Vec<_>>>()?;
        let main = self.number()?;
        // A function is written behind those in it, so that a visit ends.
        let sound = |(number, proto): (usize, &Proto)| {
            let constant = |constant: &Constant| !matches!(constant, Constant::Function(index) if *index >= number);
            proto.inner.iter().all(|index| *index < number) && proto.constants.iter().all(constant)
        };
        ensure!(main < protos.len() && protos.iter().enumerate().all(sound), "a function is missing");
        Ok(Protos { all: protos, main })
    }

    fn proto(&mut self, texts: &[Vec<u8>]) -> Result<Proto> {
        let head = self.take(5)?;
        let (captures, head) = (head[2], [head[1], head[2], head[3]]);
        let size = self.number()?;
        self.take(size)?;
        let count = self.number()?;
        let code = (0..count).map(|_| self.word()).collect::<Result<Vec<u32>>>()?;
        let count = self.number()?;
        let constants = (0..count).map(|_| self.constant(texts)).collect::<Result<Vec<_>>>()?;
        let count = self.number()?;
        let inner = (0..count).map(|_| self.number()).collect::<Result<Vec<usize>>>()?;
        let line = self.number()?;
        self.number()?; // Its name.
        let lines = if self.byte()? != 0 { self.lines(code.len())? } else { vec![line; code.len()] };
        let (mut variables, mut names) = (Vec::new(), Vec::new());
        if self.byte()? != 0 {
            for _ in 0..self.number()? {
                let name = self.number()?.checked_sub(1).and_then(|index| texts.get(index));
                names.extend(name.map(|name| String::from_utf8_lossy(name).into_owned()));
                let code = self.number()?..self.number()?;
                variables.push((u32::from(self.byte()?), code));
            }
            for _ in 0..self.number()? {
                self.number()?;
            }
        }
        let proto = Proto { head, captures, code, lines, constants, inner, line, variables, names };
        let operation = |at: usize| proto.code[at] as u8;
        let unknown = proto.operations().map(|(at, _)| operation(at)).find(|operation| *operation > OPERATION_MAX);
        ensure!(unknown.is_none(), "an operation is not known: {}", unknown.unwrap_or_default());
        // Where the length of one were not known, they would end within one, or with one that goes on behind it.
        let last = proto.operations().last().context("a function has no code")?;
        let end = last.0 + 1 + usize::from(TWO_WORDS.contains(&operation(last.0)));
        let ends = operation(last.0) == RETURN || JUMPS.contains(&operation(last.0));
        ensure!(end == proto.code.len() && ends, "the code of a function has no end");
        Ok(proto)
    }

    /// The line of each word of code: differences of bytes, that begin anew at every so many words.
    fn lines(&mut self, count: usize) -> Result<Vec<usize>> {
        let gap = u32::from(self.byte()?);
        let (mut offset, mut base) = (0_u8, 0_i64);
        let offsets = self.take(count)?.to_vec();
        let intervals = (count.saturating_sub(1) >> gap.min(31)) + 1;
        let bases = (0..intervals).map(|_| {
            base += i64::from(self.word()? as i32);
            Ok(base)
        });
        let bases = bases.collect::<Result<Vec<i64>>>()?;
        let lines = offsets.iter().enumerate().map(|(at, difference)| {
            offset = offset.wrapping_add(*difference);
            usize::try_from(bases[at >> gap.min(31)] + i64::from(offset)).unwrap_or(0)
        });
        Ok(lines.collect())
    }

    fn constant(&mut self, texts: &[Vec<u8>]) -> Result<Constant> {
        let tag = self.byte()?;
        let start = self.at;
        match tag {
            0 => {}
            1 => drop(self.byte()?),
            2 => drop(self.take(8)?),
            3 => {
                let index = self.number()?;
                let text = index.checked_sub(1).and_then(|index| texts.get(index));
                return Ok(Constant::Text(text.context("a text is missing")?.clone()));
            }
            4 => drop(self.take(4)?),
            5 => {
                for _ in 0..self.number()? {
                    self.number()?;
                }
            }
            6 => return Ok(Constant::Function(self.number()?)),
            7 => drop(self.take(16)?),
            8 => {
                for _ in 0..self.number()? {
                    self.number()?;
                    self.take(4)?;
                }
            }
            9 => {
                self.byte()?;
                self.number()?;
            }
            11 => drop(self.take(32)?),
            other => bail!("a constant of kind {other} is not known"),
        }
        Ok(Constant::Plain([&[tag], &self.bytes[start..self.at]].concat()))
    }

    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len()).context("bytecode is cut off")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn word(&mut self) -> Result<u32> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// A number in seven bits a byte.
    fn number(&mut self) -> Result<usize> {
        let (mut number, mut shift) = (0_u64, 0);
        loop {
            let byte = self.byte()?;
            ensure!(shift < 64, "a number is too long");
            number |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return Ok(usize::try_from(number)?);
            }
        }
    }
}

/// Bytes as small hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        let globals = Functions::of(text).expect("it compiles").globals();
        globals
            .iter()
            .map(|global| format!("{}{}{}", global.line, if global.is_set { "=" } else { " " }, global.name))
            .collect()
    }

    #[test]
    fn globals_are_found_at_their_lines_and_locals_are_none() {
        let text = "local a, b: number = 1, 2\nlocal function f(x)\n  return x + y\nend\nz = f(a)\n\
            for i = 1, 3 do print(i, `{w} {a}`) end\nlocal t = { y = if a then v else b }\nt.q = function() return t.nothing end\n\
            type Row = { text: string }\nrepeat local done = true until done\nreturn homeroom.fine_tune { on_step = function(r) return r.u + s end }";
        assert_eq!(names(text), ["3 y", "5=z", "6 print", "6 w", "7 v", "11 homeroom", "11 s"]);
        let long = format!("{}print(x)", "local _ = { 1, 2 }\n".repeat(150));
        assert_eq!(names(&long), ["151 print", "151 x"]);
    }

    #[test]
    fn a_function_is_told_by_what_it_does() {
        let at = |text: &str, line: usize| Functions::of(text).expect("it compiles").at(line).expect("a function");
        let first = at("local n = 2\nreturn function(r) return r.loss * n end", 2);
        let moved = at("-- said\nlocal m = 2\n\nreturn function(report)\n  -- more\n  return report.loss * m\nend", 4);
        assert_eq!((&first.digest, first.captures), (&moved.digest, moved.captures));
        // What never changes is part of it; what may is taken from around it.
        let other = at("local n = 3\nreturn function(r) return r.loss * n end", 2);
        assert_ne!(first.digest, other.digest);
        let taken =
            |value: &str| at(&format!("local n = {value}\nn += 1\nreturn function(r) return r.loss * n end"), 3);
        assert_eq!((taken("2").captures, taken("2").digest), (1, taken("3").digest));
        let other = at("local n = 2\nreturn function(r) return r.loss + n end", 2);
        assert_ne!(first.digest, other.digest);
        let other = at("local n = 2\nreturn function(r) return r.lost * n end", 2);
        assert_ne!(first.digest, other.digest);
        let inner =
            |number: usize| at(&format!("return function() return function() return {number} end end"), 1).digest;
        assert_ne!(inner(1), inner(2));
        assert!(Functions::of("return 1").expect("it compiles").at(1).is_none());
    }

    #[test]
    fn the_parameters_that_a_function_reads_are_known_unless_they_may_be_any() {
        let params = |body: &str| {
            let text = format!("return function(r)\n{body}\nend");
            Functions::of(&text).expect("it compiles").at(1).expect("a function").fields("params")
        };
        let named = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>());
        assert_eq!(params("return r.loss"), named(&[]));
        assert_eq!(params("return r.loss > params.most or (function() return params.r end)()"), named(&["most", "r"]));
        assert_eq!(params("return params[r.loss]"), None);
        assert_eq!(params("local p = params return p.most"), None);
    }

    /// Whether a callback writes elsewhere than to its own tables and to `report.state`; and as another function.
    #[test]
    fn a_function_that_may_change_a_table_is_known_by_what_it_sets() {
        for (body, as_callback, otherwise) in [
            ("return r.loss", false, false),
            ("r.state.n = 1", false, true),
            ("r.state.n = (r.state.n or 0) + 1 if r.loss > 2 then r.state.list[r.step] = r.loss end", false, true),
            ("local s = r.state for i = 1, 3 do s.n = i end", false, true),
            ("local s = r.state if not s.seen then s.seen = {} end s.seen[r.step] = true", false, true),
            ("r.n = 1", true, true),
            ("t.state.n = 1", true, true),
            ("local u = t u.state.n = 1", true, true),
            ("r = t r.state.n = 1", true, true),
            ("for i = 1, 2 do r.state.n = 1 r = t end", true, true),
            ("local u = {} u.state.n = 1", true, true),
            ("local u = {} u.n = 1 return u", false, false),
            ("local u = { n = 1 } for i = 1, 3 do u[i] = i end local v = u v.n = 2", false, false),
            ("local u = if r.loss > 1 then { n = 0 } else {} u.n = 1", false, false),
            ("local u = t if r.loss > 1 then u = {} end u.n = 1", true, true),
            ("local u = {} if r.loss > 1 then u = t end u.n = 1", true, true),
            ("local u = {} for i = 1, 2 do u.n = 1 u = t end", true, true),
            ("local u = r.loss > 1 and t or {} u.n = 1", true, true),
            ("local u = { t } u[1].n = 1", true, true),
            ("local u = r.state for i = 1, 2 do u.n = 1 u = t end", true, true),
            ("local function f(r) r.state.n = 1 end f({ state = t })", true, true),
            ("setmetatable(t, nil)", true, true),
            ("table.freeze(t)", true, true),
            ("rawset(t, 1, 2)", true, true),
        ] {
            let text = format!("local t = {{ {{}} }}\nreturn function(r)\n{body}\nend");
            let source = Functions::of(&text).expect("it compiles").at(2).expect("a function");
            assert_eq!((source.writes_beside_state, source.writes), (as_callback, otherwise), "{body}");
        }
        // Without a parameter there is no report, and one that is not the first is none.
        for head in ["function(...) local r = ...", "function(a, r)", "function() local r"] {
            let text = format!("local t = {{}}\nreturn {head}\nr.state.n = 1\nend");
            assert!(
                Functions::of(&text).expect("it compiles").at(2).expect("a function").writes_beside_state,
                "{head}"
            );
        }
    }

    /// The reader says so where operations do not end with the code, or a function goes on behind its code; here that nothing is left out.
    #[test]
    fn all_operations_of_the_scripts_that_are_shipped_are_known() {
        let scripts = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts");
        let mut words = 0;
        for entry in std::fs::read_dir(scripts).expect("they are there") {
            let path = entry.expect("it is there").path();
            if path.extension().is_none_or(|extension| extension != "lua") {
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("it is a text");
            let functions = Functions::of(&text).unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
            for proto in functions.plain.all.iter().chain(&functions.run.all) {
                let walked: usize = proto.operations().map(|(_, second)| 1 + usize::from(second.is_some())).sum();
                assert_eq!(walked, proto.code.len(), "{}:{}", path.display(), proto.line);
                words += walked;
            }
        }
        assert!(words > 1000, "{words} words of code");
    }

    #[test]
    fn bytecode_of_another_version_and_operations_that_are_not_known_are_refused() {
        let bytes = compiler().compile("return 1").expect("it compiles");
        let read = |bytes: &[u8]| Reader { bytes, at: 0 }.protos().map(|_| ()).map_err(|error| format!("{error:#}"));
        assert_eq!((bytes[0], read(&bytes)), (VERSION, Ok(())));
        for version in [VERSION - 1, VERSION + 1] {
            let other = [&[version], &bytes[1..]].concat();
            assert!(read(&other).is_err_and(|error| error.contains("is not known, only that of version 9")));
        }
        // LOADN R0 1; RETURN R0 1, and each of them another operation.
        let code = bytes.windows(4).position(|word| word == [4, 0, 1, 0]).expect("it loads 1");
        for (at, operation, expected) in [
            (code, OPERATION_MAX + 1, "an operation is not known: 91"),
            (code + 4, 4, "has no end"),
            (code + 4, 7, "has no end"),
        ] {
            let mut other = bytes.clone();
            other[at] = operation;
            assert!(read(&other).is_err_and(|error| error.contains(expected)), "{operation}");
        }
    }

    #[test]
    fn a_scripts_own_return_is_found() {
        let line = |text: &str| Functions::of(text).expect("it compiles").last_return();
        assert_eq!(line("local function f()\n  return 1\nend\nreturn {\n  f = function() return 2 end }\n"), Some(5));
        assert!(Functions::of("local = 1").is_err());
    }
}
