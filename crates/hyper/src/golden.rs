//! Which verbs and flags the golden cases name: all of them, or the test lists what is missing.

use std::{collections::BTreeSet, path::Path};

use clap::{ArgMatches, Command, CommandFactory as _, parser::ValueSource};

use crate::{cli::Cli, refusals};

/// Files of golden cases, from this crate's directory.
const FILES: &[&str] = &[
    "tests/golden/offline.txt",
    "tests/golden/recorded.txt",
    "../../tests/scenarios/hyper.txt",
    "../../tests/scenarios/images.txt",
    "../../tests/scenarios/pause.txt",
    "../../tests/scenarios/suspend.txt",
    "../../tests/scenarios/clone.txt",
    "../../tests/scenarios/snapshot.txt",
];

/// Verbs that only say that they are refused: their arguments are not looked at.
const REFUSED: &[&str] = &[
    "build",
    "commit",
    "diff",
    "export",
    "import",
    "network connect",
    "network disconnect",
    "system df",
    "update",
];

/// Command lines of `hyper` in a line for the shell, those in quotes and substitutions too.
fn command_lines(line: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (at, _) in line.match_indices("hyper ") {
        let before = line[..at].chars().next_back();
        if before.is_some_and(|c| c.is_ascii_alphanumeric() || "-./_$".contains(c)) {
            continue;
        }
        let mut words = vec!["hyper".to_owned()];
        let (mut word, mut begun, mut quote) = (String::new(), false, None);
        let inside = line[..at].matches('\'').count() % 2 == 1;
        for c in line[at + "hyper ".len()..].chars().chain([' ', ';']) {
            match quote {
                Some(open) if c == open => quote = None,
                Some(_) => word.push(c),
                None if c == '\'' && inside => {
                    words.push(std::mem::take(&mut word));
                    break;
                }
                // The number of a stream that goes elsewhere is no argument.
                None if c == '>' && word.chars().all(|c| c.is_ascii_digit()) => break,
                None if c == '\'' || c == '"' => (quote, begun) = (Some(c), true),
                None if c.is_whitespace() || ";|&()<>`".contains(c) => {
                    if begun || !word.is_empty() {
                        words.push(std::mem::take(&mut word));
                    }
                    begun = false;
                    if !c.is_whitespace() {
                        break;
                    }
                }
                None => word.push(c),
            }
        }
        found.push(words);
    }
    found
}

/// Notes the verb of a command line, and its flags that were given.
fn note(command: &Command, matches: &ArgMatches, path: &[String], into: &mut BTreeSet<String>) {
    let verb = match path {
        [] => "-".to_owned(),
        _ => refusals::canonical(path),
    };
    into.insert(verb.clone());
    for arg in command.get_arguments() {
        if arg.is_positional() {
            continue;
        }
        if matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine) {
            into.insert(format!("{verb} --{}", arg.get_long().unwrap_or_default()));
        }
    }
    if let Some((name, matches)) = matches.subcommand()
        && let Some(command) = command.find_subcommand(name)
    {
        note(command, matches, &[path, &[name.to_owned()]].concat(), into);
    }
}

fn all(command: &Command, path: &[String], into: &mut BTreeSet<String>) {
    let verb = match path {
        [] => "-".to_owned(),
        _ => refusals::canonical(path),
    };
    if !command.has_subcommands() || path.is_empty() {
        into.insert(verb.clone());
        if !REFUSED.contains(&verb.as_str()) {
            for long in command.get_arguments().filter_map(clap::Arg::get_long) {
                into.insert(format!("{verb} --{long}"));
            }
        }
    }
    for sub in command.get_subcommands() {
        all(sub, &[path, &[sub.get_name().to_owned()]].concat(), into);
    }
}

#[test]
fn each_verb_and_flag_has_a_golden_case() {
    let root = Cli::command();
    let (mut wanted, mut named) = (BTreeSet::new(), BTreeSet::new());
    all(&root, &[], &mut wanted);
    for file in FILES {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        let commands = text.lines().filter_map(|line| line.strip_prefix("$ "));
        for words in commands.flat_map(command_lines) {
            match root.clone().try_get_matches_from(&words) {
                Ok(matches) => note(&root, &matches, &[], &mut named),
                // Help and versions are answers of the parser.
                Err(error) if error.exit_code() == 0 => {
                    let (path, _) = crate::usage::verb_of(&root, &words);
                    let verb = match &path[1..] {
                        [] => "-".to_owned(),
                        path => refusals::canonical(path),
                    };
                    for flag in words.iter().filter(|word| word.starts_with("--")) {
                        named.insert(format!("{verb} {flag}"));
                    }
                }
                Err(_) => {}
            }
        }
    }
    let missing: Vec<&String> = wanted.difference(&named).collect();
    assert!(
        missing.is_empty(),
        "{} of {} without a golden case:\n{}",
        missing.len(),
        wanted.len(),
        missing
            .iter()
            .map(|text| text.as_str())
            .collect::<Vec<_>>()
            .join("\n")
    );
}

#[test]
fn command_lines_are_found_in_shell() {
    let lines = |text| {
        command_lines(text)
            .iter()
            .map(|words| words.join("|"))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        lines("id=$(hyper ps -q); hyper rm \"$id\" | wc -l"),
        ["hyper|ps|-q", "hyper|rm|$id"]
    );
    assert_eq!(
        lines("script -qec 'hyper attach --detach-keys x t' /dev/null; kubectl get x-hyper y"),
        ["hyper|attach|--detach-keys|x|t"]
    );
    assert_eq!(
        lines("hyper ps --format '{{.Names}} {{.State}}' && echo ok"),
        ["hyper|ps|--format|{{.Names}} {{.State}}"]
    );
}
