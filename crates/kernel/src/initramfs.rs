//! The initramfs: HyperStart as `/init`, and the modules that the kernel needs.
//!
//! A cpio archive in the kernel's `newc` format (kernel `Documentation/driver-api/early-userspace/
//! buffer-format.rst`), the same bytes for the same input. It is not compressed: the
//! host's page cache holds it once for all VMs, and unpacking 3 MiB of gzip costs an emulated guest a
//! tenth of its boot.

use std::io::{self, Write};

/// Where HyperStart looks for modules and for the file `order` with their names.
const MODULES: &str = "lib/modules/hypernetes";

/// Writes the archive. `modules` are name and content, in the order in which they are loaded.
pub fn write<'a>(
    out: &mut dyn Write,
    init: &[u8],
    modules: impl IntoIterator<Item = (&'a str, &'a [u8])>,
) -> io::Result<()> {
    let mut archive = Newc { out, inode: 0 };
    for directory in ["dev", "proc", "sys", "lib", "lib/modules", MODULES] {
        archive.entry(directory, DIRECTORY | 0o755, &[], (0, 0))?;
    }
    // The kernel opens it for init before devtmpfs is mounted.
    archive.entry("dev/console", CHARACTER_DEVICE | 0o600, &[], (5, 1))?;
    archive.entry("init", REGULAR | 0o755, init, (0, 0))?;
    let mut order = String::new();
    for (name, content) in modules {
        let file = format!("{name}.ko");
        archive.entry(
            &format!("{MODULES}/{file}"),
            REGULAR | 0o400,
            content,
            (0, 0),
        )?;
        order.push_str(&file);
        order.push('\n');
    }
    if !order.is_empty() {
        archive.entry(
            &format!("{MODULES}/order"),
            REGULAR | 0o400,
            order.as_bytes(),
            (0, 0),
        )?;
    }
    archive.entry("TRAILER!!!", 0, &[], (0, 0))
}

const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const REGULAR: u32 = 0o100_000;

struct Newc<'a> {
    out: &'a mut dyn Write,
    inode: u32,
}

impl Newc<'_> {
    fn entry(&mut self, name: &str, mode: u32, data: &[u8], device: (u32, u32)) -> io::Result<()> {
        let length = |n: usize| {
            u32::try_from(n)
                .map_err(|_cause| io::Error::new(io::ErrorKind::FileTooLarge, "4 GiB in a file"))
        };
        self.inode += 1;
        let (data_size, name_size) = (length(data.len())?, length(name.len() + 1)?);
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [
            self.inode, mode, 0, 0, 1, 0, data_size, 0, 0, device.0, device.1, name_size, 0,
        ];
        self.out.write_all(b"070701")?;
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        // Header (110 bytes) with name, and data, each end on a multiple of four.
        self.pad(110 + name.len() + 1, 1)?;
        self.out.write_all(data)?;
        self.pad(data.len(), 0)
    }

    fn pad(&mut self, length: usize, terminator: usize) -> io::Result<()> {
        let zeros = [0; 4];
        self.out
            .write_all(&zeros[..terminator + length.next_multiple_of(4) - length])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive() -> Vec<u8> {
        let mut out = Vec::new();
        write(
            &mut out,
            b"#!init",
            [("overlay", b"one".as_slice()), ("ext4", b"three")],
        )
        .unwrap();
        out
    }

    /// Name, mode and data of each entry, by the format's rules alone.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (u32::try_from(field(1)).unwrap(), field(6), field(11));
            assert_eq!(bytes[110 + name_size - 1], 0);
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let start = (110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(start, bytes.len());
                return entries;
            }
            entries.push((name, mode, bytes[start..start + size].to_vec()));
            bytes = &bytes[(start + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn holds_init_console_and_modules_in_order() {
        let entries = read(&archive());
        let data = |name: &str| {
            let (_, mode, data) = entries.iter().find(|entry| entry.0 == name).unwrap();
            (*mode, data.clone())
        };
        assert_eq!(data("init"), (0o100_755, b"#!init".to_vec()));
        assert_eq!(data("dev/console").0, 0o020_600);
        assert_eq!(
            data("lib/modules/hypernetes/order").1,
            b"overlay.ko\next4.ko\n"
        );
        assert_eq!(data("lib/modules/hypernetes/ext4.ko").1, b"three");
    }

    #[test]
    fn same_input_same_bytes() {
        assert_eq!(archive(), archive());
    }
}
