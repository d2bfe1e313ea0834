//! Hypercalls as a guest makes them: parameter bytes in RAM, a port, a register.

use super::*;
use crate::devices::serial::Output;
use crate::isolation::wait::tests::kicked;
use crate::isolation::{FileMap, IoMode, Scratch, Source};
use crate::memory::Backing;
use nix::sys::signal::Signal;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use uhyve_interface::v2::parameters as abi;

mod data;
mod hostile;

const RAM: u64 = 1 << 20;
/// Where the tests put parameters, names and buffers.
const PARAMETERS: u64 = 0x1000;
const NAME: u64 = 0x3000;
const BUFFER: u64 = 0x8000;

struct Guest {
    services: Services,
    /// Mapped at `/d`.
    host: Scratch,
}

fn guest_with(output: Output, arguments: &[&str], environment: &[(&str, &str)]) -> Guest {
    let host = Scratch::new(None).unwrap();
    std::fs::write(host.path().join("file"), "0123456789").unwrap();
    std::fs::write(host.path().join("alone"), "just me").unwrap();
    let source = |name: &str| Source::Host(host.path().join(name));
    let map = FileMap::new(vec![
        ("/d".into(), Source::Host(host.path().to_path_buf())),
        ("/f".into(), source("alone")),
        ("/new/file".into(), source("not-yet")),
        ("/v/a".into(), Source::Bytes(Arc::from(&b"virtual"[..]))),
        ("/v/w/b".into(), Source::Bytes(Arc::from(&b""[..]))),
    ]);
    let files = Files::new(map.unwrap(), Scratch::new(None).unwrap(), IoMode::default());
    let memory = GuestMemory::new(0, RAM, Backing::default()).unwrap();
    let arguments: Vec<_> = arguments.iter().map(|a| a.to_string()).collect();
    let environment: Vec<_> = environment.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let command_line = CommandLine::new(Path::new("/images/app"), &arguments, &environment).unwrap();
    let console = Arc::new(Serial::new(output).unwrap());
    let services = Services::new(memory, console, files, command_line).with_input(Input::Empty);
    Guest { services, host }
}

fn guest() -> Guest {
    guest_with(Output::Capture { limit: 1 << 20 }, &[], &[])
}

/// The little-endian bytes of some integers, one after the other.
macro_rules! bytes {
    ($($value:expr),*) => {{ let mut all = Vec::new(); $(all.extend_from_slice(&$value.to_le_bytes());)* all }};
}
use bytes;

impl Guest {
    fn put(&self, address: u64, data: &[u8]) {
        self.services.memory.write(address, data).unwrap();
    }

    fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.services.memory.read(address, &mut data).unwrap();
        data
    }

    fn i32(&self, offset: u64) -> i32 {
        i32::from_le_bytes(self.get(PARAMETERS + offset))
    }

    fn i64(&self, offset: u64) -> i64 {
        i64::from_le_bytes(self.get(PARAMETERS + offset))
    }

    fn raw(
        &self,
        port: u16,
        value: u64,
        cancelled: &dyn Fn() -> bool,
        progress: &mut u64,
        translate: Translate<'_>,
    ) -> Outcome {
        let call = identify(port).unwrap();
        let data = u32::try_from(value & 0xffff_ffff).unwrap();
        let rdi = if call.needs_rdi() { value } else { 0xdead };
        let mut request = Request { call, data, size: 4, rdi, translate, cancelled, progress };
        self.services.dispatch(&mut request)
    }

    /// A call with a value, with virtual addresses equal to physical ones.
    fn value(&self, port: u16, value: u64) -> Outcome {
        self.raw(port, value, &|| false, &mut 0, &mut |at| Some((at, 0x1000 - at % 0x1000)))
    }

    /// A call with parameters.
    fn call(&self, port: u16, parameters: &[u8]) {
        self.put(PARAMETERS, parameters);
        let outcome = self.value(port, PARAMETERS);
        assert!(matches!(outcome, Outcome::Done), "{outcome:?}");
    }

    fn name(&self, name: &str) -> u64 {
        self.put(NAME, format!("{name}\0").as_bytes());
        NAME
    }

    fn open(&self, name: &str, flags: i32) -> i32 {
        self.call(0x1110, &bytes!(self.name(name), flags, 0o600i32, 77i32));
        self.i32(16)
    }

    fn close(&self, fd: i32) -> i32 {
        self.call(0x1120, &bytes!(fd, 77i32));
        self.i32(4)
    }

    fn read_at(&self, fd: i32, buffer: u64, length: u64) -> i64 {
        self.call(0x1130, &bytes!(length, 77i64, buffer, fd, 0i32));
        self.i64(8)
    }

    fn read(&self, fd: i32, length: u64) -> Result<Vec<u8>, i64> {
        let read = self.read_at(fd, BUFFER, length);
        let mut data = vec![0; usize::try_from(read).map_err(|_| read)?];
        self.services.memory.read(BUFFER, &mut data).unwrap();
        Ok(data)
    }

    fn write(&self, fd: i32, data: &[u8]) -> i64 {
        self.put(BUFFER, data);
        self.call(0x1100, &bytes!(data.len() as u64, 77i64, BUFFER, fd, 0i32));
        self.i64(8)
    }

    fn seek(&self, fd: i32, offset: i64, whence: u32) -> i64 {
        self.call(0x1140, &bytes!(offset, whence, fd));
        self.i64(0)
    }

    fn unlink(&self, name: &str) -> i32 {
        self.call(0x1150, &bytes!(self.name(name), 77i32));
        self.i32(8)
    }

    /// The tag of the result and the error.
    fn mkdir(&self, name: &str) -> (i32, i32) {
        self.call(0x1190, &bytes!(self.name(name), 0u64, 0u32, 0i32));
        (self.i32(16), self.i32(20))
    }

    /// The tag of the result, the error, mode and size.
    fn stat(&self, name: &str, kind: u32) -> (i32, i32, u32, i64) {
        self.put(BUFFER, &[0xff; size_of::<abi::FileAttr>()]);
        self.call(0x1170, &bytes!(self.name(name), kind, 0u32, BUFFER, 0u32, 0i32));
        let (tag, errno) = (self.i32(24), self.i32(28));
        let at = |offset: usize| BUFFER + offset as u64;
        let mode = u32::from_le_bytes(self.get(at(std::mem::offset_of!(abi::FileAttr, st_mode))));
        (tag, errno, mode, i64::from_le_bytes(self.get(at(std::mem::offset_of!(abi::FileAttr, st_size)))))
    }

    /// All names of a directory with their types, sorted, by listings of `length` bytes.
    fn list(&self, fd: i32, length: u64) -> Result<Vec<(String, u8)>, i32> {
        let mut names = Vec::new();
        loop {
            self.call(0x1160, &bytes!(fd, 0u32, BUFFER, length, 0u32, 0u32, 0u64));
            match self.i32(24) {
                1 => {}
                2 => break,
                3 => return Err(self.i32(32)),
                tag => panic!("tag {tag}"),
            }
            let (mut at, end) = (BUFFER, BUFFER + u64::try_from(self.i64(32)).unwrap());
            while at < end {
                let size = u16::from_le_bytes(self.get(at + 16));
                let name = self.services.memory.read_cstring(at + 19, 256).unwrap().unwrap();
                names.push((String::from_utf8(name).unwrap(), self.get::<1>(at + 18)[0]));
                assert!(size.is_multiple_of(8) && size >= 24);
                at += u64::from(size);
            }
            assert_eq!(at, end);
        }
        names.retain(|(name, _)| name != "." && name != "..");
        names.sort();
        Ok(names)
    }

    fn output(&self) -> String {
        String::from_utf8(self.services.console.captured()).unwrap()
    }
}

#[test]
fn test_exit_of_both_versions_gives_its_code() {
    let guest = guest();
    guest.put(PARAMETERS, &(-1i32).to_le_bytes());
    assert!(matches!(guest.value(0x540, PARAMETERS), Outcome::Exit(-1)));
    assert!(matches!(guest.value(0x540, RAM - 3), Outcome::Crash(text) if text.contains("0xffffd")));
    assert!(matches!(guest.value(0x1010, 0xffff_ffff), Outcome::Exit(-1)));
    assert!(matches!(guest.value(0x1010, 7), Outcome::Exit(7)));
}

#[test]
fn test_console_calls_of_both_versions_share_a_sink() {
    let guest = guest();
    guest.value(0x800, 0x1234_5600 | u64::from(b'a'));
    guest.value(0x1020, u64::from(b'b'));
    guest.put(BUFFER, b"buffer");
    guest.call(0x880, &bytes!(BUFFER, 3u64));
    guest.call(0x1030, &bytes!(6u64, BUFFER));
    assert_eq!(guest.write(1, b"out"), 3);
    assert_eq!(guest.write(2, b"err"), 3);
    guest.put(BUFFER, b"v1");
    guest.call(0x400, &bytes!(1i32, BUFFER, 2u64));
    assert_eq!(guest.output(), "abbufbufferouterrv1");
    guest.call(0x1030, &bytes!(u64::MAX, BUFFER));
    guest.call(0x880, &bytes!(RAM - 1, 2u64));
    assert_eq!(guest.output().len(), 19, "a buffer that leaves RAM writes nothing");
}

#[test]
fn test_cmdsize_and_cmdval_agree() {
    let guest = guest_with(Output::Discard, &["-v", ""], &[("KEY", "value"), ("EMPTY", "")]);
    guest.value(0x740, BUFFER);
    let number = |index: u64| i32::from_le_bytes(guest.get(BUFFER + 4 * index));
    let arguments: Vec<_> = (0..4).map(number).collect();
    assert_eq!(arguments, [3, 12, 3, 1]);
    assert_eq!((number(129), number(130), number(131), number(132)), (2, 10, 7, 0));
    let (argv, envp, mut at) = (0x4000u64, 0x4400u64, 0x5000u64);
    let mut expected = Vec::new();
    for (table, list) in [(argv, &["/images/app\0", "-v\0", "\0"][..]), (envp, &["KEY=value\0", "EMPTY=\0"][..])] {
        for (i, text) in list.iter().enumerate() {
            guest.put(table + 8 * i as u64, &at.to_le_bytes());
            expected.push((at, *text));
            at += 0x40;
        }
    }
    // A slot that points nowhere is skipped; those behind it are not.
    guest.put(argv + 8, &u64::MAX.to_le_bytes());
    guest.call(0x780, &bytes!(argv, envp));
    for (i, (at, text)) in expected.into_iter().enumerate() {
        let text = if i == 1 { "\0\0" } else { text };
        let mut found = vec![0; text.len()];
        guest.services.memory.read(at, &mut found).unwrap();
        assert_eq!(found, text.as_bytes());
    }
    guest.call(0x780, &bytes!(u64::MAX, RAM));
    assert!(matches!(guest.value(0x740, RAM - 1031), Outcome::Done));
}

#[test]
fn test_open_read_seek_close_of_a_mapped_file() {
    let guest = guest();
    let fd = guest.open("/d/../d//file", 0);
    assert_eq!(fd, 3);
    assert_eq!(guest.read(fd, 4).unwrap(), b"0123");
    assert_eq!(guest.seek(fd, -2, 2), 8);
    assert_eq!(guest.read(fd, 100).unwrap(), b"89");
    assert_eq!(guest.read(fd, 100).unwrap(), b"");
    assert_eq!(guest.seek(fd, -1, 0), -i64::from(abi::EINVAL));
    assert_eq!(guest.seek(fd, 0, 9), -i64::from(abi::EINVAL));
    assert_eq!(guest.write(fd, b"x"), -i64::from(abi::EBADF), "opened read-only");
    assert_eq!((guest.close(fd), guest.close(fd)), (0, -abi::EBADF));
    assert_eq!(guest.read(fd, 1), Err(-i64::from(abi::EBADF)));
    assert_eq!([guest.close(0), guest.close(1), guest.close(2), guest.close(-1)], [0, 0, 0, -abi::EBADF]);
    // Version 1 answers −1, with the offset in the struct's middle.
    guest.call(0x580, &bytes!(77i32, 5i64, 0i32));
    assert_eq!(guest.i64(4), -1);
}

#[test]
fn test_open_flags() {
    let guest = guest();
    assert_eq!(guest.open("/d/file", 0o4000), -abi::EINVAL);
    assert_eq!(guest.open("/d/file", 3), -abi::EINVAL);
    assert_eq!(guest.open("/d/x", abi::O_CREAT | abi::O_DIRECTORY), -abi::EINVAL);
    assert_eq!(guest.open("/nowhere", abi::O_RDWR), -abi::ENOENT);
    assert_eq!(guest.open("/d/none", abi::O_RDWR), -abi::ENOENT);
    assert_eq!(guest.open("/d/file", abi::O_CREAT | abi::O_EXCL), -abi::EEXIST);
    assert_eq!(guest.open("/d", abi::O_RDWR), -abi::EISDIR);
    let fd = guest.open("/d/file", abi::O_WRONLY | abi::O_APPEND);
    assert_eq!(guest.write(fd, b"ab"), 2);
    assert_eq!(std::fs::read(guest.host.path().join("file")).unwrap(), b"0123456789ab");
    let fd = guest.open("/d/file", abi::O_RDWR | abi::O_TRUNC);
    assert_eq!((guest.read(fd, 9).unwrap(), guest.stat("/d/file", 0).3), (vec![], 0));
    guest.put(NAME, &[b'a'; 5000]);
    guest.call(0x1110, &bytes!(NAME, 0i32, 0i32, 0i32));
    assert_eq!(guest.i32(16), -abi::EINVAL, "no NUL");
    guest.put(NAME, b"/\xff\0");
    guest.call(0x1110, &bytes!(NAME, 0i32, 0i32, 0i32));
    assert_eq!(guest.i32(16), -abi::EINVAL, "not UTF-8");
    guest.call(0x440, &bytes!(RAM, 0i32, 0i32, 0i32));
    assert_eq!(guest.i32(16), -abi::EFAULT);
}

#[test]
fn test_mapped_file_is_all_of_its_mapping() {
    let guest = guest();
    let fd = guest.open("/f", 0);
    assert_eq!(guest.read(fd, 99).unwrap(), b"just me");
    assert!(guest.open("/f/../file", 0) < 0 && guest.open("/f/file", 0) < 0);
    // One that doesn't exist yet, with the name that the user gave it.
    assert_eq!(guest.open("/new/file", 0), -abi::ENOENT);
    assert_eq!(guest.mkdir("/new/file"), (2, abi::EPERM));
    let fd = guest.open("/new/file", abi::O_CREAT | abi::O_WRONLY);
    assert_eq!(guest.write(fd, b"made"), 4);
    assert_eq!(std::fs::read(guest.host.path().join("not-yet")).unwrap(), b"made");
    assert_eq!(guest.unlink("/new/file"), 0);
    assert!(!guest.host.path().join("not-yet").exists());
    // A link that appears in its place leads nowhere, not even to its sibling.
    std::os::unix::fs::symlink("file", guest.host.path().join("not-yet")).unwrap();
    assert_eq!(guest.open("/new/file", 0), -abi::EPERM);
}

#[test]
fn test_links_do_not_lead_out_of_a_mapping() {
    let guest = guest();
    let outside = Scratch::new(None).unwrap();
    std::fs::write(outside.path().join("secret"), "s").unwrap();
    let link = |target: &Path, name: &str| std::os::unix::fs::symlink(target, guest.host.path().join(name)).unwrap();
    link(&outside.path().join("secret"), "absolute");
    let up = Path::new("..").join(outside.path().file_name().unwrap());
    link(&up.join("secret"), "relative");
    link(&up, "directory");
    link(Path::new("/proc/self/root"), "magic");
    link(Path::new("file"), "inside");
    for name in ["/d/absolute", "/d/relative", "/d/directory/secret", "/d/magic/etc/passwd", "/d/directory"] {
        for flags in [0, abi::O_RDWR, abi::O_CREAT | abi::O_WRONLY, abi::O_TRUNC | abi::O_RDWR] {
            assert_eq!(guest.open(name, flags), -abi::EPERM, "{name}");
        }
        assert_eq!(guest.stat(name, 0).1, abi::EPERM, "{name}");
    }
    assert_eq!((guest.mkdir("/d/directory/x"), guest.unlink("/d/directory/secret")), ((2, abi::EPERM), -abi::EPERM));
    assert_eq!(std::fs::read(outside.path().join("secret")).unwrap(), b"s");
    let fd = guest.open("/d/inside", 0);
    assert_eq!(guest.read(fd, 2).unwrap(), b"01");
    // The link itself may be looked at and removed.
    assert_eq!(guest.stat("/d/absolute", 1).2 & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!((guest.unlink("/d/absolute"), outside.path().join("secret").exists()), (0, true));
}

#[test]
fn test_virtual_files_are_read_only_and_listed() {
    let guest = guest();
    let fd = guest.open("/v/a", 0);
    assert_eq!((guest.read(fd, 3).unwrap(), guest.read(fd, 30).unwrap()), (b"vir".to_vec(), b"tual".to_vec()));
    assert_eq!((guest.seek(fd, 2, 0), guest.seek(fd, 1, 1), guest.seek(fd, 100, 2)), (2, 3, 107));
    assert_eq!(guest.read(fd, 1).unwrap(), b"");
    assert_eq!(guest.seek(fd, i64::MAX, 1), -i64::from(abi::EOVERFLOW));
    assert_eq!(guest.seek(fd, -108, 1), -i64::from(abi::EINVAL));
    assert_eq!(guest.write(fd, b"x"), -i64::from(abi::EROFS));
    assert_eq!(guest.open("/v/a", abi::O_RDWR), -abi::EROFS);
    let directory = guest.open("/v", abi::O_DIRECTORY);
    let expected = [
        ("a".to_string(), u8::from(abi::FileType::RegularFile)),
        ("w".to_string(), u8::from(abi::FileType::Directory)),
    ];
    assert_eq!(guest.list(directory, 24).unwrap(), expected);
    assert_eq!(guest.list(directory, 4096).unwrap(), []);
    assert_eq!(guest.seek(directory, 0, 0), 0);
    assert_eq!(guest.list(directory, 23), Err(abi::EINVAL));
    assert_eq!(guest.list(directory, 4096).unwrap(), expected);
    assert_eq!(guest.read(directory, 1), Err(-i64::from(abi::EISDIR)));
    assert_eq!((guest.stat("/v/a", 0).2, guest.stat("/v/a", 0).3), (libc::S_IFREG | 0o444, 7));
    assert_eq!(guest.stat("/v", 0).2, libc::S_IFDIR | 0o755);
    assert_eq!((guest.mkdir("/v"), guest.unlink("/v")), ((2, abi::EEXIST), -abi::EISDIR));
    assert_eq!((guest.unlink("/v/a"), guest.open("/v/a", 0)), (0, -abi::ENOENT));
}

#[test]
fn test_unmapped_files_live_in_the_scratch_directory_until_the_end() {
    let guest = guest();
    let scratch = guest.services.files.allowed();
    let fd = guest.open("/tmp/x", abi::O_CREAT | abi::O_RDWR);
    assert_eq!(guest.write(fd, b"mine"), 4);
    let again = guest.open("/tmp/x", 0);
    assert_eq!(guest.read(again, 9).unwrap(), b"mine");
    assert_eq!(guest.open("/tmp/x", abi::O_CREAT | abi::O_EXCL), -abi::EEXIST);
    assert_eq!(guest.mkdir("/tmp"), (2, abi::EEXIST));
    assert_eq!((guest.mkdir("/made").0, guest.mkdir("/made/deep").0), (1, 1));
    assert!(guest.open("/made/deep/f", abi::O_CREAT | abi::O_WRONLY) > 0);
    let root = guest.open("/", 0);
    let names: Vec<_> = guest.list(root, 4096).unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["d", "f", "made", "new", "tmp", "v"]);
    assert_eq!(
        (guest.unlink("/made"), guest.unlink("/tmp/x"), guest.unlink("/tmp/x")),
        (-abi::EISDIR, 0, -abi::ENOENT)
    );
    assert_eq!(guest.read(again, 0).unwrap(), b"");
    drop(scratch);
    let path = guest.services.files.scratch_path().to_path_buf();
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 1);
    drop(guest);
    assert!(!path.exists());
}

#[test]
fn test_host_directory_is_listed_and_stated() {
    let guest = guest();
    assert_eq!(guest.mkdir("/d/sub"), (1, 0));
    assert_eq!(guest.mkdir("/d/sub"), (2, abi::EEXIST));
    let fd = guest.open("/d", abi::O_DIRECTORY);
    let names: Vec<_> = guest.list(fd, 64).unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["alone", "file", "sub"]);
    assert_eq!(guest.list(guest.open("/d/file", 0), 64), Err(abi::EIO), "ENOTDIR has no number of its own");
    guest.call(0x1160, &bytes!(fd, 0u32, RAM - 8, 9u64, 0u32, 0u32, 0u64));
    assert_eq!((guest.i32(24), guest.i32(32)), (3, abi::EFAULT));
    assert_eq!(guest.stat("/d/file", 0).3, 10);
    assert_eq!((guest.stat("/d/none", 0).1, guest.stat("/d/file", 2).1), (abi::ENOENT, abi::EINVAL));
    guest.call(0x1180, &bytes!(fd, 0u32, BUFFER, 0u32, 0i32));
    assert_eq!(guest.i32(16), 1);
    guest.call(0x1180, &bytes!(1i32, 0u32, BUFFER, 0u32, 0i32));
    assert_eq!((guest.i32(16), guest.i32(20)), (2, abi::EBADF));
    guest.call(0x1170, &bytes!(guest.name("/d"), 0u32, 0u32, RAM - 50, 0u32, 0i32));
    assert_eq!((guest.i32(24), guest.i32(28)), (2, abi::EFAULT));
}
