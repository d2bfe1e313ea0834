//! The timer of a local APIC (Intel SDM 3A, 11.5.4): one-shot, periodic, and by a TSC deadline. It counts nothing: it
//! knows when it expires. Its clock ticks once a nanosecond, as KVM's does.

/// How the LVT entry makes the timer work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TimerMode {
    /// Counts down once.
    #[default]
    OneShot,
    /// Counts down again and again.
    Periodic,
    /// Expires when the time stamp counter reaches a value.
    Deadline,
}

impl TimerMode {
    /// The mode in bits 18–17 of the LVT entry. The reserved fourth counts nothing, like a one-shot without a count.
    pub fn from_entry(entry: u32) -> Self {
        match entry >> 17 & 3 {
            1 => Self::Periodic,
            2 => Self::Deadline,
            _ => Self::OneShot,
        }
    }
}

/// The timer's registers, and when it expires next. Times are in nanoseconds of the machine's clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timer {
    mode: TimerMode,
    initial: u32,
    divide: u32,
    expiry: Option<u64>,
    deadline: u64,
}

/// A period is at least this long, so that a guest can't have the machine do nothing but expire its timer.
const SHORTEST_PERIOD: u64 = 500;

impl Timer {
    /// What a count lasts, in ticks: the divide configuration register's bits 3, 1 and 0.
    fn divisor(&self) -> u64 {
        let bits = (self.divide & 3) | (self.divide >> 1 & 4);
        1 << ((bits + 1) & 7)
    }

    fn period(&self) -> u64 {
        u64::from(self.initial) * self.divisor()
    }

    /// The LVT entry was written. A change between deadline and the others disarms the timer.
    pub fn set_mode(&mut self, mode: TimerMode) {
        if (mode == TimerMode::Deadline) != (self.mode == TimerMode::Deadline) {
            (self.expiry, self.deadline, self.initial) = (None, 0, 0);
        }
        self.mode = mode;
    }

    /// The initial count.
    pub fn initial(&self) -> u32 {
        self.initial
    }

    /// Writes the initial count, which starts the timer, or stops it with 0.
    pub fn set_initial(&mut self, count: u32, now: u64) {
        if self.mode == TimerMode::Deadline {
            return;
        }
        self.initial = count;
        self.expiry = (count != 0).then(|| now.saturating_add(self.period()));
    }

    /// The current count.
    pub fn current(&self, now: u64) -> u32 {
        match self.expiry {
            Some(expiry) if self.mode != TimerMode::Deadline => {
                u32::try_from(expiry.saturating_sub(now).div_ceil(self.divisor())).unwrap_or(u32::MAX)
            }
            _ => 0,
        }
    }

    /// The divide configuration register.
    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// Writes the divide configuration register: the counts that are left last as long as it says now.
    pub fn set_divide(&mut self, value: u32, now: u64) {
        let left = self.current(now);
        self.divide = value & 0xb;
        if self.mode != TimerMode::Deadline && self.expiry.is_some() {
            self.expiry = Some(now.saturating_add(u64::from(left) * self.divisor()));
        }
    }

    /// IA32_TSC_DEADLINE: 0 if the timer is not armed by it.
    pub fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Writes IA32_TSC_DEADLINE, which has no effect in the other modes. `at` is when the counter reaches the value.
    pub fn set_deadline(&mut self, deadline: u64, at: u64) {
        if self.mode == TimerMode::Deadline {
            self.deadline = deadline;
            self.expiry = (deadline != 0).then_some(at);
        }
    }

    /// When it expires next.
    pub fn next(&self) -> Option<u64> {
        self.expiry
    }

    /// Whether it has expired until `now`; a periodic one is on its way again then.
    pub fn expire(&mut self, now: u64) -> bool {
        let Some(expiry) = self.expiry.filter(|expiry| *expiry <= now) else { return false };
        self.deadline = 0;
        self.expiry = (self.mode == TimerMode::Periodic && self.initial != 0).then(|| {
            // What was missed is one expiry, as on a CPU that has not taken the interrupt yet.
            let period = self.period().max(SHORTEST_PERIOD);
            let missed = (now - expiry) / period;
            expiry.saturating_add(period.saturating_mul(missed + 1))
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_divide_register_gives_each_divisor() {
        for (value, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
            let mut timer = Timer::default();
            timer.set_divide(value | 0xffff_fff4, 0);
            timer.set_initial(100, 1000);
            assert_eq!((timer.divide(), timer.next()), (value, Some(1000 + 100 * divisor)));
        }
    }

    #[test]
    fn test_one_shot_counts_down_once() {
        let mut timer = Timer::default();
        timer.set_divide(0, 0);
        timer.set_initial(10, 100);
        assert_eq!((timer.current(100), timer.current(109), timer.current(119), timer.current(500)), (10, 6, 1, 0));
        assert!(!timer.expire(119) && timer.expire(120) && !timer.expire(1000));
        assert_eq!((timer.current(1000), timer.next()), (0, None));
        timer.set_initial(10, 2000);
        timer.set_initial(0, 2001);
        assert_eq!(timer.next(), None);
    }

    #[test]
    fn test_periodic_goes_on_and_what_was_missed_is_one() {
        let mut timer = Timer::default();
        timer.set_mode(TimerMode::Periodic);
        timer.set_divide(11, 0);
        timer.set_initial(1000, 0);
        assert!(timer.expire(1000));
        assert_eq!(timer.next(), Some(2000));
        assert!(timer.expire(5500) && !timer.expire(5999));
        assert_eq!(timer.next(), Some(6000));
    }

    #[test]
    fn test_period_of_nothing_does_not_stop_time() {
        let mut timer = Timer::default();
        timer.set_mode(TimerMode::Periodic);
        timer.set_divide(11, 0);
        timer.set_initial(1, 0);
        assert!(timer.expire(7));
        assert!(timer.next() > Some(7));
        timer.set_initial(u32::MAX, u64::MAX - 3);
        assert!(timer.expire(u64::MAX));
    }

    #[test]
    fn test_deadline_expires_once_and_reads_zero_then() {
        let mut timer = Timer::default();
        timer.set_deadline(500, 500);
        assert_eq!((timer.deadline(), timer.next()), (0, None), "not in deadline mode");
        timer.set_mode(TimerMode::Deadline);
        timer.set_initial(5, 0);
        assert_eq!(timer.next(), None, "the count has no effect");
        timer.set_deadline(500, 500);
        assert!(!timer.expire(499) && timer.expire(500));
        assert_eq!((timer.deadline(), timer.next()), (0, None));
        timer.set_deadline(900, 900);
        timer.set_mode(TimerMode::OneShot);
        assert_eq!(timer.next(), None, "another mode disarms it");
    }

    #[test]
    fn test_divide_changed_while_running_stretches_what_is_left() {
        let mut timer = Timer::default();
        timer.set_divide(11, 0);
        timer.set_initial(100, 0);
        timer.set_divide(0, 40);
        assert_eq!(timer.next(), Some(40 + 60 * 2));
    }
}
