//! Runs nft scripts. Each is one transaction.

use std::{
    io::{self, Write},
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::netns::Namespace;

/// Applies `script` in `namespace`, all of it or nothing.
pub(crate) fn apply(namespace: &Namespace, script: &str) -> io::Result<()> {
    nft(namespace, &["-f", "-"], script).map(drop)
}

/// Whether `namespace` has the table.
pub(crate) fn has_table(namespace: &Namespace, family: &str, table: &str) -> io::Result<bool> {
    let want = format!("table {family} {table}");
    Ok(nft(namespace, &["list", "tables"], "")?
        .lines()
        .any(|line| line == want))
}

/// Names of the table's chains and sets; none if there is no such table.
pub(crate) fn names(
    namespace: &Namespace,
    family: &str,
    table: &str,
) -> io::Result<(Vec<String>, Vec<String>)> {
    let list = |kind: &str, what: &str| {
        let text = nft(namespace, &["-t", "-j", "list", what, family], "")?;
        let listed: Value = serde_json::from_str(&text)?;
        let names = listed["nftables"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|entry| &entry[kind])
            .filter(|entry| entry["table"] == table)
            .filter_map(|entry| entry["name"].as_str().map(str::to_owned));
        io::Result::Ok(names.collect())
    };
    Ok((list("chain", "chains")?, list("set", "sets")?))
}

fn nft(namespace: &Namespace, arguments: &[&str], input: &str) -> io::Result<String> {
    namespace.run(|| {
        let mut child = Command::new("nft")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("start nft: {error}")))?;
        // nft reads all of its input before it writes: no deadlock.
        let written = child
            .stdin
            .take()
            .map_or(Ok(()), |mut pipe| pipe.write_all(input.as_bytes()));
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            let message = message.chars().take(2000).collect::<String>();
            return Err(io::Error::other(format!(
                "nft {}: {}",
                output.status,
                message.trim()
            )));
        }
        written?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    })
}
