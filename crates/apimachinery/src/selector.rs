//! Label and field selectors.

mod field;
mod label;

pub use field::FieldSelector;
pub use label::LabelSelector;

/// A selector that cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SelectorError {
    /// The text is not a selector.
    #[error("unable to parse requirement: {0}")]
    Syntax(String),
    /// The JSON form is not a selector.
    #[error("{0}")]
    Invalid(String),
    /// The text is not a field selector.
    #[error("invalid selector: '{0}'; can't understand '{1}'")]
    FieldSyntax(String, String),
    /// The kind cannot be selected by the field.
    #[error("field label not supported: {0}")]
    Field(String),
    /// The kind cannot be selected by the field, and by none of its own.
    #[error("{0:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\"")]
    UnknownField(String),
    /// Jobs cannot be selected by the field.
    #[error("field label {0:?} not supported for batchv1.Job")]
    JobField(String),
}
