//! What is kept of the rows that are neither refused nor left out: where each stands, and hashes of what it says.

use anyhow::Result;

use super::records::{Finished, Records};
use super::said::Said;
use super::{Part, Place};

/// Rows whose values are sorted at once, where all are few.
const SORTED_ROWS: usize = 1 << 18;
/// Parts in which values are sorted at most.
const PARTS: usize = 16;

/// Where rows stand. It stays in memory: six bytes a row.
#[derive(Default)]
pub(super) struct Kept {
    lines: Vec<u32>,
    parts: Vec<Part>,
    /// Whether each has a system message.
    with_system: Vec<bool>,
    /// Numbers of the rows that are not here, among all rows of their source.
    left_out: Vec<u32>,
}

impl Kept {
    /// Adds the next row of its source.
    pub fn push(&mut self, place: Place, has_system: bool) {
        self.lines.push(place.line as u32);
        self.parts.push(place.part);
        self.with_system.push(has_system);
    }

    /// The next row of its source is not kept.
    pub fn leave_out(&mut self) {
        let number = self.lines.len() + self.left_out.len();
        self.left_out.push(number as u32);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// In which part a row is.
    pub fn part(&self, row: u32) -> Part {
        self.parts[row as usize]
    }

    /// Where a row stands.
    pub fn place(&self, row: u32) -> Place {
        Place { part: self.part(row), line: self.lines[row as usize] as usize }
    }

    /// Holds a row out.
    pub fn hold_out(&mut self, row: usize) {
        self.parts[row] = Part::HeldOut;
    }

    /// How many are in a part.
    pub fn count(&self, part: Part) -> usize {
        self.parts.iter().filter(|of| **of == part).count()
    }

    /// Where rows without a system message stand.
    pub fn without_system(&self) -> impl Iterator<Item = Place> {
        let rows = (0..).zip(&self.with_system).filter(|(_, has_system)| !**has_system);
        rows.map(|(row, _)| self.place(row))
    }

    /// For each row of the source, in order, its place among those that are kept; `None`: it is not.
    pub fn numbers(&self) -> impl FnMut() -> Option<usize> {
        let (mut number, mut row) = (0, 0);
        let mut left_out = self.left_out.iter().peekable();
        move || {
            let is_left_out = left_out.next_if(|left_out| **left_out == number).is_some();
            number += 1;
            // A file that was changed meanwhile may have more rows by now.
            let kept = (!is_left_out && row < self.len()).then_some(row)?;
            row += 1;
            Some(kept)
        }
    }
}

/// What a row says, in hashes: [`Said::whole`], [`Said::asked`], [`Said::answered`].
#[derive(Clone, Copy)]
pub(super) struct Hashes {
    pub whole: u64,
    pub asked: u64,
    pub answered: u64,
}

/// The hashes of rows.
#[derive(Default)]
pub(super) struct HashList(Records<6>);

impl HashList {
    /// Adds a row behind those before.
    pub fn push(&mut self, said: &Said) -> Result<()> {
        let mut words = [0; 6];
        for (halves, hash) in words.chunks_exact_mut(2).zip([said.whole, said.asked, said.answered]) {
            halves.copy_from_slice(&[hash as u32, (hash >> 32) as u32]);
        }
        self.0.push(words)
    }

    /// All of them, to be read.
    pub fn finish(self) -> Result<AllHashes> {
        self.0.finish().map(AllHashes)
    }
}

/// The hashes of all rows.
pub(super) struct AllHashes(Finished<6>);

/// A row with its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Valued {
    /// The value that it shares.
    value: u64,
    /// Its number.
    pub row: u32,
    /// What it answers.
    pub answered: u64,
}

impl AllHashes {
    /// Calls `each` with the rows that share a value, ascending, for all values that several have.
    pub fn shared(&self, value: impl Fn(&Hashes) -> Option<u64>, each: impl FnMut(&[Valued])) {
        self.shared_in(self.0.len().div_ceil(SORTED_ROWS).clamp(1, PARTS), value, each);
    }

    /// The same, sorted in so many parts: in memory are the values of one, and those of rows that share one are never apart.
    fn shared_in(&self, parts: usize, value: impl Fn(&Hashes) -> Option<u64>, mut each: impl FnMut(&[Valued])) {
        // Parts are about alike, unless many rows share one value.
        let usual = self.0.len().div_ceil(parts);
        let mut order: Vec<Valued> = Vec::with_capacity(usual + usual / 8);
        for part in 0..parts {
            order.clear();
            let mut row = 0;
            self.0.each(|words| {
                let hash = |at: usize| u64::from(words[at]) | u64::from(words[at + 1]) << 32;
                let hashes = Hashes { whole: hash(0), asked: hash(2), answered: hash(4) };
                // By its upper bits.
                let of_part = |value: &u64| (u128::from(*value) * parts as u128) >> 64 == part as u128;
                if let Some(value) = value(&hashes).filter(of_part) {
                    order.push(Valued { value, row, answered: hashes.answered });
                }
                row += 1;
            });
            order.sort_unstable();
            order.chunk_by(|a, b| a.value == b.value).filter(|group| group.len() > 1).for_each(&mut each);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::said::hash;
    use super::*;

    #[test]
    fn rows_that_share_a_value_are_found_in_parts_as_at_once() -> Result<()> {
        let mut list = HashList::default();
        for row in 0..1000_u64 {
            // A value in three is that of the next one, and none is asked by every seventh.
            let whole = hash(&(row - u64::from(row % 3 == 1)));
            let asked = if row % 7 == 0 { 0 } else { hash(&(row % 50)) };
            list.push(&Said { whole, asked, answered: row, ..Said::default() })?;
        }
        let hashes = list.finish()?;
        for value in
            [|hashes: &Hashes| Some(hashes.whole), |hashes: &Hashes| Some(hashes.asked).filter(|asked| *asked != 0)]
        {
            let groups = |parts| {
                let mut groups: Vec<Vec<Valued>> = Vec::new();
                hashes.shared_in(parts, value, |group| groups.push(group.to_vec()));
                groups.sort_by_key(|group| group[0].row);
                groups
            };
            let once = groups(1);
            assert!(once.len() == 333 || once.len() == 50, "{}", once.len());
            for group in &once {
                assert!(group.len() > 1 && group.is_sorted_by(|a, b| a.value == b.value && a.row < b.row));
                assert!(group.iter().all(|row| row.answered == u64::from(row.row)));
            }
            for parts in [2, 5, PARTS] {
                assert_eq!(groups(parts), once, "{parts} parts");
            }
        }
        Ok(())
    }

    #[test]
    fn rows_that_are_left_out_are_passed_over() {
        let mut kept = Kept::default();
        for line in 1..=9 {
            match line {
                1 | 4 | 5 => kept.leave_out(),
                _ => kept.push(Place { part: Part::Train, line }, line != 7),
            }
        }
        let mut number = kept.numbers();
        let numbers: Vec<Option<usize>> = (0..11).map(|_| number()).collect();
        let (none, some) = (None, Some::<usize>);
        assert_eq!(numbers, [none, some(0), some(1), none, none, some(2), some(3), some(4), some(5), none, none]);
        assert_eq!(kept.without_system().collect::<Vec<_>>(), [Place { part: Part::Train, line: 7 }]);
    }
}
