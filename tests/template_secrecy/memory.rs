//! Looks into processes from outside: what they map, and what is in it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt},
};

use memchr::memmem;
use rustix::fs::{SeekFrom, seek};

/// Read at a time.
const CHUNK: usize = 1 << 20;
/// No text that is searched for is longer.
const OVERLAP: usize = 128;

/// A line of /proc/PID/smaps with what matters of the figures below it.
#[derive(Debug, Clone)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) permissions: String,
    /// Device and inode: what is mapped.
    pub(crate) file: (String, u64),
    pub(crate) path: String,
    pub(crate) private_dirty_kib: u64,
}

impl Mapping {
    /// What a process writes here, whoever else maps the file sees.
    pub(crate) fn is_shared_writable(&self) -> bool {
        self.permissions.contains('w') && self.permissions.ends_with('s')
    }

    /// Memory of the VM: a template's, or of its own.
    pub(crate) fn is_guest(&self) -> bool {
        self.path.contains("guest-memory") || self.path.contains("memory-backend-memfd")
    }
}

/// Everything that a process maps.
pub(crate) fn mappings(pid: u32) -> Vec<Mapping> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut found: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let Some((start, end)) = words[0].split_once('-')
            && let (Ok(start), Ok(end)) =
                (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            found.push(Mapping {
                start,
                end,
                permissions: words[1].to_owned(),
                file: (words[3].to_owned(), words[4].parse().unwrap()),
                path: words[5..].join(" "),
                private_dirty_kib: 0,
            });
        } else if words[0] == "Private_Dirty:" {
            found.last_mut().unwrap().private_dirty_kib = words[1].parse().unwrap();
        }
    }
    assert!(!found.is_empty(), "process {pid} maps nothing");
    found
}

/// The templates' memory that a process has open, each file once.
pub(crate) fn templates(pid: u32) -> Vec<File> {
    let mut found: Vec<(u64, File)> = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let path = entry.unwrap().path();
        let link = fs::read_link(&path).unwrap_or_default();
        if !link.to_string_lossy().contains("memfd:guest-memory") {
            continue;
        }
        // It may be closed meanwhile.
        let Ok(file) = File::open(&path) else {
            continue;
        };
        let inode = file.metadata().unwrap().ino();
        if found.iter().all(|(known, _)| *known != inode) {
            found.push((inode, file));
        }
    }
    found.into_iter().map(|(_, file)| file).collect()
}

/// What follows each occurrence of a text, the text included, 128 bytes at most.
pub(crate) fn find(
    read_at: impl Fn(&mut [u8], u64) -> io::Result<usize>,
    (start, end): (u64, u64),
    text: &[u8],
) -> Vec<Vec<u8>> {
    let finder = memmem::Finder::new(text);
    let most = (end - start).min((CHUNK + OVERLAP) as u64);
    let mut buffer = vec![0; usize::try_from(most).unwrap()];
    let mut found = Vec::new();
    let mut position = start;
    while position < end {
        let room =
            usize::try_from(end - position).map_or(buffer.len(), |left| left.min(buffer.len()));
        let mut filled = 0;
        while filled < room {
            match read_at(&mut buffer[filled..room], position + filled as u64) {
                Ok(0) | Err(_) => break,
                Ok(count) => filled += count,
            }
        }
        if filled == 0 {
            // A guard page, or memory that the kernel does not show.
            position += 4096;
            continue;
        }
        for at in finder.find_iter(&buffer[..filled]) {
            // What begins in the overlap is found in the next round.
            if at < CHUNK {
                found.push(buffer[at..filled.min(at + OVERLAP)].to_vec());
            }
        }
        position += filled.min(CHUNK) as u64;
    }
    found
}

/// Searches a whole file; what was never written is not looked at.
pub(crate) fn find_in_file(file: &File, text: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut position = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(position)) {
        position = seek(file, SeekFrom::Hole(start)).unwrap();
        let read_at = |buffer: &mut [u8], at| file.read_at(buffer, at);
        found.extend(find(read_at, (start, position), text));
    }
    assert!(position > 0, "the file is empty");
    found
}

/// Parts of a mapping that are in memory, as pagemap tells (proc_pid_pagemap(5)).
fn resident(pid: u32, mapping: &Mapping) -> Vec<(u64, u64)> {
    const PAGE: u64 = 4096;
    let pages = usize::try_from((mapping.end - mapping.start) / PAGE).unwrap();
    let mut entries = vec![0; pages * 8];
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    pagemap
        .read_exact_at(&mut entries, mapping.start / PAGE * 8)
        .unwrap();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut start = mapping.start;
    for entry in entries.chunks_exact(8) {
        // The highest bits of the last byte: present, swapped.
        if entry[7] & 0xc0 != 0 {
            match ranges.last_mut() {
                Some((_, end)) if *end == start => *end += PAGE,
                _ => ranges.push((start, start + PAGE)),
            }
        }
        start += PAGE;
    }
    ranges
}

/// Searches what of some mappings of a process is in memory.
pub(crate) fn find_in_process(
    pid: u32,
    text: &[u8],
    wanted: impl Fn(&Mapping) -> bool,
) -> Vec<Vec<u8>> {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let read_at = |buffer: &mut [u8], at| memory.read_at(buffer, at);
    mappings(pid)
        .iter()
        .filter(|mapping| wanted(mapping))
        .flat_map(|mapping| resident(pid, mapping))
        .flat_map(|range| find(read_at, range, text))
        .collect()
}

/// Complete states of devices, as QEMU's migration writes them, in the memory of a process.
pub(crate) fn device_states(pid: u32) -> Vec<Vec<u8>> {
    /// Magic number and version.
    const BEGIN: &[u8] = b"QEVM\0\0\0\x03";
    /// More is none of ours.
    const MOST: usize = 4 << 20;
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut states = Vec::new();
    for mapping in mappings(pid) {
        if !mapping.permissions.starts_with("rw") || mapping.is_guest() {
            continue;
        }
        let Ok(length) = usize::try_from(mapping.end - mapping.start) else {
            continue;
        };
        let mut content = vec![0; length];
        if memory.read_exact_at(&mut content, mapping.start).is_err() {
            continue;
        }
        for at in memmem::find_iter(&content, BEGIN) {
            let rest = &content[at..content.len().min(at + MOST)];
            states.extend(complete_state(rest).map(<[u8]>::to_vec));
        }
    }
    states
}

/// The state at the beginning of some memory: it ends with an end mark and its own description,
/// a JSON object whose length stands before it.
fn complete_state(memory: &[u8]) -> Option<&[u8]> {
    const DESCRIPTION: &[u8] = b"\0\x06\0";
    memmem::find_iter(memory, DESCRIPTION).find_map(|at| {
        let length: [u8; 4] = memory.get(at + 2..at + 6)?.try_into().ok()?;
        let end = at + 6 + usize::try_from(u32::from_be_bytes(length)).ok()?;
        let json = memory.get(at + 6..end)?;
        (json.starts_with(b"{") && json.ends_with(b"}") && json.len() > 100).then(|| &memory[..end])
    })
}

#[test]
fn a_text_across_two_reads_is_found_once() {
    let mut content = vec![b'.'; 2 * CHUNK];
    for at in [0, CHUNK - 3, CHUNK + 1000, 2 * CHUNK - 4] {
        content[at..at + 4].copy_from_slice(b"here");
    }
    let read_at = |buffer: &mut [u8], at: u64| {
        let from = &content[usize::try_from(at).unwrap()..];
        let count = buffer.len().min(from.len()).min(70_000);
        buffer[..count].copy_from_slice(&from[..count]);
        Ok(count)
    };
    let found = find(read_at, (0, content.len() as u64), b"here");
    assert_eq!(found.len(), 4);
    assert_eq!(found[3], b"here");
}

#[test]
fn a_state_ends_with_its_description() {
    let json = format!("{{{}}}", " ".repeat(200));
    let mut memory = b"QEVM\0\0\0\x03devices\0\x06\0\0\0\x01x".to_vec();
    memory.extend(b"\0\x06");
    memory.extend(u32::try_from(json.len()).unwrap().to_be_bytes());
    memory.extend(json.bytes());
    let length = memory.len();
    memory.extend(b"of somebody else");
    assert_eq!(complete_state(&memory).unwrap().len(), length);
    assert!(complete_state(&memory[..length - 1]).is_none());
}
