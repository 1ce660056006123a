//! What is said of a command line that is not one, in docker's words and with docker's exit codes: 125 for a
//! flag, 1 for a verb or a number of arguments.

use clap::{
    Arg, ArgAction, Command, CommandFactory as _, FromArgMatches as _,
    builder::TypedValueParser as _,
    error::{ContextKind, ContextValue, ErrorKind},
};

use crate::{
    cli::Cli,
    error::{Failure, OWN},
    refusals,
};

/// Parses a command line. Switches take `=true` and `=false` as docker's do.
pub(crate) fn parse(args: &[String]) -> Result<Cli, clap::Error> {
    let error = match <Cli as clap::Parser>::try_parse_from(args) {
        Ok(cli) => return Ok(cli),
        Err(error) => error,
    };
    // A second tree only where it can help: in help texts a switch is a switch.
    let of_a_switch = match error.kind() {
        ErrorKind::TooManyValues => true,
        // `-q=false`, or `-aq=false`, letter by letter.
        ErrorKind::UnknownArgument => {
            text(&error, ContextKind::InvalidArg).is_some_and(|arg| arg.starts_with("-="))
        }
        _ => false,
    };
    if !of_a_switch {
        return Err(error);
    }
    let matches = with_values(Cli::command()).try_get_matches_from(args)?;
    Cli::from_arg_matches(&matches)
}

/// The same command, with switches that take a value.
fn with_values(command: Command) -> Command {
    command
        .mut_args(|arg| match arg.get_action() {
            ArgAction::SetTrue => arg
                .action(ArgAction::Set)
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
                .default_value("false")
                .value_parser(switch()),
            _ => arg,
        })
        .mut_subcommands(with_values)
}

fn switch() -> clap::builder::ValueParser {
    clap::builder::StringValueParser::new()
        .try_map(|text| match text.as_str() {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            _ => Err("invalid syntax"),
        })
        .into()
}

/// The verb of a command line: its words, and its command as far as there is one.
pub(crate) fn verb_of<'a>(root: &'a Command, args: &[String]) -> (Vec<String>, &'a Command) {
    let (mut path, mut command) = (vec![root.get_name().to_owned()], root);
    let mut words = args.iter().skip(1);
    while let Some(word) = words.next() {
        if let Some(flag) = word.strip_prefix('-') {
            // Of the flags before a verb, those with a value take the next word.
            let long = flag.strip_prefix('-');
            let takes = command.get_arguments().any(|arg| {
                let named = match long {
                    Some(long) => arg.get_long() == Some(long),
                    None => arg.get_short().is_some_and(|c| flag == c.to_string()),
                };
                named && arg.get_action().takes_values() && arg.get_num_args() != Some(0.into())
            });
            if takes {
                words.next();
            }
            continue;
        }
        let Some(next) = command.find_subcommand(word) else {
            break;
        };
        path.push(word.clone());
        command = next;
    }
    (path, command)
}

/// How many arguments a verb takes; `None` above: any number.
pub(crate) fn arity(command: &Command) -> (usize, Option<usize>) {
    let mut least = 0;
    let mut most = Some(0);
    for arg in command.get_positionals() {
        let range = arg.get_num_args().unwrap_or_else(|| 1.into());
        let many = matches!(arg.get_action(), ArgAction::Append) || range.max_values() > 1;
        if arg.is_required_set() {
            least += range.min_values().max(1);
        }
        most = match most {
            Some(most) if !many => Some(most + 1),
            _ => None,
        };
    }
    (least, most)
}

/// docker's words for a wrong number of arguments.
pub(crate) fn arity_text(arity: (usize, Option<usize>)) -> String {
    let arguments = |count: usize| if count == 1 { "argument" } else { "arguments" };
    match arity {
        (0, Some(0)) => "accepts no arguments".to_owned(),
        (least, Some(most)) if least == most => {
            format!("requires {least} {}", arguments(least))
        }
        (0, Some(most)) => format!("requires at most {most} {}", arguments(most)),
        (least, None) => format!("requires at least {least} {}", arguments(least)),
        (least, Some(most)) => {
            format!("requires at least {least} and at most {most} arguments")
        }
    }
}

fn value_name(arg: &Arg) -> String {
    let named = arg.get_value_names().and_then(|names| names.first());
    named.map_or_else(
        || arg.get_id().as_str().to_uppercase(),
        |name| name.as_str().to_owned(),
    )
}

/// `hyper rm [OPTIONS] CONTAINER [CONTAINER...]`.
pub(crate) fn usage(path: &[String], command: &Command) -> String {
    let mut words = vec![path.join(" ")];
    if command.get_opts().next().is_some()
        || command
            .get_arguments()
            .any(|arg| !arg.is_positional() && !arg.is_hide_set())
    {
        words.push("[OPTIONS]".to_owned());
    }
    if command.has_subcommands() {
        words.push("COMMAND".to_owned());
    }
    for arg in command.get_positionals().filter(|arg| !arg.is_hide_set()) {
        let name = value_name(arg);
        let many = matches!(arg.get_action(), ArgAction::Append)
            || arg
                .get_num_args()
                .is_some_and(|range| range.max_values() > 1);
        words.push(match (arg.is_required_set(), many) {
            _ if name.contains(' ') => name,
            (true, false) => name,
            (true, true) => format!("{name} [{name}...]"),
            (false, false) => format!("[{name}]"),
            (false, true) => format!("[{name}...]"),
        });
    }
    words.join(" ")
}

fn text(error: &clap::Error, kind: ContextKind) -> Option<String> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => texts.first().cloned(),
        _ => None,
    }
}

/// A flag as docker names it in errors: `-n, --last`.
fn flag_name(command: &Command, given: &str) -> String {
    let given = given.split([' ', '=', '[']).next().unwrap_or(given);
    let found = command.get_arguments().find(|arg| {
        arg.get_long()
            .is_some_and(|long| given.strip_prefix("--") == Some(long))
            || arg
                .get_short()
                .is_some_and(|short| given == format!("-{short}"))
    });
    match found.map(|arg| (arg.get_short(), arg.get_long())) {
        Some((Some(short), Some(long))) => format!("-{short}, --{long}"),
        Some((None, Some(long))) => format!("--{long}"),
        _ => given.to_owned(),
    }
}

/// Why a value is none, as docker's own language says it.
fn why_not(error: &clap::Error, value: &str) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    match source.as_deref() {
        Some(text) if text.contains("invalid digit") => {
            format!("strconv.ParseInt: parsing \"{value}\": invalid syntax")
        }
        Some("invalid syntax") => format!("strconv.ParseBool: parsing \"{value}\": invalid syntax"),
        Some(text) => text.to_owned(),
        None => match error.get(ContextKind::ValidValue) {
            Some(ContextValue::Strings(valid)) => format!("must be one of {}", valid.join(", ")),
            _ => "invalid value".to_owned(),
        },
    }
}

/// What to say of a command line that clap refused, and the exit code.
pub(crate) fn explain(error: &clap::Error, args: &[String]) -> Failure {
    let root = Cli::command();
    let (path, command) = verb_of(&root, args);
    let verb = path.join(" ");
    let usage = usage(&path, command);
    let with_usage = |said: String| {
        Failure::plain(format_args!(
            "{said}\n\nUsage:  {usage}\n\nRun '{verb} --help' for more information"
        ))
    };
    let arguments = || {
        let wrong = arity_text(arity(command));
        with_usage(format!("hyper: '{verb}' {wrong}"))
    };
    let invalid = text(error, ContextKind::InvalidArg);
    match error.kind() {
        ErrorKind::UnknownArgument => {
            let Some(given) = invalid else {
                return arguments();
            };
            let flag = given.split('=').next().unwrap_or(&given);
            if let Some(advice) = refusals::advice(&path[1..], flag) {
                return Failure::refused(flag, advice);
            }
            match flag.strip_prefix('-') {
                Some(long) if long.starts_with('-') => {
                    with_usage(format!("unknown flag: {flag}")).with_code(OWN)
                }
                Some(letters) if !letters.is_empty() => {
                    let letter: String = letters.chars().take(1).collect();
                    with_usage(format!("unknown shorthand flag: '{letter}' in {flag}"))
                        .with_code(OWN)
                }
                _ if command.has_subcommands() => unknown_verb(&path, command, flag),
                _ => arguments(),
            }
        }
        ErrorKind::MissingRequiredArgument
        | ErrorKind::TooFewValues
        | ErrorKind::WrongNumberOfValues => arguments(),
        ErrorKind::InvalidSubcommand => {
            let word = text(error, ContextKind::InvalidSubcommand).unwrap_or_default();
            match refusals::verb(&path[1..], &word) {
                Some(advice) => {
                    let whole = [&path[1..], std::slice::from_ref(&word)].concat().join(" ");
                    Failure::refused(whole, advice)
                }
                None => unknown_verb(&path, command, &word),
            }
        }
        ErrorKind::InvalidValue
        | ErrorKind::ValueValidation
        | ErrorKind::TooManyValues
        | ErrorKind::NoEquals => {
            let given = invalid.unwrap_or_default();
            let flag = given.split([' ', '=', '[']).next().unwrap_or_default();
            if !flag.starts_with('-') {
                return Failure::plain(error.render()).with_code(OWN);
            }
            match text(error, ContextKind::InvalidValue) {
                Some(value) if !value.is_empty() => with_usage(format!(
                    "invalid argument \"{value}\" for \"{}\" flag: {}",
                    flag_name(command, flag),
                    why_not(error, &value)
                ))
                .with_code(OWN),
                // Which of its two names was given is docker's to say.
                _ => {
                    let named = args.iter().any(|arg| arg == flag);
                    let short = command
                        .get_arguments()
                        .find(|arg| {
                            arg.get_long()
                                .is_some_and(|long| flag.strip_prefix("--") == Some(long))
                        })
                        .and_then(Arg::get_short);
                    let said = match short {
                        Some(letter) if !named => {
                            let last = args.last().map(String::as_str).unwrap_or_default();
                            format!("flag needs an argument: '{letter}' in {last}")
                        }
                        _ => format!("flag needs an argument: {flag}"),
                    };
                    with_usage(said).with_code(OWN)
                }
            }
        }
        _ => Failure::plain(error.render().to_string().trim_end()).with_code(OWN),
    }
}

fn unknown_verb(path: &[String], command: &Command, word: &str) -> Failure {
    let verb = path.join(" ");
    let usage = match path.len() {
        1 => String::new(),
        _ => format!("\n\nUsage:  {}", usage(path, command)),
    };
    Failure::plain(format_args!(
        "hyper: unknown command: {verb} {word}{usage}\n\nRun '{verb} --help' for more information"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(args: &[&str]) -> Failure {
        let args: Vec<String> = ["hyper"]
            .iter()
            .chain(args)
            .map(|arg| (*arg).to_owned())
            .collect();
        explain(&parse(&args).unwrap_err(), &args)
    }

    #[test]
    fn errors_are_dockers() {
        // First line and exit code as docker 28.2.2 has them, `docker` being `hyper`.
        for (args, first, code) in [
            (&["--bogus"][..], "unknown flag: --bogus", 125),
            (&["-x"], "unknown shorthand flag: 'x' in -x", 125),
            (&["ps", "--bogus"], "unknown flag: --bogus", 125),
            (&["ps", "-n"], "flag needs an argument: 'n' in -n", 125),
            (&["-c"], "flag needs an argument: 'c' in -c", 125),
            (&["run", "-h"], "flag needs an argument: 'h' in -h", 125),
            (&["run", "--name"], "flag needs an argument: --name", 125),
            (
                &["ps", "-n", "x"],
                "invalid argument \"x\" for \"-n, --last\" flag: strconv.ParseInt: parsing \"x\": invalid syntax",
                125,
            ),
            (
                &["stop", "-t", "x", "a"],
                "invalid argument \"x\" for \"-t, --timeout\" flag: strconv.ParseInt: parsing \"x\": invalid syntax",
                125,
            ),
            (
                &["rm", "--force=maybe", "a"],
                "invalid argument \"maybe\" for \"-f, --force\" flag: strconv.ParseBool: parsing \"maybe\": invalid syntax",
                125,
            ),
            (&["dance"], "hyper: unknown command: hyper dance", 1),
            (
                &["network", "dance"],
                "hyper: unknown command: hyper network dance",
                1,
            ),
            (&["rm"], "hyper: 'hyper rm' requires at least 1 argument", 1),
            (
                &["rename", "a"],
                "hyper: 'hyper rename' requires 2 arguments",
                1,
            ),
            (
                &["rename", "a", "b", "c"],
                "hyper: 'hyper rename' requires 2 arguments",
                1,
            ),
            (
                &["exec", "a"],
                "hyper: 'hyper exec' requires at least 2 arguments",
                1,
            ),
            (
                &["run"],
                "hyper: 'hyper run' requires at least 1 argument",
                1,
            ),
            (&["ps", "a"], "hyper: 'hyper ps' accepts no arguments", 1),
            (
                &["images", "a", "b"],
                "hyper: 'hyper images' requires at most 1 argument",
                1,
            ),
            (
                &["port"],
                "hyper: 'hyper port' requires at least 1 and at most 2 arguments",
                1,
            ),
            (
                &["logs", "a", "b"],
                "hyper: 'hyper logs' requires 1 argument",
                1,
            ),
            (
                &["-c", "one", "rm"],
                "hyper: 'hyper rm' requires at least 1 argument",
                1,
            ),
        ] {
            let failure = said(args);
            assert_eq!(
                failure.message.lines().next(),
                Some(first),
                "{args:?}: {failure}"
            );
            assert_eq!(failure.code, code, "{args:?}");
        }
        assert_eq!(
            said(&["rm"]).message,
            "hyper: 'hyper rm' requires at least 1 argument\n\nUsage:  hyper rm [OPTIONS] CONTAINER [CONTAINER...]\n\nRun 'hyper rm --help' for more information"
        );
        assert_eq!(
            said(&["exec", "a"]).message.lines().nth(2),
            Some("Usage:  hyper exec [OPTIONS] CONTAINER COMMAND [ARG...]")
        );
        assert_eq!(
            said(&["port"]).message.lines().nth(2),
            Some("Usage:  hyper port CONTAINER [PRIVATE_PORT[/PROTO]]")
        );
    }

    #[test]
    fn switches_take_values() {
        for (args, all, quiet) in [
            (&["ps", "-aq"][..], true, true),
            (&["ps", "--all=true", "-q"], true, true),
            (&["ps", "-qa=false"], false, true),
            (&["ps", "--all=0", "-q=T"], false, true),
            (&["ps", "-a", "--quiet=FALSE"], true, false),
        ] {
            let args: Vec<String> = ["hyper"]
                .iter()
                .chain(args)
                .map(|arg| (*arg).to_owned())
                .collect();
            let cli = parse(&args).unwrap_or_else(|error| panic!("{args:?}: {error}"));
            let crate::cli::Command::Container(command) = cli.command else {
                panic!("{args:?}")
            };
            let crate::cli::ContainerCommand::Ps(ps) = *command else {
                panic!("{args:?}")
            };
            assert_eq!((ps.all, ps.quiet), (all, quiet), "{args:?}");
        }
    }
}
