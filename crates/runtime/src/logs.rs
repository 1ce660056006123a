//! Container output on its way from the guest to a log file and to whoever is attached.
//!
//! The guest keeps output until the node acknowledges it, and the node acknowledges only what stands
//! in the log file. A checkpoint per container and the lines behind it say how far each stream has
//! come, whatever became of the file meanwhile: a node that was killed anywhere goes on at exactly
//! the next byte. [`file`] finds that place, [`pump`] moves the bytes.

pub(crate) mod beneath;
pub(crate) mod fanout;
pub(crate) mod file;
pub(crate) mod format;
pub(crate) mod pump;
pub(crate) mod ship;
