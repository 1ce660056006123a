//! Label selectors: the text grammar of query parameters and the JSON form in objects.

use serde_json::{Map, Value};

use crate::meta::{self, rules};

use super::SelectorError;

/// Longer selectors are refused before they are parsed.
const MAX_LENGTH: usize = 64 << 10;

/// Requirements on labels, all of which must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
    /// Selects nothing, whatever the labels (an absent JSON selector).
    nothing: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
    values: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    GreaterThan,
    LessThan,
}

/// The form that `labelSelector` in a query takes, sorted by key as upstream prints it.
impl std::fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut texts: Vec<(&str, String)> = self
            .requirements
            .iter()
            .map(|requirement| (requirement.key.as_str(), requirement.text()))
            .collect();
        texts.sort();
        let texts: Vec<String> = texts.into_iter().map(|(_, text)| text).collect();
        f.write_str(&texts.join(","))
    }
}

impl Requirement {
    fn text(&self) -> String {
        let key = &self.key;
        let mut values: Vec<&str> = self.values.iter().map(String::as_str).collect();
        values.sort_unstable();
        match (self.operator, values.as_slice()) {
            (Operator::Exists, _) => key.clone(),
            (Operator::DoesNotExist, _) => format!("!{key}"),
            (Operator::In, [only]) => format!("{key}={only}"),
            (Operator::In, _) => format!("{key} in ({})", values.join(",")),
            (Operator::NotIn, _) => format!("{key} notin ({})", values.join(",")),
            (Operator::GreaterThan, _) => format!("{key}>{}", values.join(",")),
            (Operator::LessThan, _) => format!("{key}<{}", values.join(",")),
        }
    }
}

impl LabelSelector {
    /// Parses `a=b,c!=d,e in (f,g),h notin (i),j,!k,l>1`.
    ///
    /// # Errors
    /// [`SelectorError::Syntax`].
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        if text.len() > MAX_LENGTH {
            return Err(SelectorError::Syntax("the selector is too long".into()));
        }
        let mut parser = Parser {
            tokens: tokens(text),
            at: 0,
        };
        let mut requirements = Vec::new();
        if parser.peek() != &Token::End {
            loop {
                requirements.push(parser.requirement()?);
                match parser.next() {
                    Token::End => break,
                    Token::Comma => {
                        if !matches!(parser.peek(), Token::Word(_) | Token::Not) {
                            return Err(found(parser.peek(), "identifier after ','"));
                        }
                    }
                    other => return Err(found(&other, "',' or 'end of string'")),
                }
            }
        }
        Ok(Self {
            requirements,
            nothing: false,
        })
    }

    /// The selector of what owns pods, whichever form its kind has.
    ///
    /// # Errors
    /// [`SelectorError::Invalid`].
    pub fn of_owner(object: &Value) -> Result<Self, SelectorError> {
        let selector = &object["spec"]["selector"];
        if object["kind"] == "ReplicationController" && selector.is_object() {
            // A plain map, as services have it.
            return Self::from_json(&serde_json::json!({"matchLabels": selector}));
        }
        Self::from_json(selector)
    }

    /// From `{matchLabels, matchExpressions}`; null selects nothing, an empty one everything.
    ///
    /// # Errors
    /// [`SelectorError::Invalid`].
    pub fn from_json(selector: &Value) -> Result<Self, SelectorError> {
        let Some(selector) = selector.as_object() else {
            return Ok(Self {
                requirements: Vec::new(),
                nothing: true,
            });
        };
        let mut requirements = Vec::new();
        for (key, value) in selector
            .get("matchLabels")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            let value = value.as_str().unwrap_or_default().to_owned();
            requirements.push(Requirement {
                key: key.clone(),
                operator: Operator::In,
                values: vec![value],
            });
        }
        let expressions = selector.get("matchExpressions").and_then(Value::as_array);
        for expression in expressions.into_iter().flatten() {
            let operator = match expression["operator"].as_str().unwrap_or_default() {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                other => {
                    return Err(SelectorError::Invalid(format!(
                        "{other:?} is not a valid label selector operator"
                    )));
                }
            };
            let values: Vec<String> = expression["values"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|value| value.as_str().map(str::to_owned))
                .collect();
            let sets = matches!(operator, Operator::In | Operator::NotIn);
            if sets == values.is_empty() {
                let rule = if sets {
                    "for 'in', 'notin' operators, values set can't be empty"
                } else {
                    "values set must be empty for exists and does not exist"
                };
                return Err(SelectorError::Invalid(format!(
                    "values: Invalid value: []: {rule}"
                )));
            }
            let key = expression["key"].as_str().unwrap_or_default().to_owned();
            requirements.push(Requirement {
                key,
                operator,
                values,
            });
        }
        Ok(Self {
            requirements,
            nothing: false,
        })
    }

    /// Whether everything is selected.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty() && !self.nothing
    }

    /// Whether the object's labels meet every requirement.
    pub fn matches(&self, object: &Value) -> bool {
        self.matches_labels(meta::labels(object))
    }

    /// Whether the labels meet every requirement.
    pub fn matches_labels(&self, labels: Option<&Map<String, Value>>) -> bool {
        !self.nothing
            && self.requirements.iter().all(|requirement| {
                requirement.holds(labels.and_then(|l| l.get(&requirement.key)?.as_str()))
            })
    }
}

impl Requirement {
    fn holds(&self, value: Option<&str>) -> bool {
        let listed = |value: &str| self.values.iter().any(|v| v == value);
        match self.operator {
            Operator::In => value.is_some_and(listed),
            Operator::NotIn => !value.is_some_and(listed),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::GreaterThan | Operator::LessThan => {
                let number = |text: &str| text.parse::<i64>().ok();
                let bound = self.values.first().and_then(|v| number(v));
                match (value.and_then(number), bound) {
                    (Some(value), Some(bound)) if self.operator == Operator::LessThan => {
                        value < bound
                    }
                    (Some(value), Some(bound)) => value > bound,
                    _ => false,
                }
            }
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(String),
    Equal,
    NotEqual,
    Not,
    Greater,
    Less,
    Open,
    Close,
    Comma,
    End,
}

fn tokens(text: &str) -> Vec<Token> {
    let mut out = Vec::new();
    let mut letters = text.chars().peekable();
    while let Some(c) = letters.next() {
        out.push(match c {
            c if c.is_whitespace() => continue,
            '=' => {
                letters.next_if_eq(&'=');
                Token::Equal
            }
            '!' if letters.next_if_eq(&'=').is_some() => Token::NotEqual,
            '!' => Token::Not,
            '>' => Token::Greater,
            '<' => Token::Less,
            '(' => Token::Open,
            ')' => Token::Close,
            ',' => Token::Comma,
            first => {
                let mut word = String::from(first);
                while let Some(c) =
                    letters.next_if(|c| !c.is_whitespace() && !"=!<>(),".contains(*c))
                {
                    word.push(c);
                }
                Token::Word(word)
            }
        });
    }
    out.push(Token::End);
    out
}

fn found(token: &Token, expected: &str) -> SelectorError {
    let text = match token {
        Token::Word(word) => word.as_str(),
        Token::Equal => "=",
        Token::NotEqual => "!=",
        Token::Not => "!",
        Token::Greater => ">",
        Token::Less => "<",
        Token::Open => "(",
        Token::Close => ")",
        Token::Comma => ",",
        Token::End => "",
    };
    SelectorError::Syntax(format!("found '{text}', expected: {expected}"))
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> &Token {
        self.tokens.get(self.at).unwrap_or(&Token::End)
    }

    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.at += 1;
        token
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        let absent = self.peek() == &Token::Not;
        if absent {
            self.at += 1;
        }
        let key = match self.next() {
            Token::Word(word) => word,
            other => return Err(found(&other, "!, identifier, or 'end of string'")),
        };
        if let Some(problem) = rules::qualified_name(&key).first() {
            return Err(SelectorError::Syntax(format!(
                "key: Invalid value: {key:?}: {problem}"
            )));
        }
        if absent {
            return Ok(Requirement {
                key,
                operator: Operator::DoesNotExist,
                values: Vec::new(),
            });
        }
        let operator = match self.peek().clone() {
            Token::End | Token::Comma => {
                return Ok(Requirement {
                    key,
                    operator: Operator::Exists,
                    values: Vec::new(),
                });
            }
            Token::Equal => Operator::In,
            Token::NotEqual => Operator::NotIn,
            Token::Greater => Operator::GreaterThan,
            Token::Less => Operator::LessThan,
            Token::Word(word) if word == "in" || word == "notin" => {
                self.at += 1;
                let operator = if word == "in" {
                    Operator::In
                } else {
                    Operator::NotIn
                };
                let values = self.set()?;
                return Self::checked(key, operator, values);
            }
            other => return Err(found(&other, "in, notin, =, ==, !=, gt, lt")),
        };
        self.at += 1;
        let value = match self.peek().clone() {
            Token::Word(word) => {
                self.at += 1;
                word
            }
            Token::End | Token::Comma => String::new(),
            other => return Err(found(&other, "identifier")),
        };
        Self::checked(key, operator, vec![value])
    }

    fn set(&mut self) -> Result<Vec<String>, SelectorError> {
        match self.next() {
            Token::Open => {}
            other => return Err(found(&other, "'('")),
        }
        let mut values = Vec::new();
        loop {
            match self.next() {
                Token::Word(word) => {
                    values.push(word);
                    match self.next() {
                        Token::Comma => {
                            if self.peek() == &Token::Close {
                                values.push(String::new());
                            }
                        }
                        Token::Close => return Ok(values),
                        other => return Err(found(&other, "',' or ')'")),
                    }
                }
                Token::Comma => values.push(String::new()),
                Token::Close => {
                    if values.is_empty() {
                        values.push(String::new());
                    }
                    return Ok(values);
                }
                other => return Err(found(&other, "',', ')' or identifier")),
            }
        }
    }

    fn checked(
        key: String,
        operator: Operator,
        values: Vec<String>,
    ) -> Result<Requirement, SelectorError> {
        let numeric = matches!(operator, Operator::GreaterThan | Operator::LessThan);
        for (index, value) in values.iter().enumerate() {
            if numeric && value.parse::<i64>().is_err() {
                return Err(SelectorError::Syntax(format!(
                    "values[{index}]: Invalid value: {value:?}: for 'Gt', 'Lt' operators, the \
                     value must be an integer"
                )));
            }
            if let Some(problem) = rules::label_value(value).first() {
                return Err(SelectorError::Syntax(format!(
                    "values[{index}][{key}]: Invalid value: {value:?}: {problem}"
                )));
            }
        }
        Ok(Requirement {
            key,
            operator,
            values,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn selects(selector: &str, labels: Value) -> bool {
        LabelSelector::parse(selector)
            .unwrap()
            .matches(&json!({"metadata": {"labels": labels}}))
    }

    #[test]
    fn every_form_of_requirement() {
        let labels = || json!({"app": "web", "tier": "front", "n": "5", "e": ""});
        for yes in [
            "",
            "app=web",
            "app==web",
            "app = web , tier=front",
            "app!=db",
            "none!=x",
            "app in (db, web)",
            "app notin (db)",
            "none notin (x)",
            "app",
            "!none",
            "n>4",
            "n<6",
            "e=",
            "e in ()",
            "e in (,x)",
        ] {
            assert!(selects(yes, labels()), "{yes}");
        }
        for no in [
            "app=db",
            "app!=web",
            "app in (db)",
            "app notin (web)",
            "none",
            "!app",
            "n>5",
            "none=",
        ] {
            assert!(!selects(no, labels()), "{no}");
        }
    }

    #[test]
    fn what_cannot_be_parsed_is_told() {
        for (text, words) in [
            ("app in web", "found 'web', expected: '('"),
            (
                "app web",
                "found 'web', expected: in, notin, =, ==, !=, gt, lt",
            ),
            ("a=b,", "found '', expected: identifier after ','"),
            (
                "=b",
                "found '=', expected: !, identifier, or 'end of string'",
            ),
        ] {
            let error = LabelSelector::parse(text).unwrap_err().to_string();
            assert_eq!(error, format!("unable to parse requirement: {words}"));
        }
        for bad in ["a>x", "a/b/c", "a=-b", "a in (b", "!"] {
            assert!(LabelSelector::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_json_form() {
        let object = json!({"metadata": {"labels": {"a": "b"}}});
        let matches = |selector: Value| {
            LabelSelector::from_json(&selector)
                .unwrap()
                .matches(&object)
        };
        assert!(matches(json!({})));
        assert!(!matches(Value::Null));
        assert!(matches(json!({"matchLabels": {"a": "b"}})));
        assert!(!matches(
            json!({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]})
        ));
        assert!(matches(
            json!({"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]})
        ));
        let error = LabelSelector::from_json(&json!({"matchExpressions": [{"operator": "Is"}]}));
        assert_eq!(
            error.unwrap_err().to_string(),
            "\"Is\" is not a valid label selector operator"
        );
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[a-c=!<>(), ]{0,30}") {
            let _ = LabelSelector::parse(&text);
        }

        #[test]
        fn in_and_notin_are_opposites(value in prop::option::of("[ab]"), set in "[ab](,[ab])?") {
            let labels = value.map_or_else(|| json!({}), |v| json!({"k": v}));
            let inside = selects(&format!("k in ({set})"), labels.clone());
            prop_assert_eq!(inside, !selects(&format!("k notin ({set})"), labels));
        }
    }
}
