//! Stopping the world and starting it again. One lock holds the protocol; vCPU threads come to [`Engine::safe_point`]
//! when they are asked to, and leave it when they may run. A stop is reported only when every vCPU stands there, so that
//! all registers can be read at once, without waiting. Nobody is woken but for what it waits for: a vCPU that comes to
//! its safe point disturbs none that stands there, and the last one wakes who asked.
//!
//! Besides a stop there is the [`exclusive`] section; [`waiting`] is how front ends hear of the world.

mod exclusive;
mod waiting;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use nix::sys::eventfd::EventFd;

pub use exclusive::{Exclusive, Owner};
use waiting::tell;
pub use waiting::waiter;

use super::stop::{Event, Stop, StopReason};
use crate::backend::Kick;
use crate::error::{Crash, Error, Result};

/// A kick reaches a vCPU in microseconds; one that met its thread in the instant before a blocking system call is sent again after this.
pub(crate) const KICK_AGAIN: Duration = Duration::from_millis(10);

/// What a vCPU does after the next resume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Run on.
    Run,
    /// One instruction, then an event. Of several vCPUs that step, each executes its own before the stop is reported.
    Step,
    /// Instructions until the program counter lies outside of `start..end`, one at least; then an event.
    StepRange {
        /// The first address of the range.
        start: u64,
        /// The first address behind it.
        end: u64,
    },
    /// Stay where it is.
    Hold,
}

/// What a vCPU thread is to do when it leaves its safe point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Run by this plan.
    Run(Plan),
    /// The VM is over: return from the thread.
    End,
}

/// How the VM ended.
#[derive(Debug)]
pub enum End {
    /// The guest ended itself with this code.
    Exit(i32),
    /// The guest crashed.
    Crash(Arc<Crash>),
    /// The host failed.
    Failed(Error),
    /// The user of the VM ended it.
    Killed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Stopping,
    Stopped,
    Ended,
}

#[derive(Clone, Copy)]
struct Seat {
    /// At its safe point: the world may be stopped, and the exclusive section entered.
    parked: bool,
    /// Outside of the guest and of its context, but in the middle of something: the exclusive section may be entered,
    /// and no stop is reported before the vCPU has finished.
    outside: bool,
    /// Has not begun the step that it is to make: no stop is reported before.
    owes_step: bool,
    plan: Plan,
}

impl Seat {
    fn stands_still(&self) -> bool {
        self.parked || self.outside
    }
}

struct State {
    phase: Phase,
    seats: Vec<Seat>,
    exclusive: Option<Owner>,
    /// Found and not yet reported.
    queue: VecDeque<Event>,
    /// A front end asked for a stop, for this reason.
    interrupt: Option<StopReason>,
    stop: Option<Stop>,
    /// Stops are shown to those who wait only when somebody has approved of them.
    is_gated: bool,
    /// The current stop waits for that.
    is_held: bool,
    end: Option<Arc<End>>,
    waiters: Vec<Arc<EventFd>>,
    /// One that nobody uses now: to make one and to close it takes as long as the way of a stop to who waits for it.
    spare: Option<Arc<EventFd>>,
}

impl State {
    /// Whether a vCPU at its safe point may leave it.
    fn may_leave(&self, seat: &Seat) -> bool {
        let may_run = match self.phase {
            Phase::Running => true,
            Phase::Stopping => seat.owes_step,
            Phase::Stopped | Phase::Ended => false,
        };
        may_run && self.exclusive.is_none() && seat.plan != Plan::Hold
    }

    fn status(&self) -> Status {
        match self.phase {
            Phase::Running | Phase::Stopping => Status::Running,
            Phase::Stopped => Status::Stopped(self.stop.clone().expect("the world stopped at least once")),
            Phase::Ended => Status::Ended(self.end.clone().expect("an end is set with the phase")),
        }
    }

    /// Whether all stand still but the owner of the exclusive section.
    fn stands_still_but(&self, owner: Owner) -> bool {
        (0..).zip(&self.seats).all(|(n, seat)| seat.stands_still() || owner == Owner::Vcpu(n))
    }
}

struct Slot {
    request: AtomicBool,
    kick: Mutex<Option<Arc<dyn Kick>>>,
    /// The vCPU may leave its safe point.
    go: Condvar,
}

/// vCPUs that are asked to come to their safe points, and still to be kicked: with the lock released, since a signal to
/// another host CPU takes longer than a vCPU's way to the lock.
#[must_use]
struct Kicks(Vec<usize>);

/// The engine of one VM.
pub struct Engine {
    state: Mutex<State>,
    /// The exclusive section is free.
    freed: Condvar,
    /// Its owner is the only one that moves.
    still: Condvar,
    slots: Vec<Slot>,
    debugging: AtomicBool,
}

/// The state that a front end finds when it asks.
#[derive(Clone)]
pub enum Status {
    /// At least one vCPU may execute guest code.
    Running,
    /// All vCPUs stand still.
    Stopped(Stop),
    /// The VM is over.
    Ended(Arc<End>),
}

impl Engine {
    /// An engine for `cpus` vCPUs. With `debugging` it begins with a stop at the entry, and the guest's end is a stop too;
    /// otherwise the vCPUs run at once, and the guest's end is the VM's.
    pub fn new(cpus: u32, debugging: bool) -> Self {
        let seat = Seat { parked: false, outside: false, owes_step: false, plan: Plan::Run };
        Self {
            state: Mutex::new(State {
                phase: if debugging { Phase::Stopping } else { Phase::Running },
                seats: vec![seat; cpus as usize],
                exclusive: None,
                queue: VecDeque::new(),
                interrupt: debugging.then_some(StopReason::Entry),
                stop: None,
                is_gated: false,
                is_held: false,
                end: None,
                waiters: Vec::new(),
                spare: None,
            }),
            freed: Condvar::new(),
            still: Condvar::new(),
            slots: (0..cpus)
                .map(|_| Slot { request: AtomicBool::new(false), kick: Mutex::new(None), go: Condvar::new() })
                .collect(),
            debugging: AtomicBool::new(debugging),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, on: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        on.wait(state).unwrap_or_else(|e| e.into_inner())
    }

    /// Whether the guest's end is a stop.
    pub fn is_debugging(&self) -> bool {
        self.debugging.load(Ordering::SeqCst)
    }

    /// Ends debugging: what was found and not reported is dropped, all vCPUs run, and the guest's end is the VM's.
    pub fn detach(&self) -> Result<()> {
        let mut state = self.lock();
        self.debugging.store(false, Ordering::SeqCst);
        let events: Vec<_> = state.queue.drain(..).collect();
        let last = events.into_iter().map(|event| event.reason).chain(state.stop.iter().map(|s| s.reason.clone()));
        let end = last.into_iter().find_map(|reason| reason.end());
        if state.phase == Phase::Ended {
            return Ok(());
        }
        if let Some(end) = end {
            drop(state);
            self.end(end);
            return Ok(());
        }
        for seat in &mut state.seats {
            (seat.plan, seat.owes_step) = (Plan::Run, false);
        }
        state.interrupt = None;
        state.phase = Phase::Running;
        self.let_go(state);
        Ok(())
    }

    /// Names the kick handle of a vCPU; its thread does so before its first safe point, and takes it back at its end.
    pub fn set_kick(&self, vcpu: u32, kick: Option<Arc<dyn Kick>>) {
        *self.slots[vcpu as usize].kick.lock().unwrap_or_else(|e| e.into_inner()) = kick;
    }

    /// What [`Engine::is_requested`] looks at.
    pub(crate) fn request_flag(&self, vcpu: u32) -> &AtomicBool {
        &self.slots[vcpu as usize].request
    }

    /// Whether the vCPU's thread is asked to come to its safe point. Cheap; looked at before each entry.
    #[inline]
    pub fn is_requested(&self, vcpu: u32) -> bool {
        self.slots[vcpu as usize].request.load(Ordering::SeqCst)
    }

    /// Asks vCPUs to come to their safe points.
    fn request(&self, state: &State, which: impl Fn(usize, &Seat) -> bool) -> Kicks {
        let mut asked = Vec::new();
        for (n, seat) in state.seats.iter().enumerate() {
            if which(n, seat) {
                self.slots[n].request.store(true, Ordering::SeqCst);
                asked.push(n);
            }
        }
        Kicks(asked)
    }

    /// Asks all that are not at their safe points.
    fn request_running(&self, state: &State) -> Kicks {
        self.request(state, |_, seat| !seat.parked)
    }

    /// Makes them leave the guest. One that has come to its safe point meanwhile, and left it, loses an entry by it.
    fn kick(&self, kicks: Kicks) {
        for n in kicks.0 {
            let kick = self.slots[n].kick.lock().unwrap_or_else(|e| e.into_inner()).clone();
            if let Some(kick) = kick {
                kick.kick();
            }
        }
    }

    fn notify(&self, state: &State) {
        tell(&state.waiters);
    }

    /// Wakes the vCPUs at their safe points that may leave them.
    fn let_go(&self, state: MutexGuard<'_, State>) {
        let leaves = |seat: &Seat| seat.parked && (state.phase == Phase::Ended || state.may_leave(seat));
        let leaving: Vec<bool> = state.seats.iter().map(leaves).collect();
        // Whoever wakes takes the lock first of all.
        drop(state);
        for (slot, _) in self.slots.iter().zip(leaving).filter(|(_, leaves)| *leaves) {
            slot.go.notify_all();
        }
    }

    /// A vCPU stands still: who holds the exclusive section may have waited for it.
    fn has_come(&self, state: &State) {
        if state.exclusive.is_some_and(|owner| state.stands_still_but(owner)) {
            self.still.notify_all();
        }
    }

    /// Whether the world is to stop, and every vCPU stands still.
    fn is_complete(&self, state: &State) -> bool {
        state.phase == Phase::Stopping && state.seats.iter().all(|s| s.parked && !s.owes_step)
    }

    /// Reports the stop if it is complete.
    fn settle(&self, state: &mut State) {
        if self.is_complete(state) {
            self.report(state);
            self.notify(state);
        }
    }

    fn report(&self, state: &mut State) {
        // What was found by a vCPU that has held since waits for the resume that lets it go on.
        let next = state.queue.iter().position(|event| state.seats[event.vcpu as usize].plan != Plan::Hold);
        let event = next.and_then(|at| state.queue.remove(at));
        self.report_event(state, event);
    }

    fn report_event(&self, state: &mut State, event: Option<Event>) {
        let interrupt = state.interrupt.take();
        let last = state.stop.as_ref();
        let number = last.map_or(0, |s| s.number) + 1;
        let stop = match event {
            Some(Event { vcpu, pc, reason, others }) => Stop { reason, others, vcpu, pc, number },
            None => Stop {
                others: Vec::new(),
                reason: interrupt.unwrap_or(StopReason::Interrupt),
                vcpu: interrupted(&state.seats, last.map_or(0, |s| s.vcpu)),
                pc: 0,
                number,
            },
        };
        state.stop = Some(stop);
        state.is_held = state.is_gated;
        state.phase = Phase::Stopped;
    }

    /// Whether vCPUs are on their way to their safe points.
    pub fn is_stopping(&self) -> bool {
        self.lock().phase == Phase::Stopping
    }

    /// A vCPU thread stands here while it may not run. Its vCPU is not locked meanwhile.
    pub fn safe_point(&self, vcpu: u32) -> Command {
        let n = vcpu as usize;
        let mut state = self.lock();
        state.seats[n].parked = true;
        self.has_come(&state);
        if self.is_complete(&state) {
            self.report(&mut state);
            let waiters = state.waiters.clone();
            // Who wakes may take this thread's host CPU at once, and wants the lock.
            drop(state);
            tell(&waiters);
            state = self.lock();
        }
        while !state.may_leave(&state.seats[n]) {
            if state.phase == Phase::Ended {
                return Command::End;
            }
            state = self.wait(&self.slots[n].go, state);
        }
        let seat = &mut state.seats[n];
        (seat.parked, seat.owes_step) = (false, false);
        // Late for its step, it makes that one, and waits for nothing.
        self.slots[n].request.store(state.phase == Phase::Stopping, Ordering::SeqCst);
        Command::Run(state.seats[n].plan)
    }

    /// A vCPU found something that stops the world. Its thread goes to its safe point next. Once detached, the guest's
    /// end is the VM's, and all else is dropped.
    pub fn stop(&self, event: Event) {
        let mut state = self.lock();
        if state.phase == Phase::Ended {
            return;
        }
        let vcpu = event.vcpu;
        if !self.is_debugging() {
            let end = match event.reason {
                StopReason::Exit { code } => End::Exit(code),
                StopReason::Crash(crash) => End::Crash(crash),
                _ => return,
            };
            drop(state);
            return self.end(end);
        }
        state.queue.push_back(event);
        self.slots[vcpu as usize].request.store(true, Ordering::SeqCst);
        if state.phase == Phase::Running {
            state.phase = Phase::Stopping;
            let kicks = self.request(&state, |n, seat| !seat.parked && n != vcpu as usize);
            // Who waits sees to kicks that come late; where none is sent, the stop itself soon wakes them.
            let waiters = if kicks.0.is_empty() { Vec::new() } else { state.waiters.clone() };
            drop(state);
            self.kick(kicks);
            tell(&waiters);
        }
    }

    /// The VM is over. The first end counts. All vCPU threads return as soon as they can.
    pub fn end(&self, end: End) {
        let mut state = self.lock();
        if state.phase != Phase::Ended {
            state.phase = Phase::Ended;
            state.end = Some(Arc::new(end));
            state.spare = None;
        }
        let kicks = self.request_running(&state);
        self.notify(&state);
        self.let_go(state);
        self.freed.notify_all();
        self.still.notify_all();
        self.kick(kicks);
    }

    /// Asks for a stop. False if the world stands still or the VM is over.
    pub fn interrupt(&self, reason: StopReason) -> bool {
        let mut state = self.lock();
        match state.phase {
            Phase::Running => {
                state.phase = Phase::Stopping;
                state.interrupt = Some(reason);
                let kicks = self.request_running(&state);
                let waiters = state.waiters.clone();
                self.settle(&mut state);
                drop(state);
                self.kick(kicks);
                tell(&waiters);
                true
            }
            Phase::Stopping => true,
            Phase::Stopped | Phase::Ended => false,
        }
    }

    /// Runs `check` on each event that is found and not reported, oldest first, with the world stopped. The first that
    /// still holds, with the reason that `check` leaves in it, becomes the current stop; those before it are dropped.
    /// Events of vCPUs that hold stay as they are.
    pub fn report_pending(
        &self,
        holds: impl Fn(u32) -> bool,
        mut check: impl FnMut(&mut Event) -> bool,
    ) -> Result<Option<Stop>> {
        loop {
            let mut event = {
                let mut state = self.lock();
                self.require_stopped(&state)?;
                let next = state.queue.iter().position(|event| !holds(event.vcpu));
                match next.and_then(|at| state.queue.remove(at)) {
                    Some(event) => event,
                    None => return Ok(None),
                }
            };
            if check(&mut event) {
                let mut state = self.lock();
                // The VM may have ended during the check.
                self.require_stopped(&state)?;
                self.report_event(&mut state, Some(event));
                self.notify(&state);
                return Ok(state.stop.clone());
            }
        }
    }

    /// Starts the world; vCPU n does what `plan(n)` says.
    pub fn resume(&self, plan: impl Fn(u32) -> Plan) -> Result<()> {
        let mut state = self.lock();
        self.require_stopped(&state)?;
        if let Some(stop) = state.stop.as_ref().filter(|s| s.reason.is_final()) {
            let text = match &stop.reason {
                StopReason::Exit { code } => {
                    format!("the guest has exited with code {code}; make a new VM to run it again")
                }
                _ => "the guest has crashed and can't be resumed; look at its registers and memory, then make a new VM"
                    .to_owned(),
            };
            return Err(Error::VmState(text));
        }
        for (n, seat) in (0..).zip(&mut state.seats) {
            seat.plan = plan(n);
            seat.owes_step = seat.plan == Plan::Step;
        }
        state.phase = Phase::Running;
        self.let_go(state);
        Ok(())
    }

    fn require_stopped(&self, state: &State) -> Result<()> {
        match state.phase {
            Phase::Stopped => Ok(()),
            Phase::Ended => Err(Error::VmState("the VM is closed".into())),
            Phase::Running | Phase::Stopping => {
                Err(Error::VmState("the guest is running; stop it first (interrupt(), or wait for a stop)".into()))
            }
        }
    }

    /// Fails unless the world stands still.
    pub fn check_stopped(&self) -> Result<Stop> {
        let state = self.lock();
        self.require_stopped(&state)?;
        Ok(state.stop.clone().expect("the world stopped at least once"))
    }

    /// Where a front end finds the VM now.
    pub fn status(&self) -> Status {
        self.lock().status()
    }

    /// Kicks again whoever has not come to its safe point though it was asked to.
    pub fn kick_late(&self) {
        let state = self.lock();
        if matches!(state.phase, Phase::Stopping | Phase::Ended) {
            let kicks = self.request_running(&state);
            drop(state);
            self.kick(kicks);
        }
    }
}

/// The vCPU of an interrupt, which none has found: the last stop's, unless it held. A client takes a stop of what it has
/// not let go for the target's error.
fn interrupted(seats: &[Seat], last: u32) -> u32 {
    let holds = |seat: &Seat| seat.plan == Plan::Hold;
    if !seats.get(last as usize).is_some_and(holds) {
        return last;
    }
    (0..).zip(seats).find(|(_, seat)| !holds(seat)).map_or(last, |(n, _)| n)
}

#[cfg(test)]
mod tests;
