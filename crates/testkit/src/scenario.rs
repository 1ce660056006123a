//! Scripted command lines with their expected output and exit code.
//!
//! A scenario is a text file:
//!
//! ```text
//! # comment
//! $ kubectl create configmap a --from-literal=k=v
//! configmap/a created
//!
//! $ kubectl get configmap b
//! Error from server (NotFound): configmaps "b" not found
//! ? 1
//!
//! @ 60
//! $ kubectl get pod web
//! NAME   READY   STATUS    RESTARTS   AGE
//! web    1/1     Running   0          {{*}}
//! ```
//!
//! `$` starts a command (bash; indented lines below it belong to it, for here-documents), lines after
//! it are its expected output, standard error after standard output; `{{*}}` matches any text within
//! a line, `...` any number of lines; `? N` is the exit code, 0 if absent; `@ SECONDS` before a
//! command repeats it until it is as expected. Runs of blanks match any run of blanks. Commands run in the
//! directory that the variable `SCRATCH` names, if it is set.

use std::{
    collections::BTreeMap,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use regex::Regex;

use crate::{
    Daemon, DaemonOptions, KUBECTL_VERSIONS, Registry, kubectl, release_dir, workspace_root,
};

/// A parsed scenario.
#[derive(Debug)]
pub struct Scenario {
    name: String,
    steps: Vec<Step>,
}

#[derive(Debug, Default)]
struct Step {
    line: usize,
    command: String,
    expected: Vec<String>,
    code: i32,
    within: Option<Duration>,
}

/// What a run of a scenario did.
#[derive(Debug)]
pub struct ScenarioReport {
    /// Commands that were as expected.
    pub passed: usize,
    /// A text for each that was not.
    pub failures: Vec<String>,
}

impl Scenario {
    /// Reads a scenario file.
    pub fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path)
            .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
        Self {
            name: path.display().to_string(),
            steps: parse(&text),
        }
    }

    /// Number of commands.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// True if there is no command.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Runs all commands, of which there are `at_least` so many, and fails the test with what was not as
    /// expected.
    ///
    /// # Panics
    /// If there are fewer, or one is not as expected.
    pub fn must_pass(&self, at_least: usize, vars: &BTreeMap<String, String>) {
        assert!(self.len() >= at_least, "{} commands", self.len());
        let report = self.run(vars);
        println!(
            "{}: {} of {} commands as expected",
            self.name,
            report.passed,
            self.len()
        );
        assert!(
            report.failures.is_empty(),
            "{}",
            report.failures.join("\n\n")
        );
    }

    /// Runs all commands in order with `vars` in the environment.
    pub fn run(&self, vars: &BTreeMap<String, String>) -> ScenarioReport {
        let mut report = ScenarioReport {
            passed: 0,
            failures: Vec::new(),
        };
        for step in &self.steps {
            let end = step.within.map(|within| Instant::now() + within);
            loop {
                match step.attempt(vars) {
                    Ok(()) => {
                        report.passed += 1;
                        break;
                    }
                    Err(_) if end.is_some_and(|end| Instant::now() < end) => {
                        std::thread::sleep(Duration::from_millis(200));
                    }
                    Err(why) => {
                        report
                            .failures
                            .push(format!("{}:{}: {why}", self.name, step.line));
                        break;
                    }
                }
            }
        }
        report
    }
}

/// Runs `tests/scenarios/NAME.txt`, of at least so many commands, with `hyper` and kubectl as the administrator of a
/// tenant whose pods are in `cidr`. Returns the daemon, which had no other tenant.
///
/// # Panics
/// If not all is as expected.
pub fn must_pass_as_tenant(name: &str, cidr: &str, at_least: usize) -> Daemon {
    let file = workspace_root().join(format!("tests/scenarios/{name}.txt"));
    let scenario = Scenario::read(&file);
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let kubeconfig = daemon.tenant("acme", cidr);
    let path = daemon.path_with(&[
        ("kubectl", &kubectl(KUBECTL_VERSIONS[0])),
        ("hyper", &release_dir().join("hyper")),
    ]);
    let work = daemon.dir().join("work");
    std::fs::create_dir(&work).unwrap();
    let vars = [
        ("KUBECONFIG", kubeconfig.display().to_string()),
        ("PATH", path),
        ("HOME", daemon.dir().display().to_string()),
        ("WORK", work.display().to_string()),
        ("BOX", registry.image("busybox:1")),
        ("REGISTRY", registry.address().to_owned()),
        ("NO_COLOR", "1".to_owned()),
    ];
    scenario.must_pass(
        at_least,
        &vars.map(|(name, value)| (name.to_owned(), value)).into(),
    );
    daemon
}

impl Step {
    fn attempt(&self, vars: &BTreeMap<String, String>) -> Result<(), String> {
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=5", "240", "bash", "-c", &self.command])
            .envs(vars)
            .stdin(Stdio::null());
        if let Some(dir) = vars.get("SCRATCH") {
            command.current_dir(dir);
        }
        let output = command
            .output()
            .map_err(|error| format!("cannot run bash: {error}"))?;
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        let code = output.status.code().unwrap_or(-1);
        let expected: Vec<String> = self.expected.iter().map(|line| fill(line, vars)).collect();
        let actual: Vec<&str> = text.lines().map(str::trim_end).collect();
        if code != self.code || !matches(&expected, &actual) {
            return Err(format!(
                "$ {}\n--- expected (exit {})\n{}\n--- got (exit {code})\n{}",
                self.command,
                self.code,
                expected.join("\n"),
                actual.join("\n")
            ));
        }
        Ok(())
    }
}

/// Replaces `${NAME}` in expected output.
fn fill(line: &str, vars: &BTreeMap<String, String>) -> String {
    vars.iter().fold(line.to_owned(), |line, (name, value)| {
        line.replace(&format!("${{{name}}}"), value)
    })
}

fn parse(text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut within = None;
    let mut in_command = false;
    for (index, line) in text.lines().enumerate() {
        if let Some(command) = line.strip_prefix("$ ") {
            steps.push(Step {
                line: index + 1,
                command: command.to_owned(),
                within: within.take(),
                ..Step::default()
            });
            in_command = true;
        } else if let Some(seconds) = line.strip_prefix("@ ") {
            within = Some(Duration::from_secs(
                seconds.trim().parse().expect("@ SECONDS"),
            ));
        } else if line.starts_with('#') && !in_command {
            // A comment ends the step before it.
        } else if let Some(step) = steps.last_mut() {
            if let Some(rest) = line.strip_prefix("  ").filter(|_| in_command) {
                step.command.push('\n');
                step.command.push_str(rest);
                continue;
            }
            in_command = false;
            if let Some(code) = line.strip_prefix("? ") {
                step.code = code.trim().parse().expect("? EXIT-CODE");
            } else if line.starts_with("# ") {
            } else {
                step.expected.push(line.trim_end().to_owned());
            }
        }
    }
    for step in &mut steps {
        while step.expected.last().is_some_and(String::is_empty) {
            step.expected.pop();
        }
    }
    steps
}

fn matches(expected: &[String], actual: &[&str]) -> bool {
    match expected.split_first() {
        None => actual.iter().all(|line| line.is_empty()),
        Some((line, rest)) if line == "..." => {
            (0..=actual.len()).any(|skip| matches(rest, &actual[skip..]))
        }
        Some((line, rest)) => match actual.split_first() {
            Some((first, others)) => line_matches(line, first) && matches(rest, others),
            None => false,
        },
    }
}

fn line_matches(expected: &str, actual: &str) -> bool {
    let squeeze = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let pattern = squeeze(expected)
        .split("{{*}}")
        .map(regex::escape)
        .collect::<Vec<_>>()
        .join(".*");
    Regex::new(&format!("^{pattern}$"))
        .expect("an escaped pattern")
        .is_match(&squeeze(actual))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(text: &str) -> ScenarioReport {
        Scenario {
            name: "test".into(),
            steps: parse(text),
        }
        .run(&BTreeMap::from([("NAME".into(), "value".into())]))
    }

    #[test]
    fn output_and_exit_code_must_be_as_written() {
        let report = run("$ echo a   b\na b\n\n$ echo x; exit 3\nx\n? 3\n");
        assert_eq!(
            (report.passed, report.failures.len()),
            (2, 0),
            "{:?}",
            report.failures
        );
        assert_eq!(run("$ echo a\nb\n").failures.len(), 1);
        assert_eq!(run("$ false\n").failures.len(), 1);
        assert_eq!(
            run("$ echo more\n").failures.len(),
            1,
            "output that nobody expected"
        );
    }

    #[test]
    fn wildcards_and_variables() {
        let text =
            "$ printf '1\\n2\\n3\\nend 5s\\n'\n1\n...\nend {{*}}s\n\n$ echo $NAME\n${NAME}\n";
        let report = run(text);
        assert!(report.failures.is_empty(), "{:?}", report.failures);
    }

    #[test]
    fn commands_may_have_here_documents() {
        let report = run("$ cat <<EOF\n  one\n  two\n  EOF\none\ntwo\n");
        assert!(report.failures.is_empty(), "{:?}", report.failures);
    }
}
