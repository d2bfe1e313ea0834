//! When the console's thread works: it sleeps until it is woken, or for a while, and learns when the VM is over.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Puts the console thread to sleep and wakes it.
#[derive(Clone, Default)]
pub struct Pump {
    state: Arc<(Mutex<PumpState>, Condvar)>,
}

#[derive(Default)]
struct PumpState {
    woken: bool,
    over: bool,
}

impl Pump {
    fn lock(&self) -> MutexGuard<'_, PumpState> {
        self.state.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Ends the sleep, now or as soon as it begins.
    pub fn wake(&self) {
        self.lock().woken = true;
        self.state.1.notify_all();
    }

    /// The VM is over.
    pub fn end(&self) {
        self.lock().over = true;
        self.state.1.notify_all();
    }

    /// Whether the VM is over.
    pub fn is_over(&self) -> bool {
        self.lock().over
    }

    /// Sleeps until woken, or for `every`. False: the VM is over.
    pub fn sleep(&self, every: Option<Duration>) -> bool {
        let mut state = self.lock();
        let until = every.map(|d| Instant::now() + d);
        while !state.woken && !state.over {
            state = match until.map(|u| u.saturating_duration_since(Instant::now())) {
                None => self.state.1.wait(state).unwrap_or_else(|e| e.into_inner()),
                Some(Duration::ZERO) => break,
                Some(left) => self.state.1.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0,
            };
        }
        state.woken = false;
        !state.over
    }

    /// Sleeps for `time`. False: the VM is over.
    pub fn linger(&self, time: Duration) -> bool {
        let state = self.lock();
        let wait = self.state.1.wait_timeout_while(state, time, |s| !s.over);
        !wait.unwrap_or_else(|e| e.into_inner()).0.over
    }
}
