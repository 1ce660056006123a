//! `x-kubernetes-validations`: rules in CEL.
//!
//! A rule is judged when its definition is made: its syntax, its variables, how deep it is and what it
//! may cost. What it costs on one object is bounded again before it is evaluated, as lists need not
//! have a bound in their schema.

use std::fmt;

use kube_cel::{
    CompiledSchema, RootContext, Validator, WarningKind, cel::common::ast::Expr, compile_schema,
    estimate_rule_cost,
};
use serde_json::Value;

use super::{
    structural::{Additional, Structural},
    validate::{Findings, child},
};
use crate::validation::{ErrorKind, FieldError};

const KEY: &str = "x-kubernetes-validations";
/// Longest rule.
const MAX_LENGTH: usize = 8192;
/// Longest message of the parser that is passed on.
const MAX_MESSAGE: usize = 300;
/// Deepest expression: evaluation goes down with it.
const MAX_DEPTH: usize = 64;
/// Most map literals, whose depth is not looked at.
const MAX_MAPS: usize = 16;
/// What the rules of one object may cost, in values that are looked at.
const BUDGET: f64 = 5_000_000.0;
/// Parsing goes down with what is parsed, before its depth is known.
const STACK: usize = 64 << 20;

/// The rules of one node.
pub(super) struct Rules {
    compiled: CompiledSchema,
    /// How deep each rule nests loops.
    loops: usize,
    uses_old: bool,
}

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules").field("loops", &self.loops).finish()
    }
}

/// The node without the rules and defaults below it.
fn alone(source: &Value, top: bool) -> Value {
    match source {
        Value::Object(fields) => fields
            .iter()
            .filter(|(key, _)| {
                (top || key.as_str() != KEY)
                    && !matches!(
                        key.as_str(),
                        "default" | "allOf" | "anyOf" | "oneOf" | "not" | "description"
                    )
            })
            .map(|(key, value)| {
                // Names of properties are no keywords.
                let value = if key == "properties" {
                    let fields = value.as_object().into_iter().flatten();
                    fields.map(|(k, v)| (k.clone(), alone(v, false))).collect()
                } else if key == KEY {
                    value.clone()
                } else {
                    alone(value, false)
                };
                (key.clone(), value)
            })
            .collect(),
        other => other.clone(),
    }
}

/// Runs where there is room for a deep expression. `None`: it did not end well.
fn with_room<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .stack_size(STACK)
            .spawn_scoped(scope, work)
            .ok()?
            .join()
            .ok()
    })
}

impl Rules {
    /// The rules of a node, if it has any.
    pub(super) fn of(source: &Value) -> Option<Self> {
        if source[KEY].as_array().is_none_or(Vec::is_empty) {
            return None;
        }
        let source = alone(source, true);
        with_room(move || {
            let compiled = compile_schema(&source);
            let programs = compiled
                .validations
                .iter()
                .filter_map(|rule| rule.as_ref().ok());
            let (mut loops, mut uses_old) = (0, false);
            for rule in programs {
                loops = loops.max(size_of(&rule.program.expression().expr).loops);
                uses_old |= rule.is_transition_rule;
            }
            Self {
                compiled,
                loops,
                uses_old,
            }
        })
    }
}

#[derive(Default, Clone, Copy)]
struct Size {
    depth: usize,
    loops: usize,
}

impl Size {
    fn max(self, other: Self) -> Self {
        Self {
            depth: self.depth.max(other.depth),
            loops: self.loops.max(other.loops),
        }
    }
}

fn size_of(expr: &Expr) -> Size {
    let all = |parts: &mut dyn Iterator<Item = &Expr>| {
        parts.map(size_of).fold(Size::default(), Size::max)
    };
    let mut out = match expr {
        Expr::Call(call) => all(&mut call
            .target
            .iter()
            .map(|t| &t.expr)
            .chain(call.args.iter().map(|a| &a.expr))),
        Expr::Select(select) => size_of(&select.operand.expr),
        Expr::List(list) => all(&mut list.elements.iter().map(|e| &e.expr)),
        Expr::Comprehension(comprehension) => {
            let inner = all(&mut [
                &comprehension.loop_cond.expr,
                &comprehension.loop_step.expr,
                &comprehension.result.expr,
            ]
            .into_iter());
            let range = size_of(&comprehension.iter_range.expr);
            Size {
                depth: inner.depth.max(range.depth),
                loops: (inner.loops + 1).max(range.loops),
            }
        }
        _ => Size::default(),
    };
    out.depth += 1;
    out
}

/// Names that stand for something in every rule: variables, types, and what functions belong to.
const KNOWN: [&str; 33] = [
    "self",
    "oldSelf",
    "apiVersion",
    "apiGroup",
    "kind",
    "bool",
    "bytes",
    "double",
    "duration",
    "dyn",
    "int",
    "list",
    "map",
    "null_type",
    "string",
    "timestamp",
    "type",
    "uint",
    "base64",
    "cidr",
    "format",
    "ip",
    "jsonpatch",
    "kubernetes",
    "lists",
    "math",
    "net",
    "optional",
    "quantity",
    "semver",
    "sets",
    "strings",
    "url",
];

/// A name in an expression that stands for nothing.
fn unknown_name<'a>(expr: &'a Expr, bound: &mut Vec<&'a str>) -> Option<&'a str> {
    match expr {
        Expr::Ident(name) => {
            let name = name.as_str();
            let known = KNOWN.contains(&name) || bound.contains(&name) || name.starts_with('@');
            (!known).then_some(name)
        }
        Expr::Call(call) => {
            let target = call.target.iter().map(|target| &target.expr);
            let parts = target.chain(call.args.iter().map(|arg| &arg.expr));
            parts.into_iter().find_map(|part| unknown_name(part, bound))
        }
        Expr::Select(select) => unknown_name(&select.operand.expr, bound),
        Expr::List(list) => list
            .elements
            .iter()
            .find_map(|element| unknown_name(&element.expr, bound)),
        Expr::Comprehension(loops) => {
            let outside = [&loops.iter_range.expr, &loops.accu_init.expr];
            if let Some(name) = outside.into_iter().find_map(|e| unknown_name(e, bound)) {
                return Some(name);
            }
            let length = bound.len();
            bound.extend([loops.iter_var.as_str(), loops.accu_var.as_str()]);
            bound.extend(loops.iter_var2.as_deref());
            let inside = [
                &loops.loop_cond.expr,
                &loops.loop_step.expr,
                &loops.result.expr,
            ];
            let found = inside.into_iter().find_map(|e| unknown_name(e, bound));
            bound.truncate(length);
            found
        }
        _ => None,
    }
}

/// Judges the rules of a node. `path` is that of the node in the definition.
pub(super) fn check(source: &Value, path: &str, correlated: bool, found: &mut Vec<FieldError>) {
    let Some(rules) = source[KEY].as_array() else {
        return;
    };
    let schema = alone(source, true);
    for (index, rule) in rules.iter().enumerate() {
        let at = format!("{path}.{KEY}[{index}]");
        let text = rule["rule"].as_str().unwrap_or_default();
        if text.trim().is_empty() {
            found.push(FieldError {
                kind: ErrorKind::Required,
                field: format!("{at}.rule"),
                value: Value::Null,
                detail: "rule is not specified".into(),
            });
            continue;
        }
        let invalid = |field: &str, value: &str, detail: String| FieldError {
            kind: ErrorKind::Invalid,
            field: format!("{at}.{field}"),
            value: value.into(),
            detail,
        };
        for field in ["rule", "messageExpression"] {
            let Some(text) = rule[field].as_str() else {
                continue;
            };
            if let Err(detail) = judge(text, &schema) {
                found.push(match detail {
                    Fault::Invalid(detail) => invalid(field, text, detail),
                    Fault::Costly(detail) => FieldError::forbidden(format!("{at}.{field}"), detail),
                });
            }
        }
        if !correlated && text.contains("oldSelf") {
            let detail = "oldSelf cannot be used on the uncorrelatable portion of the schema";
            found.push(invalid("rule", text, detail.to_owned()));
        }
        if rule["message"].as_str().is_some_and(|m| m.contains('\n')) {
            let message = rule["message"].as_str().unwrap_or_default();
            let detail = "message must not contain line breaks".to_owned();
            found.push(invalid("message", message, detail));
        }
        let reason = rule["reason"].as_str().unwrap_or_default();
        let known = [
            "",
            "FieldValueInvalid",
            "FieldValueForbidden",
            "FieldValueRequired",
            "FieldValueDuplicate",
        ];
        if !known.contains(&reason) {
            let list: Vec<String> = known[1..].iter().map(|k| format!("{k:?}")).collect();
            found.push(FieldError {
                kind: ErrorKind::NotSupported,
                field: format!("{at}.reason"),
                value: reason.into(),
                detail: format!("supported values: {}", list.join(", ")),
            });
        }
    }
}

enum Fault {
    Invalid(String),
    Costly(String),
}

fn judge(text: &str, schema: &Value) -> Result<(), Fault> {
    if text.len() > MAX_LENGTH {
        return Err(Fault::Invalid(format!(
            "may not be more than {MAX_LENGTH} bytes"
        )));
    }
    if text.matches('{').count() > MAX_MAPS {
        return Err(Fault::Costly(format!(
            "the expression has more than {MAX_MAPS} map literals"
        )));
    }
    let failed = || {
        Err(Fault::Costly(
            "the rule cannot be compiled: it nests too deeply".to_owned(),
        ))
    };
    with_room(|| {
        let program = match kube_cel::cel::Program::compile(text) {
            Ok(program) => program,
            Err(error) => {
                let error = error.to_string();
                let line = error.lines().next().unwrap_or_default();
                let line: String = line.chars().take(MAX_MESSAGE).collect();
                return Err(Fault::Invalid(format!("compilation failed: {line}")));
            }
        };
        if size_of(&program.expression().expr).depth > MAX_DEPTH {
            return Err(Fault::Costly(format!(
                "the expression nests deeper than {MAX_DEPTH}"
            )));
        }
        if let Some(name) = unknown_name(&program.expression().expr, &mut Vec::new()) {
            return Err(Fault::Invalid(format!(
                "compilation failed: undeclared reference to '{name}' (in container '')"
            )));
        }
        let schema = compile_schema(schema);
        match estimate_rule_cost(text, &schema)
            .into_iter()
            .find(|warning| warning.kind == WarningKind::CostExceeded)
        {
            Some(_) => Err(Fault::Costly(
                "estimated rule cost exceeds budget (try simplifying the rule, or adding maxItems, \
                 maxProperties, and maxLength where arrays, maps, and strings are declared)"
                    .to_owned(),
            )),
            None => Ok(()),
        }
    })
    .unwrap_or_else(failed)
}

/// Values in a value.
fn count(value: &Value) -> f64 {
    match value {
        Value::Object(fields) => 1.0 + fields.values().map(count).sum::<f64>(),
        Value::Array(items) => 1.0 + items.iter().map(count).sum::<f64>(),
        // Texts are searched by their length.
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        Value::String(text) => 1.0 + text.len() as f64 / 64.0,
        _ => 1.0,
    }
}

/// Evaluates all rules of an object.
pub(super) struct Evaluation<'a> {
    validator: Validator,
    root: &'a RootContext,
    left: f64,
    found: &'a mut Findings,
}

impl<'a> Evaluation<'a> {
    pub(super) fn new(root: &'a RootContext, found: &'a mut Findings) -> Self {
        Self {
            validator: Validator::new(),
            root,
            left: BUDGET,
            found,
        }
    }

    pub(super) fn node(
        &mut self,
        schema: &Structural,
        value: &Value,
        old: Option<&Value>,
        path: &str,
    ) {
        if value.is_null() || self.left < 0.0 {
            return;
        }
        if let Some(rules) = &schema.rules
            && (rules.uses_old || old.is_none_or(|old| old != value))
        {
            self.evaluate(rules, schema, value, old, path);
        }
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    let below = match (schema.properties.get(name), &schema.additional) {
                        (Some(schema), _) => schema,
                        (None, Additional::Schema(schema)) => schema,
                        _ => continue,
                    };
                    let old = old.and_then(|old| old.get(name));
                    self.node(below, value, old, &child(path, name));
                }
            }
            Value::Array(items) => {
                let Some(below) = &schema.items else { return };
                for (index, item) in items.iter().enumerate() {
                    let old = schema.old_item(item, old);
                    self.node(below, item, old, &format!("{path}[{index}]"));
                }
            }
            _ => {}
        }
    }

    fn evaluate(
        &mut self,
        rules: &Rules,
        schema: &Structural,
        value: &Value,
        old: Option<&Value>,
        path: &str,
    ) {
        let size = count(value) + old.map_or(0.0, count);
        let powers = i32::try_from(rules.loops.max(1)).unwrap_or(i32::MAX);
        #[expect(clippy::cast_precision_loss, reason = "a handful of rules")]
        let number = rules.compiled.validations.len() as f64;
        self.left -= size.powi(powers) * number.max(1.0);
        let shape = schema.shape.map_or("object", |shape| shape.text());
        if self.left < 0.0 {
            self.found.0.push(FieldError {
                kind: ErrorKind::Invalid,
                field: if path.is_empty() { "<nil>" } else { path }.to_owned(),
                value: shape.into(),
                detail:
                    "validation failed due to running out of cost budget, no further validation \
                         rules will be run"
                        .into(),
            });
            return;
        }
        let root = path.is_empty().then_some(self.root);
        let result =
            self.validator
                .validate_compiled_with_context(&rules.compiled, value, old, root);
        let Err(errors) = result else { return };
        for error in errors {
            let detail = error.message.clone();
            let mut field = path.to_owned();
            let inner = error.field_path.trim_start_matches('.');
            if !inner.is_empty() {
                field = child(&field, inner);
            }
            let kind = match error.reason.as_deref() {
                Some("FieldValueForbidden") => ErrorKind::Forbidden,
                Some("FieldValueRequired") => ErrorKind::Required,
                Some("FieldValueDuplicate") => ErrorKind::Duplicate,
                _ => ErrorKind::Invalid,
            };
            self.found.0.push(FieldError {
                kind,
                field: if field.is_empty() {
                    "<nil>".to_owned()
                } else {
                    field
                },
                value: shape.into(),
                detail,
            });
        }
    }
}
