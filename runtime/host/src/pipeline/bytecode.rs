//! What Luau's compiler makes of a script, read back: which globals its functions name and at which line, and what tells one function
//! from another. The compiler knows scopes, types and strings better than a second parser would; nothing that is read here is run.
//!
//! The format is that of `lvmload.cpp` and `Bytecode.h` of the Luau that mlua is built with. A version that is not known is an error;
//! the tests below would say so.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, anyhow, bail, ensure};
use mlua::chunk::Compiler;
use sha2::{Digest, Sha256};

/// Versions whose fields are known here.
const VERSIONS: std::ops::RangeInclusive<u8> = 4..=10;
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
const NEWTABLE: u8 = 53;
const DUPTABLE: u8 = 54;
/// Operations that leave the register of their first operand as it is, or have none.
const NO_RESULT: [u8; 27] =
    [0, 8, 10, 11, 14, 16, 18, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 55, 60, 68, 70, 73, 74, 75, 77, 78];
/// As [`NO_RESULT`], of comparisons with a constant.
const NO_RESULT_EITHER: [u8; 2] = [79, 80];
/// Functions of `table` that change a table.
const TABLE_WRITERS: [&str; 5] = ["clear", "insert", "move", "remove", "sort"];
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
    /// Whether it may change a table that is neither its own nor kept in `report.state`.
    pub writes: bool,
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
        let (mut assigns, mut writes) = (false, false);
        for index in self.run.beginning_at(line) {
            captures = captures.max(Some(self.run.all[index].captures));
            self.run.visit(index, &mut |proto| {
                proto.digest(&mut hash);
                assigns |= proto.code_of(&[SETUPVAL]).next().is_some();
                writes |= proto.writes();
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
        writes |= globals.contains_key("rawset");
        if let Some(fields) = globals.get("table") {
            writes |= fields.as_ref().is_none_or(|all| all.iter().any(|name| writes_tables("table", name)));
        }
        let is_alone = self.run.beginning_at(line).count() == 1;
        Some(Source { is_alone, assigns, writes, digest: hex(&hash.finalize()), captures: captures?, globals })
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

    /// Whether it sets a field of a table that it did not make, and that is not `report.state` or within it. A table of which that cannot
    /// be told counts.
    fn writes(&self) -> bool {
        self.code_of(&[SETTABLE, SETTABLEKS, SETTABLEN]).any(|at| !self.is_own(self.code[at] >> 16 & 0xff, at))
    }

    /// Whether the register holds a table of its own before a word of code.
    fn is_own(&self, register: u32, before: usize) -> bool {
        let sets = |at: usize| {
            let (word, operation) = (self.code[at], self.code[at] as u8);
            let first = word >> 8 & 0xff;
            match operation {
                // Names and calls leave their results from a register on.
                20 | CALL | 63 | 85 | 87 => first <= register,
                _ if NO_RESULT.contains(&operation) || NO_RESULT_EITHER.contains(&operation) => false,
                56..=59 | 61 | 76 => first <= register,
                _ => first == register,
            }
        };
        let last = self.operations().take_while(|(at, _)| *at < before).filter(|(at, _)| sets(*at)).last();
        let Some((at, second)) = last else { return false };
        let from = self.code[at] >> 16 & 0xff;
        match self.code[at] as u8 {
            NEWTABLE | DUPTABLE => true,
            GETTABLEKS if second.and_then(|text| self.text(text)).is_some_and(|name| name == "state") => true,
            GETTABLE | GETTABLEKS | GETTABLEN | MOVE => self.is_own(from, at),
            _ => false,
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

/// Whether a function of a library changes a table that it is given.
pub fn writes_tables(library: &str, name: &str) -> bool {
    library == "table" && TABLE_WRITERS.contains(&name) || library.is_empty() && name == "rawset"
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
        ensure!(VERSIONS.contains(&version), "bytecode of version {version} is not known");
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
        Ok(Proto { head, captures, code, lines, constants, inner, line, variables, names })
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

    #[test]
    fn a_scripts_own_return_is_found() {
        let line = |text: &str| Functions::of(text).expect("it compiles").last_return();
        assert_eq!(line("local function f()\n  return 1\nend\nreturn {\n  f = function() return 2 end }\n"), Some(5));
        assert!(Functions::of("local = 1").is_err());
    }
}
