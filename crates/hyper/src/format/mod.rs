//! `--format` and `--filter` as docker has them.

mod filter;
mod table;
mod template;

pub(crate) use filter::{Filters, well_formed};
pub(crate) use table::columns;
pub(crate) use template::{Row, Rows, render};
