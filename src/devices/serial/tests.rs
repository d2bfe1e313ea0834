use super::*;
use crate::isolation::wait::tests::kicked;
use nix::sys::signal::Signal;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};

const NEVER: &dyn Fn() -> bool = &|| false;

fn pipe() -> (File, Serial) {
    let (read, write): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
    (File::from(read), Serial::new(Output::File(File::from(write))).unwrap())
}

fn collector() -> (Arc<Mutex<Vec<Vec<u8>>>>, Serial) {
    let pieces = Arc::new(Mutex::new(Vec::new()));
    let sink = pieces.clone();
    let callback = Box::new(move |bytes: &[u8]| {
        sink.lock().unwrap().push(bytes.to_vec());
        Ok(())
    });
    (pieces, Serial::new(Output::Callback(callback)).unwrap())
}

fn read(file: &mut File) -> Vec<u8> {
    let mut buffer = [0; 256];
    let n = if is_ready(file.as_fd(), PollFlags::POLLIN) { file.read(&mut buffer).unwrap() } else { 0 };
    buffer[..n].to_vec()
}

#[test]
fn test_line_leaves_at_its_newline_and_the_rest_by_flush() {
    let (mut end, serial) = pipe();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    serial.set_notifier(Box::new(move || {
        counted.fetch_add(1, Ordering::SeqCst);
    }));
    for byte in b"ab" {
        serial.write(&[*byte], NEVER).unwrap();
    }
    assert_eq!((read(&mut end), calls.load(Ordering::SeqCst), serial.has_unflushed()), (vec![], 1, true));
    serial.write(b"\n", NEVER).unwrap();
    assert_eq!((read(&mut end), serial.has_unflushed()), (b"ab\n".to_vec(), false));
    serial.write(b"tail", NEVER).unwrap();
    assert_eq!(calls.load(Ordering::SeqCst), 2);
    serial.flush(NEVER).unwrap();
    assert_eq!(read(&mut end), b"tail");
}

#[test]
fn test_capture_keeps_its_limit() {
    let serial = Serial::new(Output::Capture { limit: 5 }).unwrap();
    serial.write(b"abcd", NEVER).unwrap();
    assert!(!serial.truncated());
    serial.write(b"efgh", NEVER).unwrap();
    serial.write(b"i", NEVER).unwrap();
    assert_eq!((serial.captured(), serial.truncated(), serial.has_unflushed()), (b"abcde".to_vec(), true, false));
}

#[test]
fn test_regular_file_gets_everything_in_order() {
    let dir = crate::isolation::Scratch::new(None).unwrap();
    let path = dir.path().join("out");
    let serial = Serial::new(Output::File(File::create(&path).unwrap())).unwrap();
    serial.write(&[b'x'; 100_000], NEVER).unwrap();
    serial.write(b"end", NEVER).unwrap();
    serial.flush(NEVER).unwrap();
    let text = std::fs::read(path).unwrap();
    assert_eq!((text.len(), text.ends_with(b"xend")), (100_003, true));
}

#[test]
fn test_callback_gets_a_line_a_call_and_pieces_of_a_long_one() {
    let (pieces, serial) = collector();
    serial.write(b"one\ntwo\nthr", NEVER).unwrap();
    serial.write(b"ee\n", NEVER).unwrap();
    serial.write(&[b'z'; PIECE - 1], NEVER).unwrap();
    serial.write("€".as_bytes(), NEVER).unwrap();
    serial.flush(NEVER).unwrap();
    let pieces = pieces.lock().unwrap();
    assert_eq!(pieces[..3], [b"one\n".to_vec(), b"two\n".to_vec(), b"three\n".to_vec()]);
    assert_eq!((pieces[3].len(), pieces[4].as_slice(), pieces.len()), (PIECE - 1, "€".as_bytes(), 5));
}

#[test]
fn test_callback_may_use_the_console_and_its_error_is_returned_once() {
    let serial = Arc::new(Mutex::new(None::<Arc<Serial>>));
    let own = serial.clone();
    let callback = Box::new(move |_: &[u8]| {
        let console = own.lock().unwrap().clone().unwrap();
        console.flush(&|| false)?;
        assert!(!console.truncated());
        Err(io::Error::other("no"))
    });
    let console = Arc::new(Serial::new(Output::Callback(callback)).unwrap());
    *serial.lock().unwrap() = Some(console.clone());
    assert_eq!(console.write(b"a\n", NEVER).unwrap_err().to_string(), "no");
    console.write(b"b\n", NEVER).unwrap();
    console.flush(NEVER).unwrap();
    assert!(!console.has_unflushed());
    *serial.lock().unwrap() = None;
}

#[test]
fn test_callback_panic_unwinds_and_leaves_a_console_that_does_not_hang() {
    let serial = Serial::new(Output::Callback(Box::new(|_| panic!("callback")))).unwrap();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| serial.write(b"a\n", NEVER)));
    assert!(result.is_err());
    for _ in 0..20 {
        serial.write(&[b'x'; 10_000], NEVER).unwrap();
    }
    serial.flush(NEVER).unwrap();
}

#[test]
fn test_closed_pipe_is_an_error_once() {
    let (end, serial) = pipe();
    drop(end);
    assert_eq!(serial.write(b"a\n", NEVER).unwrap_err().kind(), ErrorKind::BrokenPipe);
    serial.write(b"b\n", NEVER).unwrap();
    serial.flush(NEVER).unwrap();
}

#[test]
fn test_full_pipe_buffers_then_refuses_when_kicked_and_loses_nothing() {
    let (mut end, serial) = pipe();
    let mut taken = 0;
    let mut line = vec![b'x'; 1023];
    line.push(b'\n');
    let error = kicked(
        Signal::SIGUSR1,
        true,
        |cancelled| loop {
            match serial.write(&line, cancelled) {
                Ok(()) => taken += line.len(),
                Err(e) => break e,
            }
        },
        || {},
    );
    assert_eq!(error.kind(), ErrorKind::Interrupted);
    assert!(serial.has_unflushed() && taken >= FULL);
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        end.read_to_end(&mut text).unwrap();
        text
    });
    serial.flush(NEVER).unwrap();
    serial.write(b"last", NEVER).unwrap();
    serial.flush(NEVER).unwrap();
    drop(serial);
    let text = reader.join().unwrap();
    assert_eq!((text.len(), text.ends_with(b"\nlast")), (taken + 4, true));
}

#[test]
fn test_writers_of_a_slow_callback_wait_and_nothing_is_lost() {
    let total = Arc::new(AtomicUsize::new(0));
    let sum = total.clone();
    let callback = Box::new(move |bytes: &[u8]| {
        std::thread::sleep(std::time::Duration::from_micros(200));
        sum.fetch_add(bytes.len(), Ordering::SeqCst);
        Ok(())
    });
    let serial = Serial::new(Output::Callback(callback)).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    serial.write(&[b'y'; 1000], NEVER).unwrap();
                    serial.write(b"\n", NEVER).unwrap();
                }
            });
        }
    });
    serial.flush(NEVER).unwrap();
    assert_eq!(total.load(Ordering::SeqCst), 4 * 200 * 1001);
}

#[test]
fn test_settle_waits_for_the_callback_of_another_thread() {
    let (entered, inside) = std::sync::mpsc::channel();
    let done = Arc::new(AtomicUsize::new(0));
    let count = done.clone();
    let callback = Box::new(move |_: &[u8]| {
        entered.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    let serial = Serial::new(Output::Callback(callback)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| serial.write(b"a line\n", NEVER).unwrap());
        inside.recv().unwrap();
        serial.settle(NEVER).unwrap();
        assert_eq!(done.load(Ordering::SeqCst), 1);
    });
}

#[test]
fn test_writer_behind_a_stuck_callback_can_be_kicked() {
    let (mut read_end, write_end) = nix::unistd::pipe().map(|(r, w)| (File::from(r), File::from(w))).unwrap();
    let callback = Box::new(move |_: &[u8]| {
        let _ = read_end.read(&mut [0]);
        Ok(())
    });
    let serial = Serial::new(Output::Callback(callback)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| serial.write(b"stuck\n", NEVER));
        std::thread::sleep(std::time::Duration::from_millis(30));
        let error = kicked(
            Signal::SIGUSR1,
            true,
            |cancelled| loop {
                if let Err(e) = serial.write(&[b'x'; 1000], cancelled) {
                    break e;
                }
            },
            || {},
        );
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        drop(write_end);
    });
    let _ = io::stdout().flush();
}
