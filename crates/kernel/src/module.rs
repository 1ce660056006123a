//! Kernel modules: what they need, and in which order they load.
//!
//! A package holds no `modules.dep` (depmod makes it at installation), so what a module depends on
//! is read from the module: the section `.modinfo` of its ELF file, NUL-terminated `key=value`s.

use std::collections::{BTreeMap, BTreeSet};

/// The module's own idea of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ModuleInfo {
    /// Modules that must be loaded before.
    pub(crate) depends: Vec<String>,
    /// Modules that should be, if there are any of that name.
    pub(crate) soft: Vec<String>,
}

/// `virtio-rng.ko.xz` → `virtio_rng`; `None` if it is no module's file name.
pub(crate) fn name_of_file(file: &str) -> Option<String> {
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"]
        .iter()
        .find_map(|end| file.strip_suffix(end))?;
    normal(stem)
}

/// The name as the kernel knows it, if it is one.
fn normal(name: &str) -> Option<String> {
    let ok = (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    ok.then(|| name.replace('-', "_"))
}

/// Reads a module. `None` if it is not a 64-bit little-endian ELF file with such a section.
pub(crate) fn read(elf: &[u8]) -> Option<ModuleInfo> {
    let mut info = ModuleInfo::default();
    for entry in section(elf, b".modinfo")?.split(|b| *b == 0) {
        let Ok(text) = std::str::from_utf8(entry) else {
            continue;
        };
        match text.split_once('=') {
            Some(("depends", list)) => info.depends.extend(list.split(',').filter_map(normal)),
            Some(("softdep", list)) => {
                // "pre: a b post: c": what comes after is not waited for.
                let before = list
                    .split_whitespace()
                    .skip_while(|word| *word != "pre:")
                    .skip(1);
                info.soft.extend(
                    before
                        .take_while(|word| !word.ends_with(':'))
                        .filter_map(normal),
                );
            }
            _ => {}
        }
    }
    Some(info)
}

fn section<'a>(elf: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let number = |at: usize, size: usize| -> Option<usize> {
        let bytes = elf.get(at..at.checked_add(size)?)?;
        let value = bytes
            .iter()
            .rev()
            .fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).ok()
    };
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    // Elf64_Ehdr: e_shoff at 40, e_shentsize 58, e_shnum 60, e_shstrndx 62.
    let (table, size, count, names) = (
        number(40, 8)?,
        number(58, 2)?,
        number(60, 2)?,
        number(62, 2)?,
    );
    let header = |index: usize| table.checked_add(index.checked_mul(size)?);
    // Elf64_Shdr: sh_name at 0, sh_offset 24, sh_size 32.
    let body = |at: usize| {
        let (offset, size) = (
            number(at.checked_add(24)?, 8)?,
            number(at.checked_add(32)?, 8)?,
        );
        elf.get(offset..offset.checked_add(size)?)
    };
    let names = body(header(names)?)?;
    for index in 0..count {
        let at = header(index)?;
        let name = names.get(number(at, 4)?..)?;
        if name
            .strip_prefix(wanted)
            .is_some_and(|rest| rest.first() == Some(&0))
        {
            return body(at);
        }
    }
    None
}

/// The modules that `wanted` come down to, each after what it needs. Modules that are not in
/// `known` are left out: they are built in, or the caller finds out that they are missing.
pub(crate) fn order(wanted: &[&str], known: &BTreeMap<String, ModuleInfo>) -> Vec<String> {
    let mut state = Walk {
        known,
        seen: BTreeSet::new(),
        order: Vec::new(),
    };
    for name in wanted {
        state.visit(name);
    }
    state.order
}

struct Walk<'a> {
    known: &'a BTreeMap<String, ModuleInfo>,
    seen: BTreeSet<String>,
    order: Vec<String>,
}

impl Walk<'_> {
    fn visit(&mut self, name: &str) {
        // An explicit stack: a chain of made-up modules must not end ours.
        let mut stack = vec![(name.to_owned(), false)];
        while let Some((name, ready)) = stack.pop() {
            if ready {
                self.order.push(name);
                continue;
            }
            let Some(info) = self.known.get(&name) else {
                continue;
            };
            if !self.seen.insert(name.clone()) {
                continue;
            }
            stack.push((name, true));
            for before in info.soft.iter().chain(&info.depends) {
                stack.push((before.clone(), false));
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An ELF file with a `.modinfo` and nothing else.
    pub(crate) fn elf(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut out = vec![0; 64];
        out[..6].copy_from_slice(b"\x7fELF\x02\x01");
        out.extend_from_slice(modinfo);
        out.extend_from_slice(names);
        let table = out.len() as u64;
        out[40..48].copy_from_slice(&table.to_le_bytes());
        out[58..64].copy_from_slice(&[64, 0, 3, 0, 2, 0]);
        let mut section = |name: u32, offset: usize, size: usize| {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
            out.extend_from_slice(&header);
        };
        section(0, 0, 0);
        section(1, 64, modinfo.len());
        section(10, 64 + modinfo.len(), names.len());
        out
    }

    #[test]
    fn needs_are_read_from_the_module() {
        let file =
            elf(b"license=GPL\0depends=jbd2,mb-cache\0softdep=pre: crc32c x post: y\0depends=\0");
        let info = read(&file).unwrap();
        assert_eq!(info.depends, ["jbd2", "mb_cache"]);
        assert_eq!(info.soft, ["crc32c", "x"]);
    }

    #[test]
    fn damaged_modules_are_no_modules() {
        let good = elf(b"depends=a\0");
        assert!(read(b"").is_none() && read(b"\x7fELF").is_none());
        for at in 40..good.len() {
            let mut bad = good.clone();
            bad[at] = 0xff;
            // Any answer will do, as long as there is one.
            drop(read(&bad));
            drop(read(&good[..at]));
        }
        let mut endless = good;
        endless[40..48].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(read(&endless).is_none());
    }

    #[test]
    fn file_names_are_checked_and_normalised() {
        assert_eq!(
            name_of_file("virtio-rng.ko.xz").as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(name_of_file("ext4.ko").as_deref(), Some("ext4"));
        for bad in ["ext4.o", ".ko", "a b.ko", "a/b.ko", "..ko"] {
            assert_eq!(name_of_file(bad), None, "{bad}");
        }
    }

    #[test]
    fn dependencies_come_first_and_cycles_end() {
        let info = |depends: &[&str], soft: &[&str]| ModuleInfo {
            depends: depends.iter().map(|s| (*s).to_owned()).collect(),
            soft: soft.iter().map(|s| (*s).to_owned()).collect(),
        };
        let known = BTreeMap::from([
            (
                "ext4".to_owned(),
                info(&["jbd2", "mbcache", "absent"], &["crc32c"]),
            ),
            ("jbd2".to_owned(), info(&["mbcache"], &[])),
            ("mbcache".to_owned(), info(&[], &[])),
            ("crc32c".to_owned(), info(&[], &[])),
            ("snake".to_owned(), info(&["tail"], &[])),
            ("tail".to_owned(), info(&["snake"], &[])),
        ]);
        let order = order(&["ext4", "missing", "jbd2", "snake"], &known);
        let at = |name: &str| order.iter().position(|n| n == name).unwrap();
        assert!(at("mbcache") < at("jbd2") && at("jbd2") < at("ext4") && at("crc32c") < at("ext4"));
        assert_eq!(order.len(), 6);
    }
}
