//! What the driver remembers across restarts: one JSON file per network and per lease.
//!
//! A file is replaced by rename after it and before its directory are synced, so that a crash
//! leaves the old or the new content, never a part. An effect on the system follows its record;
//! a record goes away after its effects.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Lease, NameRecord, NetworkServices, NetworkSpec, netns::DirBefore};

/// A network that exists or is being made or removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NetworkRecord {
    /// As asked for.
    pub(crate) spec: NetworkSpec,
    /// Its /31 of the pool.
    pub(crate) transit: Ipv4Net,
    /// Deletion has begun.
    pub(crate) deleting: bool,
    /// What its pods can resolve.
    pub(crate) names: Vec<NameRecord>,
    /// What its pods reach by services.
    #[serde(default)]
    pub(crate) services: NetworkServices,
}

/// What the host was like before the first network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostRecord {
    /// `net.ipv4.ip_forward`.
    pub(crate) ip_forward: String,
    /// `/run/netns`.
    pub(crate) netns_dir: DirBefore,
}

/// The state directory.
#[derive(Debug)]
pub(crate) struct Records {
    root: PathBuf,
}

impl Records {
    /// Opens or makes the directory.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        for part in ["networks", "leases"] {
            open_dir(&root.join(part))?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    pub(crate) fn networks(&self) -> io::Result<Vec<NetworkRecord>> {
        self.list("networks")
    }

    pub(crate) fn put_network(&self, hash: &str, record: &NetworkRecord) -> io::Result<()> {
        self.put("networks", hash, record)
    }

    pub(crate) fn remove_network(&self, hash: &str) -> io::Result<()> {
        self.remove("networks", hash)
    }

    pub(crate) fn leases(&self) -> io::Result<Vec<Lease>> {
        self.list("leases")
    }

    pub(crate) fn put_lease(&self, lease: &Lease) -> io::Result<()> {
        self.put("leases", lease.sandbox.as_str(), lease)
    }

    pub(crate) fn remove_lease(&self, lease: &Lease) -> io::Result<()> {
        self.remove("leases", lease.sandbox.as_str())
    }

    pub(crate) fn host(&self) -> io::Result<Option<HostRecord>> {
        match read(&self.root.join("host.json")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    pub(crate) fn put_host(&self, record: &HostRecord) -> io::Result<()> {
        self.put("", "host", record)
    }

    pub(crate) fn remove_host(&self) -> io::Result<()> {
        self.remove("", "host")
    }

    fn list<T: DeserializeOwned>(&self, dir: &str) -> io::Result<Vec<T>> {
        list(&self.root.join(dir))
    }

    fn put(&self, dir: &str, name: &str, value: &impl Serialize) -> io::Result<()> {
        put(&self.root.join(dir), name, value)
    }

    fn remove(&self, dir: &str, name: &str) -> io::Result<()> {
        remove(&self.root.join(dir), name)
    }
}

/// Opens or makes a directory of records, and forgets what was half written.
pub(crate) fn open_dir(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "tmp") {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// All records of a directory.
pub(crate) fn list<T: DeserializeOwned>(dir: &Path) -> io::Result<Vec<T>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            all.push(read(&path)?);
        }
    }
    Ok(all)
}

/// Makes or replaces a record.
pub(crate) fn put(dir: &Path, name: &str, value: &impl Serialize) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.tmp"));
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(format!("{name}.json")))?;
    File::open(dir)?.sync_all()
}

/// Forgets a record, if there is one.
pub(crate) fn remove(dir: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(dir.join(format!("{name}.json"))) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    File::open(dir)?.sync_all()
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let bytes = fs::read(path)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{}: {error}", path.display()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_written_files_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let host = HostRecord {
            ip_forward: "0".to_owned(),
            netns_dir: DirBefore::Absent,
        };
        records.put_host(&host).unwrap();
        fs::write(dir.path().join("leases/x.tmp"), b"{\"sand").unwrap();
        let records = Records::open(dir.path()).unwrap();
        assert_eq!(records.host().unwrap(), Some(host));
        assert_eq!(records.leases().unwrap(), []);
        records.remove_host().unwrap();
        records.remove_host().unwrap();
        assert_eq!(records.host().unwrap(), None);
    }

    #[test]
    fn foreign_content_is_an_error_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        fs::write(dir.path().join("leases/x.json"), b"{}").unwrap();
        let error = records.leases().unwrap_err().to_string();
        assert!(error.contains("leases/x.json"), "{error}");
    }
}
