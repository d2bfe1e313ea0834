//! Transfers: buffers across pages, buffers out of RAM, and waiting for data.

use super::*;

fn fifo(guest: &Guest) -> std::path::PathBuf {
    let path = guest.host.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    path
}

/// Virtual pages 2n and 2n + 1 lie swapped in RAM.
fn swapped(at: u64) -> Option<(u64, u64)> {
    (at < RAM).then_some((at ^ 0x1000, 0x1000 - at % 0x1000))
}

#[test]
fn test_v1_buffers_are_translated_page_by_page() {
    let guest = guest();
    let data: Vec<u8> = (0..0x2800u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    std::fs::write(guest.host.path().join("file"), &data).unwrap();
    let fd = guest.open("/d/file", 0);
    guest.put(PARAMETERS, &bytes!(fd, 0x1_0800u64, 0x3000u64, 0i64));
    guest.raw(0x500, PARAMETERS, &|| false, &mut 0, &mut |at| swapped(at));
    assert_eq!(guest.i64(20), 0x2800);
    for (i, byte) in data.iter().enumerate() {
        assert_eq!(guest.get::<1>(swapped(0x1_0800 + i as u64).unwrap().0)[0], *byte, "byte {i}");
    }
    let out = guest.open("/d/out", abi::O_CREAT | abi::O_WRONLY);
    guest.put(PARAMETERS, &bytes!(out, 0x1_0800u64, 0x2800u64));
    guest.raw(0x400, PARAMETERS, &|| false, &mut 0, &mut |at| swapped(at));
    assert_eq!(std::fs::read(guest.host.path().join("out")).unwrap(), data);
    guest.put(PARAMETERS, &bytes!(1i32, 0x1_0800u64, 0x2800u64));
    guest.raw(0x400, PARAMETERS, &|| false, &mut 0, &mut |at| swapped(at));
    assert_eq!(guest.services.console.captured(), data);
}

#[test]
fn test_buffers_that_leave_ram_are_efault_and_move_nothing() {
    let guest = guest();
    let fd = guest.open("/d/file", abi::O_RDWR);
    let efault = -i64::from(abi::EFAULT);
    for (buffer, length) in [(RAM - 4, 5), (RAM, 1), (0, RAM + 1), (u64::MAX, 2), (8, u64::MAX), (u64::MAX, u64::MAX)] {
        assert_eq!(guest.read_at(fd, buffer, length), efault);
        guest.call(0x1100, &bytes!(length, 77i64, buffer, fd, 0i32));
        assert_eq!(guest.i64(8), efault);
        guest.call(0x1100, &bytes!(length, 77i64, buffer, 1i32, 0i32));
        assert_eq!(guest.i64(8), efault);
        guest.call(0x500, &bytes!(fd, buffer, length, 77i64));
        assert_eq!(guest.i64(20), efault);
        guest.call(0x500, &bytes!(0i32, buffer, length, 77i64));
        assert_eq!(guest.i64(20), efault);
    }
    // The second page of the buffer isn't mapped.
    guest.put(PARAMETERS, &bytes!(fd, 0x1_0ffcu64, 8u64, 0i64));
    guest.raw(0x500, PARAMETERS, &|| false, &mut 0, &mut |at| swapped(at).filter(|_| at < 0x1_1000));
    assert_eq!(guest.i64(20), efault);
    assert_eq!(guest.read(fd, 10).unwrap(), b"0123456789", "the offset never moved");
    // The longest buffer there is.
    guest.seek(fd, 0, 0);
    assert_eq!(guest.read_at(fd, 0x2000, RAM - 0x2000), 10);
    assert_eq!(guest.read_at(fd, RAM + 5, 0), 0);
}

#[test]
fn test_input_is_read_after_the_console_is_flushed() {
    let (read, write): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
    let mut guest = guest();
    guest.services = guest.services.with_input(Input::File(read));
    let mut write = std::fs::File::from(write);
    guest.call(0x1050, &bytes!(16u64, 99u64, BUFFER));
    assert_eq!(guest.i64(8), 0, "nothing there yet");
    write.write_all(b"hello world").unwrap();
    assert_eq!(guest.read(0, 5).unwrap(), b"hello");
    guest.call(0x1050, &bytes!(16u64, 99u64, BUFFER));
    assert_eq!((guest.i64(8), guest.get::<6>(BUFFER)), (6, *b" world"));
    guest.call(0x1050, &bytes!(u64::MAX, 99u64, BUFFER));
    assert_eq!(guest.i64(8), 0);
    drop(write);
    assert_eq!(guest.read(0, 5).unwrap(), b"");
}

#[test]
fn test_read_of_an_empty_fifo_is_interrupted_by_a_kick_and_made_again() {
    let guest = guest();
    let path = fifo(&guest);
    let fd = guest.open("/d/fifo", 0);
    guest.put(PARAMETERS, &bytes!(16u64, 77i64, BUFFER, fd, 0i32));
    let outcome = kicked(
        Signal::SIGUSR1,
        true,
        |cancelled| guest.raw(0x1130, PARAMETERS, cancelled, &mut 0, &mut |_| None),
        || {},
    );
    assert!(matches!(outcome, Outcome::Interrupted), "{outcome:?}");
    assert_eq!(guest.i64(8), 77, "the guest has no answer yet");
    // A signal that is no kick changes nothing.
    let outcome = kicked(
        Signal::SIGUSR1,
        false,
        |cancelled| guest.raw(0x1130, PARAMETERS, cancelled, &mut 0, &mut |_| None),
        || std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(b"late").unwrap(),
    );
    assert!(matches!(outcome, Outcome::Done));
    assert_eq!((guest.i64(8), guest.get::<4>(BUFFER)), (4, *b"late"));
}

#[test]
fn test_write_to_a_full_fifo_goes_on_where_it_was_interrupted() {
    let guest = guest();
    let path = fifo(&guest);
    let mut reader = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let fd = guest.open("/d/fifo", abi::O_WRONLY);
    let length = 0x8_0000u64;
    let data: Vec<u8> = (0..length).map(|i| u8::try_from(i % 253).unwrap()).collect();
    guest.put(0x1_0000, &data);
    guest.put(PARAMETERS, &bytes!(length, 77i64, 0x1_0000u64, fd, 0i32));
    let mut progress = 0;
    let outcome =
        kicked(Signal::SIGUSR1, true, |c| guest.raw(0x1100, PARAMETERS, c, &mut progress, &mut |_| None), || {});
    assert!(matches!(outcome, Outcome::Interrupted) && progress > 0 && progress < length, "{outcome:?} {progress}");
    let read = std::thread::spawn(move || {
        let mut all = vec![0; usize::try_from(length).unwrap()];
        std::io::Read::read_exact(&mut reader, &mut all).unwrap();
        all
    });
    let outcome = guest.raw(0x1100, PARAMETERS, &|| false, &mut progress, &mut |_| None);
    assert!(matches!(outcome, Outcome::Done));
    assert_eq!(guest.i64(8), i64::try_from(length).unwrap());
    assert!(read.join().unwrap() == data);
}

#[test]
fn test_console_failure_is_a_host_error() {
    let guest = guest_with(Output::Callback(Box::new(|_| Err(std::io::Error::other("full")))), &[], &[]);
    guest.put(BUFFER, b"x\n");
    guest.put(PARAMETERS, &bytes!(2u64, BUFFER));
    assert!(matches!(guest.value(0x1030, PARAMETERS), Outcome::HostError(e) if e.to_string() == "full"));
    assert!(matches!(guest.value(0x1030, PARAMETERS), Outcome::Done));
}

#[test]
fn test_two_vcpus_share_descriptors_and_the_table() {
    let guest = guest();
    let names: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4u64)
            .map(|n| {
                let guest = &guest;
                scope.spawn(move || {
                    let (at, name) = (0x2_0000 + n * 0x1000, 0x2_0800 + n * 0x1000);
                    (0..50u64)
                        .map(|i| {
                            // All of them create, open and remove the same few paths.
                            guest.put(name, format!("/s/{}\0", i % 3).as_bytes());
                            guest.put(at, &bytes!(name, abi::O_CREAT | abi::O_RDWR, 0o600i32, 0i32));
                            guest.value(0x1110, at);
                            let fd = i32::from_le_bytes(guest.get(at + 16));
                            if i % 5 == 0 {
                                guest.put(at, &bytes!(name, 0i32));
                                guest.value(0x1150, at);
                            }
                            guest.put(at, &bytes!(fd, 0i32));
                            guest.value(0x1120, at);
                            (fd, i32::from_le_bytes(guest.get(at + 4)))
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(names.iter().all(|(fd, closed)| *fd >= 3 && *closed == 0), "{names:?}");
    let distinct: std::collections::HashSet<_> = names.iter().map(|(fd, _)| fd).collect();
    assert_eq!(distinct.len(), names.len());
}

#[test]
fn test_calls_of_a_restricted_thread_work_on_what_is_mapped() {
    let guest = guest();
    let outside = Scratch::new(None).unwrap();
    std::thread::scope(|scope| {
        let work = || {
            crate::isolation::restrict_thread(crate::isolation::FileIsolation::Normal, &guest.services.files.allowed())
                .unwrap();
            let fd = guest.open("/d/file", abi::O_RDWR | abi::O_TRUNC);
            assert_eq!(
                (guest.write(fd, b"abc"), guest.seek(fd, 0, 0), guest.read(fd, 9).unwrap()),
                (3, 0, b"abc".to_vec())
            );
            assert!(guest.open("/d/made", abi::O_CREAT | abi::O_WRONLY) > 0);
            assert_eq!((guest.mkdir("/d/dir").0, guest.mkdir("/own").0), (1, 1));
            assert!(
                guest.open("/own/f", abi::O_CREAT | abi::O_RDWR) > 0
                    && guest.open("/tmp/f", abi::O_CREAT | abi::O_RDWR) > 0
            );
            assert!(guest.open("/new/file", abi::O_CREAT | abi::O_RDWR) > 0);
            assert_eq!((guest.unlink("/f"), guest.unlink("/new/file"), guest.unlink("/tmp/f")), (0, 0, 0));
            let directory = guest.open("/d", 0);
            assert!(guest.list(directory, 4096).unwrap().len() >= 3);
            std::fs::write(outside.path().join("x"), "")
        };
        // The kernel of a test machine may lack Landlock; then the write succeeds, and the log says why.
        let _ = scope.spawn(work).join().unwrap();
    });
}
