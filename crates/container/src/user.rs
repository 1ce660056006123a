//! Users and groups from the image's own files. The C library's databases are never asked: in a
//! static binary they load shared objects, and those would be the image's.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use crate::spec::UserSpec;

/// Largest passwd or group file that is read.
const MAX_FILE: u64 = 4 * 1024 * 1024;
/// Most supplementary groups.
const MAX_GROUPS: usize = 1024;

/// A user that was looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups, sorted, without the primary one.
    pub groups: Vec<u32>,
    /// Home directory, if the image knows one.
    pub home: Option<String>,
}

/// Why a user cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum UserError {
    /// No such user.
    #[error("no user {0} in the image's /etc/passwd")]
    NoUser(String),
    /// No such group.
    #[error("no group {0} in the image's /etc/group")]
    NoGroup(String),
    /// 2^32-1 means "no change" to the kernel, which would leave root.
    #[error("{0} is no user or group id")]
    BadId(u32),
    /// More than can be set.
    #[error("more than {MAX_GROUPS} supplementary groups")]
    TooManyGroups,
}

/// Reads a passwd or group file: empty if missing, cut off at a limit, never blocking on a FIFO.
pub(crate) fn read_database(path: &Path) -> io::Result<String> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn users(passwd: &str) -> impl Iterator<Item = Passwd<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(Passwd {
            name,
            uid,
            gid,
            home,
        })
    })
}

fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

/// Finds out who is meant, from the contents of the image's two files.
pub fn resolve(spec: &UserSpec, passwd: &str, group: &str) -> Result<Identity, UserError> {
    let (mut uid, mut gid) = (spec.uid, spec.gid);
    let known;
    if let Some(text) = spec.username.as_deref().filter(|text| !text.is_empty()) {
        let (user, wanted_group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (text, None),
        };
        let number = user.parse::<u32>().ok();
        known = users(passwd)
            .find(|entry| entry.name == user)
            .or_else(|| users(passwd).find(|entry| Some(entry.uid) == number));
        (uid, gid) = match (&known, number) {
            (Some(entry), _) => (entry.uid, entry.gid),
            (None, Some(number)) => (number, 0),
            (None, None) => return Err(UserError::NoUser(user.into())),
        };
        if let Some(wanted) = wanted_group {
            let found = groups(group)
                .find(|(name, ..)| *name == wanted)
                .map(|(_, gid, _)| gid);
            gid = found
                .or_else(|| wanted.parse().ok())
                .ok_or_else(|| UserError::NoGroup(wanted.into()))?;
        }
        gid = spec.run_as_group.unwrap_or(gid);
    } else {
        known = users(passwd).find(|entry| entry.uid == uid);
    }

    let mut all: BTreeSet<u32> = spec.additional_gids.iter().copied().collect();
    if let Some(entry) = known.as_ref().filter(|_| !spec.only_additional_gids) {
        let member = |members: &str| members.split(',').any(|member| member.trim() == entry.name);
        all.extend(
            groups(group)
                .filter(|(.., members)| member(members))
                .map(|(_, gid, _)| gid),
        );
    }
    all.remove(&gid);
    if all.len() > MAX_GROUPS {
        return Err(UserError::TooManyGroups);
    }
    if let Some(bad) = [uid, gid]
        .into_iter()
        .chain(all.iter().copied())
        .find(|id| *id == u32::MAX)
    {
        return Err(UserError::BadId(bad));
    }
    let home = known
        .map(|entry| entry.home.to_owned())
        .filter(|home| home.starts_with('/'));
    Ok(Identity {
        uid,
        gid,
        groups: all.into_iter().collect(),
        home,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\n1000:x:7:8::/odd:\n";
    const GROUP: &str = "root:x:0:\nweb:x:33:\nssl:x:50:web,root\nlogs:x:51:x, web\n";

    fn of(username: &str) -> Result<Identity, UserError> {
        let spec = UserSpec {
            username: Some(username.into()),
            ..Default::default()
        };
        resolve(&spec, PASSWD, GROUP)
    }

    fn ids(username: &str) -> (u32, u32, Vec<u32>) {
        let identity = of(username).unwrap();
        (identity.uid, identity.gid, identity.groups)
    }

    #[test]
    fn names_and_numbers_are_found() {
        assert_eq!(ids("web"), (33, 33, vec![50, 51]));
        assert_eq!(ids("33"), (33, 33, vec![50, 51]));
        assert_eq!(ids("web:ssl"), (33, 50, vec![51]));
        assert_eq!(ids("web:77"), (33, 77, vec![50, 51]));
        assert_eq!(ids("4242"), (4242, 0, vec![]));
        assert_eq!(ids("4242:4343"), (4242, 4343, vec![]));
        assert_eq!(
            ids("1000"),
            (7, 8, vec![]),
            "a user may be named like a number"
        );
        assert_eq!(of("web").unwrap().home.as_deref(), Some("/var/www"));
        assert_eq!(of("nobody"), Err(UserError::NoUser("nobody".into())));
        assert_eq!(of("web:nogroup"), Err(UserError::NoGroup("nogroup".into())));
    }

    #[test]
    fn the_id_that_means_no_change_is_refused() {
        assert_eq!(of("4294967295"), Err(UserError::BadId(u32::MAX)));
        assert_eq!(
            of("4294967296"),
            Err(UserError::NoUser("4294967296".into()))
        );
        let spec = UserSpec {
            additional_gids: vec![u32::MAX],
            ..Default::default()
        };
        assert_eq!(resolve(&spec, "", ""), Err(UserError::BadId(u32::MAX)));
    }

    #[test]
    fn the_image_s_groups_can_be_left_out() {
        let spec = UserSpec {
            username: Some("web".into()),
            additional_gids: vec![5],
            only_additional_gids: true,
            ..Default::default()
        };
        let identity = resolve(&spec, PASSWD, GROUP).unwrap();
        assert_eq!((identity.gid, identity.groups), (33, vec![5]));
    }

    #[test]
    fn numeric_users_get_their_groups_too() {
        let spec = UserSpec {
            uid: 33,
            gid: 9,
            additional_gids: vec![5, 9],
            ..Default::default()
        };
        let identity = resolve(&spec, PASSWD, GROUP).unwrap();
        assert_eq!(
            (identity.uid, identity.gid, identity.groups),
            (33, 9, vec![5, 50, 51])
        );
        let spec = UserSpec {
            username: Some("web".into()),
            run_as_group: Some(5),
            ..Default::default()
        };
        assert_eq!(resolve(&spec, PASSWD, GROUP).unwrap().gid, 5);
    }
}
