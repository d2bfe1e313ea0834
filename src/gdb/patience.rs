//! How a session waits. What comes next often comes sooner than a thread that sleeps is woken, which takes tens of
//! microseconds: a step ends, gdb asks for what it shows of it, and goes on. So for a moment the session looks for
//! itself, if what it waited for the last time came so soon; and gives its time to whoever else has something to do.

use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollTimeout, poll};

/// What still is a moment.
const MOMENT: Duration = Duration::from_micros(250);

/// Whether it pays to look for a moment.
#[derive(Debug, Default)]
pub(super) struct Patience {
    was_short: bool,
}

impl Patience {
    /// Like `poll`.
    pub(super) fn poll(&mut self, fds: &mut [PollFd<'_>], timeout: PollTimeout) -> nix::Result<i32> {
        let start = Instant::now();
        while self.was_short && start.elapsed() < MOMENT {
            let ready = poll(fds, PollTimeout::ZERO)?;
            if ready != 0 {
                return Ok(ready);
            }
            std::thread::yield_now();
        }
        let ready = poll(fds, timeout)?;
        self.was_short = start.elapsed() < MOMENT;
        Ok(ready)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use nix::poll::PollFlags;
    use nix::sys::eventfd::EventFd;

    use super::*;

    #[test]
    fn test_event_that_is_there_or_comes_is_seen_and_a_timeout_is_one() {
        let event = EventFd::new().unwrap();
        let mut patience = Patience::default();
        let mut look = |timeout: u16| {
            let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
            patience.poll(&mut fds, timeout.into()).unwrap()
        };
        assert_eq!(look(1), 0);
        event.write(1).unwrap();
        assert_eq!((look(1000), look(1000), look(0)), (1, 1, 1), "the second looks for itself");
        event.read().unwrap();
        assert_eq!((look(1), look(0)), (0, 0));
        std::thread::scope(|scope| {
            scope.spawn(|| event.write(1).unwrap());
            assert_eq!(look(30_000), 1);
        });
    }
}
