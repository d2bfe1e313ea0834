//! What the vCPUs of a machine share: devices, clock and turns, behind one lock. Only the vCPU whose turn it is executes
//! guest code, on its own thread; it takes the lock for an access to a device, and at the ends of its slices. Everybody
//! else waits here, without using the host's CPU.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::board::{Board, Interrupt};
use super::clock::{Clock, ClockKind};
use super::schedule::{Halt, Schedule};

/// So many instructions run at most before a vCPU looks whether it is asked to leave.
const LONGEST_SLICE: u64 = 100_000;
/// So many run at least before a timer is looked at: a guest with a flood of timers still goes on.
const SHORTEST_SLICE: u64 = 16;

/// What the user of a machine chooses about it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SoftOptions {
    /// Which interleaving of the vCPUs the guest gets.
    pub seed: u64,
    /// Which numbers RDRAND gives.
    pub random: u64,
    /// Instructions of a vCPU's turn, on average; 0 is [`DEFAULT_QUANTUM`](super::schedule::DEFAULT_QUANTUM).
    pub quantum: u64,
    /// What time goes by.
    pub clock: ClockKind,
    /// Seconds since 1970 when the machine starts.
    pub epoch: u64,
}

/// So long the others wait for a vCPU whose turn it is and whose thread answers an exit: a host call that lasts longer
/// (the terminal, a FIFO) does not hold them up.
const PATIENCE: Duration = Duration::from_secs(1);
/// So long they wait for one whose thread has stepped aside.
const LITTLE_PATIENCE: Duration = Duration::from_millis(10);

/// Where a vCPU's thread is, as far as others have to know.
#[derive(Debug, Clone, Copy)]
struct Visit {
    /// How often it has come to take its turn.
    count: u64,
    /// It executes guest code.
    is_inside: bool,
    /// How long the others wait for it while it does not.
    patience: Duration,
}

/// The part behind the lock.
pub(super) struct Inner {
    visits: Vec<Visit>,
    pub(super) board: Board,
    pub(super) clock: Clock,
    pub(super) schedule: Schedule,
}

impl Inner {
    /// The timers, up to the time.
    pub(super) fn advance(&mut self) -> u64 {
        let now = self.clock.now();
        self.board.advance(now);
        now
    }

    /// Whether a vCPU that sleeps has a reason to wake.
    fn wakes(board: &Board, vcpu: usize, halt: Halt) -> bool {
        match board.pending(vcpu) {
            Some(Interrupt::Nmi) => true,
            Some(Interrupt::Maskable) => halt.is_maskable,
            None => false,
        }
    }

    /// The turn goes round.
    fn pass(&mut self) {
        let board = &self.board;
        self.schedule.pass(&|vcpu, halt| Self::wakes(board, vcpu, halt));
    }

    /// Gives the turn to a vCPU that can run. If all sleep, time goes on to the next timer that wakes one: at once if it
    /// is virtual, else how long to wait for it is given back. `Err(None)`: no timer wakes anybody.
    fn settle(&mut self) -> Result<(), Option<Duration>> {
        let mut pit_has_fired = false;
        loop {
            self.advance();
            let board = &self.board;
            if self.schedule.settle(&|vcpu, halt| Self::wakes(board, vcpu, halt)) {
                return Ok(());
            }
            let timer = self.schedule.sleepers().filter_map(|vcpu| board.apic(vcpu).next_wake()).min();
            // Once it has fired and woken nobody, it never does: nothing else changes meanwhile.
            let pit = board.next_pit().filter(|_| !pit_has_fired && self.schedule.sleepers().next().is_some());
            let next = timer.into_iter().chain(pit).min().ok_or(None)?;
            pit_has_fired |= Some(next) == pit;
            if let Some(wait) = self.clock.idle_until(next) {
                return Err(Some(wait));
            }
        }
    }

    /// Whether the vCPU whose turn it is has been outside for longer than the others wait. One whose thread waits for its
    /// turn is not: the host has only not run it since it got that. `seen` is what the caller has found the last time.
    fn is_overdue(&self, seen: &mut Option<(usize, u64, Instant)>) -> bool {
        let holder = self.schedule.holder();
        let visit = &self.visits[holder];
        if visit.is_inside || visit.count == 0 || self.schedule.is_waiting(holder) {
            *seen = None;
            return false;
        }
        match seen {
            Some((vcpu, count, since)) if (*vcpu, *count) == (holder, visit.count) => since.elapsed() >= visit.patience,
            _ => {
                *seen = Some((holder, visit.count, Instant::now()));
                false
            }
        }
    }

    /// The vCPU whose turn it is has executed so many instructions.
    pub(super) fn count(&mut self, instructions: u64) {
        self.clock.pass(instructions);
        self.schedule.spend(instructions);
    }

    /// Instructions that the vCPU whose turn it is may execute before something has to be looked at.
    pub(super) fn budget(&mut self) -> u64 {
        let now = self.advance();
        let timer = self.board.next_event().map_or(u64::MAX, |next| next.saturating_sub(now).max(SHORTEST_SLICE));
        let turn = if self.schedule.is_alone() { u64::MAX } else { self.schedule.left() };
        timer.min(turn).min(LONGEST_SLICE)
    }
}

/// What the vCPUs of a machine share.
pub(super) struct Shared {
    inner: Mutex<Inner>,
    /// Where each vCPU's thread waits for its turn.
    turns: Vec<Condvar>,
    /// A kick came that no `run` of the vCPU has answered.
    kicked: Vec<AtomicBool>,
}

/// Why a vCPU stops executing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pause {
    /// Something has to be looked at.
    Slice,
    /// It waits for another vCPU, by PAUSE, and gives its turn away.
    Turn,
    /// It sleeps until an interrupt comes.
    Halt(Halt),
}

impl Shared {
    pub(super) fn new(cpus: u32, has_pit: bool, options: &SoftOptions) -> Self {
        let visit = Visit { count: 0, is_inside: false, patience: PATIENCE };
        let inner = Inner {
            visits: vec![visit; cpus as usize],
            board: Board::new(cpus, has_pit, options.epoch),
            clock: Clock::new(options.clock),
            schedule: Schedule::new(cpus, options.quantum, options.seed),
        };
        Self {
            inner: Mutex::new(inner),
            turns: (0..cpus).map(|_| Condvar::new()).collect(),
            kicked: (0..cpus).map(|_| AtomicBool::new(false)).collect(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The vCPU takes turns from now on.
    pub(super) fn join(&self, vcpu: usize) {
        self.lock().schedule.set_present(vcpu, true);
    }

    /// A kick for a vCPU: it does not wait, neither now nor the next time.
    pub(super) fn kick(&self, vcpu: usize) {
        self.kicked[vcpu].store(true, Ordering::SeqCst);
        self.wake(vcpu);
    }

    /// Whether there is a kick, which is answered by that.
    pub(super) fn take_kick(&self, vcpu: usize) -> bool {
        self.kicked[vcpu].load(Ordering::SeqCst) && self.kicked[vcpu].swap(false, Ordering::SeqCst)
    }

    /// Waits for the vCPU's turn. `None`: there was a kick.
    pub(super) fn take_turn(&self, vcpu: usize) -> Option<MutexGuard<'_, Inner>> {
        let mut inner = self.lock();
        inner.schedule.set_present(vcpu, true);
        let mut seen = None;
        loop {
            if self.take_kick(vcpu) {
                inner.schedule.set_waiting(vcpu, false);
                return None;
            }
            let before = inner.schedule.holder();
            let settled = inner.settle();
            let holder = inner.schedule.holder();
            if settled.is_ok() && holder == vcpu {
                inner.schedule.set_waiting(vcpu, false);
                inner.schedule.set_halt(vcpu, None);
                let visit = &mut inner.visits[vcpu];
                *visit = Visit { count: visit.count + 1, is_inside: true, patience: PATIENCE };
                return Some(inner);
            }
            if settled.is_ok() && holder != before {
                self.turns[holder].notify_one();
            }
            inner.schedule.set_waiting(vcpu, true);
            let turn = &self.turns[vcpu];
            inner = match settled {
                Err(None) => turn.wait(inner).unwrap_or_else(|e| e.into_inner()),
                Err(Some(wait)) => turn.wait_timeout(inner, wait).unwrap_or_else(|e| e.into_inner()).0,
                Ok(()) => {
                    if inner.is_overdue(&mut seen) {
                        inner.schedule.set_present(holder, false);
                        continue;
                    }
                    turn.wait_timeout(inner, LITTLE_PATIENCE).unwrap_or_else(|e| e.into_inner()).0
                }
            };
        }
    }

    /// The vCPU whose turn it is has executed so many instructions, and keeps its turn while its thread is outside.
    pub(super) fn go_outside(&self, vcpu: usize, instructions: u64) {
        let mut inner = self.lock();
        inner.count(instructions);
        inner.visits[vcpu].is_inside = false;
    }

    /// The vCPU's thread, which is outside, may be there for long.
    pub(super) fn step_aside(&self, vcpu: usize) {
        self.lock().visits[vcpu].patience = LITTLE_PATIENCE;
    }

    /// The vCPU whose turn it is has executed so many instructions, and stops for a reason.
    pub(super) fn end_slice(&self, vcpu: usize, instructions: u64, pause: Pause) {
        let mut inner = self.lock();
        inner.count(instructions);
        inner.visits[vcpu].is_inside = false;
        match pause {
            Pause::Slice if inner.schedule.left() > 0 => return,
            Pause::Slice | Pause::Turn => {}
            Pause::Halt(halt) => inner.schedule.set_halt(vcpu, Some(halt)),
        }
        inner.advance();
        inner.pass();
        let holder = inner.schedule.holder();
        if holder != vcpu {
            self.turns[holder].notify_one();
        }
    }

    /// The vCPU's thread goes where it may stay for long. Whoever waits and is not kicked does not wait for it.
    pub(super) fn leave(&self, vcpu: usize) {
        let mut inner = self.lock();
        let Inner { board, schedule, .. } = &mut *inner;
        let stays = |n: usize| !self.kicked[n].load(Ordering::SeqCst);
        schedule.leave(vcpu, &|n, halt| Inner::wakes(board, n, halt), &stays);
        // If all the others sleep, one of them has to see to the time.
        self.turns.iter().for_each(Condvar::notify_one);
    }

    /// Lets a vCPU's thread that waits look around.
    pub(super) fn wake(&self, vcpu: usize) {
        // With the lock held for an instant: a thread that was about to wait does so before, or sees what changed.
        drop(self.lock());
        self.turns[vcpu].notify_one();
    }

    /// These vCPUs are about to run, all others stand still. None does now.
    pub(super) fn resume(&self, runs: &dyn Fn(u32) -> bool) {
        let mut inner = self.lock();
        for (number, vcpu) in (0..self.turns.len()).filter_map(|n| Some((u32::try_from(n).ok()?, n))) {
            inner.schedule.set_present(vcpu, runs(number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Barrier};

    fn shared(cpus: u32, clock: ClockKind) -> Arc<Shared> {
        let shared = Shared::new(cpus, false, &SoftOptions { quantum: 100, clock, ..SoftOptions::default() });
        (0..cpus as usize).for_each(|n| shared.join(n));
        Arc::new(shared)
    }

    /// Arms a vCPU's timer; its interrupt comes after so many nanoseconds.
    fn arm(shared: &Shared, vcpu: usize, delay: u32) {
        let mut inner = shared.lock();
        let now = inner.clock.now();
        let moment = super::super::local_apic::Moment { now, tsc: now };
        for (register, value) in [(0xf0, 0x1ff), (0x3e0, 0xb), (0x320, 0x40), (0x380, delay)] {
            assert!(inner.board.write_memory(vcpu, 0xfee0_0000 + register, moment, &u32::to_le_bytes(value)));
        }
    }

    #[test]
    fn test_threads_take_turns_in_one_order_however_they_arrive() {
        let orders: Vec<_> = (0..3u64)
            .map(|delay| {
                let shared = shared(3, ClockKind::Virtual);
                let order = Arc::new(Mutex::new(Vec::new()));
                let done = Arc::new(Barrier::new(3));
                let threads: Vec<_> = (0..3)
                    .map(|vcpu| {
                        let (shared, order, done) = (shared.clone(), order.clone(), done.clone());
                        std::thread::spawn(move || {
                            std::thread::sleep(Duration::from_millis((vcpu as u64 * 2 + delay) % 3));
                            for _ in 0..50 {
                                let budget = shared.take_turn(vcpu).unwrap().budget();
                                order.lock().unwrap().push((vcpu, budget));
                                shared.end_slice(vcpu, budget, Pause::Slice);
                            }
                            // When the others have left, the last one's turn has no end.
                            done.wait();
                            shared.leave(vcpu);
                        })
                    })
                    .collect();
                threads.into_iter().for_each(|thread| thread.join().unwrap());
                Arc::try_unwrap(order).unwrap().into_inner().unwrap()
            })
            .collect();
        assert!(orders.iter().all(|order| *order == orders[0] && order.len() == 150));
        assert!((0..140).all(|n| orders[0][n].0 == n % 3));
    }

    #[test]
    fn test_vcpu_that_pauses_gives_its_turn_away() {
        let shared = shared(2, ClockKind::Virtual);
        assert!(shared.take_turn(0).unwrap().schedule.left() > 1);
        shared.end_slice(0, 1, Pause::Turn);
        assert_eq!(shared.lock().schedule.holder(), 1);
    }

    #[test]
    fn test_idle_virtual_machine_jumps_to_the_timer_at_once() {
        let shared = shared(1, ClockKind::Virtual);
        arm(&shared, 0, 4_000_000_000);
        let before = Instant::now();
        drop(shared.take_turn(0).unwrap());
        shared.end_slice(0, 10, Pause::Halt(Halt { is_maskable: true }));
        let mut inner = shared.take_turn(0).unwrap();
        assert_eq!((inner.clock.now(), inner.board.acknowledge(0)), (4_000_000_000, Some(0x40)));
        assert!(before.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn test_idle_machine_by_the_hosts_clock_sleeps_until_the_timer() {
        let shared = shared(1, ClockKind::Host);
        let before = Instant::now();
        arm(&shared, 0, 30_000_000);
        shared.end_slice(0, 0, Pause::Halt(Halt { is_maskable: true }));
        assert_eq!(shared.take_turn(0).unwrap().board.acknowledge(0), Some(0x40));
        assert!(before.elapsed() >= Duration::from_millis(30));
    }

    #[test]
    fn test_machine_that_nothing_wakes_waits_for_a_kick() {
        for (clock, is_maskable) in [(ClockKind::Virtual, false), (ClockKind::Host, false), (ClockKind::Virtual, true)]
        {
            let shared = shared(2, clock);
            if !is_maskable {
                arm(&shared, 0, 1000);
            }
            for vcpu in 0..2 {
                shared.end_slice(vcpu, 1, Pause::Halt(Halt { is_maskable }));
            }
            let other = shared.clone();
            let kicker = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                other.kick(0);
            });
            assert!(shared.take_turn(0).is_none());
            kicker.join().unwrap();
        }
    }

    #[test]
    fn test_interrupt_from_another_vcpu_wakes_a_sleeper() {
        let shared = shared(2, ClockKind::Virtual);
        arm(&shared, 0, 0);
        shared.end_slice(0, 1, Pause::Halt(Halt { is_maskable: true }));
        let mut inner = shared.take_turn(1).unwrap();
        for (register, value) in [(0x310, 0u32), (0x300, 0x51)] {
            inner.board.write_memory(1, 0xfee0_0000 + register, Default::default(), &value.to_le_bytes());
        }
        drop(inner);
        shared.end_slice(1, 1, Pause::Halt(Halt { is_maskable: true }));
        assert_eq!(shared.take_turn(0).unwrap().board.acknowledge(0), Some(0x51));
    }

    #[test]
    fn test_vcpu_whose_thread_is_away_does_not_hold_the_others_up() {
        let shared = shared(2, ClockKind::Virtual);
        drop(shared.take_turn(0).unwrap());
        let other = shared.clone();
        let waiting = std::thread::spawn(move || drop(other.take_turn(1).unwrap()));
        std::thread::sleep(Duration::from_millis(10));
        assert!(!waiting.is_finished(), "it is vCPU 0's turn while its exit is answered");
        shared.leave(0);
        waiting.join().unwrap();
        shared.resume(&|n| n == 0);
        drop(shared.take_turn(0).unwrap());
    }

    #[test]
    fn test_vcpu_that_stepped_aside_is_waited_for_a_little_and_has_its_turn_again() {
        let shared = shared(2, ClockKind::Virtual);
        let before = Instant::now();
        drop(shared.take_turn(0).unwrap());
        shared.go_outside(0, 1);
        shared.step_aside(0);
        drop(shared.take_turn(1).unwrap());
        assert!(before.elapsed() >= LITTLE_PATIENCE && before.elapsed() < PATIENCE);
        let other = shared.clone();
        let waiting = std::thread::spawn(move || drop(other.take_turn(0).unwrap()));
        std::thread::sleep(LITTLE_PATIENCE);
        assert!(!waiting.is_finished(), "it is vCPU 1's turn now");
        shared.end_slice(1, 1000, Pause::Slice);
        waiting.join().unwrap();
    }

    #[test]
    fn test_vcpu_that_waits_and_whose_thread_the_host_does_not_run_keeps_its_place() {
        let shared = shared(2, ClockKind::Virtual);
        drop(shared.take_turn(0).unwrap());
        shared.go_outside(0, 1);
        shared.step_aside(0);
        for is_waiting in [true, false] {
            let mut inner = shared.lock();
            inner.schedule.set_waiting(0, is_waiting);
            let mut seen = None;
            assert!(!inner.is_overdue(&mut seen), "seen for the first time");
            std::thread::sleep(LITTLE_PATIENCE);
            assert_eq!(inner.is_overdue(&mut seen), !is_waiting);
        }
    }

    #[test]
    fn test_flood_of_timers_leaves_instructions_to_the_guest() {
        let shared = shared(1, ClockKind::Virtual);
        arm(&shared, 0, 1);
        let budget = shared.take_turn(0).unwrap().budget();
        assert_eq!(budget, SHORTEST_SLICE);
    }
}
