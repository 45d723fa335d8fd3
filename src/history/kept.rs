//! A row that is kept in memory at least until the disk has it.

/// A row in memory. Changes are numbered by its owner.
#[derive(Debug)]
pub(super) struct Kept<T> {
    pub(super) value: T,
    /// Number of the row's last change, if the disk does not have it yet.
    pub(super) unwritten: Option<u64>,
}

impl<T> Kept<T> {
    /// The disk has every change up to this one, or will never take it.
    pub(super) fn written(&mut self, change: u64) {
        if self.unwritten.is_some_and(|unwritten| unwritten <= change) {
            self.unwritten = None;
        }
    }
}
