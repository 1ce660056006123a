//! Makes the protobuf table: which field number of which message is which JSON property.
//!
//! Reads the Rust sources of the crate `k8s-pb`, which carry the numbers in their attributes but
//! not the JSON names; those come from the OpenAPI definitions, matched without case and
//! underscores. A message field that has no property of its own is a Go-embedded struct: its fields
//! belong to the parent.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use flate2::read::GzDecoder;
use serde_json::{Map, Value};

use crate::definitions::DATA;

#[derive(Debug)]
struct Field {
    number: u32,
    name: String,
    /// Scalar name, or `message`.
    scalar: String,
    repeated: bool,
    map: bool,
    /// Full name of the message type.
    message: Option<String>,
}

type Messages = BTreeMap<String, Vec<Field>>;

/// Read as one JSON value by the decoder, not field by field.
const LEAVES: &[&str] = &[
    "io.k8s.apimachinery.pkg.apis.meta.v1.Time",
    "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime",
    "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1",
    "io.k8s.apimachinery.pkg.api.resource.Quantity",
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString",
    "io.k8s.apimachinery.pkg.runtime.RawExtension",
];

pub(crate) fn run(directory: &Path) -> Result<()> {
    let source = directory.join("src");
    let mut messages = Messages::new();
    let mut pending = vec![source.clone()];
    while let Some(at) = pending.pop() {
        for entry in std::fs::read_dir(&at).with_context(|| format!("cannot read {at:?}"))? {
            let path = entry?.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.file_name().is_some_and(|name| name == "mod.rs") {
                read_module(&source, &path, &mut messages)?;
            }
        }
    }
    let definitions = definitions()?;
    let lower: BTreeMap<String, &str> = definitions
        .keys()
        .map(|name| (name.to_lowercase(), name.as_str()))
        .collect();

    // From the kinds down. An embedded message takes its names from its parent.
    let mut tables: BTreeMap<String, BTreeMap<u32, String>> = BTreeMap::new();
    let mut lost = BTreeSet::new();
    let mut wanted: Vec<(String, String)> = Vec::new();
    for name in definitions.keys() {
        if let Some(message) = messages.keys().find(|m| m.eq_ignore_ascii_case(name)) {
            wanted.push((message.clone(), name.clone()));
        }
    }
    let mut done = BTreeSet::new();
    while let Some((message, parent)) = wanted.pop() {
        if !done.insert((message.clone(), parent.clone())) {
            continue;
        }
        if LEAVES
            .iter()
            .any(|leaf| leaf.eq_ignore_ascii_case(&message))
        {
            continue;
        }
        let own = lower.get(&message.to_lowercase()).copied();
        let name = own.unwrap_or(&message).to_owned();
        let properties = definitions[&parent]["properties"].as_object();
        for field in &messages[&message] {
            let property = properties.and_then(|properties| {
                properties
                    .keys()
                    .find(|key| plain(key) == plain(&field.name))
            });
            let target = field.message.as_ref().map(|m| {
                lower
                    .get(&m.to_lowercase())
                    .map_or_else(|| m.clone(), ToString::to_string)
            });
            let kind = match (&target, field.scalar.as_str()) {
                (Some(target), _) => {
                    match messages.get(field.message.as_ref().context("a message")?) {
                        // A named list type, such as ExtraValue: on the wire a message, in JSON a
                        // list.
                        Some(fields)
                            if !definitions.contains_key(target)
                                && property.is_some()
                                && matches!(fields.as_slice(), [only] if only.name == "items") =>
                        {
                            "list".to_owned()
                        }
                        _ => format!("={target}"),
                    }
                }
                (None, scalar) => scalar.to_owned(),
            };
            let json = match (property, &field.message) {
                (Some(property), _) => property.clone(),
                (None, Some(embedded)) if !field.repeated && !field.map => {
                    wanted.push((embedded.clone(), parent.clone()));
                    ".".to_owned()
                }
                (None, _) => {
                    lost.insert(format!("{message}.{}", field.name));
                    continue;
                }
            };
            let flags = match (field.map, field.repeated) {
                (true, _) => "map",
                (_, true) => "repeated",
                _ => "single",
            };
            let line = format!("{}\t{json}\t{flags}\t{kind}", field.number);
            // The same embedded struct in two parents has the same JSON names.
            tables
                .entry(name.clone())
                .or_default()
                .insert(field.number, line);
        }
        tables.entry(name).or_default();
    }
    let mut out = String::new();
    for (name, fields) in &tables {
        out.push_str(name);
        out.push('\n');
        for line in fields.values() {
            out.push_str(line);
            out.push('\n');
        }
    }
    for name in &lost {
        out.push_str("# no JSON property: ");
        out.push_str(name);
        out.push('\n');
    }
    let path = Path::new(DATA).join("protobuf.tsv");
    std::fs::write(&path, out).with_context(|| format!("cannot write {}", path.display()))
}

fn plain(name: &str) -> String {
    name.trim_start_matches("r#")
        .trim_start_matches('$')
        .replace(['_', '-'], "")
        .to_lowercase()
}

fn definitions() -> Result<Map<String, Value>> {
    let path = Path::new(DATA).join("definitions.json.gz");
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut text = String::new();
    GzDecoder::new(file).read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

fn read_module(root: &Path, path: &Path, messages: &mut Messages) -> Result<()> {
    let text = std::fs::read_to_string(path)?;
    let module: Vec<String> = path
        .parent()
        .and_then(|p| p.strip_prefix(root).ok())
        .context("not below src")?
        .components()
        .map(|part| part.as_os_str().to_string_lossy().into_owned())
        .collect();
    let mut message: Option<String> = None;
    let mut attribute: Option<String> = None;
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let line = line.trim();
        if line.starts_with("///") || line.is_empty() {
            continue;
        }
        if let Some(rest) = line.strip_prefix("pub struct ") {
            let name = rest.split([' ', '{', ';']).next().unwrap_or_default();
            let name = full_name(&module, name);
            messages.insert(name.clone(), Vec::new());
            message = (!rest.ends_with("{}")).then_some(name);
        } else if line == "}" {
            message = None;
        } else if let Some(rest) = line.strip_prefix("#[prost(") {
            let mut whole = rest.to_owned();
            while !whole.ends_with(")]") {
                whole.push_str(lines.next().context("attribute has no end")?.trim());
            }
            attribute = Some(whole.trim_end_matches(")]").to_owned());
        } else if let (Some(rest), Some(name), Some(found)) =
            (line.strip_prefix("pub "), &message, attribute.take())
        {
            let mut whole = rest.to_owned();
            while !whole.ends_with(',') || whole.matches('<').count() > whole.matches('>').count() {
                whole.push_str(lines.next().context("field has no end")?.trim());
            }
            let (field, kind) = whole.split_once(':').context("field has no type")?;
            let field = read_field(field.trim(), kind.trim(), &found, &module)?;
            messages.get_mut(name).context("message")?.push(field);
        }
    }
    Ok(())
}

fn full_name(module: &[String], name: &str) -> String {
    // The one package whose directory is written with an underscore is not served.
    format!("io.k8s.{}.{name}", module.join("."))
}

fn read_field(name: &str, kind: &str, attribute: &str, module: &[String]) -> Result<Field> {
    let number = attribute
        .split("tag = \"")
        .nth(1)
        .and_then(|rest| rest.split('"').next())
        .with_context(|| format!("no tag: {attribute}"))?
        .parse()?;
    let map = attribute.starts_with("btree_map");
    let scalar = if map {
        let types = attribute.split('"').nth(1).context("map types")?;
        types
            .split(',')
            .nth(1)
            .context("map value")?
            .trim()
            .to_owned()
    } else {
        attribute
            .split([',', ' '])
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let message = if scalar == "message" {
        let path = kind
            .trim_end_matches([',', '>', ' '])
            .rsplit(['<', ' ', ','])
            .next()
            .context("message type")?
            .to_owned();
        let mut at: PathBuf = module.iter().collect();
        let mut parts: Vec<&str> = path.split("::").collect();
        let last = parts.pop().context("type name")?;
        for part in parts {
            match part {
                "super" => {
                    at.pop();
                }
                "" | "prost" => bail!("unexpected type {kind}"),
                other => at.push(other),
            }
        }
        let module: Vec<String> = at
            .components()
            .map(|part| part.as_os_str().to_string_lossy().into_owned())
            .collect();
        Some(full_name(&module, last))
    } else {
        None
    };
    Ok(Field {
        number,
        name: name.to_owned(),
        scalar,
        repeated: attribute.contains(" repeated"),
        map,
        message,
    })
}
