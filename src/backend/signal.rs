//! The signal that interrupts a vCPU's thread, in the guest or in a blocking system call: it does nothing itself, and
//! restarts nothing.

use std::sync::OnceLock;

use crate::error::{Error, Result};

extern "C" fn nothing(_: libc::c_int) {}

/// The real-time signal for kicks: the first one that nobody handles, with a handler that does nothing, for the
/// whole process.
pub(super) fn number() -> Result<libc::c_int> {
    static SIGNAL: OnceLock<Option<libc::c_int>> = OnceLock::new();
    SIGNAL.get_or_init(|| (libc::SIGRTMIN()..=libc::SIGRTMAX()).find(|signal| install(*signal))).ok_or_else(|| {
        Error::Config("every real-time signal has a handler in this process; one is needed to interrupt vCPUs".into())
    })
}

fn install(signal: libc::c_int) -> bool {
    // SAFETY: a zeroed sigaction is a valid one (SIG_DFL, empty mask), and all pointers are to locals.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(signal, std::ptr::null(), &mut old) != 0 || old.sa_sigaction != libc::SIG_DFL {
            return false;
        }
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(signal, &new, std::ptr::null_mut()) == 0
    }
}

/// Lets the kick signal through in the calling thread, whatever mask it inherited.
pub(crate) fn unblock() -> Result<()> {
    let signal = number()?;
    // SAFETY: the set is a local and initialised by sigemptyset.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
    Ok(())
}
