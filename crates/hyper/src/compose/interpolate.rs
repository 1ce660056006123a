//! Variables in a compose file: `$NAME`, `${NAME}`, `${NAME:-default}` and their like.

use std::collections::BTreeMap;

use crate::error::{Failure, Result};

/// Replaces the variables of a text. `$$` is a dollar.
pub(crate) fn interpolate(text: &str, variables: &BTreeMap<String, String>) -> Result<String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(inside) = rest.strip_prefix('{') {
            let end = closing(inside).ok_or_else(|| invalid(text))?;
            out.push_str(&braced(&inside[..end], variables, text)?);
            rest = &inside[end + 1..];
        } else {
            let length = name_length(rest);
            if length == 0 {
                return Err(invalid(text));
            }
            out.push_str(variables.get(&rest[..length]).map_or("", String::as_str));
            rest = &rest[length..];
        }
    }
    out.push_str(rest);
    Ok(out)
}

fn invalid(text: &str) -> Failure {
    Failure::usage(format_args!(
        "invalid interpolation format: \"{text}\"; you may need to escape any $ with another $"
    ))
}

fn name_length(text: &str) -> usize {
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return 0;
    }
    text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .unwrap_or(text.len())
}

/// Position of the brace that ends an expression; expressions may be inside one another.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => return Some(at),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// `NAME`, `NAME:-x`, `NAME-x`, `NAME:?x`, `NAME?x`, `NAME:+x`, `NAME+x`.
fn braced(expression: &str, variables: &BTreeMap<String, String>, whole: &str) -> Result<String> {
    let length = name_length(expression);
    let (name, rest) = expression.split_at(length);
    if name.is_empty() {
        return Err(invalid(whole));
    }
    let value = variables.get(name);
    if rest.is_empty() {
        return Ok(value.cloned().unwrap_or_default());
    }
    let (not_empty, rest) = match rest.strip_prefix(':') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let value = value.filter(|value| !not_empty || !value.is_empty());
    let mut characters = rest.chars();
    let operator = characters.next();
    let word = characters.as_str();
    match (operator, value) {
        (Some('-' | '?'), Some(value)) => Ok(value.clone()),
        (Some('-'), None) | (Some('+'), Some(_)) => interpolate(word, variables),
        (Some('+'), None) => Ok(String::new()),
        (Some('?'), None) => Err(Failure::usage(format_args!(
            "required variable {name} is missing a value: {}",
            interpolate(word, variables)?
        ))),
        _ => Err(invalid(whole)),
    }
}

/// A file of variables: `NAME=value`, quotes as a shell has them, comments.
pub(crate) fn parse_env_file(text: &str) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    for line in text.lines() {
        let line = line.trim();
        let line = line.strip_prefix("export ").unwrap_or(line);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else {
            continue;
        };
        let value = value.trim();
        let value = match value.chars().next() {
            Some('\'') => value[1..].split('\'').next().unwrap_or_default().to_owned(),
            Some('"') => value[1..]
                .split('"')
                .next()
                .unwrap_or_default()
                .replace("\\n", "\n"),
            _ => value
                .split(" #")
                .next()
                .unwrap_or_default()
                .trim()
                .to_owned(),
        };
        variables.insert(name.trim().to_owned(), value);
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_variable() {
        let variables = BTreeMap::from([
            ("A".to_owned(), "1".to_owned()),
            ("E".to_owned(), String::new()),
        ]);
        for (text, value) in [
            ("x$A-${A}", "x1-1"),
            ("$$A", "$A"),
            ("$N|${N}", "|"),
            ("${N:-d}${N-d}", "dd"),
            ("${E:-d}${E-d}", "d"),
            ("${A:+y}${N:+y}${E:+y}${E+y}", "yy"),
            ("${N:-${A}}", "1"),
            ("${A:?no}", "1"),
            ("no dollar", "no dollar"),
        ] {
            assert_eq!(interpolate(text, &variables).unwrap(), value, "{text}");
        }
        assert_eq!(
            interpolate("${N:?say it}", &variables).unwrap_err().message,
            "hyper: required variable N is missing a value: say it"
        );
        for bad in ["${", "$", "${}", "$1", "${A!x}"] {
            assert!(interpolate(bad, &variables).is_err(), "{bad}");
        }
    }

    #[test]
    fn files_of_variables() {
        let variables =
            parse_env_file("# c\nA=1\nexport B='x # y'\nC=\"two words\"\nD=v # comment\n\nbad\n");
        let expected = [("A", "1"), ("B", "x # y"), ("C", "two words"), ("D", "v")];
        assert_eq!(
            variables,
            expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into()
        );
    }
}
