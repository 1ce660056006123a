//! hyper's verbs and flags against what docker's are: `tests/docker-surface.txt`.

use std::collections::{BTreeMap, BTreeSet};

use clap::{Arg, ArgAction, Command, CommandFactory as _};

use crate::{cli::Cli, refusals, usage};

const TABLE: &str = include_str!("../tests/docker-surface.txt");

/// Flags that are hyper's own, and why.
const OWN: &[(&str, &str)] = &[
    ("-", "--kubeconfig"),
    ("-", "--namespace"),
    ("run", "--kernel"),
    ("create", "--kernel"),
    ("run", "--timing"),
    ("context create", "--namespace"),
    ("context ls", "--filter"),
    ("context ls", "--no-trunc"),
    ("volume ls", "--no-trunc"),
];

#[derive(Debug)]
struct Flag {
    short: Option<char>,
    long: String,
    kind: String,
    default: Option<String>,
    verdict: String,
}

#[derive(Debug)]
struct Verb {
    arity: String,
    served: bool,
    flags: Vec<Flag>,
}

type Surface = (BTreeMap<String, Verb>, BTreeMap<String, String>);

fn flag(line: &str) -> Flag {
    let (facts, verdict) = line.rsplit_once(" | ").unwrap();
    let mut words = facts.split_whitespace().peekable();
    let short = words
        .next_if(|word| !word.starts_with("--"))
        .map(|word| word.chars().nth(1).unwrap());
    let long = words.next().unwrap().trim_start_matches("--").to_owned();
    let kind = words.next().unwrap().to_owned();
    let default = words
        .next()
        .map(|word| word.strip_prefix("default=").unwrap().to_owned());
    assert_eq!(words.next(), None, "{line}");
    assert!(
        matches!(verdict, "same" | "refused") || verdict.starts_with("differs: "),
        "{line}"
    );
    Flag {
        short,
        long,
        kind,
        default,
        verdict: verdict.to_owned(),
    }
}

fn surface() -> Surface {
    let (mut verbs, mut same) = (BTreeMap::<String, Verb>::new(), BTreeMap::new());
    let mut last = String::new();
    for line in TABLE.lines() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        if line.starts_with(' ') {
            verbs.get_mut(&last).unwrap().flags.push(flag(line));
        } else if let Some((other, name)) = line.split_once(" = ") {
            same.insert(other.to_owned(), name.to_owned());
        } else {
            let parts: Vec<&str> = line.split(" | ").collect();
            let [name, arity, verdict] = parts[..] else {
                panic!("{line}")
            };
            assert!(matches!(verdict, "served" | "refused"), "{line}");
            last = name.to_owned();
            let verb = Verb {
                arity: arity.to_owned(),
                served: verdict == "served",
                flags: Vec::new(),
            };
            assert!(verbs.insert(last.clone(), verb).is_none(), "twice: {line}");
        }
    }
    (verbs, same)
}

fn words(verb: &str) -> Vec<String> {
    let words = verb.split(' ').filter(|word| *word != "-");
    words.map(ToOwned::to_owned).collect()
}

fn find<'a>(root: &'a Command, verb: &str) -> Option<&'a Command> {
    words(verb)
        .iter()
        .try_fold(root, |command, word| command.find_subcommand(word))
}

/// What hyper says to a command line that it refuses.
fn refusal(args: &[String]) -> Option<String> {
    let args: Vec<String> = std::iter::once("hyper".to_owned())
        .chain(args.iter().cloned())
        .collect();
    let error = usage::parse(&args).err()?;
    let failure = usage::explain(&error, &args);
    (failure.code == crate::error::OWN).then_some(failure.message)
}

/// A value that every flag of such a type takes.
fn sample(flag: &Flag) -> &str {
    match (flag.long.as_str(), flag.kind.as_str()) {
        (_, "int" | "uint16" | "uint" | "decimal") => "1",
        (_, "bytes") => "64m",
        (_, "duration") => "1s",
        ("platform", _) => "linux/amd64",
        (_, "filter") => "label=x",
        _ => "x=y",
    }
}

fn same_flag(verb: &str, flag: &Flag, arg: &Arg) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut check = |right: bool, what: &str| {
        if !right {
            wrong.push(format!("{verb} --{}: {what}", flag.long));
        }
    };
    check(arg.get_short() == flag.short, "another short name");
    let switch = matches!(
        arg.get_action(),
        ArgAction::SetTrue | ArgAction::Version | ArgAction::Help
    ) || arg
        .get_num_args()
        .is_some_and(|range| range.min_values() == 0);
    check(switch == (flag.kind == "bool"), "a value, or none");
    let many = matches!(
        flag.kind.as_str(),
        "list" | "filter" | "map" | "mount" | "ulimit" | "strings"
    );
    if flag.verdict == "same" {
        check(
            !many || matches!(arg.get_action(), ArgAction::Append),
            "not more than once",
        );
        let given: Vec<String> = arg
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy().into_owned())
            .filter(|value| value != "false")
            .collect();
        // -1 is docker's way to say that there is no bound.
        let wanted: Vec<String> = flag
            .default
            .iter()
            .filter(|value| *value != "-1")
            .cloned()
            .collect();
        check(
            given == wanted,
            &format!("defaults {given:?}, docker's {wanted:?}"),
        );
    }
    wrong
}

#[test]
fn each_flag_of_docker_is_there_or_refused_by_name() {
    let root = Cli::command();
    let (verbs, _) = surface();
    let mut wrong = Vec::new();
    for (name, verb) in &verbs {
        let path = words(name);
        if !verb.served {
            let parsed = find(&root, name).is_some_and(|command| !command.has_subcommands());
            if !parsed && !refusal(&path).is_some_and(|text| text.contains("is not supported: ")) {
                wrong.push(format!("{name}: not refused by name"));
            }
            continue;
        }
        let Some(command) = find(&root, name) else {
            wrong.push(format!("{name}: no such verb"));
            continue;
        };
        if name != "-" && verb.arity != "any" {
            let arity = usage::arity_text(usage::arity(command));
            if arity != verb.arity {
                wrong.push(format!("{name}: {arity}, docker's {}", verb.arity));
            }
        }
        for flag in &verb.flags {
            let long = format!("--{}", flag.long);
            let arg = command
                .get_arguments()
                .find(|arg| arg.get_long() == Some(&flag.long));
            let mut given = path.clone();
            if flag.verdict == "refused" {
                if arg.is_some() {
                    wrong.push(format!("{name} {long}: served, the table says refused"));
                }
                for spelt in [
                    Some(long.clone()),
                    flag.short.map(|short| format!("-{short}")),
                ]
                .into_iter()
                .flatten()
                {
                    let args: Vec<String> = path.iter().cloned().chain([spelt.clone()]).collect();
                    let said = refusal(&args).unwrap_or_default();
                    if !said.starts_with(&format!("hyper: {spelt} is not supported: ")) {
                        wrong.push(format!("{name} {spelt}: not refused by name: {said}"));
                    }
                }
                continue;
            }
            let Some(arg) = arg else {
                wrong.push(format!("{name} {long}: not there"));
                continue;
            };
            wrong.extend(same_flag(name, flag, arg));
            if matches!(flag.long.as_str(), "help" | "version") {
                continue;
            }
            given.push(match flag.kind.as_str() {
                "bool" => long.clone(),
                _ => format!("{long}={}", sample(flag)),
            });
            let args = std::iter::once("hyper".to_owned())
                .chain(given)
                .collect::<Vec<_>>();
            if let Err(error) = usage::parse(&args) {
                use clap::error::ErrorKind::{
                    DisplayHelpOnMissingArgumentOrSubcommand, MissingRequiredArgument,
                    MissingSubcommand, TooFewValues,
                };
                if !matches!(
                    error.kind(),
                    MissingRequiredArgument
                        | MissingSubcommand
                        | DisplayHelpOnMissingArgumentOrSubcommand
                        | TooFewValues
                ) {
                    wrong.push(format!("{name} {long}: does not parse: {error}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// All verbs of a command with their names, not those that only lead to others.
fn leaves<'a>(prefix: &str, command: &'a Command, into: &mut Vec<(String, &'a Command)>) {
    for sub in command.get_subcommands() {
        let name = format!("{prefix} {}", sub.get_name()).trim().to_owned();
        if sub.has_subcommands() {
            leaves(&name, sub, into);
        } else {
            into.push((name, sub));
        }
    }
}

#[test]
fn each_flag_of_hyper_is_dockers_or_known_to_be_its_own() {
    let root = Cli::command();
    let (verbs, _) = surface();
    let mut all = vec![("-".to_owned(), &root)];
    leaves("", &root, &mut all);
    let mut wrong = Vec::new();
    for (name, command) in all {
        let canonical = match name.as_str() {
            "-" => "-".to_owned(),
            _ => refusals::canonical(&words(&name)),
        };
        // The microVM's memory: no docker has one to be kept.
        if matches!(
            canonical.rsplit(' ').next(),
            Some("suspend" | "resume" | "clone")
        ) {
            continue;
        }
        // docker's compose is a plug-in, snapshots are of microVMs' memory; completion and manual pages are docker's in another form.
        if matches!(
            canonical.split(' ').next(),
            Some("compose" | "up" | "down" | "completion" | "man" | "snapshot")
        ) {
            continue;
        }
        let Some(verb) = verbs.get(&canonical) else {
            wrong.push(format!("{name}: not one of docker's"));
            continue;
        };
        for long in command.get_arguments().filter_map(Arg::get_long) {
            let own = OWN.contains(&(canonical.as_str(), &format!("--{long}")));
            let dockers = verb.flags.iter().any(|flag| flag.long == long);
            if verb.served && own == dockers {
                wrong.push(format!("{name} --{long}: docker's, or hyper's own?"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn other_names_are_the_same_verbs() {
    let root = Cli::command();
    let (verbs, same) = surface();
    let flags = |command: &Command| -> BTreeSet<String> {
        let longs = command.get_arguments().map(|arg| arg.get_id().to_string());
        longs.collect()
    };
    for (other, name) in same {
        assert!(verbs.contains_key(&name), "{other}: no {name}");
        assert_eq!(refusals::canonical(&words(&other)), name);
        let (Some(one), Some(two)) = (find(&root, &other), find(&root, &name)) else {
            panic!("{other} or {name} is not there");
        };
        assert_eq!(flags(one), flags(two), "{other}");
    }
}

#[test]
fn the_table_is_whole() {
    let (verbs, same) = surface();
    let flags: usize = verbs.values().map(|verb| verb.flags.len()).sum();
    // So many the client has; a part that is not read would be noticed by nothing else.
    assert!(
        verbs.len() >= 79 && same.len() >= 36 && flags >= 367,
        "{} verbs, {} other names, {flags} flags",
        verbs.len(),
        same.len()
    );
}
