//! How long exits take: HDR histograms per vCPU and reason, of all exits or of a random sample that costs next to nothing.
//!
//! An exit begins when the vCPU's thread enters the guest and ends when it is about to enter it again. The time in KVM_RUN
//! (which is the guest's own code, too) is told from the time outside, and that is split into the handler's part (a hypercall's
//! service, a breakpoint's decision), the part of a script, and the rest: the dispatch.

use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hdrhistogram::Histogram;

use super::{ExitKind, clock};
use crate::hypercall::Kind;

/// One exit in so many is timed unless somebody asks for another rate.
pub const EVERY: u32 = 128;
/// The longest time that is told apart: an hour of a clock of 4 GHz.
const LONGEST: u64 = 3600 * 4_000_000_000;
const REASONS: usize = ExitKind::ALL.len() + Kind::ALL.len();

/// Which exits are timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling {
    /// One in so many, at random; 1 is all, and 0 none.
    pub every: u32,
    /// So many exits of each vCPU are not, at first.
    pub skip: u32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { every: EVERY, skip: 0 }
    }
}

/// A part of an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Part {
    /// All of it.
    Total,
    /// In KVM_RUN, or whatever runs the guest; what the guest executes belongs to it.
    Run,
    /// Outside: the next three together.
    Vmm,
    /// Finding out what is to be done.
    Dispatch,
    /// Doing it.
    Handler,
    /// In a callable of the front end's.
    Script,
}

impl Part {
    /// All of them, with their names.
    pub const ALL: [(Part, &'static str); 6] = [
        (Self::Total, "total"),
        (Self::Run, "run"),
        (Self::Vmm, "vmm"),
        (Self::Dispatch, "dispatch"),
        (Self::Handler, "handler"),
        (Self::Script, "script"),
    ];
}

/// The histograms of one reason, in ticks. A part that never took time has none.
type Parts = [Option<Histogram<u32>>; Part::ALL.len()];

/// What is known of one vCPU's exits.
struct Book {
    reasons: Box<[Parts; REASONS]>,
}

impl Book {
    fn new() -> Self {
        Self { reasons: Box::new(std::array::from_fn(|_| Parts::default())) }
    }

    fn record(&mut self, reason: usize, ticks: &[u64; Part::ALL.len()], digits: u8) {
        for (n, (slot, ticks)) in self.reasons[reason].iter_mut().zip(ticks).enumerate() {
            if slot.is_none() && (*ticks > 0 || n < Part::Handler as usize) {
                *slot = Histogram::new_with_max(LONGEST, digits).ok();
            }
            if let Some(histogram) = slot {
                histogram.saturating_record(*ticks);
            }
        }
    }
}

/// The latencies of a VM.
pub struct Latencies {
    books: Vec<Mutex<Book>>,
    every: AtomicU32,
    /// Exits of each vCPU that are not timed, at first.
    skip: AtomicU32,
    /// How often somebody has restarted it.
    restarts: AtomicU32,
    /// When each vCPU last came to its safe point, and when it last left it.
    marks: Vec<[AtomicU64; 2]>,
}

/// A value and how often it was seen, in nanoseconds, rising.
pub type Buckets = Vec<(f64, u64)>;

/// What was measured of one reason.
#[derive(Debug, Clone, PartialEq)]
pub struct ReasonLatency {
    /// The reason: an [`ExitKind`]'s name, or a hypercall's.
    pub reason: &'static str,
    /// What was recorded of each part that took time.
    pub parts: Vec<(&'static str, Recorded)>,
}

/// A histogram that is over.
#[derive(Debug, Clone, PartialEq)]
pub struct Recorded {
    histogram: Histogram<u32>,
    rate: f64,
}

impl Recorded {
    /// A histogram of ticks.
    pub fn new(histogram: Histogram<u32>) -> Self {
        Self { histogram, rate: clock::ticks_per_ns() }
    }

    /// How many were recorded.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The value that so many percent do not exceed, in nanoseconds; 0 is the least.
    pub fn percentile(&self, percent: f64) -> f64 {
        if percent <= 0.0 {
            return self.histogram.min() as f64 / self.rate;
        }
        self.histogram.value_at_percentile(percent) as f64 / self.rate
    }

    /// The mean in nanoseconds.
    pub fn mean(&self) -> f64 {
        self.histogram.mean() / self.rate
    }

    /// All that was recorded.
    pub fn buckets(&self) -> Buckets {
        let values = self.histogram.iter_recorded();
        values.map(|v| (v.value_iterated_to() as f64 / self.rate, v.count_since_last_iteration())).collect()
    }
}

impl Latencies {
    pub(super) fn new(cpus: u32, sampling: Sampling) -> Self {
        clock::prepare();
        Self {
            books: (0..cpus).map(|_| Mutex::new(Book::new())).collect(),
            every: AtomicU32::new(sampling.every),
            skip: AtomicU32::new(sampling.skip),
            restarts: AtomicU32::new(0),
            marks: (0..cpus).map(|_| Default::default()).collect(),
        }
    }

    /// Notes that a vCPU comes to its safe point (0) or leaves it (1).
    pub(crate) fn mark(&self, vcpu: u32, leaves: usize) {
        self.marks[vcpu as usize][leaves].store(clock::now(), Ordering::Release);
    }

    /// When a vCPU last came to its safe point, and when it last left it, in ticks.
    pub fn marks(&self, vcpu: u32) -> (u64, u64) {
        let [came, left] = &self.marks[vcpu as usize];
        (came.load(Ordering::Acquire), left.load(Ordering::Acquire))
    }

    /// What was recorded of each vCPU so far.
    pub fn snapshot(&self) -> Vec<Vec<ReasonLatency>> {
        let rate = clock::ticks_per_ns();
        let names = ExitKind::ALL.iter().map(|(_, name)| *name).chain(Kind::ALL.iter().map(|kind| kind.name()));
        let names: Vec<_> = names.collect();
        let of_book = |book: &Mutex<Book>| {
            let book = book.lock().unwrap_or_else(|e| e.into_inner());
            let seen = names.iter().zip(book.reasons.iter()).filter(|(_, parts)| parts[0].is_some());
            seen.map(|(reason, parts)| ReasonLatency {
                reason,
                parts: Part::ALL
                    .iter()
                    .zip(parts)
                    .filter_map(|((_, name), h)| h.as_ref().map(|h| (*name, Recorded { histogram: h.clone(), rate })))
                    .collect(),
            })
            .collect()
        };
        self.books.iter().map(of_book).collect()
    }

    /// Forgets what was recorded, and times as `sampling` says from each vCPU's next resume on.
    pub fn restart(&self, sampling: Sampling) {
        self.every.store(sampling.every, Ordering::Relaxed);
        self.skip.store(sampling.skip, Ordering::Relaxed);
        for book in &self.books {
            *book.lock().unwrap_or_else(|e| e.into_inner()) = Book::new();
        }
        self.restarts.fetch_add(1, Ordering::Release);
    }

    fn record(&self, vcpu: u32, reason: usize, ticks: &[u64; Part::ALL.len()]) {
        // All exits are for a report, a sample for a glance.
        let digits = if self.every.load(Ordering::Relaxed) == 1 { 3 } else { 2 };
        self.books[vcpu as usize].lock().unwrap_or_else(|e| e.into_inner()).record(reason, ticks, digits);
    }
}

const NO_REASON: usize = usize::MAX;

/// A vCPU's thread with a stopwatch. What is not timed costs a decrement and some branches that are never taken.
pub(crate) struct Sampler {
    left: u32,
    /// The restart that it obeys.
    restart: u32,
    random: u32,
    is_timing: bool,
    entered: u64,
    left_guest: u64,
    reason: Cell<usize>,
    handler: Cell<u64>,
    script: Cell<u64>,
}

impl Sampler {
    /// For a vCPU that has not run.
    pub fn new(latencies: &Latencies) -> Self {
        let [a, b, c, d, ..] = clock::now().to_le_bytes();
        let random = u32::from_le_bytes([a, b, c, d]) | 1;
        let mut sampler = Self {
            left: 0,
            restart: latencies.restarts.load(Ordering::Acquire),
            random,
            is_timing: false,
            entered: 0,
            left_guest: 0,
            reason: Cell::new(NO_REASON),
            handler: Cell::new(0),
            script: Cell::new(0),
        };
        sampler.start(latencies);
        sampler
    }

    fn start(&mut self, latencies: &Latencies) {
        let skipped = latencies.skip.load(Ordering::Relaxed);
        self.left = self.next(latencies).saturating_add(skipped);
    }

    /// The vCPU is about to run on. The exits that it still has to the next that is timed stay as many, however often the
    /// world stops, unless somebody has restarted the sampling.
    pub fn resume(&mut self, latencies: &Latencies) {
        let restart = latencies.restarts.load(Ordering::Acquire);
        if self.restart != restart {
            self.restart = restart;
            self.start(latencies);
        }
    }

    /// Exits to the next that is timed: `every` on average, at random, so that no rhythm of the guest's is met.
    fn next(&mut self, latencies: &Latencies) -> u32 {
        match latencies.every.load(Ordering::Relaxed) {
            0 => u32::MAX,
            1 => 1,
            every => {
                // xorshift32.
                self.random ^= self.random << 13;
                self.random ^= self.random >> 17;
                self.random ^= self.random << 5;
                every.div_ceil(2) + self.random % (every | 1)
            }
        }
    }

    /// The guest is entered.
    #[inline]
    pub fn enter(&mut self) {
        self.left -= 1;
        if self.left == 0 {
            self.is_timing = true;
            self.reason.set(NO_REASON);
            self.handler.set(0);
            self.script.set(0);
            self.entered = clock::now();
        }
    }

    /// The guest is left.
    #[inline]
    pub fn leave(&mut self) {
        if self.is_timing {
            self.left_guest = clock::now();
        }
    }

    /// Why; the first reason counts.
    #[inline]
    pub fn exit(&self, kind: ExitKind) {
        if self.is_timing && self.reason.get() == NO_REASON {
            self.reason.set(kind as usize);
        }
    }

    /// A hypercall; the first reason counts.
    #[inline]
    pub fn hypercall(&self, kind: Kind) {
        if self.is_timing && self.reason.get() == NO_REASON {
            self.reason.set(ExitKind::ALL.len() + kind as usize);
        }
    }

    /// The beginning of a part, for [`Sampler::handled`] and [`Sampler::called`].
    #[inline]
    pub fn begin(&self) -> u64 {
        if self.is_timing { clock::now() } else { 0 }
    }

    /// The handler has worked since.
    #[inline]
    pub fn handled(&self, since: u64) {
        if self.is_timing {
            self.handler.set(self.handler.get() + clock::now().saturating_sub(since));
        }
    }

    /// A script has run since, within a handler.
    #[inline]
    pub fn called(&self, since: u64) {
        if self.is_timing {
            self.script.set(self.script.get() + clock::now().saturating_sub(since));
        }
    }

    /// The exit is answered.
    #[inline]
    pub fn finish(&mut self, latencies: &Latencies, vcpu: u32) {
        if self.is_timing {
            self.record(latencies, vcpu);
        }
    }

    #[cold]
    fn record(&mut self, latencies: &Latencies, vcpu: u32) {
        let end = clock::now();
        self.is_timing = false;
        let run = self.left_guest.saturating_sub(self.entered);
        let vmm = end.saturating_sub(self.left_guest);
        let script = self.script.get().min(vmm);
        let handler = self.handler.get().saturating_sub(script).min(vmm - script);
        let reason = self.reason.get();
        if reason < REASONS {
            latencies.record(vcpu, reason, &[run + vmm, run, vmm, vmm - handler - script, handler, script]);
        }
        self.left = self.next(latencies);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exits(latencies: &Latencies, count: u32) {
        exits_of(&mut Sampler::new(latencies), latencies, count);
    }

    fn exits_of(sampler: &mut Sampler, latencies: &Latencies, count: u32) {
        for _ in 0..count {
            sampler.enter();
            sampler.leave();
            sampler.exit(ExitKind::PortWrite);
            let since = sampler.begin();
            sampler.handled(since);
            sampler.finish(latencies, 0);
        }
    }

    fn recorded(latencies: &Latencies) -> u64 {
        let found = &latencies.snapshot()[0];
        found.iter().map(|r| r.parts[0].1.count()).sum()
    }

    #[test]
    fn test_every_exit_is_recorded_behind_those_that_are_skipped() {
        let latencies = Latencies::new(1, Sampling { every: 1, skip: 10 });
        exits(&latencies, 110);
        assert_eq!(recorded(&latencies), 100);
    }

    #[test]
    fn test_sample_has_about_its_share_of_the_exits_and_none_when_off() {
        let latencies = Latencies::new(1, Sampling::default());
        exits(&latencies, 128_000);
        let count = recorded(&latencies);
        assert!((800..1300).contains(&count), "{count}");
        latencies.restart(Sampling { every: 0, skip: 0 });
        exits(&latencies, 1000);
        assert_eq!(recorded(&latencies), 0);
    }

    #[test]
    fn test_sample_has_its_share_of_the_exits_however_small_the_rate() {
        for every in [2, 3, 4, 5] {
            let latencies = Latencies::new(1, Sampling { every, skip: 0 });
            exits(&latencies, 60_000);
            let share = recorded(&latencies) as f64 * f64::from(every) / 60_000.0;
            assert!((0.97..1.03).contains(&share), "1 in {every}: {share}");
        }
    }

    #[test]
    fn test_sample_has_its_share_of_exits_between_which_the_world_stops() {
        let latencies = Latencies::new(1, Sampling::default());
        let mut sampler = Sampler::new(&latencies);
        for _ in 0..12_800 {
            sampler.resume(&latencies);
            exits_of(&mut sampler, &latencies, 10);
        }
        let count = recorded(&latencies);
        assert!((800..1300).contains(&count), "{count}");
        latencies.restart(Sampling { every: 1, skip: 5 });
        sampler.resume(&latencies);
        exits_of(&mut sampler, &latencies, 10);
        assert_eq!(recorded(&latencies), 5, "a restart counts from the next resume on");
    }

    #[test]
    fn test_parts_of_an_exit_add_up_to_its_total() {
        let latencies = Latencies::new(1, Sampling { every: 1, skip: 0 });
        latencies.record(0, ExitKind::Debug as usize, &[1000, 600, 400, 100, 250, 50]);
        let found = latencies.snapshot();
        let of = |name: &str| {
            let parts = &found[0][0].parts;
            parts.iter().find(|(n, _)| *n == name).map(|(_, r)| r.percentile(50.0)).unwrap()
        };
        assert_eq!(found[0][0].reason, "debug");
        let sum = of("run") + of("dispatch") + of("handler") + of("script");
        assert!((sum / of("total") - 1.0).abs() < 0.01, "{sum}");
    }
}
