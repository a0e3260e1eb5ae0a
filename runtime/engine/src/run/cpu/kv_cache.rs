//! Keys and values that are kept of a sequence, so that a further token is one row.

use homeroom_kernels::Element;

use crate::models::Architecture;

/// Keys and values of all layers.
pub struct KvCache<E> {
    /// Of each layer (T, 2 H_kv D), k beside v.
    layers: Vec<Vec<E>>,
    /// Values of a position.
    row: usize,
    len: usize,
    /// Tokens of the sequence that were known when its prompt was read: some ropes go by it.
    pub(crate) length: usize,
    /// Positions from the first on that were read as a prompt. The others came token by token, whose products are summed in another
    /// order.
    prefilled: usize,
}

impl<E: Element> KvCache<E> {
    /// Nothing yet.
    pub fn new(architecture: &Architecture) -> Self {
        let row = architecture.layers.first().map_or(0, |layer| 2 * layer.attention().kv_width());
        Self { layers: vec![Vec::new(); architecture.layers.len()], row, len: 0, length: 0, prefilled: 0 }
    }

    /// Positions.
    pub fn positions(&self) -> usize {
        self.len
    }

    /// Positions from the first on that another sequence with the same tokens would come to, bit by bit.
    pub fn prefilled(&self) -> usize {
        self.prefilled
    }

    /// A copy of the first `len` positions, which were all read as a prompt.
    pub fn prefix(&self, len: usize) -> Self {
        assert!(len <= self.prefilled, "{len} of {} positions", self.prefilled);
        let layers = self.layers.iter().map(|layer| layer[..len * self.row].to_vec()).collect();
        Self { layers, row: self.row, len, length: self.length, prefilled: len }
    }

    /// Bytes of all positions.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.capacity() * size_of::<E>()).sum()
    }

    /// Appends rows of k beside v to a layer and returns all of its rows.
    pub(crate) fn extend<'a>(&mut self, layer: usize, rows: impl Iterator<Item = &'a [E]>) -> &[E]
    where
        E: 'a,
    {
        for row in rows {
            assert_eq!(row.len(), self.row, "a row of k and v");
            self.layers[layer].extend_from_slice(row);
        }
        &self.layers[layer]
    }

    /// All rows of a layer.
    pub(crate) fn layer(&self, layer: usize) -> &[E] {
        &self.layers[layer]
    }

    /// Counts positions that all layers have got.
    pub(crate) fn advance(&mut self, positions: usize, prompt: bool) {
        if prompt && self.prefilled == self.len {
            self.prefilled += positions;
        }
        self.len += positions;
        debug_assert!(self.layers.iter().all(|layer| layer.len() == self.len * self.row));
    }
}
