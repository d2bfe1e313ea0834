//! A Hermit image that is not an ELF file: a gzip'd tar archive with the kernel, files for the guest, and
//! `hermit.toml`, which names the kernel and says with which input and on which machine it wants to run.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::io::{self, Read};
use std::sync::Arc;

use flate2::read::MultiGzDecoder;
use hermit_entry::config::Config;

use super::elf::Result;
use crate::error::ImageError;

/// The magic number of gzip with its only compression method.
pub(super) const GZIP_MAGIC: [u8; 3] = [0x1f, 0x8b, 8];
/// The most that an archive may hold, unpacked; it is kept in memory.
pub(super) const SIZE_LIMIT: u64 = 1 << 30;

/// What an archive's `hermit.toml` asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageConfig {
    /// Arguments of the kernel.
    pub kernel_args: Vec<String>,
    /// Arguments of the application.
    pub app_args: Vec<String>,
    /// Environment variables, name and value.
    pub env_vars: Vec<(String, String)>,
    /// The least memory in bytes, if the image says.
    pub memory: Option<u64>,
    /// The least number of CPUs; 0 if the image doesn't say.
    pub cpus: u32,
}

/// An unpacked archive.
pub(super) struct Archive {
    /// Regular files by absolute guest path, `hermit.toml` and the kernel among them.
    pub(super) files: Vec<(String, Arc<[u8]>)>,
    pub(super) config: ImageConfig,
    pub(super) kernel: Arc<[u8]>,
}

impl Archive {
    /// Unpacks all of an archive that holds no more than `limit` bytes.
    pub(super) fn unpack(bytes: &[u8], limit: u64) -> Result<Self> {
        let files = members(bytes, limit)?;
        let text = files.get(&format!("/{}", Config::DEFAULT_PATH)).ok_or_else(|| archive("it has no hermit.toml"))?;
        let (path, config) = parse_config(text)?;
        let kernel =
            files.get(&path).ok_or_else(|| archive(format!("the kernel {path} is not one of its regular files")))?;
        if !kernel.starts_with(&object::elf::ELFMAG) {
            return Err(archive(format!("the kernel {path} is not an ELF file")));
        }
        Ok(Self { kernel: kernel.clone(), config, files: files.into_iter().collect() })
    }
}

fn archive(what: impl Into<String>) -> ImageError {
    ImageError::Archive { what: what.into() }
}

/// The error with its causes: `tar` puts the decompressor's error below its own.
fn unreadable(error: io::Error) -> ImageError {
    // What tar says of a header that is none quotes its bytes.
    if error.to_string().contains("when getting cksum") {
        return archive("it can't be unpacked: what is gzip'd is not a tar archive");
    }
    let mut what = format!("it can't be unpacked: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !what.ends_with(&text) {
            what = format!("{what}: {text}");
        }
        cause = error.source();
    }
    archive(what)
}

/// A reader that fails, rather than ends, once more than `limit` bytes were read.
struct Limited<R> {
    inner: R,
    limit: u64,
    left: u64,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(count as u64).ok_or_else(|| too_big(self.limit))?;
        Ok(count)
    }
}

fn too_big(limit: u64) -> io::Error {
    io::Error::other(format!("it holds more than {limit} bytes, the limit"))
}

/// Regular files by absolute guest path. Of several with one name, the last counts, as for tar.
fn members(bytes: &[u8], limit: u64) -> Result<BTreeMap<String, Arc<[u8]>>> {
    let mut files = BTreeMap::new();
    let mut tar = tar::Archive::new(Limited { inner: MultiGzDecoder::new(bytes), limit, left: limit });
    let mut left = limit;
    for entry in tar.entries().map_err(unreadable)? {
        let mut entry = entry.map_err(unreadable)?;
        let kind = entry.header().entry_type();
        let name = entry.path_bytes().into_owned();
        // The oldest format has no type for directories.
        if kind.is_dir() || kind.is_pax_global_extensions() || name.ends_with(b"/") {
            continue;
        }
        let path = guest_path(&name)?;
        if kind.is_hard_link() {
            let target = guest_path(&entry.link_name_bytes().unwrap_or_default())?;
            let data: &Arc<[u8]> = files
                .get(&target)
                .ok_or_else(|| archive(format!("{path} is a link to {target}, which is not before it")))?;
            let data = data.clone();
            files.insert(path, data);
        } else if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() {
            // A sparse member grows without reading from the archive, so its contents are limited too.
            let data = read_member(&mut entry, left, limit)?;
            left -= data.len() as u64;
            files.insert(path, data.into());
        } else {
            log::warn!("image archive: {path} is left out, it is not a regular file ({kind:?})");
        }
    }
    // The check sum comes last, behind the padding of the archive.
    io::copy(&mut tar.into_inner(), &mut io::sink()).map_err(unreadable)?;
    Ok(files)
}

fn read_member<R: Read>(entry: &mut tar::Entry<'_, R>, left: u64, limit: u64) -> Result<Vec<u8>> {
    let size = entry.size();
    if size > left {
        return Err(unreadable(too_big(limit)));
    }
    let mut data = Vec::new();
    entry.take(left + 1).read_to_end(&mut data).map_err(unreadable)?;
    if data.len() as u64 > left {
        return Err(unreadable(too_big(limit)));
    }
    if data.len() as u64 != size {
        return Err(archive(format!("a file of {size} bytes ends after {}", data.len())));
    }
    Ok(data)
}

/// The name of a member as an absolute path in the guest.
fn guest_path(name: &[u8]) -> Result<String> {
    let text = std::str::from_utf8(name)
        .map_err(|_| archive(format!("the name {:?} is not UTF-8", String::from_utf8_lossy(name))))?;
    let mut path = String::new();
    for part in text.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." {
            return Err(archive(format!("the name {text:?} leaves the archive by \"..\"")));
        }
        path.push('/');
        path.push_str(part);
    }
    if path.is_empty() || path.contains('\0') {
        return Err(archive(format!("{text:?} is no name of a file")));
    }
    Ok(path)
}

/// The kernel's path, and the rest.
fn parse_config(text: &[u8]) -> Result<(String, ImageConfig)> {
    let text = std::str::from_utf8(text).map_err(|e| archive(format!("hermit.toml is not UTF-8: {e}")))?;
    let Config::V1 { input, requirements, kernel } = toml::from_str(text).map_err(|e| archive(in_config(text, &e)))?;
    let owned = |list: Vec<std::borrow::Cow<'_, str>>| list.into_iter().map(std::borrow::Cow::into_owned).collect();
    let config = ImageConfig {
        kernel_args: owned(input.kernel_args),
        app_args: owned(input.app_args),
        env_vars: input.env_vars.iter().map(|variable| split_variable(variable)).collect::<Result<_>>()?,
        memory: requirements.memory.map(|bytes| bytes.as_u64()),
        cpus: requirements.cpus,
    };
    Ok((guest_path(kernel.as_bytes())?, config))
}

fn in_config(text: &str, error: &toml::de::Error) -> String {
    let line = error.span().and_then(|span| text.get(..span.start)).map(|before| before.matches('\n').count() + 1);
    let place = line.map(|line| format!(", line {line}")).unwrap_or_default();
    format!("hermit.toml{place}: {}", error.message())
}

fn split_variable(variable: &str) -> Result<(String, String)> {
    let (name, value) = variable.split_once('=').ok_or_else(|| {
        archive(format!("hermit.toml: the environment variable {variable:?} is not of the form NAME=VALUE"))
    })?;
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{ElfBuilder, gzip, tar};

    const TOML: &str = r#"
version = "1"
kernel = "./bin/kernel"
[input]
kernel_args = ["-freq", "1000"]
app_args = ["a b"]
env_vars = ["A=1=2"]
[requirements]
memory = "64 MiB"
cpus = 2
"#;

    fn unpack(files: &[(&str, &[u8])]) -> Result<Archive> {
        Archive::unpack(&gzip(&tar(files)), 1 << 20)
    }

    #[track_caller]
    fn assert_refused(result: Result<Archive>, expected: &str) {
        let error = result.err().unwrap();
        assert!(matches!(&error, ImageError::Archive { what } if what.contains(expected)), "{error}");
    }

    #[test]
    fn test_archive_valid_gives_kernel_files_and_config() {
        let elf = ElfBuilder::hermit().build();
        let found =
            unpack(&[("hermit.toml", TOML.as_bytes()), ("bin//kernel", &elf), ("./etc/a", b"old"), ("/etc/a", b"new")])
                .unwrap();
        assert_eq!(*found.kernel, *elf);
        let names: Vec<_> = found.files.iter().map(|(name, data)| (name.as_str(), data.len())).collect();
        assert_eq!(names, [("/bin/kernel", elf.len()), ("/etc/a", 3), ("/hermit.toml", TOML.len())]);
        assert_eq!(&*found.files[1].1, b"new");
        let expected = ImageConfig {
            kernel_args: vec!["-freq".into(), "1000".into()],
            app_args: vec!["a b".into()],
            env_vars: vec![("A".into(), "1=2".into())],
            memory: Some(64 << 20),
            cpus: 2,
        };
        assert_eq!(found.config, expected);
    }

    #[test]
    fn test_archive_hard_link_to_an_earlier_member_is_followed() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(3);
        builder.append_data(&mut header, "first", &b"abc"[..]).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Link);
        header.set_size(0);
        builder.append_link(&mut header, "second", "first").unwrap();
        let files = members(&gzip(&builder.into_inner().unwrap()), 1 << 20).unwrap();
        assert_eq!(&*files["/second"], b"abc");
    }

    #[test]
    fn test_archive_damaged_is_refused() {
        let elf = ElfBuilder::hermit().build();
        let plain = tar(&[("hermit.toml", TOML.as_bytes()), ("bin/kernel", &elf)]);
        let good = gzip(&plain);
        for length in [0, 3, 10, 20, good.len() / 2, good.len() - 9, good.len() - 1] {
            assert_refused(Archive::unpack(&good[..length], 1 << 20), "");
        }
        let mut bad_sum = good.clone();
        let at = bad_sum.len() - 6;
        bad_sum[at] ^= 1;
        assert_refused(Archive::unpack(&bad_sum, 1 << 20), "can't be unpacked");
        assert_refused(Archive::unpack(&gzip(&[b'x'; 5000]), 1 << 20), "is not a tar archive");
        assert_refused(Archive::unpack(&gzip(&elf), 1 << 20), "is not a tar archive");
        assert_refused(Archive::unpack(&gzip(b"short"), 1 << 20), "");
        assert_refused(Archive::unpack(&gzip(&plain[..1100]), 1 << 20), "");
    }

    #[test]
    fn test_archive_bigger_than_the_limit_is_refused_with_the_limit() {
        let bomb = gzip(&tar(&[("hermit.toml", TOML.as_bytes()), ("zeros", &vec![0; 2 << 20])]));
        assert!(bomb.len() < 100_000);
        assert_refused(Archive::unpack(&bomb, 1 << 20), "more than 1048576 bytes");
        let many = gzip(&vec![0; 2 << 20]);
        assert_refused(Archive::unpack(&many, 1 << 20), "more than 1048576 bytes");
    }

    #[test]
    fn test_archive_with_bad_names_is_refused() {
        for name in ["../x", "a/../../x", "/..", "a/.."] {
            assert_refused(unpack(&[(name, b"")]), "leaves the archive");
        }
        for name in [".", "./."] {
            assert_refused(unpack(&[(name, b"")]), "no name of a file");
        }
        assert!(guest_path(b"a\xff").is_err());
        assert!(guest_path(b"a\0b").is_err());
    }

    #[test]
    fn test_archive_without_config_or_kernel_says_so() {
        let with =
            |toml: &str| unpack(&[("hermit.toml", toml.as_bytes()), ("text", b"no kernel"), ("zip", &gzip(b"x"))]);
        assert_refused(unpack(&[("kernel", b"")]), "no hermit.toml");
        assert_refused(with(TOML), "the kernel /bin/kernel is not one of");
        assert_refused(with(&TOML.replace("./bin/kernel", "")), "no name of a file");
        assert_refused(with(&TOML.replace("./bin/kernel", "../zip")), "leaves the archive");
        assert_refused(with(&TOML.replace("./bin/kernel", "/text")), "/text is not an ELF file");
        assert_refused(with(&TOML.replace("./bin/kernel", "zip")), "/zip is not an ELF file");
    }

    #[test]
    fn test_config_broken_is_refused_with_its_place() {
        let with = |toml: &str| unpack(&[("hermit.toml", toml.as_bytes())]);
        assert_refused(with(&TOML.replace("\"1\"", "\"2\"")), "unknown variant `2`");
        assert_refused(with(&TOML.replace("version = \"1\"", "")), "version");
        assert_refused(with(&TOML.replace("cpus = 2", "cpus = -2")), "hermit.toml");
        assert_refused(with(&TOML.replace("cpus = 2", "cpus = ")), "line 10");
        assert_refused(with(&TOML.replace("64 MiB", "-1")), "hermit.toml");
        assert_refused(with(&TOML.replace("A=1=2", "A")), "NAME=VALUE");
        assert_refused(unpack(&[("hermit.toml", b"\xff")]), "not UTF-8");
        assert_refused(with(""), "hermit.toml");
    }
}
