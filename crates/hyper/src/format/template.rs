//! Go templates over rows: `table …`, `json`, `{{.Field}}`.

use std::collections::BTreeMap;

use gotmpl::{Template, TemplateError, Value as GoValue};
use serde_json::{Value, json};

use super::columns;
use crate::error::{Failure, Result};

/// One object of a list: field names and texts.
pub(crate) type Row = BTreeMap<&'static str, String>;

/// A list as it is printed.
#[derive(Debug)]
pub(crate) struct Rows<'a> {
    /// Columns without `--format`: field and header.
    pub(crate) default: &'a [&'a str],
    /// Headers of all fields that a format may name.
    pub(crate) headers: &'a [(&'a str, &'a str)],
    /// The field that `--quiet` prints.
    pub(crate) quiet: &'a str,
}

impl Rows<'_> {
    /// The list in the form that was asked for.
    pub(crate) fn print(&self, rows: &[Row], format: Option<&str>, quiet: bool) -> Result<String> {
        if quiet && format.is_none() {
            return Ok(rows
                .iter()
                .map(|row| format!("{}\n", row.get(self.quiet).map_or("", String::as_str)))
                .collect());
        }
        let format = format.unwrap_or("table").trim();
        if format == "table" {
            if quiet {
                return self.print(rows, None, true);
            }
            let mut lines = vec![
                self.default
                    .iter()
                    .map(|field| self.header(field))
                    .collect::<Vec<_>>(),
            ];
            lines.extend(rows.iter().map(|row| {
                self.default
                    .iter()
                    .map(|field| row.get(field).cloned().unwrap_or_default())
                    .collect()
            }));
            return Ok(columns(&lines));
        }
        if format == "json" {
            return Ok(rows.iter().map(|row| format!("{}\n", json!(row))).collect());
        }
        if let Some(rest) = format.strip_prefix("table").filter(|rest| {
            rest.starts_with(char::is_whitespace)
                || rest.starts_with("{{")
                || rest.starts_with("\\t")
        }) {
            let text = unescape(rest.trim_start());
            let template = parse(&text)?;
            let headers: BTreeMap<&str, &str> = self.headers.iter().copied().collect();
            let mut lines = vec![cells(&execute(&template, &json!(headers))?)];
            for row in rows {
                lines.push(cells(&execute(&template, &json!(row))?));
            }
            return Ok(columns(&lines));
        }
        let template = parse(&unescape(format))?;
        let mut text = String::new();
        for row in rows {
            text.push_str(&execute(&template, &json!(row))?);
            text.push('\n');
        }
        Ok(text)
    }

    fn header(&self, field: &str) -> String {
        self.headers
            .iter()
            .find(|(name, _)| *name == field)
            .map_or_else(String::new, |(_, header)| (*header).to_owned())
    }
}

/// One object through a template, without a line's end.
pub(crate) fn render(format: &str, object: &Value) -> Result<String> {
    match format {
        "json" => Ok(object.to_string()),
        _ => execute(&parse(&unescape(format))?, object),
    }
}

fn cells(line: &str) -> Vec<String> {
    line.split('\t').map(str::to_owned).collect()
}

/// Shells leave `\t` and `\n` as they are; docker does not.
fn unescape(text: &str) -> String {
    text.replace("\\t", "\t").replace("\\n", "\n")
}

/// `.Label "key"`, a method of docker's rows, is a function of the row's labels here.
fn methods(text: &str) -> String {
    text.replace(".Label \"", "label .Labels \"")
}

fn parse(text: &str) -> Result<Template> {
    let text = &methods(text);
    Template::new("")
        .missing_key(gotmpl::MissingKey::Error)
        .func("json", |args| {
            let value = args.first().unwrap_or(&GoValue::Nil);
            Ok(GoValue::String(to_json(value).to_string().into()))
        })
        .func("label", |args| {
            let (labels, key) = (text_of(args, 0), text_of(args, 1));
            let found = labels
                .split(',')
                .filter_map(|pair| pair.split_once('='))
                .find(|(name, _)| *name == key);
            Ok(found.map_or("", |(_, value)| value).into())
        })
        .func("upper", |args| Ok(text_of(args, 0).to_uppercase().into()))
        .func("lower", |args| Ok(text_of(args, 0).to_lowercase().into()))
        .func("title", |args| Ok(title(&text_of(args, 0)).into()))
        .func("pad", |args| {
            let count = |index: usize| {
                let number = args.get(index).and_then(GoValue::as_int).unwrap_or(0);
                usize::try_from(number.clamp(0, 1000)).unwrap_or(0)
            };
            let text = text_of(args, 0);
            if text.is_empty() {
                return Ok(text.into());
            }
            Ok(format!("{}{text}{}", " ".repeat(count(1)), " ".repeat(count(2))).into())
        })
        .func("truncate", |args| {
            let length = args.get(1).and_then(GoValue::as_int).unwrap_or(0);
            let length = usize::try_from(length).unwrap_or(0);
            Ok(text_of(args, 0)
                .chars()
                .take(length)
                .collect::<String>()
                .into())
        })
        .func("split", |args| {
            let (text, by) = (text_of(args, 0), text_of(args, 1));
            let parts: Vec<GoValue> = match by.as_str() {
                "" => text.chars().map(|c| c.to_string().into()).collect(),
                by => text.split(by).map(GoValue::from).collect(),
            };
            Ok(parts.into())
        })
        .func("join", |args| {
            let parts: Vec<String> = match args.first() {
                Some(GoValue::List(list)) => list.iter().map(ToString::to_string).collect(),
                _ => {
                    return Err(TemplateError::Exec(
                        "join: the first argument must be a list".to_owned(),
                    ));
                }
            };
            Ok(parts.join(&text_of(args, 1)).into())
        })
        .parse(text)
        .map_err(|error| Failure {
            code: 1,
            message: format!("template parsing error: {error}"),
        })
}

fn execute(template: &Template, data: &Value) -> Result<String> {
    let failed = |error: TemplateError| Failure {
        code: 1,
        message: format!("template parsing error: {error}"),
    };
    let data = gotmpl::to_value(data).map_err(failed)?;
    template.execute_to_string(&data).map_err(failed)
}

fn text_of(args: &[GoValue], index: usize) -> String {
    args.get(index).map(ToString::to_string).unwrap_or_default()
}

fn title(text: &str) -> String {
    let mut start = true;
    text.chars()
        .map(|c| {
            let c = if start { c.to_ascii_uppercase() } else { c };
            start = c.is_whitespace();
            c
        })
        .collect()
}

fn to_json(value: &GoValue) -> Value {
    match value {
        GoValue::Nil | GoValue::Function(_) => Value::Null,
        GoValue::Bool(flag) => json!(flag),
        GoValue::Int(number) => json!(number),
        GoValue::Uint(number) => json!(number),
        GoValue::Float(number) => json!(number),
        GoValue::String(text) => json!(&**text),
        GoValue::List(list) => list.iter().map(to_json).collect(),
        GoValue::Map(map) => map
            .iter()
            .map(|(key, value)| (key.to_string(), to_json(value)))
            .collect::<serde_json::Map<_, _>>()
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: Rows<'_> = Rows {
        default: &["ID", "Names"],
        headers: &[
            ("ID", "CONTAINER ID"),
            ("Names", "NAMES"),
            ("Image", "IMAGE"),
        ],
        quiet: "ID",
    };

    fn rows() -> Vec<Row> {
        [("1", "web", "nginx:1"), ("2", "a_long_name", "busybox")]
            .map(|(id, name, image)| {
                Row::from([
                    ("ID", id.to_owned()),
                    ("Names", name.to_owned()),
                    ("Image", image.to_owned()),
                ])
            })
            .to_vec()
    }

    #[test]
    fn lists_in_every_form() {
        let print = |format, quiet| ROWS.print(&rows(), format, quiet).unwrap();
        assert_eq!(
            print(None, false),
            "CONTAINER ID   NAMES\n1              web\n2              a_long_name\n"
        );
        assert_eq!(print(None, true), "1\n2\n");
        assert_eq!(
            print(Some("{{.ID}}: {{.Names}}"), false),
            "1: web\n2: a_long_name\n"
        );
        assert_eq!(
            print(Some("table {{.Names}}\\t{{.Image}}"), false),
            "NAMES         IMAGE\nweb           nginx:1\na_long_name   busybox\n"
        );
        assert_eq!(
            print(Some("json"), false).lines().next().unwrap(),
            r#"{"ID":"1","Image":"nginx:1","Names":"web"}"#
        );
        assert_eq!(
            print(Some("{{json .}}"), false).lines().next().unwrap(),
            r#"{"ID":"1","Image":"nginx:1","Names":"web"}"#
        );
    }

    #[test]
    fn an_unknown_field_is_an_error() {
        let error = ROWS.print(&rows(), Some("{{.Nope}}"), false).unwrap_err();
        assert_eq!(error.code, 1);
        assert!(
            error.message.starts_with("template parsing error: "),
            "{error}"
        );
        assert!(ROWS.print(&rows(), Some("{{.ID"), false).is_err());
    }

    #[test]
    fn functions_of_dockers_documentation() {
        let object = json!({"Name": "web", "Args": ["a", "b"], "State": {"Running": true, "Pid": 7},
            "NetworkSettings": {"Networks": {"default": {"IPAddress": "10.0.0.2"}}, "Ports": {"80/tcp": [{"HostPort": "8080"}]}}});
        for (template, text) in [
            ("{{.State.Running}} {{.State.Pid}}", "true 7"),
            (
                "{{upper .Name}} {{lower \"X\"}} {{title .Name}}",
                "WEB x Web",
            ),
            ("{{join .Args \", \"}}", "a, b"),
            ("{{json .Args}}", "[\"a\",\"b\"]"),
            (
                "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}",
                "10.0.0.2",
            ),
            (
                "{{range $p, $conf := .NetworkSettings.Ports}}{{$p}} -> {{(index $conf 0).HostPort}}{{end}}",
                "80/tcp -> 8080",
            ),
            ("{{if .State.Running}}up{{else}}down{{end}}", "up"),
            ("{{index (split .Name \"e\") 0}}", "w"),
            ("{{range .Args}}{{println .}}{{end}}", "a\nb\n"),
            (
                "{{len .Args}} {{printf \"%s!\" .Name}} {{truncate .Name 2}} [{{pad .Name 1 1}}]",
                "2 web! we [ web ]",
            ),
        ] {
            assert_eq!(render(template, &object).unwrap(), text, "{template}");
        }
    }
}
