//! A server: one thread that listens, and serves one client after the other. It sleeps in one `poll` for everything.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::address::{Address, Listener};
use super::policy::Policy;
use super::session::{Outcome, Session};
use crate::debug::engine::{self, Status};
use crate::error::{Error, Result};
use crate::isolation::wait::Mask;
use crate::vm::{Machine, ThreadWrapper};

/// A running server. Dropping it closes it.
pub struct Server {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    address: String,
    closing: EventFd,
    /// Readable while nothing is left to serve: the guest has ended and no client is there, or the server is closed.
    over: EventFd,
    state: Mutex<State>,
}

struct State {
    machine: Arc<Machine>,
    client: Option<String>,
    is_over: bool,
}

fn event(initial: u32) -> Result<EventFd> {
    EventFd::from_value_and_flags(initial, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|e| Error::Host { what: "can't make an eventfd".into(), source: e.into() })
}

impl Server {
    /// Listens at `address` for clients that debug `machine`. `wrapper` wraps the server's thread.
    pub fn start(
        machine: Arc<Machine>,
        address: &Address,
        policy: Option<Arc<dyn Policy>>,
        wrapper: Option<ThreadWrapper>,
    ) -> Result<Self> {
        machine.check_owner()?;
        let listener = Listener::bind(address)?;
        let state = Mutex::new(State { machine, client: None, is_over: false });
        let shared = Arc::new(Shared { address: listener.local(), closing: event(0)?, over: event(0)?, state });
        let own = shared.clone();
        let wake = engine::waiter()?;
        let mut work = Some((listener, policy));
        let mut body = move || {
            if let Some((listener, policy)) = work.take() {
                own.serve(listener, policy, &wake);
            }
        };
        // Signals of the process go to threads that can do something about them.
        let _mask =
            Mask::block_all().map_err(|e| Error::Host { what: "can't block signals".into(), source: e.into() })?;
        let thread = std::thread::Builder::new().name("uhyve-gdb".into()).spawn(move || match wrapper {
            Some(wrapper) => wrapper(&mut body),
            None => body(),
        });
        let thread =
            thread.map_err(|source| Error::Host { what: "can't start the gdb server's thread".into(), source })?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Where it listens: `HOST:PORT`, a path, or `-`.
    pub fn address(&self) -> &str {
        &self.shared.address
    }

    /// The client that is attached.
    pub fn client(&self) -> Option<String> {
        self.shared.lock().client.clone()
    }

    /// Waits until there is nothing left to serve: the guest has ended and no client is attached, or the server is
    /// closed. `check` is called whenever a signal arrives. False: the deadline passed.
    pub fn wait<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        check: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<bool, E> {
        loop {
            let mask =
                Mask::block_all().map_err(|e| Error::Host { what: "can't block signals".into(), source: e.into() })?;
            check()?;
            if self.shared.lock().is_over {
                return Ok(true);
            }
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
            let mut fds = [PollFd::new(self.shared.over.as_fd(), PollFlags::POLLIN)];
            match nix::poll::ppoll(&mut fds, left.map(Into::into), Some(mask.0)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(Error::Host { what: "can't wait for the server".into(), source: e.into() }.into()),
            }
        }
    }

    /// Stops listening and drops its client; the guest stays as it is. Waits for the thread, unless called by it.
    pub fn close(&self) {
        let Some(thread) = self.let_go() else { return };
        let is_own = thread.thread().id() == std::thread::current().id();
        if !is_own && thread.join().is_err() {
            log::error!("the gdb server's thread has panicked");
        }
    }

    /// As `close`, but leaves the thread to itself.
    pub fn abandon(&self) {
        drop(self.let_go());
    }

    fn let_go(&self) -> Option<JoinHandle<()>> {
        let _ = self.shared.closing.write(1);
        self.thread.lock().unwrap_or_else(|e| e.into_inner()).take()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn serve(&self, mut listener: Listener, policy: Option<Arc<dyn Policy>>, wake: &Arc<EventFd>) {
        /// Nobody waits for a server whose thread has gone, however it went.
        struct Over<'a>(&'a Shared, &'a Arc<EventFd>);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.lock().machine.engine.remove_waiter(self.1);
                self.0.set_over(true);
            }
        }
        let _over = Over(self, wake);
        let is_single = matches!(listener, Listener::Stdio(_));
        self.lock().machine.engine.add_waiter(wake);
        loop {
            self.look_for_end();
            let Some(client) = listener.accept() else {
                if is_single || !self.sleep(&listener, wake) {
                    return;
                }
                continue;
            };
            log::info!("gdb: {} attaches", client.name);
            let machine = {
                let mut state = self.lock();
                state.client = Some(client.name.clone());
                state.machine.clone()
            };
            self.set_over(false);
            let left = Session::serve(machine, &client, &mut listener, &self.closing, wake, policy.clone());
            log::info!("gdb: {} is gone ({:?})", client.name, left.outcome);
            let mut state = self.lock();
            state.client = None;
            state.machine = left.machine;
            drop(state);
            if left.outcome == Outcome::Closed {
                return;
            }
        }
    }

    /// Sleeps until a client comes or the VM changes. False: the server is to close.
    fn sleep(&self, listener: &Listener, wake: &EventFd) -> bool {
        let mut fds =
            vec![PollFd::new(self.closing.as_fd(), PollFlags::POLLIN), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(listener.descriptor().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                log::error!("gdb: poll: {error}");
                return false;
            }
        }
        let _ = wake.read();
        !fds[0].any().unwrap_or(false)
    }

    /// Notes whether the guest has ended.
    fn look_for_end(&self) {
        let machine = self.lock().machine.clone();
        let is_over = match machine.engine.status() {
            Status::Running => false,
            Status::Stopped(stop) => stop.reason.is_final(),
            Status::Ended(_) => true,
        };
        self.set_over(is_over);
    }

    fn set_over(&self, is_over: bool) {
        let mut state = self.lock();
        if state.is_over != is_over {
            state.is_over = is_over;
            let _ = if is_over { self.over.write(1).map(drop) } else { self.over.read().map(drop) };
        }
    }
}
