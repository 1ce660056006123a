//! Disks that the writer makes, read back by the kernel and by erofs-utils.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code")]

mod support;

use std::{collections::BTreeMap, fs};

use hypernetes_image::{ImageError, Limits};
use proptest::prelude::*;
use support::{
    Member, Mounted, Seen, dir, file, fsck, hard_link, look, symlink, tarball, write_image,
    write_image_with,
};
use tar::EntryType;
use tempfile::tempdir;

fn rule(members: &[Member]) -> String {
    rule_with(members, &Limits::default())
}

fn rule_with(members: &[Member], limits: &Limits) -> String {
    let dir = tempdir().unwrap();
    match write_image_with(&tarball(members), &dir.path().join("disk"), limits) {
        Err(ImageError::Invalid { what, rule }) => format!("{what}: {rule}"),
        other => panic!("not refused: {other:?}"),
    }
}

fn sample() -> Vec<Member> {
    let with = |member: Member, mode, uid, gid| Member {
        mode,
        uid,
        gid,
        ..member
    };
    let mut members = vec![
        dir("./"),
        dir("etc/"),
        file("etc/empty", b""),
        file("/etc/absolute", b"abs"),
        file("./etc/./dotted", b"dot"),
        file("etc/block", &[7; 4096]),
        file("etc/over", &[8; 4097]),
        file("etc/large", &vec![9; 300_001]),
        hard_link("etc/same", "./etc/large"),
        hard_link("bin-same", "/etc/large"),
        with(file("usr/bin/su", b"elf"), 0o4755, 0, 0),
        with(dir("tmp"), 0o1777, 0, 0),
        with(file("home/big", b"ids"), 0o600, 4_000_000_000, 70_000),
        symlink("link", "../../etc/passwd"),
        symlink("long", &"a/".repeat(2000)),
        Member {
            device: (1, 3),
            ..Member::new("dev/null", EntryType::Char)
        },
        Member {
            device: (259, 0x1_2345),
            ..Member::new("dev/disk", EntryType::Block)
        },
        Member::new("run/pipe", EntryType::Fifo),
        Member {
            mtime: 1,
            ..file("old", b"old")
        },
        Member {
            xattrs: vec![
                ("user.a".to_owned(), b"1".to_vec()),
                ("user.nl".to_owned(), b"x\ny\0z".to_vec()),
                ("trusted.t".to_owned(), vec![5; 300]),
                ("com.apple.provenance".to_owned(), vec![1]),
                (
                    "trusted.overlay.redirect".to_owned(),
                    b"/elsewhere".to_vec(),
                ),
            ],
            ..file("attributes", b"with")
        },
        Member {
            xattrs: vec![("user.big".to_owned(), vec![3; 40_000])],
            ..file("big-xattr", b"z")
        },
        Member {
            xattrs: vec![("trusted.d".to_owned(), vec![4; 3990])],
            ..symlink("crowded", &"t".repeat(200))
        },
    ];
    members.extend((0..1500).map(|i| file(&format!("many/{}{i}", "n".repeat(i % 200)), &[1; 3])));
    members.extend(
        [".a", "!first", "-dash", "+plus", "..c", "~last"].map(|n| file(&format!("odd/{n}"), b"")),
    );
    members
}

#[test]
fn the_kernel_sees_what_was_put_in() {
    let dir = tempdir().unwrap();
    let disk = dir.path().join("disk");
    let written = write_image(&tarball(&sample()), &disk).unwrap();
    assert_eq!(written.size, fs::metadata(&disk).unwrap().len());
    let extracted = dir.path().join("extracted");
    fsck(&disk, &extracted);
    let Some(mounted) = Mounted::new(&disk) else {
        return;
    };
    let seen = look(mounted.path());
    let get = |name: &str| {
        seen.get(name)
            .unwrap_or_else(|| panic!("{name} is missing"))
    };
    assert_eq!(
        seen.len() as u64,
        written.inodes + 2,
        "two names are hard links"
    );
    assert_eq!(get("etc/empty").content, b"");
    assert_eq!(get("etc/absolute").content, b"abs");
    assert_eq!(get("etc/dotted").content, b"dot");
    assert_eq!(get("etc/block").content, [7; 4096]);
    assert_eq!(get("etc/over").content, [8; 4097]);
    assert_eq!(get("etc/large").content, vec![9; 300_001]);
    assert_eq!(get("etc/same").content, vec![9; 300_001]);
    assert_eq!(get("etc/same").first, "bin-same");
    assert_eq!(get("etc/large").links, 3);
    assert_eq!(get("usr/bin/su").mode, 0o104_755);
    assert_eq!(get("tmp").mode, 0o041_777);
    assert_eq!(
        (get("home/big").uid, get("home/big").gid),
        (4_000_000_000, 70_000)
    );
    assert_eq!(get("link").content, b"../../etc/passwd");
    assert_eq!(get("long").content.len(), 4000);
    assert_eq!(
        (get("dev/null").mode, get("dev/null").device),
        (0o020_644, (1, 3))
    );
    assert_eq!(
        (get("dev/disk").mode, get("dev/disk").device),
        (0o060_644, (259, 0x1_2345))
    );
    assert_eq!(get("run/pipe").mode, 0o010_644);
    assert_eq!(
        (get("old").mtime, get("etc").mtime, get("run").mtime),
        (1, 1_700_000_000, 0)
    );
    let attributes = &get("attributes").xattrs;
    assert_eq!(attributes["user.nl"], b"x\ny\0z");
    assert_eq!(attributes["trusted.t"], [5; 300]);
    assert_eq!(attributes.len(), 3, "{:?}", attributes.keys());
    assert_eq!(get("big-xattr").xattrs["user.big"], vec![3; 40_000]);
    assert_eq!(get("big-xattr").content, b"z");
    assert_eq!(get("crowded").content, [b't'; 200]);
    assert_eq!(
        seen.keys().filter(|name| name.starts_with("many/")).count(),
        1500
    );
    for name in [".a", "!first", "-dash", "+plus", "..c", "~last"] {
        // Lookup by name, not listing: the entries must be in the order that the kernel searches.
        fs::symlink_metadata(mounted.path().join("odd").join(name)).unwrap();
    }
    for i in 0..1500 {
        let name = format!("many/{}{i}", "n".repeat(i % 200));
        assert_eq!(
            fs::read(mounted.path().join(&name)).unwrap(),
            [1; 3],
            "{name}"
        );
    }
}

#[test]
fn same_layer_same_bytes() {
    let dir = tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let tar = tarball(&sample());
    write_image(&tar, &a).unwrap();
    write_image(&tar, &b).unwrap();
    assert!(fs::read(a).unwrap() == fs::read(b).unwrap());
}

#[test]
fn whiteouts_speak_overlay() {
    let dir = tempdir().unwrap();
    let disk = dir.path().join("disk");
    let members = [
        file("a/.wh.gone", b""),
        file("b/.wh..wh..opq", b""),
        file("b/new", b"new"),
        file("c/.wh.d", b""),
        file("c/d/inside", b"made after the whiteout"),
        file("e/f", b"stays"),
        file("e/.wh.f", b""),
        file("g/h/inside", b"made before the whiteout"),
        file("g/.wh.h", b""),
        file(".wh..wh.plnk/1.2", b"bookkeeping"),
        file(".wh..wh.aufs", b"bookkeeping"),
    ];
    write_image(&tarball(&members), &disk).unwrap();
    let Some(mounted) = Mounted::new(&disk) else {
        return;
    };
    let seen = look(mounted.path());
    let opaque = |name: &str| {
        seen[name]
            .xattrs
            .get("trusted.overlay.opaque")
            .map(Vec::as_slice)
    };
    assert_eq!(
        (seen["a/gone"].mode & 0o170_000, seen["a/gone"].device),
        (0o020_000, (0, 0))
    );
    assert_eq!(opaque("b"), Some(b"y".as_slice()));
    assert_eq!(opaque("c/d"), Some(b"y".as_slice()));
    assert_eq!(opaque("g/h"), Some(b"y".as_slice()));
    assert_eq!((opaque("a"), opaque("g")), (None, None));
    assert_eq!(seen["e/f"].content, b"stays");
    assert!(
        !seen.keys().any(|name| name.contains(".wh.")),
        "{:?}",
        seen.keys()
    );
}

#[test]
fn overlayfs_obeys_the_marks() {
    let dir = tempdir().unwrap();
    let layers = [
        vec![
            file("a/gone", b"1"),
            file("a/stays", b"1"),
            file("b/old", b"1"),
            file("c/d/old", b"1"),
        ],
        vec![
            file("a/.wh.gone", b""),
            file("b/.wh..wh..opq", b""),
            file("b/new", b"2"),
            file("c/.wh.d", b""),
            file("c/d/new", b"2"),
        ],
    ];
    let mut mounted = Vec::new();
    for (i, members) in layers.iter().enumerate() {
        let disk = dir.path().join(i.to_string());
        write_image(&tarball(members), &disk).unwrap();
        let Some(disk) = Mounted::new(&disk) else {
            return;
        };
        mounted.push(disk);
    }
    let whole = Mounted::overlay(&mounted);
    let names: Vec<String> = look(whole.path()).into_keys().collect();
    assert_eq!(
        names,
        ["", "a", "a/stays", "b", "b/new", "c", "c/d", "c/d/new"]
    );
}

#[test]
fn later_entries_replace_earlier_ones() {
    let dir = tempdir().unwrap();
    let disk = dir.path().join("disk");
    let members = [
        file("f", b"first"),
        file("f", b"second"),
        support::dir("d"),
        file("d/in", b"kept"),
        Member {
            mode: 0o700,
            ..support::dir("d")
        },
        support::dir("was-dir"),
        file("was-dir/in", b"gone"),
        symlink("was-dir", "d"),
        symlink("was-link", "/"),
        support::dir("was-link"),
        file("was-link/in", b"here"),
        file("linked", b"kept by its other name"),
        hard_link("other", "linked"),
        file("linked", b"new"),
    ];
    write_image(&tarball(&members), &disk).unwrap();
    let Some(mounted) = Mounted::new(&disk) else {
        return;
    };
    let seen = look(mounted.path());
    assert_eq!(seen["f"].content, b"second");
    assert_eq!(
        (seen["d"].mode, seen["d/in"].content.as_slice()),
        (0o040_700, b"kept".as_slice())
    );
    assert_eq!(seen["was-dir"].content, b"d");
    assert!(!seen.contains_key("was-dir/in"));
    assert_eq!(seen["was-link/in"].content, b"here");
    assert_eq!(
        (seen["other"].content.as_slice(), seen["other"].links),
        (b"kept by its other name".as_slice(), 1)
    );
    assert_eq!(seen["linked"].content, b"new");
}

#[test]
fn names_that_climb_are_refused() {
    for name in ["../etc/passwd", "a/../../b", "a/..", "/..", "a/b/../c"] {
        assert!(rule(&[file(name, b"")]).contains("'..'"), "{name}");
        assert!(
            rule(&[file("x", b""), hard_link("y", name)]).contains("'..'"),
            "{name}"
        );
    }
    assert!(rule(&[file(&"n".repeat(256), b"")]).contains("255 bytes"));
    assert!(rule(&[file(&"long/".repeat(1000), b"")]).contains("4096 bytes"));
}

#[test]
fn links_are_never_followed() {
    let through = rule(&[symlink("escape", "/etc"), file("escape/passwd", b"x")]);
    assert_eq!(
        through,
        "escape/passwd: escape on its way is not a directory"
    );
    assert!(rule(&[file("f", b""), file("f/g", b"")]).contains("not a directory"));
    assert!(rule(&[symlink("s", ".."), hard_link("h", "s/../etc/shadow")]).contains("'..'"));
    assert!(rule(&[symlink("s", "/etc"), hard_link("h", "s/shadow")]).contains("s/shadow"));
}

#[test]
fn hard_links_stay_in_their_layer() {
    let refusal = rule(&[hard_link("h", "etc/shadow")]);
    assert_eq!(
        refusal,
        "h: its hard link target etc/shadow is not an earlier file of the same layer"
    );
    assert!(rule(&[hard_link("a", "b"), file("b", b"")]).contains("target b"));
    assert!(rule(&[dir("d"), hard_link("h", "d")]).contains("target d"));
    assert!(rule(&[file(".wh.w", b""), hard_link("h", "w")]).contains("target w"));
}

#[test]
fn whiteouts_name_a_file() {
    assert!(rule(&[file(".wh.", b"")]).contains("whiteout"));
    assert!(rule(&[file("a/.wh...", b"")]).contains("whiteout"));
    assert!(rule(&[symlink("/", "x")]).contains("root"));
}

#[test]
fn limits_hold() {
    let limits = Limits {
        max_entries: 10,
        ..Limits::default()
    };
    let eleven: Vec<_> = (0..11).map(|i| file(&i.to_string(), b"")).collect();
    assert!(rule_with(&eleven, &limits).contains("at most 10 entries"));
    // Directories that are only implied count.
    assert!(rule_with(&[file("1/2/3/4/5/6/7/8/9/10/11", b"")], &limits).contains("at most 10"));
    let limits = Limits {
        max_layer_size: 1000,
        ..Limits::default()
    };
    assert!(
        rule_with(&[file("a", &[0; 600]), file("b", &[0; 600])], &limits).contains("1000 bytes")
    );
    let fat = Member {
        xattrs: vec![("user.x".to_owned(), vec![0; 70_000])],
        ..file("fat", b"")
    };
    assert!(rule(&[fat]).contains("extended attributes"));
}

#[test]
fn a_sparse_file_counts_whole_and_takes_no_room() {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_path("sparse").unwrap();
    header.set_size(512);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.sparse[0].set_offset(1 << 30);
    gnu.sparse[0].set_length(512);
    gnu.set_real_size((1 << 30) + 512);
    header.set_cksum();
    let mut tar = header.as_bytes().to_vec();
    tar.extend([7; 512]);
    tar.extend([0; 1024]);
    let dir = tempdir().unwrap();
    let disk = dir.path().join("disk");
    write_image(&tar, &disk).unwrap();
    let meta = fs::metadata(&disk).unwrap();
    assert!(meta.len() > 1 << 30);
    assert!(std::os::unix::fs::MetadataExt::blocks(&meta) * 512 < 1 << 20);
    let limits = Limits {
        max_layer_size: 1 << 30,
        ..Limits::default()
    };
    assert!(write_image_with(&tar, &disk, &limits).is_err());
}

/// Any tree: directories first, then what is in them.
fn trees() -> impl Strategy<Value = Vec<Member>> {
    let names = proptest::collection::btree_set("[a-c.!~]{1,3}", 1..12).prop_map(|names| {
        names
            .into_iter()
            .filter(|n| n != "." && n != "..")
            .collect::<Vec<_>>()
    });
    let leaf = (
        0..5_u8,
        prop_oneof![
            Just(0_usize),
            1..50_usize,
            4090..4100_usize,
            8190..8200_usize
        ],
        0..0o10000_u32,
        prop_oneof![0..100_u64, 65_530..65_540_u64, Just(4_294_967_294)],
        prop_oneof![
            Just(0_u64),
            Just(1_700_000_000),
            any::<u32>().prop_map(u64::from)
        ],
        proptest::collection::vec(
            (
                "user\\.[a-z]{1,5}",
                proptest::collection::vec(any::<u8>(), 1..2000),
            ),
            0..3,
        ),
        proptest::sample::select(vec!["", "d1/", "d1/d2/", "d1/d2/d3/", "e/"]),
    );
    (names, proptest::collection::vec(leaf, 12)).prop_map(|(names, leaves)| {
        let mut members: Vec<Member> = ["d1", "d1/d2", "d1/d2/d3", "e"].map(dir).into();
        for (name, (kind, size, mode, id, mtime, xattrs, place)) in names.into_iter().zip(leaves) {
            let name = format!("{place}x{name}");
            let data: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let first_file = members
                .iter()
                .find(|m| m.kind == EntryType::Regular)
                .map(|m| m.name.clone());
            let xattrs: BTreeMap<_, _> = xattrs.into_iter().collect();
            let base = match (kind, first_file) {
                (0, _) => dir(&name),
                (1, _) => Member {
                    xattrs: Vec::new(),
                    ..symlink(&name, &"l".repeat(size.clamp(1, 4000)))
                },
                (2, Some(target)) => hard_link(&name, &target),
                _ => file(&name, &data),
            };
            let plain = matches!(base.kind, EntryType::Symlink | EntryType::Link);
            let xattrs = if plain {
                Vec::new()
            } else {
                xattrs.into_iter().collect()
            };
            members.push(Member {
                mode,
                uid: id,
                gid: id,
                mtime,
                xattrs,
                ..base
            });
        }
        members
    })
}

fn expected(members: &[Member]) -> BTreeMap<String, Seen> {
    let mut all: BTreeMap<String, Seen> = BTreeMap::new();
    let mut groups: BTreeMap<String, String> = BTreeMap::new();
    let root = Member {
        mtime: 0,
        ..dir("")
    };
    for member in [root].iter().chain(members) {
        if member.kind == EntryType::Link {
            let target = all[&member.link].clone();
            groups.insert(member.name.clone(), member.link.clone());
            all.insert(member.name.clone(), target);
            continue;
        }
        groups.insert(member.name.clone(), member.name.clone());
        let (kind, content) = match member.kind {
            EntryType::Directory => (0o040_000, Vec::new()),
            EntryType::Symlink => (0o120_000, member.link.clone().into_bytes()),
            _ => (0o100_000, member.data.clone()),
        };
        all.insert(
            member.name.clone(),
            Seen {
                mode: kind | member.mode,
                uid: u32::try_from(member.uid).unwrap(),
                gid: u32::try_from(member.gid).unwrap(),
                mtime: i64::try_from(member.mtime).unwrap(),
                device: (0, 0),
                content,
                xattrs: member.xattrs.iter().cloned().collect(),
                first: String::new(),
                links: 0,
            },
        );
    }
    for name in all.keys().cloned().collect::<Vec<_>>() {
        let same: Vec<&String> = groups
            .iter()
            .filter(|(_, g)| **g == groups[&name])
            .map(|(n, _)| n)
            .collect();
        let (first, links) = (same[0].clone(), same.len() as u64);
        let seen = all.get_mut(&name).unwrap();
        seen.links = if seen.mode & 0o170_000 == 0o040_000 {
            0
        } else {
            links
        };
        seen.first = first;
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_comes_back(members in trees()) {
        let dir = tempdir().unwrap();
        let disk = dir.path().join("disk");
        write_image(&tarball(&members), &disk).unwrap();
        let extracted = dir.path().join("extracted");
        let wanted = expected(&members);
        if fsck(&disk, &extracted) {
            let contents = |all: &BTreeMap<String, Seen>| -> BTreeMap<String, Vec<u8>> {
                all.iter().map(|(name, seen)| (name.clone(), seen.content.clone())).collect()
            };
            prop_assert_eq!(contents(&look(&extracted)), contents(&wanted));
        }
        if let Some(mounted) = Mounted::new(&disk) {
            prop_assert_eq!(look(mounted.path()), wanted);
        }
    }

    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..3000), at in 0..512_usize) {
        let dir = tempdir().unwrap();
        let disk = dir.path().join("disk");
        drop(write_image(&bytes, &disk));
        let mut tar = tarball(&sample()[..12]);
        let at = at % tar.len();
        for (place, byte) in tar[at..].iter_mut().zip(&bytes) {
            *place = *byte;
        }
        drop(write_image(&tar, &disk));
    }
}
