//! The private directory of one VM: files and directories that a guest creates at paths which nothing is mapped to
//! live here, under numbers instead of names, and vanish with the VM.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::error::{Error, Result};

/// A directory with mode 0700 that is removed, with all that is in it, on drop.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    directory: Arc<OwnedFd>,
    next: AtomicU64,
    owner: u32,
}

impl Scratch {
    /// Makes one in `parent`, or in `$TMP`, or where the system keeps temporary files.
    pub fn new(parent: Option<&Path>) -> Result<Self> {
        let parent = match parent {
            Some(path) if !path.is_dir() => {
                return Err(Error::Config(format!("tempdir {} is not a directory", path.display())));
            }
            Some(path) => path.to_path_buf(),
            None => std::env::var_os("TMP")
                .map(PathBuf::from)
                .filter(|p| p.is_dir())
                .or_else(|| Some(std::env::temp_dir()).filter(|p| !p.as_os_str().is_empty()))
                .unwrap_or_else(|| "/tmp".into()),
        };
        let failed = |source: nix::Error| Error::Host {
            what: format!("can't make a scratch directory in {}", parent.display()),
            source: source.into(),
        };
        let parent_path =
            parent.canonicalize().map_err(|e| Error::Host { what: parent.display().to_string(), source: e })?;
        let path = nix::unistd::mkdtemp(&parent_path.join("uhyve-XXXXXX")).map_err(failed)?;
        let directory =
            match open(&path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty())
            {
                Ok(directory) => Arc::new(directory),
                Err(e) => {
                    let _ = std::fs::remove_dir(&path);
                    return Err(failed(e));
                }
            };
        Ok(Self { path, directory, next: AtomicU64::new(0), owner: std::process::id() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory, to resolve names beneath it.
    pub fn directory(&self) -> &Arc<OwnedFd> {
        &self.directory
    }

    /// A name in it that was never given out.
    pub fn fresh_name(&self) -> String {
        self.next.fetch_add(1, Ordering::Relaxed).to_string()
    }
}

impl Scratch {
    /// Removes it, with all that the guest made in it.
    pub fn remove(&self) {
        // A forked child has a copy of the value, not of the directory.
        if self.owner == std::process::id()
            && let Err(e) = std::fs::remove_dir_all(&self.path)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!("can't remove {}: {e}", self.path.display());
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn test_scratch_dropped_is_removed_with_its_contents() {
        let scratch = Scratch::new(None).unwrap();
        let path = scratch.path().to_path_buf();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o700);
        std::fs::create_dir(path.join("d")).unwrap();
        std::fs::write(path.join("d/f"), "x").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn test_scratch_in_missing_directory_is_a_config_error() {
        let error = Scratch::new(Some(Path::new("/nowhere/at/all"))).unwrap_err();
        assert!(matches!(error, Error::Config(text) if text.contains("/nowhere/at/all")));
    }
}
