//! QEMU's monitor, as far as saving and restoring a bare VM needs it.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A VMM that answers nothing for so long is broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a monitor.
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    /// How the last migration that was told of stands: that may come before an answer.
    migration: Option<String>,
}

impl Qmp {
    /// Greets, and leaves the mode in which nothing else is allowed.
    pub(crate) fn open(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
            migration: None,
        };
        qmp.read()?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let count = self
            .stream
            .read_line(&mut line)
            .context("the bare VMM does not answer")?;
        if count == 0 {
            bail!("the bare VMM has ended");
        }
        let message: Value = serde_json::from_str(&line)?;
        if message["event"] == "MIGRATION" {
            self.migration = message["data"]["status"].as_str().map(str::to_owned);
        }
        Ok(message)
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.stream
            .get_mut()
            .write_all(request.to_string().as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            // An event.
        }
    }

    /// Memory stays where it is; the end of a migration is told.
    pub(crate) fn prepare_migration(&mut self) -> Result<()> {
        let on = |name: &str| json!({"capability": name, "state": true});
        let capabilities = json!({"capabilities": [on("x-ignore-shared"), on("events")]});
        self.execute("migrate-set-capabilities", &capabilities)?;
        Ok(())
    }

    /// Waits for the end of a migration.
    pub(crate) fn migrated(&mut self) -> Result<()> {
        loop {
            match self.migration.as_deref() {
                Some("completed") => return Ok(()),
                Some("failed") => bail!("the migration of the bare VM has failed"),
                _ => self.read()?,
            };
        }
    }
}
