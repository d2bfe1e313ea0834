//! Making a vCPU leave the guest from another thread. Two things together lose no kick: `immediate_exit`, which makes
//! the next KVM_RUN return at once, and a signal, which ends the one that is under way (and a blocking system call of
//! the vCPU's thread, since the handler is installed without SA_RESTART).

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::backend::{Kick, signal};
use crate::error::Result;

/// The kick handle of a KVM vCPU.
pub(crate) struct KvmKick {
    /// A kick came that no `run` has answered. `immediate_exit` alone would not tell it from our own use of that flag.
    kicked: AtomicBool,
    target: Mutex<Option<Target>>,
}

struct Target {
    immediate_exit: *const AtomicU8,
    thread: libc::pthread_t,
}

// SAFETY: the pointer is used only under the lock, and cleared from there before the page that it points to is unmapped.
unsafe impl Send for KvmKick {}
// SAFETY: as above.
unsafe impl Sync for KvmKick {}

impl KvmKick {
    pub(crate) fn new() -> Self {
        Self { kicked: AtomicBool::new(false), target: Mutex::new(None) }
    }

    /// From now on kicks go to the calling thread. The caller unbinds before the thread or the vCPU ends.
    pub(crate) fn bind(&self, immediate_exit: *const AtomicU8) -> Result<()> {
        signal::number()?;
        // SAFETY: always sound.
        let thread = unsafe { libc::pthread_self() };
        *self.target.lock().unwrap_or_else(|e| e.into_inner()) = Some(Target { immediate_exit, thread });
        Ok(())
    }

    pub(super) fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    /// The kicks until now are answered.
    pub(super) fn take(&self) {
        self.kicked.store(false, Ordering::SeqCst);
    }

    pub(crate) fn unbind(&self) {
        *self.target.lock().unwrap_or_else(|e| e.into_inner()) = None;
    }
}

impl Kick for KvmKick {
    fn kick(&self) {
        let target = self.target.lock().unwrap_or_else(|e| e.into_inner());
        let (Some(target), Ok(signal)) = (&*target, signal::number()) else { return };
        self.kicked.store(true, Ordering::SeqCst);
        // SAFETY: bound, so the vCPU's page is mapped; and the byte is shared with the kernel, so atomics only.
        unsafe { (*target.immediate_exit).store(1, Ordering::SeqCst) };
        // SAFETY: bound, so the thread has not ended.
        unsafe { libc::pthread_kill(target.thread, signal) };
    }
}
