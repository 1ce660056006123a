//! What processes take: time, memory, and which processes belong together.

use std::fs;

use serde_json::{Value, json};

/// Proportional set size of a process in KiB: memory that it would free by ending.
pub(crate) fn pss_kib(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find(|line| line.starts_with("Pss:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// A line of /proc/PID/status in KiB, such as `VmRSS`.
pub(crate) fn status_kib(pid: u32, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status_line_kib(&text, name)
}

/// The same of the file's text.
pub(crate) fn status_line_kib(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find(|line| line.split(':').next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Memory that the machine has to give, in KiB: what a difference comes to has the kernel's own in it too.
pub(crate) fn available_kib() -> Option<u64> {
    status_line_kib(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")
}

/// Resident set size of a process in KiB.
pub(crate) fn rss_kib(pid: u32) -> Option<u64> {
    status_kib(pid, "VmRSS")
}

/// Clock ticks of /proc/PID/stat from field `first` on, two of them, as seconds.
fn ticks(pid: u32, first: usize) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit(')').next()?.split_whitespace().collect();
    let one = |index: usize| fields.get(index)?.parse::<f64>().ok();
    Some((one(first)? + one(first + 1)?) / 100.0)
}

/// User and system time of a process in seconds.
pub(crate) fn cpu_seconds(pid: u32) -> Option<f64> {
    ticks(pid, 11)
}

/// CPU seconds of a daemon, of all of its children that have ended, and of the VMMs that run.
pub(crate) fn tree_cpu_seconds(daemon: u32, vmms: &[u32]) -> f64 {
    let ended = ticks(daemon, 13).unwrap_or(0.0);
    let running: f64 = vmms.iter().filter_map(|pid| cpu_seconds(*pid)).sum();
    cpu_seconds(daemon).unwrap_or(0.0) + ended + running
}

/// Seconds that all cores of the machine have worked. On an idle machine a difference is what was
/// done meanwhile, by whichever process.
pub(crate) fn busy_seconds() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let words = text.lines().next().unwrap_or_default().split_whitespace();
    let ticks: Vec<f64> = words.skip(1).filter_map(|word| word.parse().ok()).collect();
    // user, nice, system, irq, softirq (proc_stat(5)).
    let busy = [0, 1, 2, 5, 6].iter().filter_map(|at| ticks.get(*at));
    busy.sum::<f64>() / 100.0
}

/// Processes whose command line is wanted.
pub(crate) fn processes(wanted: impl Fn(&str) -> bool) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            wanted(&String::from_utf8_lossy(&line))
        })
        .collect()
}

/// Processes and all that they and their children started.
pub(crate) fn family(parents: &[u32]) -> Vec<u32> {
    let mut all = parents.to_vec();
    loop {
        let children = processes(|_| true).into_iter().filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let after_name = stat.rsplit(')').next().unwrap_or_default();
            let parent = after_name.split_whitespace().nth(1);
            !all.contains(pid)
                && parent
                    .and_then(|pid| pid.parse().ok())
                    .is_some_and(|pid| all.contains(&pid))
        });
        let children: Vec<u32> = children.collect();
        if children.is_empty() {
            return all;
        }
        all.extend(children);
    }
}

/// What the memory of a VMM is, in KiB: proportional shares, so that they add up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct VmmMemory {
    /// Guest memory that is this VM's own.
    pub(crate) guest_own: u64,
    /// Its share in what VMs of one template have not changed.
    pub(crate) guest_shared: u64,
    /// All resident guest memory, shared or not.
    pub(crate) guest_resident: u64,
    /// Pages of a template that are mapped, not its own.
    pub(crate) template_resident: u64,
    /// The emulator's translated code.
    pub(crate) translations: u64,
    /// Heap, stacks and other anonymous memory.
    pub(crate) heap: u64,
    /// The share in program, libraries and firmware.
    pub(crate) program: u64,
    /// The kernel's page tables of the process; not in its PSS.
    pub(crate) page_tables: u64,
}

impl VmmMemory {
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
        let mut memory = Self::from_smaps(&text);
        memory.page_tables = status_kib(pid, "VmPTE")?;
        Some(memory)
    }

    fn from_smaps(text: &str) -> Self {
        let mut sum = Self::default();
        let (mut kind, mut shared_map) = (Kind::Heap, false);
        let (mut pss, mut rss) = (0, 0);
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let Some(first) = words.first() else { continue };
            if !first.ends_with(':') {
                let permissions = words.get(1).copied().unwrap_or_default();
                kind = Kind::of(permissions, words.get(5).copied().unwrap_or_default());
                shared_map = permissions.ends_with('s');
                continue;
            }
            let kib = words
                .get(1)
                .and_then(|word| word.parse::<u64>().ok())
                .unwrap_or(0);
            match *first {
                "Rss:" => rss = kib,
                "Pss:" => pss = kib,
                // It comes after both.
                "Anonymous:" => match kind {
                    Kind::Guest => {
                        // What a VM maps shared is nobody else's.
                        let own = if shared_map { pss } else { kib };
                        sum.guest_own += own;
                        sum.guest_shared += pss.saturating_sub(own);
                        sum.guest_resident += rss;
                        if !shared_map {
                            sum.template_resident += rss.saturating_sub(kib);
                        }
                    }
                    Kind::Translations => sum.translations += pss,
                    Kind::Heap => sum.heap += pss,
                    Kind::Program => sum.program += pss,
                },
                _ => {}
            }
        }
        sum
    }

    /// What is not the guest's.
    pub(crate) fn overhead(&self) -> u64 {
        self.translations + self.heap + self.program
    }

    /// The mean of some VMMs.
    pub(crate) fn mean(pids: &[u32]) -> Self {
        let all: Vec<Self> = pids.iter().filter_map(|pid| Self::of(*pid)).collect();
        let count = (all.len() as u64).max(1);
        let mean = |field: fn(&Self) -> u64| all.iter().map(field).sum::<u64>() / count;
        Self {
            guest_own: mean(|memory| memory.guest_own),
            guest_shared: mean(|memory| memory.guest_shared),
            guest_resident: mean(|memory| memory.guest_resident),
            template_resident: all
                .iter()
                .map(|memory| memory.template_resident)
                .max()
                .unwrap_or(0),
            translations: mean(|memory| memory.translations),
            heap: mean(|memory| memory.heap),
            program: mean(|memory| memory.program),
            page_tables: mean(|memory| memory.page_tables),
        }
    }

    pub(crate) fn line(&self) -> String {
        let mib = |kib: u64| kib as f64 / 1024.0;
        format!(
            "guest's own {:.1}, of the template {:.1}, translated code {:.1}, heap {:.1}, program {:.1}, page tables (beside) {:.1} MiB",
            mib(self.guest_own),
            mib(self.guest_shared),
            mib(self.translations),
            mib(self.heap),
            mib(self.program),
            mib(self.page_tables),
        )
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "guest_own_kib": self.guest_own, "guest_shared_kib": self.guest_shared,
            "guest_resident_kib": self.guest_resident, "translations_kib": self.translations,
            "heap_kib": self.heap, "program_kib": self.program, "page_tables_kib": self.page_tables,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Guest,
    Translations,
    Heap,
    Program,
}

impl Kind {
    fn of(permissions: &str, path: &str) -> Self {
        if path.contains("guest-memory") || path.contains("memory-backend-memfd") {
            Self::Guest
        } else if path.is_empty() && permissions.starts_with("rwx") {
            Self::Translations
        } else if path.starts_with('/') && !path.starts_with("/memfd:") {
            Self::Program
        } else {
            Self::Heap
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_vmm_is_told_apart() {
        let text = "\
55d0-55d1 r-xp 00000000 fe:00 1 /usr/bin/qemu
Rss: 100 kB
Pss: 40 kB
Anonymous: 0 kB
7f00-7f01 rwxp 00000000 00:00 0
Rss: 900 kB
Pss: 900 kB
Anonymous: 900 kB
7f10-7f11 rw-p 00000000 00:01 7 /memfd:guest-memory (deleted)
Rss: 5000 kB
Pss: 3000 kB
Anonymous: 1000 kB
7f20-7f21 rw-p 00000000 00:00 0 [heap]
Rss: 70 kB
Pss: 70 kB
Anonymous: 70 kB
VmFlags: rd wr
";
        let memory = VmmMemory::from_smaps(text);
        assert_eq!(
            (memory.program, memory.translations, memory.heap),
            (40, 900, 70)
        );
        assert_eq!((memory.guest_own, memory.guest_shared), (1000, 2000));
        assert_eq!(
            (memory.guest_resident, memory.template_resident),
            (5000, 4000)
        );
        assert_eq!(memory.overhead(), 1010);
        let own = text.replace("rw-p 00000000 00:01 7", "rw-s 00000000 00:01 7");
        let memory = VmmMemory::from_smaps(&own);
        assert_eq!((memory.guest_own, memory.guest_shared), (3000, 0));
        assert_eq!(memory.template_resident, 0);
    }

    #[test]
    fn a_line_of_a_status_is_found_by_its_whole_name() {
        let text = "VmRSSx:\t1 kB\nVmRSS:\t  2744 kB\n";
        assert_eq!(status_line_kib(text, "VmRSS"), Some(2744));
        assert_eq!(status_line_kib(text, "VmSwap"), None);
    }
}
