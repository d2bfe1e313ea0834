//! The clock of all measurements: the time stamp counter where it is sound, else CLOCK_MONOTONIC. It is chosen once a
//! process, and calibrated against CLOCK_MONOTONIC_RAW from then on: the longer the process lives, the better. Where the
//! machine slept in between, calibration begins anew: that clock stands still in its sleep, and a counter may run on or be reset.
//!
//! The counter is sound where the CPU says that it is invariant, or the kernel keeps its own time by it. A virtual machine
//! is often told neither, though its counter is steady, and its other clocks are devices that cost a thousand times as
//! much to read: there the counter of each CPU is tried, for its rate and against the others'.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// CPUID 0x8000_0007 EDX: the counter ticks at one rate in all states of the CPU (Intel SDM 3B, 19.17.1).
const INVARIANT_TSC: u32 = 1 << 8;
/// The least time that a calibration needs to be true to some 10⁻⁴.
const CALIBRATION: Duration = Duration::from_millis(1);
/// CPUID 1 ECX: under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// How long the counter of a CPU is tried, and of how many CPUs at the most.
const TRIAL: Duration = Duration::from_micros(500);
const MOST_CPUS: usize = 8;
/// By how much the counters of two CPUs may differ: their rates, and in nanoseconds what they show.
const RATE_TOLERANCE: f64 = 0.02;
const TOLERANCE: f64 = 20_000.0;

/// What the clock is, for people and for reports.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// `tsc` or `clock_gettime`.
    pub source: &'static str,
    /// CPUID says that the counter is invariant.
    pub invariant: bool,
    /// Neither CPUID nor the kernel vouches for the counter; it was tried on each CPU.
    pub tried: bool,
    /// The clock source of the kernel.
    pub kernel: String,
    /// Ticks a nanosecond.
    pub ticks_per_ns: f64,
    /// What reading it costs, in nanoseconds: the least of many pairs, and their median.
    pub cost_ns: (f64, f64),
}

struct Clock {
    is_tsc: bool,
    invariant: bool,
    tried: bool,
    kernel: String,
    start: Mutex<Moment>,
}

/// Both clocks at one moment.
#[derive(Clone, Copy)]
struct Pair {
    ticks: u64,
    ns: u64,
}

/// Where a calibration begins or ends.
#[derive(Clone, Copy)]
struct Moment {
    pair: Pair,
    /// How long the machine has slept since it was started, in nanoseconds.
    asleep: u64,
}

/// A difference that is a sleep, and no thread that was held up between two readings.
const SLEEP: u64 = 100_000_000;

impl Moment {
    fn now(is_tsc: bool) -> Self {
        // The one stands still in a sleep, the other doesn't.
        let awake = nanoseconds(libc::CLOCK_MONOTONIC);
        let asleep = nanoseconds(libc::CLOCK_BOOTTIME).saturating_sub(awake);
        Self { pair: pair(is_tsc), asleep }
    }

    /// Ticks a nanosecond until `now`; `None` while that is too soon. If the machine has slept since, it begins now.
    fn rate(&mut self, now: Self) -> Option<f64> {
        let (from, to) = (self.pair, now.pair);
        if to.ticks < from.ticks || now.asleep.abs_diff(self.asleep) > SLEEP {
            *self = now;
            return None;
        }
        let ns = to.ns.saturating_sub(from.ns);
        (u128::from(ns) >= CALIBRATION.as_nanos()).then(|| (to.ticks - from.ticks) as f64 / ns as f64)
    }
}

static CLOCK: OnceLock<Clock> = OnceLock::new();

fn clock() -> &'static Clock {
    CLOCK.get_or_init(|| {
        let leaves = std::arch::x86_64::__cpuid(0x8000_0000).eax;
        let invariant = leaves >= 0x8000_0007 && std::arch::x86_64::__cpuid(0x8000_0007).edx & INVARIANT_TSC != 0;
        let kernel = std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
        let kernel = kernel.map(|name| name.trim().to_owned()).unwrap_or_default();
        // A kernel that keeps its own time by the counter has checked it on every CPU.
        let is_vouched_for = invariant || kernel == "tsc";
        let tried = !is_vouched_for && std::arch::x86_64::__cpuid(1).ecx & HYPERVISOR != 0 && is_steady();
        let is_tsc = is_vouched_for || tried;
        Clock { is_tsc, invariant, tried, kernel, start: Mutex::new(Moment::now(is_tsc)) }
    })
}

/// Tries the counters of all CPUs that this process may use, on a thread that goes from one to the next.
fn is_steady() -> bool {
    let trial = std::thread::Builder::new().name("uhyve-clock".into()).spawn(try_each_cpu);
    trial.ok().and_then(|thread| thread.join().ok()).unwrap_or(false)
}

fn try_each_cpu() -> bool {
    let this = Pid::from_raw(0);
    let cpus = allowed_cpus();
    if cpus.len() > MOST_CPUS {
        return false;
    }
    let mut trials = Vec::new();
    for cpu in cpus {
        let mut one = CpuSet::new();
        if one.set(cpu).is_err() || sched_setaffinity(this, &one).is_err() {
            return false;
        }
        let from = pair(true);
        std::thread::sleep(TRIAL);
        trials.push((from, pair(true)));
    }
    agree(&trials)
}

/// The CPUs that this thread may use; none if nobody tells.
fn allowed_cpus() -> Vec<usize> {
    let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else { return Vec::new() };
    (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect()
}

/// Whether counters that were read at the beginning and at the end of a trial, each on a CPU of its own, are as one.
fn agree(trials: &[(Pair, Pair)]) -> bool {
    let Some((first, _)) = trials.first() else { return false };
    let Some((_, last)) = trials.last() else { return false };
    let rate_of = |from: &Pair, to: &Pair| {
        (to.ticks.wrapping_sub(from.ticks) as i64) as f64 / to.ns.saturating_sub(from.ns).max(1) as f64
    };
    let rate = rate_of(first, last);
    let is_near = |pair: &Pair| {
        let expected = pair.ns.saturating_sub(first.ns) as f64;
        let shown = (pair.ticks.wrapping_sub(first.ticks) as i64) as f64 / rate;
        (shown - expected).abs() < TOLERANCE
    };
    rate > 0.0
        && trials
            .iter()
            .all(|(from, to)| (rate_of(from, to) / rate - 1.0).abs() < RATE_TOLERANCE && is_near(from) && is_near(to))
}

/// Begins the calibration, if nobody has.
pub fn prepare() {
    clock();
}

/// The time in ticks. Of two readings on one thread the second is not less than the first.
#[inline]
pub fn now() -> u64 {
    read(clock().is_tsc)
}

#[inline]
fn read(is_tsc: bool) -> u64 {
    if is_tsc {
        // SAFETY: every x86-64 CPU has the instruction, and Linux lets programs use it.
        unsafe { std::arch::x86_64::_rdtsc() }
    } else {
        nanoseconds(libc::CLOCK_MONOTONIC)
    }
}

fn nanoseconds(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is a local; the clocks exist on every Linux that has KVM.
    unsafe { libc::clock_gettime(clock, &mut time) };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Of several tries, the one whose reading took the least time: nothing came between.
fn pair(is_tsc: bool) -> Pair {
    let tries = (0..7).map(|_| {
        let before = read(is_tsc);
        let ns = nanoseconds(libc::CLOCK_MONOTONIC_RAW);
        let took = read(is_tsc).saturating_sub(before);
        (took, Pair { ticks: before + took / 2, ns })
    });
    tries.min_by_key(|(took, _)| *took).expect("there are seven").1
}

/// Ticks a nanosecond. Takes a millisecond if the process is younger, or the machine has slept since it asked last.
pub fn ticks_per_ns() -> f64 {
    let clock = clock();
    if !clock.is_tsc {
        return 1.0;
    }
    loop {
        let now = Moment::now(true);
        if let Some(rate) = clock.start.lock().unwrap_or_else(PoisonError::into_inner).rate(now) {
            return rate;
        }
        std::thread::sleep(CALIBRATION / 4);
    }
}

/// What the clock is and costs. Takes some milliseconds.
pub fn describe() -> Description {
    let rate = ticks_per_ns();
    let mut costs: Vec<u64> = (0..2001)
        .map(|_| {
            let before = now();
            now().saturating_sub(before)
        })
        .collect();
    costs.sort_unstable();
    let clock = clock();
    Description {
        source: if clock.is_tsc { "tsc" } else { "clock_gettime" },
        invariant: clock.invariant,
        tried: clock.tried,
        kernel: clock.kernel.clone(),
        ticks_per_ns: rate,
        cost_ns: (costs[0] as f64 / rate, costs[costs.len() / 2] as f64 / rate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What CPUs show that are tried one after the other for 300 µs each: tenths of their rates, and how far each is ahead.
    fn trials(cpus: &[(u64, i64)]) -> Vec<(Pair, Pair)> {
        let pair = |(rate, ahead): (u64, i64), ns: u64| Pair { ticks: (ns * rate / 10).wrapping_add_signed(ahead), ns };
        let begins = (0..).map(|n| 1_000_000 + n * 310_000);
        cpus.iter().zip(begins).map(|(cpu, ns)| (pair(*cpu, ns), pair(*cpu, ns + 300_000))).collect()
    }

    #[test]
    fn test_counters_agree_if_they_run_at_one_rate_and_show_the_same() {
        assert!(agree(&trials(&[(25, 0)])));
        assert!(agree(&trials(&[(25, 0), (25, 900), (25, -900)])), "less than a microsecond");
        assert!(!agree(&trials(&[(25, 0), (25, 1_000_000)])), "one is 400 µs ahead");
        assert!(!agree(&trials(&[(25, 0), (25, -1_000_000)])), "or behind");
        assert!(!agree(&trials(&[(25, 0), (20, 655_000)])), "one is slower");
        assert!(!agree(&trials(&[(0, 0), (0, 0)])), "they stand still");
        assert!(!agree(&[]));
    }

    #[test]
    fn test_counters_of_this_machine_are_tried() {
        let says = clock();
        assert!(says.is_tsc || !says.invariant);
        if says.invariant && (1..=MOST_CPUS).contains(&allowed_cpus().len()) {
            // Whoever is held up just then may try again.
            assert!((0..20).any(|_| is_steady()), "what the CPU vouches for holds");
        }
    }

    #[test]
    fn test_calibration_across_a_sleep_of_the_machine_begins_anew() {
        const HOUR: u64 = 3_600_000_000_000;
        // Two ticks a nanosecond, and how many more by then.
        let at = |ns: u64, asleep: u64, more: i64| {
            let ticks = (2 * ns).saturating_add_signed(more);
            Moment { pair: Pair { ticks, ns }, asleep }
        };
        for (asleep, more) in
            [(9 * HOUR, 18 * HOUR as i64), (9 * HOUR, 0), (9 * HOUR, -2 * HOUR as i64), (0, -2 * HOUR as i64)]
        {
            let mut start = at(HOUR, 0, 0);
            assert_eq!(start.rate(at(HOUR + 100, 0, 0)), None, "too soon");
            assert_eq!(start.rate(at(2 * HOUR, 1_000, 0)), Some(2.0));
            assert_eq!(start.rate(at(HOUR + 5_000_000, asleep, more)), None, "it has slept {asleep}");
            assert_eq!(start.rate(at(HOUR + 15_000_000, asleep, more)), Some(2.0));
        }
    }

    #[test]
    fn test_clock_against_the_host_clock_runs_at_the_calibrated_rate() {
        let rate = ticks_per_ns();
        let (before, start) = (now(), std::time::Instant::now());
        std::thread::sleep(Duration::from_millis(20));
        let (ticks, took) = (now() - before, start.elapsed());
        let ratio = ticks as f64 / rate / took.as_nanos() as f64;
        assert!((0.95..1.05).contains(&ratio), "{ratio}");
    }
}
