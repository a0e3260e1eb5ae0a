//! Cosines and sines of a model's ropes, made as positions are asked for. Where a rope turns long sequences otherwise than short
//! ones, a table has rows for each set of frequencies, one set after another.

use std::collections::BTreeMap;

use homeroom_kernels::RotaryTable;

use crate::models::Architecture;
use crate::models::rope::Rope;
use crate::run::batch::Batch;

/// Sets of frequencies that a table keeps; it holds more where more are asked for at once.
const SETS: usize = 16;

/// The tables of all ropes.
#[derive(Default)]
pub struct Rotary {
    tables: Vec<Table>,
}

/// One rope's.
struct Table {
    rows: RotaryTable,
    sets: Vec<Set>,
}

/// Rows of a table: positions from 0 on under one set of frequencies.
struct Set {
    set: usize,
    first: u32,
    positions: usize,
}

impl Rotary {
    /// Readies rows for sequences: pairs of their length in tokens and of the positions, from 0 on, that they take rows for.
    pub fn ready(&mut self, architecture: &Architecture, sequences: impl Iterator<Item = (usize, usize)> + Clone) {
        let head_dim = architecture.layers.first().map_or(2, |layer| layer.attention().head_dim);
        let empty = || Table { rows: RotaryTable::new(head_dim), sets: Vec::new() };
        self.tables.resize_with(architecture.ropes.len(), empty);
        for (table, rope) in self.tables.iter_mut().zip(&architecture.ropes) {
            let mut wanted: BTreeMap<usize, usize> = BTreeMap::new();
            for (length, positions) in sequences.clone() {
                let most = wanted.entry(rope.set(length)).or_default();
                *most = positions.max(*most);
            }
            wanted.retain(|set, positions| table.find((*set, *positions)).is_none());
            let grows = table.sets.iter().any(|known| wanted.contains_key(&known.set));
            if grows || table.sets.len() + wanted.len() > SETS {
                // Made anew, with what is asked for and, if there is room, what was there.
                let known = std::mem::replace(table, empty()).sets;
                for (length, positions) in sequences.clone() {
                    let most = wanted.entry(rope.set(length)).or_default();
                    *most = positions.max(*most);
                }
                for Set { set, positions, .. } in known {
                    if wanted.len() < SETS {
                        wanted.entry(set).or_insert(positions);
                    }
                }
            }
            for (set, positions) in wanted {
                let positions = positions.next_power_of_two().min(architecture.max_position_embeddings).max(positions);
                let first = table.rows.append(positions, &rope.frequencies(set), rope.attention_factor());
                table.sets.push(Set { set, first, positions });
            }
        }
    }

    /// Readies rows for a batch. Returns, for each rope, which rows of its table the batch's rows take, (m).
    pub fn rows(&mut self, architecture: &Architecture, batch: &Batch) -> Vec<Vec<u32>> {
        let sequences = batch.sequences.iter().zip(&batch.lengths);
        let last = |rows: &std::ops::Range<usize>| batch.positions[rows.clone()].last().map_or(0, |p| *p as usize + 1);
        self.ready(architecture, sequences.clone().map(|(rows, length)| (*length, last(rows))));
        let of_rope = |(rope, table): (&Rope, &Table)| {
            let mut rows = vec![0; batch.positions.len()];
            for (sequence, length) in sequences.clone() {
                let first = table.find((rope.set(*length), last(sequence))).expect("it was just made ready");
                let positions = batch.positions[sequence.clone()].iter();
                rows[sequence.clone()].iter_mut().zip(positions).for_each(|(row, position)| *row = first + position);
            }
            rows
        };
        architecture.ropes.iter().zip(&self.tables).map(of_rope).collect()
    }

    /// The table of a rope.
    pub fn table(&self, rope: usize) -> &RotaryTable {
        &self.tables[rope].rows
    }

    /// The row of a rope's table for a position of a sequence of this length.
    ///
    /// # Panics
    /// When it was not made ready.
    pub fn row(&self, architecture: &Architecture, rope: usize, length: usize, position: usize) -> u32 {
        let set = architecture.ropes[rope].set(length);
        let first = self.tables[rope].find((set, position + 1)).expect("its rows were made ready");
        first + position as u32
    }
}

impl Table {
    /// The first row of a set that has so many positions.
    fn find(&self, (set, positions): (usize, usize)) -> Option<u32> {
        self.sets.iter().find(|known| known.set == set && known.positions >= positions).map(|known| known.first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::rope::RopeScaling;

    #[test]
    fn a_sequence_takes_the_rows_of_its_length() -> anyhow::Result<()> {
        let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama");
        let mut architecture = Architecture::from_json(&model.join("config.json"))?;
        let dims = architecture.ropes[0].dims;
        architecture.ropes[0].scaling = RopeScaling::LongRope {
            short: vec![1.0; dims / 2],
            long: vec![3.0; dims / 2],
            original: 5,
            attention_factor: 1.25,
        };
        let mut rotary = Rotary::default();
        let rows = |rotary: &mut Rotary, length| rotary.rows(&architecture, &Batch::of_piece(&[7; 3], 1, length));
        assert_eq!(rows(&mut rotary, 5), [[1, 2, 3]]);
        let long = rows(&mut rotary, 6);
        assert!(long[0][0] > 3, "{long:?}: rows of their own");
        assert_eq!(rows(&mut rotary, 5), [[1, 2, 3]], "both stay");
        assert_eq!(rotary.row(&architecture, 0, 9, 3), long[0][2]);
        // More positions of a set than there were: the table is made anew, the other set with it.
        let grown = rotary.rows(&architecture, &Batch::of_piece(&[7; 40], 0, 5));
        assert_eq!(grown[0][39] - grown[0][0], 39);
        assert_eq!(rotary.tables[0].sets.len(), 2);
        Ok(())
    }

    /// With a dynamic rope each length has a set of its own.
    #[test]
    fn more_lengths_at_once_than_a_table_keeps_have_their_rows() -> anyhow::Result<()> {
        let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama");
        let mut architecture = Architecture::from_json(&model.join("config.json"))?;
        architecture.ropes[0].scaling = RopeScaling::Dynamic { factor: 4.0, original: 5.0 };
        let mut rotary = Rotary::default();
        for from in [6, 9, 100] {
            let lengths = from..from + 2 * SETS + 1;
            rotary.ready(&architecture, lengths.clone().map(|length| (length, length)));
            let rows: Vec<u32> = lengths.map(|length| rotary.row(&architecture, 0, length, length - 1)).collect();
            let distinct: std::collections::BTreeSet<&u32> = rows.iter().collect();
            assert_eq!(distinct.len(), rows.len());
        }
        Ok(())
    }
}
