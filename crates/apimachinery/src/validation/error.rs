//! A finding.

use std::fmt;

use serde_json::Value;

/// Class of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Something referred to is not there.
    NotFound,
    /// A value is missing.
    Required,
    /// A value occurs twice.
    Duplicate,
    /// A value breaks a rule.
    Invalid,
    /// A value is not one of a list.
    NotSupported,
    /// The field may not be set or changed.
    Forbidden,
    /// Text or collection is too long.
    TooLong,
    /// Collection has too many members.
    TooMany,
    /// Value has the wrong type.
    TypeInvalid,
}

impl ErrorKind {
    /// The reason in a Status cause.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotFound => "FieldValueNotFound",
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::TypeInvalid => "FieldValueTypeInvalid",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::NotFound => "Not found",
            Self::Required => "Required value",
            Self::Duplicate => "Duplicate value",
            Self::Invalid | Self::TypeInvalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
        }
    }
}

/// One finding about a field. Displays as upstream's `field.Error`.
#[derive(Debug, Clone, PartialEq)]
pub struct FieldError {
    /// Class.
    pub kind: ErrorKind,
    /// Path: `spec.containers[0].image`.
    pub field: String,
    /// The offending value; not shown for some classes.
    pub value: Value,
    /// What is wrong.
    pub detail: String,
}

impl FieldError {
    /// A field that may not be set, for admission.
    pub fn forbidden(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Forbidden,
            field: field.into(),
            value: Value::Null,
            detail: detail.into(),
        }
    }

    /// Upstream's `ErrorBody`: the finding without its field.
    pub fn body(&self) -> String {
        let mut out = self.kind.text().to_owned();
        let shown = match self.kind {
            ErrorKind::Required | ErrorKind::Forbidden | ErrorKind::TooLong => false,
            ErrorKind::TooMany => !self.value.is_null(),
            _ => true,
        };
        if shown {
            out.push_str(": ");
            out.push_str(&self.value.to_string());
        }
        if !self.detail.is_empty() {
            out.push_str(": ");
            out.push_str(&self.detail);
        }
        out
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.body())
    }
}
