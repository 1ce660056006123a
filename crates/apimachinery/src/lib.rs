//! The Kubernetes object model over JSON values: kinds, schemas, patches, selectors, validation.
//!
//! Nothing here does I/O. Objects are [`serde_json::Value`]; their structure comes from Kubernetes'
//! own OpenAPI [`definitions`], what is served from the table in [`kinds`]. A request body goes
//! [`protobuf`] or [`strict`] (decode, unknown and duplicate fields) → [`patch`] → [`defaults`] →
//! [`validation`]; an answer goes through [`table`] or is a [`status::Status`].
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::needless_pass_by_value,
        clippy::let_underscore_must_use,
        reason = "tests are read more than they are run"
    )
)]

pub mod crd;
pub mod defaults;
pub mod definitions;
pub mod discovery;
pub mod kinds;
pub mod managed;
pub mod meta;
pub mod openapi;
pub mod patch;
pub mod protobuf;
pub mod quota;
pub mod schedule;
pub mod selector;
pub mod status;
pub mod strict;
pub mod table;
pub mod usage;
pub mod validation;

pub use definitions::{Definitions, Schema, definitions};
pub use hypernetes_types::Quantity;
pub use kinds::ResourceKind;
pub use status::{Details, Status};
