//! The map from guest paths to what they mean. Keys are cleaned guest paths ("" is the root), so the longest prefix
//! of a path that is a key decides, and the directories above a key exist without being anything on the host.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use uhyve_interface::v2::parameters::FileType;

use super::host::HostNode;
use super::landlock::{Allowed, Rights};
use crate::error::{Error, Result};

/// What the user maps a guest path to.
#[derive(Debug, Clone)]
pub enum Source {
    /// A host file (it may not exist yet, its directory must), or a host directory with what lies beneath it.
    Host(PathBuf),
    /// A read-only file with these bytes: a member of an image, or bytes from Python.
    Bytes(Arc<[u8]>),
}

#[derive(Debug, Clone)]
pub(crate) enum Node {
    Host(HostNode),
    Bytes(Arc<[u8]>),
}

/// Where a guest path leads.
#[derive(Debug)]
pub(crate) enum Target {
    /// Below (or at) a host node; the string is what remains of the path.
    Host(HostNode, String),
    Bytes(Arc<[u8]>),
    /// Below something that is a file.
    BelowFile,
    /// A directory that only exists because something is mapped below it.
    Directory,
    Missing,
}

/// Guest paths and what they mean.
#[derive(Debug, Default)]
pub struct FileMap {
    nodes: BTreeMap<String, Node>,
}

/// Resolves `.`, `..` and repeated slashes without looking at any file system; a relative path starts at the root.
/// The root is the empty string, anything else starts with a slash and doesn't end with one.
pub fn clean(path: &str) -> String {
    let mut components = Vec::new();
    for component in path.split('/') {
        match component {
            "" | "." => {}
            ".." => {
                components.pop();
            }
            name => components.push(name),
        }
    }
    components.iter().fold(String::with_capacity(path.len() + 1), |clean, name| clean + "/" + name)
}

impl FileMap {
    /// Checks the mappings and opens the host directories they need. Errors are [`Error::Config`], or
    /// [`Error::Host`] if the host refuses to open a directory that exists.
    pub fn new(entries: Vec<(String, Source)>) -> Result<Self> {
        let mut nodes = BTreeMap::new();
        for (guest, source) in entries {
            if !guest.starts_with('/') || guest.contains('\0') {
                return Err(Error::Config(format!("guest path {guest:?} must be absolute and free of NUL bytes")));
            }
            let node = match source {
                Source::Bytes(data) => Node::Bytes(data),
                Source::Host(path) => Node::Host(host_node(&path)?),
            };
            if nodes.insert(clean(&guest), node).is_some() {
                return Err(Error::Config(format!("guest path {guest:?} is mapped twice")));
            }
        }
        let map = Self { nodes };
        for path in map.nodes.keys() {
            if let Some((above, Node::Bytes(_) | Node::Host(HostNode { is_file: true, .. }))) = map.above(path) {
                return Err(Error::Config(format!(
                    "guest path {path:?} lies below {above:?}, which is mapped to a file"
                )));
            }
        }
        match map.nodes.get("") {
            Some(Node::Host(HostNode { is_file: false, .. })) | None => Ok(map),
            Some(_) => Err(Error::Config("guest path \"/\" can only be mapped to a directory".into())),
        }
    }

    /// The longest proper prefix of a cleaned path that is a key.
    fn above(&self, path: &str) -> Option<(&str, &Node)> {
        let mut end = path.len();
        while end > 0 {
            end = path[..end].rfind('/')?;
            if let Some((key, node)) = self.nodes.get_key_value(&path[..end]) {
                return Some((key, node));
            }
        }
        None
    }

    /// The guest directories to announce: mapped directories, and those which hold a mapped file; not the root, which
    /// no guest can mount.
    pub fn mounts(&self) -> Vec<String> {
        let directory = |(path, node): (&String, &Node)| match node {
            Node::Host(HostNode { is_file: false, .. }) => path.clone(),
            _ => path[..path.rfind('/').unwrap_or(0)].to_string(),
        };
        self.nodes.iter().map(directory).filter(|path| !path.is_empty()).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The host paths that the mappings lead to.
    pub fn allowed(&self) -> Allowed {
        let mut allowed = Allowed::default();
        for node in self.nodes.values() {
            let Node::Host(HostNode { is_file, path, .. }) = node else { continue };
            let parent = path.parent().unwrap_or(Path::new("/"));
            match (is_file, path.exists()) {
                (false, _) => allowed.add(path, Rights::Directory),
                (true, true) => {
                    allowed.add(path, Rights::File);
                    allowed.add(parent, Rights::Unlink);
                }
                (true, false) => allowed.add(parent, Rights::Create),
            }
        }
        allowed
    }

    /// What a cleaned path means.
    pub(crate) fn resolve(&self, path: &str) -> Target {
        match self.nodes.get(path) {
            Some(Node::Host(node)) => return Target::Host(node.clone(), String::new()),
            Some(Node::Bytes(data)) => return Target::Bytes(data.clone()),
            None => {}
        }
        match self.above(path) {
            Some((_, Node::Bytes(_) | Node::Host(HostNode { is_file: true, .. }))) => Target::BelowFile,
            Some((key, Node::Host(node))) => Target::Host(node.clone(), path[key.len() + 1..].to_string()),
            None if path.is_empty() || self.has_children(path) => Target::Directory,
            None => Target::Missing,
        }
    }

    fn below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Node)> {
        self.nodes
            .range::<str, _>((std::ops::Bound::Excluded(prefix), std::ops::Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(move |(key, node)| (&key[prefix.len()..], node))
    }

    /// Whether something is mapped below a cleaned path.
    pub(crate) fn has_children(&self, path: &str) -> bool {
        self.below(&format!("{path}/")).next().is_some()
    }

    /// The names that are mapped directly below a cleaned path, or on the way to something mapped.
    pub(crate) fn children(&self, path: &str) -> BTreeMap<String, FileType> {
        let mut children = BTreeMap::new();
        for (rest, node) in self.below(&format!("{path}/")) {
            match rest.split_once('/') {
                Some((name, _)) => children.insert(name.to_string(), FileType::Directory),
                None => {
                    let is_file = matches!(node, Node::Bytes(_) | Node::Host(HostNode { is_file: true, .. }));
                    let kind = if is_file { FileType::RegularFile } else { FileType::Directory };
                    children.insert(rest.to_string(), kind)
                }
            };
        }
        children
    }

    /// Adds what a guest creates; false if the path means something by now.
    pub(crate) fn add(&mut self, path: &str, node: HostNode) -> bool {
        let missing = matches!(self.resolve(path), Target::Missing);
        if missing {
            self.nodes.insert(path.to_string(), Node::Host(node));
        }
        missing
    }

    /// Takes a read-only file out.
    pub(crate) fn remove_bytes(&mut self, path: &str) {
        if matches!(self.nodes.get(path), Some(Node::Bytes(_))) {
            self.nodes.remove(path);
        }
    }

    /// Takes something out that a guest created under the name `base` in the scratch directory; false if it isn't there.
    pub(crate) fn remove_created(&mut self, path: &str, base: &OsString) -> bool {
        let found = matches!(self.nodes.get(path), Some(Node::Host(node)) if node.is_created && node.base == *base);
        if found {
            self.nodes.remove(path);
        }
        found
    }
}

fn host_node(path: &Path) -> Result<HostNode> {
    let config = |what: &str| Error::Config(format!("host path {}: {what}", path.display()));
    let (path, is_dir) = match path.canonicalize() {
        Ok(path) => (path.clone(), path.is_dir()),
        Err(_) => {
            let name = path.file_name().ok_or_else(|| config("no such file or directory"))?;
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let parent = parent.canonicalize().map_err(|e| config(&format!("its directory can't be used: {e}")))?;
            if !parent.is_dir() {
                return Err(config("its parent is not a directory"));
            }
            (parent.join(name), false)
        }
    };
    let (directory, base) = if is_dir {
        (path.as_path(), OsString::new())
    } else {
        let name = path.file_name().ok_or_else(|| config("it has no name"))?;
        (path.parent().unwrap_or(Path::new("/")), name.to_os_string())
    };
    let directory: OwnedFd = open(directory, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|e| Error::Host { what: format!("can't open {}", directory.display()), source: e.into() })?;
    let node = HostNode { directory: Arc::new(directory), base, is_file: !is_dir, is_created: false, path };
    if node.at("").and_then(|place| place.stat(false)) == Err(nix::errno::Errno::ENOSYS) {
        let source = nix::errno::Errno::ENOSYS.into();
        return Err(Error::Host { what: "mapped files need openat2 (Linux 5.6)".into(), source });
    }
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isolation::Scratch;

    fn bytes(path: &str) -> (String, Source) {
        (path.into(), Source::Bytes(Arc::from(&b"data"[..])))
    }

    fn config_error(entries: Vec<(String, Source)>) -> String {
        match FileMap::new(entries) {
            Err(Error::Config(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn test_clean_resolves_dots_and_slashes() {
        for (path, expected) in
            [("/", ""), ("", ""), ("..", ""), ("/a/../../b//./c/", "/b/c"), ("a/b", "/a/b"), ("/..a/.b", "/..a/.b")]
        {
            assert_eq!(clean(path), expected);
            assert_eq!(clean(&clean(path)), expected);
        }
    }

    #[test]
    fn test_new_bad_mappings_are_config_errors() {
        assert!(config_error(vec![bytes("relative")]).contains("absolute"));
        assert!(config_error(vec![bytes("/a"), bytes("/b/../a")]).contains("twice"));
        assert!(config_error(vec![bytes("/a/b"), bytes("/a")]).contains("below"));
        assert!(config_error(vec![bytes("/")]).contains("directory"));
        assert!(config_error(vec![("/a".into(), Source::Host("/nowhere/x/y".into()))]).contains("/nowhere/x/y"));
    }

    #[test]
    fn test_mounts_are_mapped_directories_and_parents_of_files() {
        let dir = Scratch::new(None).unwrap();
        let host = Source::Host(dir.path().to_path_buf());
        let missing = Source::Host(dir.path().join("new"));
        let map = FileMap::new(vec![
            bytes("/x/y/z"),
            bytes("/x/y/w"),
            bytes("/top"),
            ("/d".into(), host),
            ("/e/f".into(), missing),
        ]);
        assert_eq!(map.unwrap().mounts(), ["/d", "/e", "/x/y"]);
    }

    #[test]
    fn test_resolve_takes_the_longest_prefix_of_components() {
        let dir = Scratch::new(None).unwrap();
        let map = FileMap::new(vec![
            ("/d".into(), Source::Host(dir.path().to_path_buf())),
            bytes("/d/in/side"),
            bytes("/dd/x"),
            bytes("/a-b/x"),
            bytes("/a/x"),
            bytes("/a/y/z"),
        ])
        .unwrap();
        assert!(matches!(map.resolve("/d/other"), Target::Host(_, rest) if rest == "other"));
        assert!(matches!(map.resolve("/d/in/side"), Target::Bytes(_)));
        assert!(matches!(map.resolve("/d/in/side/x"), Target::BelowFile));
        assert!(matches!(map.resolve("/dd"), Target::Directory));
        assert!(matches!(map.resolve(""), Target::Directory));
        assert!(matches!(map.resolve("/ddd"), Target::Missing));
        assert_eq!(map.children("").keys().collect::<Vec<_>>(), ["a", "a-b", "d", "dd"]);
        let below: Vec<_> = map.children("/a").into_iter().collect();
        assert_eq!(below, [("x".to_string(), FileType::RegularFile), ("y".to_string(), FileType::Directory)]);
    }
}
