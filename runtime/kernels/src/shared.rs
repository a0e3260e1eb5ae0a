//! A pointer that tasks share.

/// A pointer that tasks share, each to write elements that no other task touches.
pub(crate) struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}

// SAFETY: the pointer is only dereferenced in `unsafe` blocks, each of which shows that its elements are its own.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as for Send.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Shares a slice's elements for as long as the caller keeps it borrowed.
    pub(crate) fn new(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// The pointer; by a method, so that a closure captures the whole and not the field.
    pub(crate) fn get(self) -> *mut T {
        self.0
    }

    /// Elements `from..from + len`.
    ///
    /// # Safety
    /// They lie in the slice that is shared, which is still borrowed, and nobody else accesses them meanwhile.
    pub(crate) unsafe fn slice<'a>(self, from: usize, len: usize) -> &'a mut [T] {
        // SAFETY: passed on to the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), len) }
    }
}
