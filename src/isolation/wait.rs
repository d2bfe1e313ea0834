//! Waiting for a host file descriptor in a way that a kick can end. The kick is a signal, whose handler is installed
//! without `SA_RESTART` and which the thread doesn't block, together with a flag that `cancelled` reads. Between the
//! look at the flag and the sleep all signals are blocked and `ppoll` unblocks them atomically: a kick is never lost.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::signal::{SigSet, SigmaskHow};

/// Restores a thread's signal mask.
pub(crate) struct Mask(pub(crate) SigSet);

impl Mask {
    pub(crate) fn block_all() -> Result<Self, Errno> {
        SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK).map(Self)
    }
}

impl Drop for Mask {
    fn drop(&mut self) {
        if let Err(e) = self.0.thread_set_mask() {
            log::error!("can't restore the signal mask of a thread: {e}");
        }
    }
}

/// Sleeps until `fd` has one of `events`, an error or a hang-up. `EINTR` means that `cancelled` became true; other
/// signals don't end the wait.
pub fn wait(fd: BorrowedFd<'_>, events: PollFlags, cancelled: &dyn Fn() -> bool) -> Result<(), Errno> {
    loop {
        let mask = Mask::block_all()?;
        if cancelled() {
            return Err(Errno::EINTR);
        }
        let result = ppoll(&mut [PollFd::new(fd, events)], None, Some(mask.0));
        drop(mask);
        match result {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Whether `fd` has one of `events`, an error or a hang-up now.
pub fn is_ready(fd: BorrowedFd<'_>, events: PollFlags) -> bool {
    matches!(poll(&mut [PollFd::new(fd, events)], PollTimeout::ZERO), Ok(n) if n > 0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use nix::sys::pthread::{pthread_kill, pthread_self};
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, Signal, sigaction};
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    extern "C" fn ignore(_: libc::c_int) {}

    /// Runs `work` on a thread of its own and kicks that thread once it had time to block.
    pub(crate) fn kicked<T: Send>(
        signal: Signal,
        flag: bool,
        work: impl FnOnce(&dyn Fn() -> bool) -> T + Send,
        then: impl FnOnce(),
    ) -> T {
        let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(signal, &action) }.unwrap();
        let cancelled = AtomicBool::new(false);
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                send.send(pthread_self()).unwrap();
                work(&|| cancelled.load(Ordering::SeqCst))
            });
            let thread = receive.recv().unwrap();
            std::thread::sleep(Duration::from_millis(50));
            cancelled.store(flag, Ordering::SeqCst);
            pthread_kill(thread, signal).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            then();
            worker.join().unwrap()
        })
    }

    #[test]
    fn test_wait_kicked_while_asleep_is_eintr() {
        let (read, _write) = nix::unistd::pipe().unwrap();
        let result = kicked(Signal::SIGUSR1, true, |c| wait(read.as_fd(), PollFlags::POLLIN, c), || {});
        assert_eq!(result, Err(Errno::EINTR));
    }

    #[test]
    fn test_wait_other_signal_goes_on_until_ready() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let result = kicked(
            Signal::SIGUSR1,
            false,
            |c| wait(read.as_fd(), PollFlags::POLLIN, c),
            || {
                nix::unistd::write(&write, b"x").unwrap();
            },
        );
        assert_eq!(result, Ok(()));
        assert!(is_ready(read.as_fd(), PollFlags::POLLIN));
    }

    #[test]
    fn test_wait_already_cancelled_does_not_sleep() {
        let (read, _write) = nix::unistd::pipe().unwrap();
        assert_eq!(wait(read.as_fd(), PollFlags::POLLIN, &|| true), Err(Errno::EINTR));
    }
}
