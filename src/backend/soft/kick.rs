//! Making a vCPU leave the guest from another thread: out of guest code, out of the wait for its turn, out of HLT, and out
//! of a blocking system call of its thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::machine::Shared;
use crate::backend::{Kick, signal};
use crate::error::Result;

/// The kick handle of a vCPU.
pub(super) struct SoftKick {
    vcpu: usize,
    /// What the CPU looks at while it executes.
    flag: Arc<AtomicBool>,
    shared: Arc<Shared>,
    thread: Mutex<Option<libc::pthread_t>>,
}

impl SoftKick {
    pub(super) fn new(vcpu: usize, flag: Arc<AtomicBool>, shared: Arc<Shared>) -> Self {
        Self { vcpu, flag, shared, thread: Mutex::new(None) }
    }

    /// From now on kicks go to the calling thread, until `unbind`.
    pub(super) fn bind(&self) -> Result<()> {
        signal::unblock()?;
        // SAFETY: always sound.
        let thread = unsafe { libc::pthread_self() };
        *self.thread.lock().unwrap_or_else(|e| e.into_inner()) = Some(thread);
        Ok(())
    }

    pub(super) fn unbind(&self) {
        *self.thread.lock().unwrap_or_else(|e| e.into_inner()) = None;
    }
}

impl Kick for SoftKick {
    fn kick(&self) {
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner());
        let (Some(thread), Ok(signal)) = (*thread, signal::number()) else { return };
        // The kick before the flag: a CPU that stops for the flag finds the kick.
        self.shared.kick(self.vcpu);
        self.flag.store(true, Ordering::SeqCst);
        // SAFETY: bound, so the thread has not ended.
        unsafe { libc::pthread_kill(thread, signal) };
    }
}
