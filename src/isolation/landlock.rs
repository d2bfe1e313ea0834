//! Landlock as a second wall behind the file map: a vCPU thread that handles hypercalls can then open nothing but what
//! is mapped, even if the map had a hole. It binds the calling thread and threads that this one starts, never the
//! process, which may be a Python interpreter; for the thread there is no way back.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus,
};

use crate::error::{Error, Result};

/// With this version (Linux 6.2) Landlock controls every way to a file's contents, truncation the last of them.
const NEEDED: ABI = ABI::V3;

/// How much the wall matters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FileIsolation {
    /// No Landlock.
    None,
    /// As much as the kernel has.
    #[default]
    Normal,
    /// All of it, or the VM doesn't run.
    Strict,
}

/// What may be done at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rights {
    /// Everything beneath a directory, except executing and making devices, sockets and links.
    Directory,
    /// Reading and writing a file.
    File,
    /// Removing names from the directory of a mapped file.
    Unlink,
    /// Creating and using files in the directory of a mapped file that doesn't exist yet: Landlock has no finer rule.
    Create,
}

impl Rights {
    fn access(self) -> BitFlags<AccessFs> {
        let file = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
        match self {
            Self::Directory => file | AccessFs::ReadDir | AccessFs::RemoveFile | AccessFs::MakeReg | AccessFs::MakeDir,
            Self::File => file,
            Self::Unlink => AccessFs::RemoveFile.into(),
            Self::Create => file | AccessFs::RemoveFile | AccessFs::MakeReg,
        }
    }
}

/// Host paths that a thread keeps.
#[derive(Debug, Clone, Default)]
pub struct Allowed(Vec<(PathBuf, Rights)>);

impl Allowed {
    /// Adds a path.
    pub fn add(&mut self, path: &Path, rights: Rights) {
        self.0.push((path.to_path_buf(), rights));
    }
}

/// Takes all host files but `allowed` from the calling thread. [`FileIsolation::Strict`] fails with [`Error::Host`] if
/// the kernel can't do it; [`FileIsolation::Normal`] logs that.
pub fn restrict_thread(mode: FileIsolation, allowed: &Allowed) -> Result<()> {
    match mode {
        FileIsolation::None => Ok(()),
        FileIsolation::Normal => {
            match restrict(allowed, CompatLevel::BestEffort) {
                Ok(RulesetStatus::FullyEnforced) => {}
                Ok(status) => {
                    log::warn!("Landlock: {status:?}: this kernel's Landlock is older than Linux 6.2's or off")
                }
                Err(e) => log::warn!("Landlock: {e}"),
            }
            Ok(())
        }
        FileIsolation::Strict => match restrict(allowed, CompatLevel::HardRequirement) {
            Ok(RulesetStatus::FullyEnforced) => Ok(()),
            Ok(status) => Err(lacking(std::io::Error::other(format!("{status:?}")))),
            Err(e) => Err(lacking(std::io::Error::other(e.to_string()))),
        },
    }
}

fn lacking(source: std::io::Error) -> Error {
    let what =
        "strict file isolation needs a kernel with Landlock ABI 3 (Linux 6.2), switched on at boot (lsm=…,landlock)";
    Error::Host { what: what.into(), source }
}

fn restrict(allowed: &Allowed, level: CompatLevel) -> Result<RulesetStatus, RulesetError> {
    let mut rules = Ruleset::default().set_compatibility(level).handle_access(AccessFs::from_all(NEEDED))?.create()?;
    for (path, rights) in &allowed.0 {
        match PathFd::new(path) {
            // A file that was there at the start may have gone since; what isn't there needs no rule.
            Err(e) => log::debug!("Landlock: {}: {e}", path.display()),
            Ok(fd) => rules = rules.add_rule(PathBeneath::new(fd, rights.access()))?,
        }
    }
    Ok(rules.restrict_self()?.ruleset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isolation::Scratch;

    fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| scope.spawn(work).join().unwrap())
    }

    fn available() -> bool {
        on_thread(|| matches!(restrict(&Allowed::default(), CompatLevel::BestEffort), Ok(RulesetStatus::FullyEnforced)))
    }

    #[test]
    fn test_restricted_thread_keeps_the_allowed_paths_only() {
        let (inside, outside) = (Scratch::new(None).unwrap(), Scratch::new(None).unwrap());
        std::fs::write(outside.path().join("secret"), "s").unwrap();
        let mut allowed = Allowed::default();
        allowed.add(inside.path(), Rights::Directory);
        let enforced = available();
        on_thread(|| {
            restrict_thread(FileIsolation::Normal, &allowed).unwrap();
            std::fs::write(inside.path().join("mine"), "x").unwrap();
            assert_eq!(std::fs::read(inside.path().join("mine")).unwrap(), b"x");
            assert_eq!(std::fs::read(outside.path().join("secret")).is_err(), enforced);
        });
        assert_eq!(std::fs::read(outside.path().join("secret")).unwrap(), b"s", "the process is not restricted");
    }

    #[test]
    fn test_strict_fails_where_landlock_is_missing() {
        let result = on_thread(|| restrict_thread(FileIsolation::Strict, &Allowed::default()));
        match result {
            Ok(()) => assert!(available()),
            Err(Error::Host { what, .. }) => assert!(!available() && what.contains("Landlock"), "{what}"),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn test_none_restricts_nothing() {
        on_thread(|| {
            restrict_thread(FileIsolation::None, &Allowed::default()).unwrap();
            assert!(std::fs::read("/proc/self/stat").is_ok());
        });
    }
}
