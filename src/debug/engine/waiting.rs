//! How front ends hear of the world: by descriptors that become readable at each change, and by a wait that signals and
//! deadlines end. A stop may wait for somebody's approval before the others hear of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;

use super::{Engine, KICK_AGAIN, Phase, Status};
use crate::error::{Error, Result};

impl Engine {
    /// From now on a stop is shown to those who wait only after [`Engine::approve`], or at once again.
    pub fn gate_stops(&self, gated: bool) {
        let mut state = self.lock();
        (state.is_gated, state.is_held) = (gated, false);
        self.notify(&state);
    }

    /// Shows the current stop to those who wait.
    pub fn approve(&self) {
        let mut state = self.lock();
        state.is_held = false;
        self.notify(&state);
    }

    /// Makes a descriptor readable at each change of the VM's state, until the VM or the descriptor is gone.
    pub fn add_waiter(&self, waiter: &Arc<EventFd>) {
        let mut state = self.lock();
        if !state.waiters.iter().any(|w| Arc::ptr_eq(w, waiter)) {
            state.waiters.push(waiter.clone());
        }
    }

    /// Ends [`Engine::add_waiter`].
    pub fn remove_waiter(&self, waiter: &Arc<EventFd>) {
        self.lock().waiters.retain(|w| !Arc::ptr_eq(w, waiter));
    }

    /// The same for a front end that does not judge stops: one that waits for approval is none yet.
    fn shown_status(&self) -> Status {
        let state = self.lock();
        match state.phase {
            Phase::Stopped if state.is_held => Status::Running,
            _ => state.status(),
        }
    }

    /// Waits until the world stands still or the VM is over. `check` is called whenever a signal arrives (and its error
    /// returned). `Ok(None)`: the deadline passed.
    pub fn wait_for_stop<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        check: &mut dyn FnMut() -> Result<(), E>,
    ) -> Result<Option<Status>, E> {
        let spare = self.lock().spare.take();
        let waiter = spare.map_or_else(waiter, Ok)?;
        self.add_waiter(&waiter);
        let result = self.poll(deadline, check, &waiter);
        let mut state = self.lock();
        state.waiters.retain(|w| !Arc::ptr_eq(w, &waiter));
        state.spare = Some(waiter).filter(|_| state.phase != Phase::Ended);
        result
    }

    fn poll<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        check: &mut dyn FnMut() -> Result<(), E>,
        waiter: &EventFd,
    ) -> Result<Option<Status>, E> {
        loop {
            // Between the look at signals and the sleep none may come: `ppoll` opens the mask.
            let mask = crate::isolation::wait::Mask::block_all()
                .map_err(|e| Error::Host { what: "can't block signals".into(), source: e.into() })?;
            check()?;
            let status = self.shown_status();
            if !matches!(status, Status::Running) {
                return Ok(Some(status));
            }
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            let stopping = self.lock().phase == Phase::Stopping;
            let sleep = [left, stopping.then_some(KICK_AGAIN)].into_iter().flatten().min();
            let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(waiter), PollFlags::POLLIN)];
            match ppoll(&mut fds, sleep.map(TimeSpec::from), Some(mask.0)) {
                Ok(0) => self.kick_late(),
                Ok(_) => drop(waiter.read()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(Error::Host { what: "can't wait for the VM".into(), source: e.into() }.into()),
            }
        }
    }
}

pub(super) fn tell(waiters: &[Arc<EventFd>]) {
    for waiter in waiters {
        // Full only if nobody has read it for 2⁶⁴ changes.
        let _ = waiter.write(1);
    }
}

/// A descriptor that wakes one waiter.
pub fn waiter() -> Result<Arc<EventFd>> {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map(Arc::new)
        .map_err(|e| Error::Host { what: "can't make an eventfd".into(), source: e.into() })
}
