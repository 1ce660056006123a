//! Kubernetes' OpenAPI definitions, embedded.
//!
//! Parsed once, at first use, into a compact form without descriptions; the OpenAPI documents take
//! the descriptions from the embedded text when they are made.

use std::{collections::HashMap, io::Read, sync::OnceLock};

use flate2::read::GzDecoder;
use serde_json::{Map, Value};

use crate::kinds::{ResourceKind, split_api_version};

static KUBERNETES: &[u8] = include_bytes!("../data/definitions.json.gz");
static EXTENSIONS: &[u8] = include_bytes!("../data/extensions.json.gz");
static METRICS: &str = include_str!("../data/metrics.json");
static IMAGES: &str = include_str!("../data/images.json");

/// What a value may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A JSON object with known properties, or a map if the schema has [`Schema::values`].
    Object,
    /// A JSON array of [`Schema::items`].
    Array,
    /// Text.
    String,
    /// Base64 of bytes.
    Bytes,
    /// RFC 3339 time, in seconds.
    Time,
    /// RFC 3339 time with microseconds.
    MicroTime,
    /// 32-bit integer.
    Int32,
    /// 64-bit integer.
    Int64,
    /// Floating-point number.
    Number,
    /// `true` or `false`.
    Boolean,
    /// Integer or text.
    IntOrString,
    /// Resource quantity: text or number.
    Quantity,
    /// Any JSON.
    Any,
}

/// How a list behaves in server-side apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListType {
    /// Replaced as a whole.
    Atomic,
    /// Merged by the keys of [`Schema::list_map_keys`].
    Map,
    /// Values are unique.
    Set,
}

/// One node of a schema.
#[derive(Debug)]
pub struct Schema {
    /// What the value may be.
    pub shape: Shape,
    /// Sorted by name.
    properties: Box<[(Box<str>, Schema)]>,
    /// Required properties.
    pub required: Box<[Box<str>]>,
    /// Schema of list items.
    items: Option<Box<Schema>>,
    /// Schema of map values.
    values: Option<Box<Schema>>,
    /// Index of the definition that this node refers to.
    reference: Option<u16>,
    /// Name if this is a definition.
    name: Option<Box<str>>,
    /// `x-kubernetes-list-type`.
    pub list_type: Option<ListType>,
    /// `x-kubernetes-list-map-keys`.
    pub list_map_keys: Box<[Box<str>]>,
    /// `x-kubernetes-map-type: atomic`.
    pub atomic_map: bool,
    /// `x-kubernetes-patch-merge-key`.
    pub merge_key: Option<Box<str>>,
    /// `x-kubernetes-patch-strategy` holds `merge`.
    pub merge: bool,
    /// `x-kubernetes-patch-strategy` holds `retainKeys`.
    pub retain_keys: bool,
    /// `default`.
    pub default: Option<Value>,
    /// `x-kubernetes-preserve-unknown-fields`: fields that are not known are kept.
    pub preserve_unknown: bool,
}

impl Schema {
    /// The definition this node refers to, or itself.
    pub fn resolve(&self) -> &Schema {
        match self.reference {
            Some(index) => &definitions().all[usize::from(index)],
            None => self,
        }
    }

    /// The full name of the definition, `io.k8s.api.core.v1.PodSpec`.
    pub fn definition_name(&self) -> Option<&str> {
        self.resolve().name.as_deref()
    }

    /// Go's name of the type, `PodSpec`.
    pub fn type_name(&self) -> Option<&str> {
        self.definition_name()
            .and_then(|name| name.rsplit('.').next())
    }

    /// The schema of a property, or of a map's value.
    pub fn property(&self, name: &str) -> Option<&Schema> {
        let schema = self.resolve();
        match schema
            .properties
            .binary_search_by(|(key, _)| (**key).cmp(name))
        {
            Ok(at) => Some(&schema.properties[at].1),
            Err(_) => schema.values.as_deref(),
        }
    }

    /// Known properties, sorted.
    pub fn properties(&self) -> impl Iterator<Item = (&str, &Schema)> {
        self.resolve()
            .properties
            .iter()
            .map(|(name, schema)| (&**name, schema))
    }

    /// Schema of list items.
    pub fn items(&self) -> Option<&Schema> {
        self.resolve().items.as_deref()
    }

    /// Schema of map values, if this is a map.
    pub fn values(&self) -> Option<&Schema> {
        self.resolve().values.as_deref()
    }

    /// What the value may be, references followed.
    pub fn shape(&self) -> Shape {
        self.resolve().shape
    }

    /// Whether any property is taken: no properties are known and it is no map of one type.
    pub fn is_open(&self) -> bool {
        let schema = self.resolve();
        schema.shape == Shape::Any
            || (schema.shape == Shape::Object
                && schema.properties.is_empty()
                && schema.values.is_none())
    }

    /// Whether fields without a schema are taken apart by server-side apply.
    pub fn separable(&self) -> bool {
        self.resolve().preserve_unknown
    }

    /// The schema at a path of property names; a list is stepped into by `*` or an index.
    pub fn at(&self, path: &[&str]) -> Option<&Schema> {
        path.iter()
            .try_fold(self, |schema, step| match schema.shape() {
                Shape::Array => schema.items(),
                _ => schema.property(step),
            })
    }
}

/// Group, version, kind.
type TypeKey = (Box<str>, Box<str>, Box<str>);

/// All definitions.
#[derive(Debug)]
pub struct Definitions {
    all: Vec<Schema>,
    by_name: HashMap<Box<str>, u16>,
    by_type: HashMap<TypeKey, u16>,
}

impl Definitions {
    /// The definition of that full name.
    pub fn get(&self, name: &str) -> Option<&Schema> {
        self.by_name
            .get(name)
            .map(|index| &self.all[usize::from(*index)])
    }

    /// The definition of a kind.
    pub fn by_kind(&self, group: &str, version: &str, kind: &str) -> Option<&Schema> {
        let key = (group.into(), version.into(), kind.into());
        self.by_type
            .get(&key)
            .map(|index| &self.all[usize::from(*index)])
    }

    /// The definition of an object's `apiVersion` and `kind`.
    pub fn by_api_version(&self, api_version: &str, kind: &str) -> Option<&Schema> {
        let (group, version) = split_api_version(api_version);
        self.by_kind(group, version, kind)
    }

    /// The definition of a served kind.
    pub fn of(&self, kind: &ResourceKind) -> Option<&Schema> {
        self.by_kind(kind.group, kind.version, kind.kind)
    }

    /// Full names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.all.iter().filter_map(|schema| schema.name.as_deref())
    }
}

/// The embedded definitions.
pub fn definitions() -> &'static Definitions {
    static DEFINITIONS: OnceLock<Definitions> = OnceLock::new();
    DEFINITIONS.get_or_init(|| compile(&raw()))
}

/// The embedded definitions as JSON, with descriptions. Parsed anew at each call.
pub(crate) fn raw() -> Map<String, Value> {
    let mut all = Map::new();
    for packed in [EXTENSIONS, KUBERNETES] {
        let mut text = String::new();
        GzDecoder::new(packed)
            .read_to_string(&mut text)
            .expect("the embedded definitions are gzip of UTF-8, which a test checks");
        let some: Map<String, Value> =
            serde_json::from_str(&text).expect("the embedded definitions are JSON, a test checks");
        all.extend(some);
    }
    for text in [METRICS, IMAGES] {
        let some: Map<String, Value> =
            serde_json::from_str(text).expect("the embedded definitions are JSON, a test checks");
        all.extend(some);
    }
    all
}

/// Compiles a schema that stands for itself, as that of a custom resource; it may refer to the
/// embedded definitions.
pub(crate) fn compile_schema(source: &Value) -> Schema {
    node(source, &definitions().by_name)
}

fn compile(raw: &Map<String, Value>) -> Definitions {
    let mut names: Vec<&String> = raw.keys().collect();
    names.sort();
    let by_name: HashMap<Box<str>, u16> = (0u16..)
        .zip(&names)
        .map(|(index, name)| (name.as_str().into(), index))
        .collect();
    let mut by_type = HashMap::new();
    let mut all = Vec::with_capacity(names.len());
    for (index, name) in (0u16..).zip(&names) {
        let source = &raw[name.as_str()];
        let mut schema = node(source, &by_name);
        schema.name = Some(name.as_str().into());
        schema.shape = match name.rsplit('.').next() {
            Some("Quantity") => Shape::Quantity,
            Some("IntOrString") => Shape::IntOrString,
            Some("MicroTime") => Shape::MicroTime,
            Some("Time") => Shape::Time,
            Some("FieldsV1" | "RawExtension" | "Patch") => Shape::Any,
            _ => schema.shape,
        };
        if matches!(
            name.rsplit('.').next(),
            Some("ContainerPort" | "ServicePort")
        ) {
            // A key of its list; the definitions say its default in words only.
            for (property, schema) in &mut schema.properties {
                if &**property == "protocol" {
                    schema.default = Some("TCP".into());
                }
            }
        }
        all.push(schema);
        for kind in source["x-kubernetes-group-version-kind"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let text = |key: &str| Box::<str>::from(kind[key].as_str().unwrap_or_default());
            by_type.insert((text("group"), text("version"), text("kind")), index);
        }
    }
    Definitions {
        all,
        by_name,
        by_type,
    }
}

fn node(source: &Value, names: &HashMap<Box<str>, u16>) -> Schema {
    let text = |key: &str| source[key].as_str();
    let texts = |key: &str| -> Box<[Box<str>]> {
        let values = source[key].as_array().into_iter().flatten();
        values.filter_map(Value::as_str).map(Into::into).collect()
    };
    // A reference beside other keywords is wrapped in `allOf` in some documents.
    let reference = text("$ref").or_else(|| source["allOf"][0]["$ref"].as_str());
    let shape = match (text("type"), text("format")) {
        (Some("object"), _) => Shape::Object,
        (Some("array"), _) => Shape::Array,
        (Some("string"), Some("byte")) => Shape::Bytes,
        (Some("string"), Some("date-time")) => Shape::Time,
        (Some("string"), _) => Shape::String,
        (Some("integer"), Some("int32")) => Shape::Int32,
        (Some("integer"), _) => Shape::Int64,
        (Some("number"), _) => Shape::Number,
        (Some("boolean"), _) => Shape::Boolean,
        _ => Shape::Any,
    };
    let mut properties: Vec<(Box<str>, Schema)> = source["properties"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| (name.as_str().into(), node(value, names)))
        .collect();
    properties.sort_by(|a, b| a.0.cmp(&b.0));
    let strategy = text("x-kubernetes-patch-strategy").unwrap_or_default();
    Schema {
        shape,
        properties: properties.into(),
        required: texts("required"),
        items: source
            .get("items")
            .map(|items| Box::new(node(items, names))),
        values: source
            .get("additionalProperties")
            .filter(|values| values.is_object())
            .map(|values| Box::new(node(values, names))),
        reference: reference.and_then(|name| names.get(name).copied()),
        name: None,
        list_type: match text("x-kubernetes-list-type") {
            Some("map") => Some(ListType::Map),
            Some("set") => Some(ListType::Set),
            Some(_) => Some(ListType::Atomic),
            None => None,
        },
        list_map_keys: texts("x-kubernetes-list-map-keys"),
        atomic_map: text("x-kubernetes-map-type") == Some("atomic"),
        merge_key: text("x-kubernetes-patch-merge-key").map(Into::into),
        merge: strategy.split(',').any(|s| s == "merge"),
        retain_keys: strategy.split(',').any(|s| s == "retainKeys"),
        default: source.get("default").filter(|v| !v.is_null()).cloned(),
        preserve_unknown: source["x-kubernetes-preserve-unknown-fields"] == true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;

    #[test]
    fn every_served_kind_has_a_definition() {
        for kind in kinds::all() {
            let schema = definitions().of(kind).unwrap_or_else(|| panic!("{kind:?}"));
            assert_eq!(schema.shape(), Shape::Object, "{kind:?}");
            assert!(schema.property("metadata").is_some(), "{kind:?}");
            for sub in kind
                .subresources
                .iter()
                .filter(|s| !s.kind.ends_with("Options"))
            {
                let group = sub.group.unwrap_or(kind.group);
                let version = sub.version.unwrap_or(kind.version);
                assert!(
                    definitions().by_kind(group, version, sub.kind).is_some(),
                    "{sub:?}"
                );
            }
        }
    }

    #[test]
    fn every_reference_is_resolved() {
        fn check(source: &Value) {
            match source {
                Value::Object(object) => {
                    if let Some(Value::String(name)) = object.get("$ref") {
                        assert!(definitions().get(name).is_some(), "{name}");
                    }
                    object.values().for_each(check);
                }
                Value::Array(values) => values.iter().for_each(check),
                _ => {}
            }
        }
        raw().values().for_each(check);
    }

    #[test]
    fn paths_lead_through_references_and_lists() {
        let pod = definitions().by_api_version("v1", "Pod").unwrap();
        let ports = pod.at(&["spec", "containers", "*", "ports"]).unwrap();
        assert_eq!(ports.merge_key.as_deref(), Some("containerPort"));
        assert_eq!(ports.items().unwrap().type_name(), Some("ContainerPort"));
        let limit = pod
            .at(&["spec", "containers", "0", "resources", "limits", "cpu"])
            .unwrap();
        assert_eq!(limit.shape(), Shape::Quantity);
        assert_eq!(
            pod.at(&["metadata", "labels", "x"]).unwrap().shape(),
            Shape::String
        );
        assert!(pod.at(&["spec", "nothing"]).is_none());
        let volumes = pod.at(&["spec", "volumes"]).unwrap();
        assert!(volumes.retain_keys && volumes.merge);
    }

    #[test]
    fn leaves_have_their_own_shapes() {
        let meta = definitions()
            .get("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")
            .unwrap();
        assert_eq!(
            meta.at(&["creationTimestamp"]).unwrap().shape(),
            Shape::Time
        );
        let lease = definitions()
            .by_api_version("coordination.k8s.io/v1", "Lease")
            .unwrap();
        assert_eq!(
            lease.at(&["spec", "renewTime"]).unwrap().shape(),
            Shape::MicroTime
        );
        let secret = definitions().by_api_version("v1", "Secret").unwrap();
        assert_eq!(secret.at(&["data", "x"]).unwrap().shape(), Shape::Bytes);
    }
}
