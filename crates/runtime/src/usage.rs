//! What a directory takes on its disk.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::{api::FilesystemUsage, error::RuntimeError, scratch::blocking};

/// Deepest nesting that is looked into; ours is two levels.
const MAX_DEPTH: u32 = 8;

/// Counts what is allocated, so that a sparse disk counts for what is in it.
pub(crate) async fn of_tree(path: PathBuf) -> Result<FilesystemUsage, RuntimeError> {
    let action = format!("measure {}", path.display());
    blocking(action, move || {
        // Nothing has been put there yet.
        fs::create_dir_all(&path)?;
        measured(path)
    })
    .await
}

/// The same of a directory that is there. Blocks.
pub(crate) fn measured(path: PathBuf) -> io::Result<FilesystemUsage> {
    let (mut used_bytes, mut files) = (0, 0);
    measure(&path, MAX_DEPTH, &mut |metadata| {
        used_bytes += metadata.blocks() * 512;
        files += 1;
    })?;
    Ok(FilesystemUsage {
        path,
        used_bytes,
        files,
    })
}

fn measure(path: &Path, depth: u32, count: &mut impl FnMut(&fs::Metadata)) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let metadata = match entry.metadata() {
            // A sandbox was removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        if metadata.is_dir() && depth > 0 {
            match measure(&entry.path(), depth - 1, count) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        } else {
            count(&metadata);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_hole_takes_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("sandboxes");
        assert_eq!(of_tree(root.clone()).await.unwrap().files, 0);
        fs::create_dir(root.join("one")).unwrap();
        let disk = fs::File::create(root.join("one/scratch")).unwrap();
        disk.set_len(1 << 30).unwrap();
        fs::write(root.join("log"), vec![1; 64 * 1024]).unwrap();
        let usage = of_tree(root).await.unwrap();
        assert_eq!(usage.files, 2);
        assert!(
            (64 * 1024..1 << 20).contains(&usage.used_bytes),
            "{usage:?}"
        );
    }
}
