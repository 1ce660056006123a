//! One served version of a custom resource, compiled.

use std::sync::Arc;

use jiff::Timestamp;
use kube_cel::RootContext;
use serde_json::{Value, json};

use super::{
    cel::Evaluation,
    columns::{self, PrinterColumn},
    intern,
    structural::Structural,
    validate::Findings,
};
use crate::{
    Schema,
    definitions::compile_schema,
    kinds::{NameRule, ResourceKind},
    strict::{self, DecodeError, FieldValidation, Parsed},
    table::IncludeObject,
    validation::{ErrorKind, FieldError},
};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
/// Upstream reports no more unknown fields than this.
const MAX_FINDINGS: usize = 100;

/// Where the scale of an object is.
#[derive(Debug, Clone)]
pub struct ScalePaths {
    /// JSON pointer of the wanted number.
    pub spec: String,
    /// JSON pointer of the number that there are.
    pub status: String,
    /// JSON pointer of the selector as text.
    pub selector: Option<String>,
}

/// One served version of a custom resource.
#[derive(Debug)]
pub struct CustomKind {
    /// Names, scope, verbs.
    pub kind: &'static ResourceKind,
    /// For server-side apply.
    pub schema: Schema,
    /// Fields that selectors may name, beside name and namespace.
    pub selectable: Vec<String>,
    /// Where the scale is, if it has one.
    pub scale: Option<ScalePaths>,
    /// `apiVersion` under which objects are stored.
    pub stored_as: String,
    /// Whether there are other versions than this.
    pub has_versions: bool,
    /// The definition is being deleted.
    pub terminating: bool,
    /// Why this version should not be used.
    pub deprecated: Option<String>,
    /// `openAPIV3Schema`.
    pub source: Arc<Value>,
    structural: Structural,
    columns: Vec<PrinterColumn>,
    root: RootContext,
    /// What an object has beside the schema: types and metadata.
    envelope: Schema,
}

impl CustomKind {
    /// The served versions of a definition.
    pub fn of_definition(definition: &Value) -> Vec<Arc<Self>> {
        if !super::names::is_true(definition, "Established") {
            return Vec::new();
        }
        let versions = definition["spec"]["versions"]
            .as_array()
            .into_iter()
            .flatten();
        versions
            .filter(|version| version["served"] == true)
            .filter_map(|version| Self::compile(definition, version).map(Arc::new))
            .collect()
    }

    fn compile(definition: &Value, version: &Value) -> Option<Self> {
        let spec = &definition["spec"];
        let names = &definition["status"]["acceptedNames"];
        let (group, name) = (spec["group"].as_str()?, version["name"].as_str()?);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let list = |value: &Value| -> Vec<String> {
            let values = value.as_array().into_iter().flatten();
            values
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect()
        };
        let plural = names["plural"].as_str().filter(|name| !name.is_empty())?;
        let storage = format!("{plural}.{group}");
        let sub = &version["subresources"];
        let kind = intern::kind(intern::Parts {
            group,
            version: name,
            kind: names["kind"].as_str()?,
            plural,
            singular: names["singular"].as_str()?,
            short_names: list(&names["shortNames"]),
            categories: list(&names["categories"]),
            namespaced: spec["scope"] == "Namespaced",
            status: sub["status"].is_object(),
            scale: sub["scale"].is_object(),
            // Where these were kept before they had a definition.
            storage: if group == hypernetes_types::kinds::GROUP {
                plural
            } else {
                &storage
            },
            name_rule: match (group, plural) {
                // Their name is that of a namespace too.
                (hypernetes_types::kinds::GROUP, "tenants") => NameRule::Label,
                _ => NameRule::Subdomain,
            },
        });
        let versions = spec["versions"].as_array()?;
        let stored = versions.iter().find(|v| v["storage"] == true)?;
        let pointer = |value: &Value| value.as_str().map(|path| path.replace('.', "/"));
        let selectable = version["selectableFields"].as_array().into_iter().flatten();
        let source = version["schema"]["openAPIV3Schema"].clone();
        let api_version = format!("{group}/{name}");
        Some(Self {
            kind,
            schema: compile_schema(&with_envelope(&source, true)),
            selectable: selectable
                .filter_map(|field| field["jsonPath"].as_str())
                .map(|path| path.trim_start_matches('.').to_owned())
                .collect(),
            scale: pointer(&sub["scale"]["specReplicasPath"]).map(|spec| ScalePaths {
                spec,
                status: pointer(&sub["scale"]["statusReplicasPath"]).unwrap_or_default(),
                selector: pointer(&sub["scale"]["labelSelectorPath"]).filter(|p| !p.is_empty()),
            }),
            stored_as: format!("{group}/{}", stored["name"].as_str()?),
            has_versions: versions.len() > 1,
            terminating: crate::meta::is_deleting(definition),
            deprecated: (version["deprecated"] == true).then(|| {
                let warning = text(&version["deprecationWarning"]);
                if warning.is_empty() {
                    format!("{api_version} {} is deprecated", text(&names["kind"]))
                } else {
                    warning
                }
            }),
            structural: Structural::parse(&source),
            columns: PrinterColumn::of_version(version),
            root: RootContext {
                api_version,
                api_group: group.to_owned(),
                kind: text(&names["kind"]),
            },
            envelope: compile_schema(&with_envelope(&json!({"type": "object"}), true)),
            source: Arc::new(source),
        })
    }

    /// Checks types and metadata of an object, takes out what the schema does not know, and reports
    /// or refuses that.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn review(
        &self,
        parsed: Parsed,
        mode: FieldValidation,
    ) -> Result<(Value, Vec<String>), DecodeError> {
        let Parsed {
            mut value,
            duplicates,
        } = parsed;
        let mut envelope = json!({});
        for field in ["apiVersion", "kind", "metadata"] {
            if let Some(value) = value.get_mut(field) {
                envelope[field] = value.take();
            }
        }
        let (mut envelope, mut findings) =
            strict::check(envelope.into(), &self.envelope, FieldValidation::Warn)?;
        let mut gone = Vec::new();
        self.structural
            .prune(&mut value, true, &mut String::new(), &mut gone);
        findings.extend(
            gone.into_iter()
                .map(|field| format!("unknown field {field:?}")),
        );
        findings.extend(duplicates);
        findings.truncate(MAX_FINDINGS);
        for field in ["apiVersion", "kind", "metadata"] {
            if let Some(found) = envelope.get_mut(field) {
                value[field] = found.take();
            }
        }
        match mode {
            FieldValidation::Ignore => Ok((value, Vec::new())),
            FieldValidation::Warn => Ok((value, findings)),
            FieldValidation::Strict if findings.is_empty() => Ok((value, findings)),
            FieldValidation::Strict => Err(DecodeError::Strict(findings)),
        }
    }

    /// Fills in defaults.
    pub fn complete(&self, object: &mut Value) {
        self.structural.drop_nulls(object);
        self.structural.complete(object);
    }

    /// Everything wrong with an object. What has not changed since `old` is let be.
    pub fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<FieldError> {
        let mut found = Findings::default();
        // The version under which the old object is stored is no change.
        let old = old.map(|old| {
            let mut old = old.clone();
            old["apiVersion"] = object["apiVersion"].clone();
            old
        });
        let old = old.as_ref();
        self.structural.validate(object, old, "", &mut found);
        if found.block_rules() {
            found.0.push(FieldError {
                kind: ErrorKind::Invalid,
                field: "<nil>".into(),
                value: Value::Null,
                detail: "some validation rules were not checked because the object was invalid; \
                         correct the existing errors to complete validation"
                    .into(),
            });
            return found.0;
        }
        Evaluation::new(&self.root, &mut found).node(&self.structural, object, old, "");
        found.0
    }

    /// The table of some objects.
    pub fn table(
        &self,
        objects: &[&Value],
        include: IncludeObject,
        list_meta: &Value,
        headers: bool,
        now: Timestamp,
    ) -> Value {
        columns::table(&self.columns, objects, include, list_meta, headers, now)
    }
}

/// The schema with what every object has; so do those embedded in it.
pub(super) fn with_envelope(source: &Value, root: bool) -> Value {
    let Some(fields) = source.as_object() else {
        return source.clone();
    };
    let mut out = fields.clone();
    if let Some(properties) = out.get_mut("properties").and_then(Value::as_object_mut) {
        for value in properties.values_mut() {
            *value = with_envelope(value, false);
        }
    }
    for key in ["items", "additionalProperties"] {
        if let Some(value) = out.get_mut(key) {
            *value = with_envelope(value, false);
        }
    }
    if root || source["x-kubernetes-embedded-resource"] == true {
        let properties = out.entry("properties").or_insert_with(|| json!({}));
        properties["apiVersion"] = json!({"type": "string", "description":
            "APIVersion defines the versioned schema of this representation of an object."});
        properties["kind"] = json!({"type": "string", "description":
            "Kind is a string value representing the REST resource this object represents."});
        properties["metadata"] =
            json!({"$ref": META, "description": "Standard object's metadata."});
    }
    out.into()
}
