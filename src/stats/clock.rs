//! The clock of all measurements: the time stamp counter where it is sound, else CLOCK_MONOTONIC. It is chosen once a
//! process, and calibrated against CLOCK_MONOTONIC_RAW from then on: the longer the process lives, the better.

use std::sync::OnceLock;
use std::time::Duration;

/// CPUID 0x8000_0007 EDX: the counter ticks at one rate in all states of the CPU (Intel SDM 3B, 19.17.1).
const INVARIANT_TSC: u32 = 1 << 8;
/// The least time that a calibration needs to be true to some 10⁻⁴.
const CALIBRATION: Duration = Duration::from_millis(1);

/// What the clock is, for people and for reports.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// `tsc` or `clock_gettime`.
    pub source: &'static str,
    /// CPUID says that the counter is invariant.
    pub invariant: bool,
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
    kernel: String,
    start: Pair,
}

/// Both clocks at one moment.
#[derive(Clone, Copy)]
struct Pair {
    ticks: u64,
    ns: u64,
}

static CLOCK: OnceLock<Clock> = OnceLock::new();

fn clock() -> &'static Clock {
    CLOCK.get_or_init(|| {
        let leaves = std::arch::x86_64::__cpuid(0x8000_0000).eax;
        let invariant = leaves >= 0x8000_0007 && std::arch::x86_64::__cpuid(0x8000_0007).edx & INVARIANT_TSC != 0;
        let kernel = std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
        let kernel = kernel.map(|name| name.trim().to_owned()).unwrap_or_default();
        // A kernel that keeps its own time by the counter has checked it on every CPU.
        let is_tsc = invariant || kernel == "tsc";
        Clock { is_tsc, invariant, kernel, start: pair(is_tsc) }
    })
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

/// Ticks a nanosecond. Takes a millisecond if the process is younger.
pub fn ticks_per_ns() -> f64 {
    let clock = clock();
    if !clock.is_tsc {
        return 1.0;
    }
    loop {
        let now = pair(true);
        let ns = now.ns.saturating_sub(clock.start.ns);
        if u128::from(ns) >= CALIBRATION.as_nanos() {
            return now.ticks.saturating_sub(clock.start.ticks) as f64 / ns as f64;
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
        kernel: clock.kernel.clone(),
        ticks_per_ns: rate,
        cost_ns: (costs[0] as f64 / rate, costs[costs.len() / 2] as f64 / rate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
