//! The machine's time: nanoseconds since its start. Virtual time passes by instructions, one nanosecond each, so that the
//! same execution happens at the same times; the host's clock is for guests that deal with the world outside.
//!
//! The time stamp counter ticks once a nanosecond on either clock.

use std::time::{Duration, Instant};

/// Frequency of the time stamp counter.
pub const TSC_KHZ: u32 = 1_000_000;

/// Which clock a machine goes by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ClockKind {
    /// Instructions; an idle machine jumps to the next timer.
    #[default]
    Virtual,
    /// The host's; an idle machine sleeps.
    Host,
}

impl ClockKind {
    /// The clock of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "virtual" => Some(Self::Virtual),
            "host" => Some(Self::Host),
            _ => None,
        }
    }
}

/// A clock.
#[derive(Debug, Clone, Copy)]
pub enum Clock {
    /// Instructions that all vCPUs have executed, and the time that was jumped over.
    Virtual(u64),
    /// When it was 0.
    Host(Instant),
}

impl Clock {
    /// A clock at 0.
    pub fn new(kind: ClockKind) -> Self {
        match kind {
            ClockKind::Virtual => Self::Virtual(0),
            ClockKind::Host => Self::Host(Instant::now()),
        }
    }

    /// The time.
    pub fn now(&self) -> u64 {
        match self {
            Self::Virtual(now) => *now,
            Self::Host(start) => u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// The time after so many more instructions.
    pub fn after(&self, instructions: u64) -> u64 {
        match self {
            Self::Virtual(now) => now.saturating_add(instructions),
            Self::Host(_) => self.now(),
        }
    }

    /// So many instructions were executed.
    pub fn pass(&mut self, instructions: u64) {
        *self = match *self {
            Self::Virtual(now) => Self::Virtual(now.saturating_add(instructions)),
            host @ Self::Host(_) => host,
        };
    }

    /// Nothing happens until `time`. Gives how long to wait for it: virtual time jumps there.
    pub fn idle_until(&mut self, time: u64) -> Option<Duration> {
        match self {
            Self::Virtual(now) => {
                *now = time.max(*now);
                None
            }
            Self::Host(_) => {
                let left = time.saturating_sub(self.now());
                (left > 0).then(|| Duration::from_nanos(left))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_virtual_time_passes_by_instructions_and_jumps_when_idle() {
        let mut clock = Clock::new(ClockKind::Virtual);
        clock.pass(100);
        assert_eq!((clock.now(), clock.after(5)), (100, 105));
        assert_eq!(clock.idle_until(1_000_000_000), None);
        assert_eq!(clock.idle_until(5), None, "never back");
        assert_eq!(clock.now(), 1_000_000_000);
        clock.pass(u64::MAX);
        assert_eq!(clock.now(), u64::MAX);
    }

    #[test]
    fn test_host_time_passes_by_itself_and_is_waited_for() {
        let mut clock = Clock::new(ClockKind::Host);
        std::thread::sleep(Duration::from_millis(2));
        let now = clock.now();
        assert!(now >= 2_000_000);
        clock.pass(u64::MAX);
        assert!(clock.after(u64::MAX) < now + 1_000_000_000_000);
        assert!(clock.idle_until(now + 1_000_000_000_000) > Some(Duration::from_secs(900)));
        assert_eq!(clock.idle_until(1), None);
    }
}
