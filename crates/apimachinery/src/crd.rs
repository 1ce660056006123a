//! Custom resources: what a CustomResourceDefinition says, compiled, and what follows from it for the
//! objects of its kind.
//!
//! [`check`] judges a definition, [`names`] which of its names are free. [`CustomKind`] is one served
//! version: it prunes, defaults and validates objects, knows their columns, selectable fields and
//! scale, and publishes itself in OpenAPI.

mod cel;
mod check;
mod columns;
mod compiled;
mod complete;
mod intern;
pub mod names;
mod own;
mod publish;
mod structural;
mod validate;

pub use check::{prepare, validate_definition, validate_definition_update};
pub use compiled::{CustomKind, ScalePaths};
pub(crate) use own::own_kind;
pub use own::{own_definitions, own_kinds};
pub use publish::{PublishedKind, document};

#[cfg(test)]
mod tests;
