//! Protobuf request bodies, decoded to JSON.
//!
//! kubectl and Helm send some bodies as protobuf and do not ask again in JSON. A body is the
//! [`MAGIC`], then a `runtime.Unknown` that names the type and holds the object. Field numbers and
//! names are a table made from the crate `k8s-pb` (`cargo run -p xtask -- protobuf`); fields that it
//! does not know are skipped.
//!
//! Go writes fields that are not pointers even when they are empty. Empty texts, and zeroes of
//! fields that cannot tell zero from absent, are left out, as Go's JSON encoder does.

use std::{collections::HashMap, sync::OnceLock};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Map, Value};

use crate::{definitions, meta};

/// First bytes of every protobuf body.
pub const MAGIC: &[u8] = b"k8s\0";

const TABLE: &str = include_str!("../data/protobuf.tsv");
/// Deeper nesting than any kind has.
const MAX_DEPTH: usize = 64;
/// Most JSON values made from one body: small fields grow when they become JSON.
const MAX_VALUES: usize = 1_000_000;

/// A body that is not what it says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtobufError {
    /// The body does not start with [`MAGIC`].
    #[error(
        "provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]"
    )]
    Magic,
    /// No table for the type.
    #[error("no kind {kind:?} is registered for version {api_version:?}")]
    UnknownType {
        /// Group and version.
        api_version: String,
        /// Kind.
        kind: String,
    },
    /// The bytes break the wire format or a limit.
    #[error("cannot decode the protobuf body: {0}")]
    Malformed(&'static str),
}

use ProtobufError::Malformed;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    String,
    Bytes,
    Bool,
    Int,
    Double,
    /// A message with one repeated text, in JSON a list.
    List,
    Time,
    MicroTime,
    Quantity,
    IntOrString,
    /// Raw JSON in field 1.
    Raw,
    Message(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    Single,
    Repeated,
    Map,
}

#[derive(Debug)]
struct Field {
    number: u32,
    /// `.`: the fields of the message belong to the parent.
    json: &'static str,
    label: Label,
    kind: Kind,
}

type Table = HashMap<&'static str, Vec<Field>>;

fn table() -> &'static Table {
    static PARSED: OnceLock<Table> = OnceLock::new();
    PARSED.get_or_init(|| parse_table(TABLE))
}

fn parse_table(text: &'static str) -> Table {
    let mut table = Table::new();
    let mut message = "";
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let parts: Vec<&'static str> = line.split('\t').collect();
        if let [number, json, label, kind] = parts.as_slice() {
            let field = Field {
                number: number.parse().unwrap_or_default(),
                json,
                label: match *label {
                    "repeated" => Label::Repeated,
                    "map" => Label::Map,
                    _ => Label::Single,
                },
                kind: parse_kind(kind),
            };
            table.entry(message).or_default().push(field);
        } else {
            message = line;
            table.entry(message).or_default();
        }
    }
    table
}

fn parse_kind(text: &'static str) -> Kind {
    match text {
        "string" => Kind::String,
        "bytes" => Kind::Bytes,
        "bool" => Kind::Bool,
        "double" => Kind::Double,
        "list" => Kind::List,
        _ => match text.strip_prefix('=') {
            None => Kind::Int,
            Some(name) => match name.rsplit('.').next().unwrap_or_default() {
                "Time" => Kind::Time,
                "MicroTime" => Kind::MicroTime,
                "Quantity" => Kind::Quantity,
                "IntOrString" => Kind::IntOrString,
                "RawExtension" | "FieldsV1" => Kind::Raw,
                _ => Kind::Message(name),
            },
        },
    }
}

/// Scalars whose Go type is no pointer: zero and absent are the same to them.
const PLAIN_SCALARS: &[&str] = &[
    "count",
    "failureThreshold",
    "generation",
    "hostIPC",
    "hostNetwork",
    "hostPID",
    "hostPort",
    "initialDelaySeconds",
    "observedGeneration",
    "periodSeconds",
    "readOnly",
    "stdin",
    "stdinOnce",
    "successThreshold",
    "timeoutSeconds",
    "tty",
    "unschedulable",
];

/// Whether the body is protobuf.
pub fn is_protobuf(body: &[u8]) -> bool {
    body.starts_with(MAGIC)
}

/// Decodes a body into an object with `apiVersion` and `kind`.
///
/// # Errors
/// [`ProtobufError`].
pub fn decode(body: &[u8]) -> Result<Value, ProtobufError> {
    let mut rest = Reader {
        bytes: body.strip_prefix(MAGIC).ok_or(ProtobufError::Magic)?,
    };
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    while let Some((number, wire)) = rest.field()? {
        match (number, wire) {
            (1, Wire::Bytes(bytes)) => {
                let mut types = Reader { bytes };
                while let Some((number, wire)) = types.field()? {
                    match (number, wire) {
                        (1, Wire::Bytes(bytes)) => api_version = text(bytes)?,
                        (2, Wire::Bytes(bytes)) => kind = text(bytes)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            (3, Wire::Bytes(bytes)) if !bytes.is_empty() => {
                return Err(Malformed("content encodings are not supported"));
            }
            _ => {}
        }
    }
    let name = definitions()
        .by_api_version(&api_version, &kind)
        .and_then(|schema| schema.definition_name())
        .filter(|name| table().contains_key(name));
    let Some(name) = name else {
        return Err(ProtobufError::UnknownType { api_version, kind });
    };
    let mut out = Map::new();
    out.insert("apiVersion".into(), api_version.into());
    out.insert("kind".into(), kind.into());
    let mut values = MAX_VALUES;
    Decoder {
        values: &mut values,
    }
    .message(raw, name, 0, &mut out)?;
    Ok(Value::Object(out))
}

fn text(bytes: &[u8]) -> Result<String, ProtobufError> {
    let text = std::str::from_utf8(bytes).map_err(|_cause| Malformed("text is not UTF-8"))?;
    Ok(text.to_owned())
}

struct Decoder<'a> {
    values: &'a mut usize,
}

impl Decoder<'_> {
    fn message(
        &mut self,
        bytes: &[u8],
        name: &str,
        depth: usize,
        out: &mut Map<String, Value>,
    ) -> Result<(), ProtobufError> {
        if depth > MAX_DEPTH {
            return Err(Malformed("nested too deeply"));
        }
        let fields = table().get(name).map_or(&[][..], Vec::as_slice);
        let mut reader = Reader { bytes };
        while let Some((number, wire)) = reader.field()? {
            let Ok(at) = fields.binary_search_by_key(&number, |field| field.number) else {
                tracing::debug!(message = name, number, "unknown protobuf field");
                continue;
            };
            let field = &fields[at];
            *self.values = self
                .values
                .checked_sub(1)
                .ok_or(Malformed("too many values in one body"))?;
            match (field.label, field.kind, wire) {
                (Label::Map, ..) => {
                    let Wire::Bytes(entry) = wire else {
                        return Err(Malformed("wrong wire type"));
                    };
                    let (key, value) = self.entry(entry, field.kind, depth)?;
                    if let Value::Object(map) = out.entry(field.json).or_insert_with(empty) {
                        map.insert(key, value);
                    }
                }
                (_, Kind::Message(inner), Wire::Bytes(bytes)) if field.json == "." => {
                    self.message(bytes, inner, depth + 1, out)?;
                }
                // Unpacked numbers come one by one; packed ones are not used by Kubernetes but
                // allowed by the wire format.
                (Label::Repeated, Kind::Int, Wire::Bytes(bytes)) => {
                    let mut packed = Reader { bytes };
                    while !packed.bytes.is_empty() {
                        let value = Value::from(packed.varint()?.cast_signed());
                        push(out, field.json, value);
                    }
                }
                (Label::Repeated, kind, wire) => {
                    let value = self.value(kind, wire, depth)?;
                    push(out, field.json, value);
                }
                (Label::Single, kind, wire) => {
                    let value = self.value(kind, wire, depth)?;
                    let value = match (out.get_mut(field.json), value) {
                        // A message that comes in two parts is one message.
                        (Some(Value::Object(old)), Value::Object(new))
                            if matches!(kind, Kind::Message(_)) =>
                        {
                            old.extend(new);
                            continue;
                        }
                        (_, value) => value,
                    };
                    let absent = match &value {
                        Value::Null => true,
                        Value::String(text) => text.is_empty(),
                        Value::Bool(false) => PLAIN_SCALARS.contains(&field.json),
                        Value::Number(n) => {
                            n.as_i64() == Some(0) && PLAIN_SCALARS.contains(&field.json)
                        }
                        _ => false,
                    };
                    if !absent {
                        out.insert(field.json.to_owned(), value);
                    }
                }
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        bytes: &[u8],
        kind: Kind,
        depth: usize,
    ) -> Result<(String, Value), ProtobufError> {
        let (mut key, mut value) = (String::new(), None);
        let mut reader = Reader { bytes };
        while let Some((number, wire)) = reader.field()? {
            match (number, wire) {
                (1, Wire::Bytes(bytes)) => key = text(bytes)?,
                (2, wire) => value = Some(self.value(kind, wire, depth)?),
                _ => {}
            }
        }
        let value = match (value, kind) {
            (Some(value), _) => value,
            (None, Kind::String | Kind::Bytes) => Value::String(String::new()),
            (None, Kind::List) => Value::Array(Vec::new()),
            (None, Kind::Message(_)) => empty(),
            (None, _) => Value::Null,
        };
        Ok((key, value))
    }

    fn value(&mut self, kind: Kind, wire: Wire<'_>, depth: usize) -> Result<Value, ProtobufError> {
        Ok(match (kind, wire) {
            (Kind::String, Wire::Bytes(bytes)) => text(bytes)?.into(),
            (Kind::Bytes, Wire::Bytes(bytes)) => STANDARD.encode(bytes).into(),
            (Kind::Bool, Wire::Number(number)) => (number != 0).into(),
            (Kind::Int, Wire::Number(number)) => number.cast_signed().into(),
            (Kind::Double, Wire::Number(number)) => f64::from_bits(number).into(),
            (Kind::Message(name), Wire::Bytes(bytes)) => {
                let mut out = Map::new();
                self.message(bytes, name, depth + 1, &mut out)?;
                Value::Object(out)
            }
            (Kind::Time | Kind::MicroTime, Wire::Bytes(bytes)) => time(bytes, kind)?,
            (Kind::List, Wire::Bytes(bytes)) => {
                let mut items = Vec::new();
                let mut reader = Reader { bytes };
                while let Some((number, wire)) = reader.field()? {
                    if let (1, Wire::Bytes(bytes)) = (number, wire) {
                        items.push(text(bytes)?.into());
                    }
                }
                Value::Array(items)
            }
            (Kind::Quantity, Wire::Bytes(bytes)) => match inner(bytes, 1)? {
                Some(Wire::Bytes(bytes)) => text(bytes)?.into(),
                _ => "0".into(),
            },
            (Kind::IntOrString, Wire::Bytes(bytes)) => match inner(bytes, 1)? {
                Some(Wire::Number(1)) => match inner(bytes, 3)? {
                    Some(Wire::Bytes(bytes)) => text(bytes)?.into(),
                    _ => "".into(),
                },
                _ => match inner(bytes, 2)? {
                    Some(Wire::Number(number)) => number.cast_signed().into(),
                    _ => 0.into(),
                },
            },
            (Kind::Raw, Wire::Bytes(bytes)) => match inner(bytes, 1)? {
                Some(Wire::Bytes(raw)) if !raw.is_empty() => serde_json::from_slice(raw)
                    .map_err(|_cause| Malformed("an embedded value is not JSON"))?,
                _ => Value::Null,
            },
            _ => return Err(Malformed("wrong wire type")),
        })
    }
}

fn push(out: &mut Map<String, Value>, key: &str, value: Value) {
    let list = out.entry(key).or_insert_with(|| Value::Array(Vec::new()));
    if let Value::Array(list) = list {
        list.push(value);
    }
}

fn empty() -> Value {
    Value::Object(Map::new())
}

fn inner(bytes: &[u8], wanted: u32) -> Result<Option<Wire<'_>>, ProtobufError> {
    let mut found = None;
    let mut reader = Reader { bytes };
    while let Some((number, wire)) = reader.field()? {
        if number == wanted {
            found = Some(wire);
        }
    }
    Ok(found)
}

/// Go writes its zero time as an empty message, or as the seconds of the year 1.
fn time(bytes: &[u8], kind: Kind) -> Result<Value, ProtobufError> {
    const YEAR_ONE: i64 = -62_135_596_800;
    let seconds = match inner(bytes, 1)? {
        Some(Wire::Number(number)) => number.cast_signed(),
        _ if bytes.is_empty() => return Ok(Value::Null),
        _ => 0,
    };
    let nanos = match inner(bytes, 2)? {
        Some(Wire::Number(number)) => {
            i32::try_from(number.cast_signed()).map_err(|_cause| Malformed("time out of range"))?
        }
        _ => 0,
    };
    if seconds == YEAR_ONE {
        return Ok(Value::Null);
    }
    let time =
        jiff::Timestamp::new(seconds, nanos).map_err(|_cause| Malformed("time out of range"))?;
    Ok(match kind {
        Kind::MicroTime => meta::format_micro_time(time),
        _ => meta::format_time(time),
    }
    .into())
}

#[derive(Debug, Clone, Copy)]
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn field(&mut self) -> Result<Option<(u32, Wire<'a>)>, ProtobufError> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let number =
            u32::try_from(tag >> 3).map_err(|_cause| Malformed("field number too large"))?;
        let wire = match tag & 7 {
            0 => Wire::Number(self.varint()?),
            1 => {
                let bytes = self.take(8)?.try_into().expect("eight bytes were taken");
                Wire::Number(u64::from_le_bytes(bytes))
            }
            2 => {
                let length = usize::try_from(self.varint()?)
                    .map_err(|_cause| Malformed("length out of bounds"))?;
                Wire::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?.try_into().expect("four bytes were taken");
                Wire::Number(u64::from(u32::from_le_bytes(bytes)))
            }
            _ => return Err(Malformed("unknown wire type")),
        };
        Ok(Some((number, wire)))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], ProtobufError> {
        let (taken, rest) = self
            .bytes
            .split_at_checked(length)
            .ok_or(Malformed("length out of bounds"))?;
        self.bytes = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, ProtobufError> {
        let mut value = 0u64;
        for (index, byte) in self.bytes.iter().enumerate().take(10) {
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                self.bytes = &self.bytes[index + 1..];
                return Ok(value);
            }
        }
        Err(Malformed("unfinished number"))
    }
}

#[cfg(test)]
mod tests;
