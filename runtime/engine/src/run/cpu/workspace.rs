//! Buffers of rows that are lent and come back when they are dropped, so that a step touches no fresh memory.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use homeroom_kernels::KeyValueGradients;

/// Buffers by the width of their rows. All have room for the most rows that any of them was asked for.
pub struct Pool<T>(Arc<Mutex<Free<T>>>);

/// Buffers that nobody has.
struct Free<T> {
    /// Rows that each has room for.
    room: usize,
    by_width: HashMap<usize, Vec<Vec<T>>>,
}

fn lock<T>(free: &Mutex<Free<T>>) -> MutexGuard<'_, Free<T>> {
    free.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Pool<T> {
    /// None yet.
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Free { room: 0, by_width: HashMap::new() })))
    }
}

impl<T> Pool<T> {
    /// Bytes of the buffers that nobody has.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        let capacity = |buffers: &Vec<Vec<T>>| buffers.iter().map(Vec::capacity).sum::<usize>();
        size_of::<T>() * lock(&self.0).by_width.values().map(capacity).sum::<usize>()
    }
}

impl<T: Clone + Default> Pool<T> {
    /// A buffer of `rows` rows of `width`. It holds unspecified values.
    pub fn take(&self, rows: usize, width: usize) -> Buffer<T> {
        let mut free = lock(&self.0);
        if rows > free.room {
            free.room = rows;
            free.by_width.clear();
        }
        let room = free.room;
        let buffer = free.by_width.get_mut(&width).and_then(Vec::pop);
        drop(free);
        let mut values = buffer.unwrap_or_else(|| Vec::with_capacity(room * width));
        values.resize(rows * width, T::default());
        Buffer { values, width, free: self.0.clone() }
    }
}

/// A buffer of rows. It goes back to its pool when it is dropped.
pub struct Buffer<T> {
    values: Vec<T>,
    width: usize,
    free: Arc<Mutex<Free<T>>>,
}

impl<T> Buffer<T> {
    /// The values, which do not come back to the pool.
    pub fn into_vec(mut self) -> Vec<T> {
        std::mem::take(&mut self.values)
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        let mut free = lock(&self.free);
        // One from a time when there was less room would have to grow.
        if values.capacity() > 0 && values.capacity() >= free.room * self.width {
            free.by_width.entry(self.width).or_default().push(values);
        }
    }
}

/// The buffers that the passes of a model go through.
pub struct Workspace<E> {
    /// Activations.
    pub narrow: Pool<E>,
    /// Residual stream, gradients and sums.
    pub wide: Pool<f32>,
    /// Logits, of fewer rows at a time than the others.
    pub logits: Pool<E>,
    /// The same in f32, where the head is run so.
    pub wide_logits: Pool<f32>,
    /// Parts of the gradients of keys and values, see [`attention_backward`](homeroom_kernels::attention_backward).
    pub partial: Mutex<KeyValueGradients>,
}

impl<E> Workspace<E> {
    /// No buffer yet.
    pub fn new() -> Self {
        Self {
            narrow: Pool::new(),
            wide: Pool::new(),
            logits: Pool::new(),
            wide_logits: Pool::new(),
            partial: Mutex::default(),
        }
    }
}

impl<E> Default for Workspace<E> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_handed_out_again_while_it_has_room() {
        let pool = Pool::<f32>::new();
        let first = pool.take(10, 3);
        let place = first.as_ptr();
        assert_eq!(first.len(), 30);
        assert_ne!(pool.take(10, 3).as_ptr(), place, "the first is still lent");
        lock(&pool.0).by_width.clear();
        drop(first);
        let again = pool.take(7, 3);
        assert_eq!((again.len(), again.as_ptr()), (21, place));
        assert_eq!(pool.take(11, 3).len(), 33, "now each needs more room");
        drop(again);
        assert_eq!(lock(&pool.0).by_width[&3].len(), 1, "one with too little room is not kept");
    }

    #[test]
    fn values_that_leave_as_a_vector_do_not_come_back() {
        let pool = Pool::<f32>::new();
        let values = pool.take(4, 3).into_vec();
        assert!(lock(&pool.0).by_width.is_empty());
        assert_eq!(values.len(), 12);
    }
}
