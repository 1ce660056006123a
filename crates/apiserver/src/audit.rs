//! The audit log: a line of JSON for each request, an `audit.k8s.io/v1` Event at the level Metadata.
//!
//! Requests that last (watches, logs, execs) are written when their answer begins, others when it is
//! ready. A request waits for its place in the log: nothing is lost when the disk is slow.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use http::{HeaderValue, Request, Response, header};
use hypernetes_identity::User;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::{body::ApiBody, config::Clock, listener::PeerAddress, request_info::RequestInfo};

/// Events that may wait for the disk.
const WAITING: usize = 4096;
const MIB: u64 = 1024 * 1024;

/// Where the audit log goes, and how it is kept from growing for ever. The names and the meaning of
/// zero are those of kube-apiserver's flags.
#[derive(Debug, Clone)]
pub struct AuditOptions {
    /// The file; `-` is standard output.
    pub path: PathBuf,
    /// MiB after which a new file is begun; 0 is 100.
    pub max_size: u64,
    /// How many old files are kept; 0 is all.
    pub max_backups: usize,
    /// Days that old files are kept; 0 is for ever.
    pub max_age: u64,
}

/// Takes events.
#[derive(Debug)]
pub(crate) struct AuditLog {
    queue: mpsc::Sender<String>,
    clock: Clock0,
}

/// A clock that can be shown.
#[derive(Clone)]
struct Clock0(Clock);

impl std::fmt::Debug for Clock0 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

/// What is known of a request before it is served, and what is found out meanwhile.
#[derive(Debug)]
pub(crate) struct Record {
    id: String,
    received: Timestamp,
    uri: String,
    agent: String,
    source: Option<String>,
    caller: OnceLock<User>,
    impersonated: OnceLock<User>,
}

impl Record {
    /// Who sent the request.
    pub(crate) fn called_by(&self, user: &User) {
        self.caller.get_or_init(|| user.clone());
    }

    /// As whom it is treated.
    pub(crate) fn acts_as(&self, user: &User) {
        if self.caller.get() != Some(user) {
            self.impersonated.get_or_init(|| user.clone());
        }
    }
}

fn user_value(user: &User) -> Value {
    let mut out = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        out["uid"] = user.uid.as_str().into();
    }
    if !user.extra.is_empty() {
        out["extra"] = json!(user.extra);
    }
    out
}

impl AuditLog {
    /// Opens the log.
    pub(crate) fn open(options: AuditOptions, clock: Clock) -> io::Result<Self> {
        let mut file = RotatedFile::open(options, clock.clone())?;
        let (queue, mut events) = mpsc::channel::<String>(WAITING);
        std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || {
                while let Some(line) = events.blocking_recv() {
                    if let Err(error) = file.write(&line) {
                        tracing::error!(%error, "an audit event could not be written");
                    }
                }
            })?;
        Ok(Self {
            queue,
            clock: Clock0(clock),
        })
    }

    /// Begins the record of a request.
    pub(crate) fn record(&self, request: &Request<ApiBody>) -> Record {
        let agent = request.headers().get(header::USER_AGENT);
        Record {
            id: uuid::Uuid::new_v4().to_string(),
            received: (self.clock.0)(),
            uri: request
                .uri()
                .path_and_query()
                .map_or_else(String::new, ToString::to_string),
            agent: agent.map_or_else(String::new, |value| {
                String::from_utf8_lossy(value.as_bytes()).into_owned()
            }),
            source: request
                .extensions()
                .get::<PeerAddress>()
                .map(|address| address.0.ip().to_string()),
            caller: OnceLock::new(),
            impersonated: OnceLock::new(),
        }
    }

    /// Writes the record of a request that has been answered, and tells the client its name.
    pub(crate) async fn answered(
        &self,
        record: Record,
        info: &RequestInfo,
        long_running: bool,
        response: &mut Response<ApiBody>,
    ) {
        if let Ok(id) = HeaderValue::from_str(&record.id) {
            response.headers_mut().insert("audit-id", id);
        }
        let code = response.status().as_u16();
        let time = |time: Timestamp| time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
        let nobody = User::default();
        let mut event = json!({
            "kind": "Event",
            "apiVersion": "audit.k8s.io/v1",
            "level": "Metadata",
            "auditID": record.id,
            "stage": if long_running { "ResponseStarted" } else { "ResponseComplete" },
            "requestURI": record.uri,
            "verb": info.verb,
            "user": user_value(record.caller.get().unwrap_or(&nobody)),
            "sourceIPs": record.source.iter().collect::<Vec<_>>(),
            "userAgent": record.agent,
            "responseStatus": {"metadata": {}, "code": code},
            "requestReceivedTimestamp": time(record.received),
            "stageTimestamp": time((self.clock.0)()),
        });
        if let Some(user) = record.impersonated.get() {
            event["impersonatedUser"] = user_value(user);
        }
        if info.is_resource {
            let mut object = json!({"resource": info.resource, "apiVersion": info.version});
            for (key, value) in [
                ("namespace", &info.namespace),
                ("name", &info.name),
                ("apiGroup", &info.group),
                ("subresource", &info.subresource),
            ] {
                if !value.is_empty() {
                    object[key] = value.as_str().into();
                }
            }
            event["objectRef"] = object;
        }
        event["annotations"] = json!({"authorization.k8s.io/decision": match code {
            401 | 403 => "forbid",
            _ => "allow",
        }});
        if self.queue.send(event.to_string()).await.is_err() {
            tracing::error!("the audit log has ended");
        }
    }
}

/// A file that is put aside when it is large.
struct RotatedFile {
    options: AuditOptions,
    clock: Clock,
    /// `None`: standard output.
    file: Option<File>,
    size: u64,
}

impl RotatedFile {
    fn open(options: AuditOptions, clock: Clock) -> io::Result<Self> {
        let (file, size) = if options.path == Path::new("-") {
            (None, 0)
        } else {
            let file = append(&options.path)?;
            let size = file.metadata()?.len();
            (Some(file), size)
        };
        Ok(Self {
            options,
            clock,
            file,
            size,
        })
    }

    fn write(&mut self, line: &str) -> io::Result<()> {
        let line = format!("{line}\n");
        let limit = match self.options.max_size {
            0 => 100 * MIB,
            size => size.saturating_mul(MIB),
        };
        if self.file.is_some() && self.size > 0 && self.size + line.len() as u64 > limit {
            self.rotate()?;
        }
        self.size += line.len() as u64;
        match &mut self.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stdout().lock().write_all(line.as_bytes()),
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        let path = &self.options.path;
        let stamp = (self.clock)().strftime("%Y-%m-%dT%H-%M-%S.%3f").to_string();
        let (stem, ending) = names(path);
        let mut aside = path.with_file_name(format!("{stem}-{stamp}{ending}"));
        // Two within a millisecond must not become one.
        for number in 1.. {
            if !aside.exists() {
                break;
            }
            aside = path.with_file_name(format!("{stem}-{stamp}.{number}{ending}"));
        }
        std::fs::rename(path, &aside)?;
        self.file = Some(append(path)?);
        self.size = 0;
        self.clean()
    }

    /// Removes old files: those beyond the number, and those beyond the age.
    fn clean(&self) -> io::Result<()> {
        let (stem, ending) = names(&self.options.path);
        let directory = match self.options.path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let mut old: Vec<(String, PathBuf)> = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let stamp = name
                .strip_prefix(&format!("{stem}-"))
                .and_then(|rest| rest.strip_suffix(&ending));
            if let Some(stamp) = stamp
                && stamp.starts_with(|c: char| c.is_ascii_digit())
            {
                old.push((stamp.to_owned(), entry.path()));
            }
        }
        old.sort();
        old.reverse();
        let age = Duration::from_secs(self.options.max_age.saturating_mul(24 * 3600));
        let oldest = jiff::SignedDuration::try_from(age)
            .ok()
            .and_then(|age| (self.clock)().checked_sub(age).ok())
            .map(|time| time.strftime("%Y-%m-%dT%H-%M-%S").to_string());
        for (index, (stamp, path)) in old.iter().enumerate() {
            let many = self.options.max_backups > 0 && index >= self.options.max_backups;
            let aged = self.options.max_age > 0 && oldest.as_ref().is_some_and(|o| stamp < o);
            if many || aged {
                std::fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// The file's name without its ending, and the ending with its dot.
fn names(path: &Path) -> (String, String) {
    let text = |part: Option<&std::ffi::OsStr>| {
        part.map_or_else(String::new, |part| part.to_string_lossy().into_owned())
    };
    let ending = text(path.extension());
    let ending = if ending.is_empty() {
        ending
    } else {
        format!(".{ending}")
    };
    (text(path.file_stem()), ending)
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_large_file_is_put_aside_and_the_oldest_go() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.log");
        let options = AuditOptions {
            path: path.clone(),
            max_size: 1,
            max_backups: 2,
            max_age: 0,
        };
        let mut file = RotatedFile::open(options, Arc::new(Timestamp::now)).unwrap();
        let line = "x".repeat(400 * 1024);
        for _ in 0..10 {
            file.write(&line).unwrap();
        }
        let mut names: Vec<String> = std::fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names.len(), 3, "{names:?}");
        assert!(names[0].starts_with("audit-2"), "{names:?}");
        assert_eq!(names[2], "audit.log");
        assert_eq!(
            std::fs::metadata(&path).unwrap().len(),
            2 * (400 * 1024 + 1)
        );
    }
}
