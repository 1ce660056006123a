//! Compose files: the part of the specification that a cluster of pods can do. A key that is not known is an
//! error that names it.

mod file;
mod interpolate;
mod project;
mod service;

pub(crate) use file::load;
pub(crate) use project::{Condition, Project};
pub(crate) use service::Service;
