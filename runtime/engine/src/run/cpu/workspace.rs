//! Buffers of rows that are handed out and taken back, so that a step touches no fresh memory.

use std::collections::HashMap;

/// Buffers by the width of their rows. All have room for the most rows that any pass has had.
pub struct Buffers<T> {
    rows: usize,
    room: usize,
    free: HashMap<usize, Vec<Vec<T>>>,
}

impl<T: Clone + Default> Buffers<T> {
    /// None yet.
    pub fn new() -> Self {
        Self { rows: 0, room: 0, free: HashMap::new() }
    }

    /// From now on buffers have `rows` rows.
    pub fn begin(&mut self, rows: usize) {
        self.rows = rows;
        if rows > self.room {
            self.room = rows;
            self.free.clear();
        }
    }

    /// A buffer of rows of `width`, with anything in it.
    pub fn take(&mut self, width: usize) -> Vec<T> {
        let free = self.free.get_mut(&width).and_then(Vec::pop);
        let mut buffer = free.unwrap_or_else(|| Vec::with_capacity(self.room * width));
        buffer.resize(self.rows * width, T::default());
        buffer
    }

    /// Takes a buffer of rows of `width` back.
    pub fn give(&mut self, width: usize, buffer: Vec<T>) {
        // One from a time when there was less room would have to grow.
        if buffer.capacity() >= self.room * width && width > 0 {
            self.free.entry(width).or_default().push(buffer);
        }
    }
}

impl<T: Clone + Default> Default for Buffers<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// Buffers of activations, and of what is kept in f32.
pub struct Workspace<E> {
    /// Activations.
    pub narrow: Buffers<E>,
    /// Residual stream, gradients and sums.
    pub wide: Buffers<f32>,
}

impl<E: Clone + Default> Workspace<E> {
    /// No buffer yet.
    pub fn new() -> Self {
        Self { narrow: Buffers::new(), wide: Buffers::new() }
    }

    /// See [`Buffers::begin`].
    pub fn begin(&mut self, rows: usize) {
        self.narrow.begin(rows);
        self.wide.begin(rows);
    }
}

impl<E: Clone + Default> Default for Workspace<E> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_was_given_back_is_handed_out_again_while_it_has_room() {
        let mut buffers = Buffers::<f32>::new();
        buffers.begin(10);
        let first = buffers.take(3);
        let place = first.as_ptr();
        assert_eq!(first.len(), 30);
        buffers.give(3, first);
        buffers.begin(7);
        let again = buffers.take(3);
        assert_eq!((again.len(), again.as_ptr()), (21, place));
        buffers.begin(11);
        buffers.give(3, again);
        assert_eq!(buffers.take(3).len(), 33);
        assert!(buffers.free.get(&3).is_none_or(Vec::is_empty), "one with too little room was dropped");
    }
}
