//! The guest's console: a sink that all vCPU threads write to. Bytes go into a buffer under a short lock and leave it
//! at a newline, at 8 KiB, or by [`Serial::flush`]. Nothing waits under the lock: a descriptor is written to when it is
//! ready, a callback runs with the lock released, and whoever has to wait can be kicked. A write is taken as a whole
//! or refused as a whole, so that a call that was interrupted may be made again.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::isolation::lock;
use crate::isolation::wait::{is_ready, wait};

/// The buffer leaves when it is this long, newline or not, and a callback gets no longer pieces of a line.
const PIECE: usize = 8 << 10;
/// A writer waits while the buffer holds this much.
const FULL: usize = 64 << 10;
/// How long a writer waits for room before it looks whether it is asked to stop.
const ROOM_WAIT: Duration = Duration::from_millis(5);
/// A pipe that polls as writable takes this much without blocking (`PIPE_BUF`).
const PIPE_CHUNK: usize = 4096;

/// A callback for console output: it gets a line a call, or 8 KiB of a longer one.
pub type Callback = Box<dyn FnMut(&[u8]) -> io::Result<()> + Send>;
type Notifier = Arc<dyn Fn() + Send + Sync>;

/// Where console output goes.
pub enum Output {
    /// The host's standard output.
    Stdout,
    /// A file, FIFO or terminal.
    File(File),
    /// Memory, for [`Serial::captured`].
    Capture {
        /// Bytes to keep; the rest is dropped and [`Serial::truncated`] says so.
        limit: usize,
    },
    /// Nowhere.
    Discard,
    /// A function. It runs on the thread that wrote or flushed, and may use the VM but not write to this console.
    Callback(Callback),
}

enum Sink {
    Stdout(io::Stdout),
    File {
        file: File,
        is_regular: bool,
    },
    Capture {
        limit: usize,
    },
    Discard,
    /// The event is readable while no thread is in the callback.
    Callback {
        idle: EventFd,
    },
}

/// The console of one VM.
pub struct Serial {
    sink: Sink,
    state: Mutex<State>,
    /// Signalled when a callback has taken something from the buffer.
    room: Condvar,
}

#[derive(Default)]
struct State {
    buffer: Vec<u8>,
    truncated: bool,
    /// The sink failed and its error was returned: what comes now is dropped.
    failed: bool,
    /// A flush found the callback busy; its caller takes the incomplete line too.
    flush_all: bool,
    callback: Option<Callback>,
    /// When a callback gets no more.
    limit: Option<Instant>,
    notifier: Option<Notifier>,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

fn interrupted() -> io::Error {
    io::Error::from(ErrorKind::Interrupted)
}

impl Serial {
    /// A console with that sink.
    pub fn new(output: Output) -> io::Result<Self> {
        let mut state = State::default();
        let sink = match output {
            Output::Stdout => Sink::Stdout(io::stdout()),
            Output::File(file) => {
                let is_regular = file.metadata()?.is_file();
                Sink::File { file, is_regular }
            }
            Output::Capture { limit } => Sink::Capture { limit },
            Output::Discard => Sink::Discard,
            Output::Callback(callback) => {
                state.callback = Some(callback);
                let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
                Sink::Callback { idle: EventFd::from_value_and_flags(1, flags)? }
            }
        };
        Ok(Self { sink, state: Mutex::new(state), room: Condvar::new() })
    }

    /// Calls `notifier` when an incomplete line starts to wait in the buffer (or output that the sink doesn't take
    /// now), so that somebody may flush it a little later. It runs on the writing thread, without a lock. A callback
    /// is from then on never called by a writing thread: who is notified calls [`Serial::deliver`].
    pub fn set_notifier(&self, notifier: Box<dyn Fn() + Send + Sync>) {
        lock(&self.state).notifier = Some(Arc::from(notifier));
    }

    /// Takes `bytes`. An error of kind [`ErrorKind::Interrupted`] says that the buffer is full, the sink takes nothing
    /// and `cancelled` became true: no byte was taken. Another error is the sink's, returned once; later output is
    /// dropped.
    #[inline]
    pub fn write(&self, bytes: &[u8], cancelled: &dyn Fn() -> bool) -> io::Result<()> {
        match &self.sink {
            Sink::Discard => Ok(()),
            Sink::Capture { limit } => {
                let mut state = lock(&self.state);
                let kept = bytes.len().min(limit.saturating_sub(state.buffer.len()));
                state.buffer.extend_from_slice(&bytes[..kept]);
                state.truncated |= kept < bytes.len();
                Ok(())
            }
            _ => {
                let mut state = lock(&self.state);
                if state.buffer.len() >= FULL {
                    state = self.make_room(state, cancelled)?;
                }
                if state.failed || bytes.is_empty() {
                    return Ok(());
                }
                let was_empty = state.buffer.is_empty();
                state.buffer.extend_from_slice(bytes);
                let is_due = state.buffer.len() >= PIECE || bytes.contains(&b'\n');
                if is_due && !self.is_served(&state) {
                    state = self.drain(state, false, cancelled)?;
                }
                if (was_empty || is_due) && !state.buffer.is_empty() {
                    let notifier = state.notifier.clone();
                    drop(state);
                    if let Some(notify) = notifier {
                        notify();
                    }
                }
                Ok(())
            }
        }
    }

    /// Takes `bytes` without giving any to the sink. False, and none taken, while the buffer is full.
    pub fn push(&self, bytes: &[u8]) -> bool {
        if matches!(self.sink, Sink::Capture { .. } | Sink::Discard) {
            return self.write(bytes, &|| true).is_ok();
        }
        let mut state = lock(&self.state);
        if state.failed {
            return true;
        }
        let has_room = state.buffer.len() < FULL;
        if has_room {
            state.buffer.extend_from_slice(bytes);
        }
        has_room
    }

    /// Waits while the buffer is full. Errors are those of [`Serial::write`].
    pub fn await_room(&self, cancelled: &dyn Fn() -> bool) -> io::Result<()> {
        let state = lock(&self.state);
        let is_full = state.buffer.len() >= FULL && !matches!(self.sink, Sink::Capture { .. });
        if is_full { self.make_room(state, cancelled).map(drop) } else { Ok(()) }
    }

    /// Gives the sink the complete lines of the buffer, as far as it takes them now.
    pub fn deliver(&self, cancelled: &dyn Fn() -> bool) -> io::Result<()> {
        let state = lock(&self.state);
        let is_due = state.buffer.len() >= PIECE || state.buffer.contains(&b'\n');
        if is_due && !matches!(self.sink, Sink::Capture { .. }) {
            drop(self.drain(state, false, cancelled)?);
        }
        Ok(())
    }

    /// Whether the sink is a callback.
    pub fn is_callback(&self) -> bool {
        matches!(self.sink, Sink::Callback { .. })
    }

    /// Whether somebody else calls the callback.
    fn is_served(&self, state: &State) -> bool {
        self.is_callback() && state.notifier.is_some()
    }

    /// Gives the sink all that is in the buffer, waiting for it if need be. While another thread is in the callback,
    /// that thread delivers the rest. Errors are those of [`Serial::write`].
    pub fn flush(&self, cancelled: &dyn Fn() -> bool) -> io::Result<()> {
        if matches!(self.sink, Sink::Capture { .. } | Sink::Discard) {
            return Ok(());
        }
        loop {
            let mut state = self.drain(lock(&self.state), true, cancelled)?;
            if state.buffer.is_empty() {
                return Ok(());
            }
            if let Sink::Callback { .. } = self.sink {
                if state.callback.is_none() {
                    state.flush_all = true;
                    return Ok(());
                }
                if cancelled() {
                    return Err(interrupted());
                }
                continue;
            }
            drop(state);
            self.wait(cancelled)?;
        }
    }

    /// Like [`Serial::flush`], and waits until another thread that is in the callback has delivered the rest. Not for
    /// callbacks: they would wait for themselves.
    pub fn settle(&self, cancelled: &dyn Fn() -> bool) -> io::Result<()> {
        loop {
            self.flush(cancelled)?;
            let is_busy = self.is_callback() && lock(&self.state).callback.is_none();
            if !is_busy {
                return Ok(());
            }
            self.wait(cancelled)?;
        }
    }

    /// A callback gets what waits for `time` at most, in which those that are not slow get all; the rest is dropped.
    pub fn hurry(&self, time: Duration) {
        if self.is_callback() {
            lock(&self.state).limit.get_or_insert_with(|| Instant::now() + time);
        }
    }

    /// Whether a callback has failed. Its error went to the thread that called it.
    pub fn callback_has_failed(&self) -> bool {
        self.is_callback() && lock(&self.state).failed
    }

    /// Whether a flush has something to do.
    pub fn has_unflushed(&self) -> bool {
        !matches!(self.sink, Sink::Capture { .. }) && !lock(&self.state).buffer.is_empty()
    }

    /// What [`Output::Capture`] kept so far.
    pub fn captured(&self) -> Vec<u8> {
        if matches!(self.sink, Sink::Capture { .. }) { lock(&self.state).buffer.clone() } else { Vec::new() }
    }

    /// Whether [`Output::Capture`] dropped output.
    pub fn truncated(&self) -> bool {
        lock(&self.state).truncated
    }

    fn descriptor(&self) -> Option<(BorrowedFd<'_>, bool)> {
        match &self.sink {
            Sink::Stdout(stdout) => Some((stdout.as_fd(), false)),
            Sink::File { file, is_regular } => Some((file.as_fd(), *is_regular)),
            _ => None,
        }
    }

    /// Waits until the sink takes something.
    fn wait(&self, cancelled: &dyn Fn() -> bool) -> io::Result<()> {
        let (fd, events) = match (&self.sink, self.descriptor()) {
            (Sink::Callback { idle }, _) => (idle.as_fd(), PollFlags::POLLIN),
            (_, Some((fd, _))) => (fd, PollFlags::POLLOUT),
            _ => return Ok(()),
        };
        wait(fd, events, cancelled).map_err(|e| if e == Errno::EINTR { interrupted() } else { e.into() })
    }

    #[cold]
    fn make_room<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        cancelled: &dyn Fn() -> bool,
    ) -> io::Result<MutexGuard<'a, State>> {
        loop {
            if self.is_served(&state) {
                state = self.wait_for_room(state, cancelled)?;
            } else {
                state = self.drain(state, false, cancelled)?;
            }
            if state.buffer.len() < FULL {
                return Ok(state);
            }
            drop(state);
            self.wait(cancelled)?;
            state = lock(&self.state);
        }
    }

    /// Waits a little for whoever calls the callback. A kick can't end a wait for a condition, so it is short.
    fn wait_for_room<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        cancelled: &dyn Fn() -> bool,
    ) -> io::Result<MutexGuard<'a, State>> {
        if cancelled() {
            return Err(interrupted());
        }
        let notifier = state.notifier.clone();
        if let Some(notify) = notifier {
            notify();
        }
        Ok(self.room.wait_timeout(state, ROOM_WAIT).unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Gives the sink what it takes without waiting: for a callback whole lines, or everything.
    fn drain<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        all: bool,
        cancelled: &dyn Fn() -> bool,
    ) -> io::Result<MutexGuard<'a, State>> {
        match (&self.sink, self.descriptor()) {
            (Sink::Callback { idle }, _) => self.drain_callback(state, idle, all, cancelled),
            (_, Some((fd, is_regular))) => drain_descriptor(state, fd, is_regular),
            _ => Ok(state),
        }
    }

    fn drain_callback<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        idle: &EventFd,
        all: bool,
        cancelled: &dyn Fn() -> bool,
    ) -> io::Result<MutexGuard<'a, State>> {
        let Some(callback) = state.callback.take() else { return Ok(state) };
        // The event follows `callback` under the lock: a waiter that saw it busy sleeps until it is put back.
        let _ = idle.read();
        state.flush_all |= all;
        let mut turn = Turn { serial: self, idle, callback: Some(callback), has_returned: true };
        let mut delivered = 0;
        let result = loop {
            if let Some(late) = state.take_late() {
                drop(state);
                log::warn!(
                    "the guest was ended, and the callback for its console is behind by {} bytes, which are dropped",
                    late.len()
                );
                state = lock(&self.state);
            }
            let length = state.piece();
            if length == 0 || (delivered > 0 && cancelled()) || delivered >= FULL {
                break Ok(());
            }
            let piece: Vec<u8> = state.buffer.drain(..length).collect();
            drop(state);
            let result = turn.call(&piece);
            delivered += length;
            state = lock(&self.state);
            self.room.notify_all();
            if result.is_err() {
                state.failed = true;
                state.buffer.clear();
                break result;
            }
        };
        state.flush_all = false;
        turn.end(&mut state);
        result.map(|()| state)
    }
}

impl State {
    /// Takes what the callback has had no time for out of the buffer.
    fn take_late(&mut self) -> Option<Vec<u8>> {
        let is_late = !self.buffer.is_empty() && self.limit.is_some_and(|limit| Instant::now() > limit);
        is_late.then(|| std::mem::take(&mut self.buffer))
    }

    /// How much of the buffer the callback gets next.
    fn piece(&self) -> usize {
        let end = self.buffer.len().min(PIECE);
        if let Some(newline) = self.buffer[..end].iter().position(|byte| *byte == b'\n') {
            return newline + 1;
        }
        if end == PIECE {
            // Rather than through a UTF-8 sequence the cut goes before it.
            let is_continuation = |at: &usize| self.buffer.get(*at).is_some_and(|byte| byte & 0xc0 == 0x80);
            return (end - 3..=end).rev().find(|at| !is_continuation(at)).unwrap_or(end);
        }
        if self.flush_all { end } else { 0 }
    }
}

/// The time that one thread has the callback. If the callback panics, the console fails instead of waiting for ever.
struct Turn<'a> {
    serial: &'a Serial,
    idle: &'a EventFd,
    callback: Option<Callback>,
    has_returned: bool,
}

impl Turn<'_> {
    fn call(&mut self, piece: &[u8]) -> io::Result<()> {
        self.has_returned = false;
        let result = self.callback.as_mut().map_or(Ok(()), |callback| callback(piece));
        self.has_returned = true;
        // Of this kind are only refused writes, and these bytes were taken.
        result.map_err(|e| if e.kind() == ErrorKind::Interrupted { io::Error::other(e) } else { e })
    }

    fn end(&mut self, state: &mut State) {
        state.callback = self.callback.take();
        if let Err(e) = self.idle.write(1) {
            log::error!("console: eventfd: {e}");
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.has_returned {
            let mut state = lock(&self.serial.state);
            state.failed = true;
            state.buffer.clear();
            self.end(&mut state);
        }
    }
}

fn drain_descriptor<'a>(
    mut state: MutexGuard<'a, State>,
    fd: BorrowedFd<'_>,
    is_regular: bool,
) -> io::Result<MutexGuard<'a, State>> {
    let mut done = 0;
    let result = loop {
        let rest = &state.buffer[done..];
        if rest.is_empty() || !(is_regular || is_ready(fd, PollFlags::POLLOUT)) {
            break Ok(());
        }
        let chunk = if is_regular { rest } else { &rest[..rest.len().min(PIPE_CHUNK)] };
        match nix::unistd::write(fd, chunk) {
            Ok(0) => break Err(io::Error::from(ErrorKind::WriteZero)),
            Ok(length) => done += length,
            Err(Errno::EINTR | Errno::EAGAIN) => break Ok(()),
            Err(e) => break Err(e.into()),
        }
    };
    match result {
        Ok(()) => {
            state.buffer.drain(..done);
            Ok(state)
        }
        Err(e) => {
            state.failed = true;
            state.buffer.clear();
            Err(e)
        }
    }
}

#[cfg(test)]
mod tests;
