//! Managed fields: who has set which field of an object, and server-side apply.
//!
//! [`update`] records a write, [`apply`] lays a configuration over an object: it sets the fields of
//! the configuration, takes out what the same manager had applied before and nobody else has set,
//! and refuses to overwrite what another manager has set to another value, unless it is forced.
//! Both work on the object as it is stored and on `metadata.managedFields` in its wire form.

mod entries;
mod operations;
mod set;
mod typed;

pub use entries::{Manager, Managers, Operation};
pub use operations::{Applied, ApplyError, Conflict, Writer, apply, last_applied, update};
pub use set::FieldSet;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
