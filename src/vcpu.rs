//! A vCPU's thread: it runs the guest, answers its exits, and comes to the engine's safe point when it is asked to.
//! What it does at breakpoints and steps is in [`crate::debug::stepping`].

mod quick;

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};

use crate::backend::{Exit, Failure, GuestDebug, Vcpu};
use crate::burst::{Burst, ticks};
use crate::debug::engine::{Command, End, Plan};
use crate::debug::stop::{Event, StopReason};
use crate::debug::watching::Watching;
use crate::error::{Crash, CrashReason, Error, Result};
use crate::hypercall::{self, Call, Outcome, Request};
use crate::memory::record_writes;
use crate::paging::{self, PagingMode};
use crate::registers::{CR0_PE, RDI};
use crate::stats::ExitKind;
use crate::stats::latency::Sampler;
use crate::vm::Machine;

/// Where a CPU begins after a reset (within its code segment).
const RESET_VECTOR: u64 = 0xfff0;

/// What belongs to a vCPU. Its thread holds it locked while it runs, and lets go at its safe point.
pub struct Context {
    /// The CPU.
    pub cpu: Box<dyn Vcpu>,
    /// The breakpoints at this address have been asked, and the instruction there has not been executed since.
    pub passed: Option<u64>,
    /// The highest number of a breakpoint that was asked there.
    pub(crate) asked: u32,
    /// An arrival here is no new one: of its breakpoints only those with higher numbers are still to be asked.
    pub(crate) asks_newer_at: Option<u64>,
    /// Hypercalls of which the first waits for the host and was interrupted; they are made before the guest goes on.
    pub(crate) calls: VecDeque<PendingCall>,
    /// The generation of the breakpoint table that the CPU is armed for.
    pub(crate) armed: Option<u64>,
    /// How it is armed.
    pub(crate) debug: GuestDebug,
    /// What it knows of watchpoints.
    pub(crate) watching: Watching,
    /// How it saves exits.
    pub(crate) burst: Burst,
}

#[derive(Clone, Copy)]
pub(crate) struct PendingCall {
    call: Call,
    /// Its number: the port that it came by.
    port: u16,
    /// The world has stopped for it, before its answer.
    was_caught: bool,
    data: u32,
    size: usize,
    rdi: u64,
    /// Bytes of its buffer that are done.
    progress: u64,
}

impl PendingCall {
    /// The `out` of `size` bytes that made it, and RDI if it [needs](Call::needs_rdi) that.
    pub(crate) fn new(call: Call, port: u16, size: usize, data: u32, rdi: u64) -> Self {
        Self { call, port, was_caught: false, data, size, rdi, progress: 0 }
    }
}

impl Context {
    /// A vCPU that has not run.
    pub fn new(cpu: Box<dyn Vcpu>) -> Self {
        Self {
            cpu,
            passed: None,
            asked: 0,
            asks_newer_at: None,
            calls: VecDeque::new(),
            armed: None,
            debug: GuestDebug::default(),
            watching: Watching::default(),
            burst: Burst::default(),
        }
    }
}

/// Whether the vCPU's thread stays in its loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Enter the guest again.
    Continue,
    /// Go to the safe point.
    Leave,
}

/// A vCPU's thread at work: its number, and its context while that is locked.
pub(crate) struct Seat<'a> {
    pub machine: &'a Arc<Machine>,
    pub number: u32,
    pub sampler: Sampler,
    guard: Option<MutexGuard<'a, Option<Context>>>,
}

/// The body of a vCPU's thread.
pub(crate) fn main(machine: &Arc<Machine>, number: u32) {
    enter_thread(machine, Some(number));
    let _ending = Ending { machine, number };
    if let Err(error) = serve(machine, number) {
        machine.engine.end(End::Failed(error));
    }
}

/// Whatever way the thread ends, nobody waits for it afterwards.
struct Ending<'a> {
    machine: &'a Arc<Machine>,
    number: u32,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let machine = self.machine;
        machine.engine.set_kick(self.number, None);
        if let Some(context) = machine.lock_context(self.number).as_mut() {
            context.cpu.unbind();
        }
        if std::thread::panicking() {
            let text = format!("the thread of vCPU {} has panicked, which is a bug of this hypervisor", self.number);
            machine.engine.end(End::Failed(Error::VmState(text)));
        }
        // Counts the vCPU as standing still, so that no stop waits for it.
        if matches!(machine.engine.status(), crate::debug::engine::Status::Ended(_)) {
            machine.engine.safe_point(self.number);
        }
    }
}

fn serve(machine: &Arc<Machine>, number: u32) -> Result<()> {
    machine.prepare_thread(number)?;
    {
        let mut guard = machine.lock_context(number);
        let context = guard.as_mut().ok_or_else(closed)?;
        context.cpu.bind_to_current_thread()?;
        machine.engine.set_kick(number, Some(context.cpu.kick_handle()));
    }
    let latencies = &machine.stats.latencies;
    let mut sampler = Sampler::new(latencies);
    loop {
        match machine.engine.safe_point(number) {
            Command::End => return Ok(()),
            Command::Run(plan) => {
                latencies.mark(number, 1);
                sampler.resume(latencies);
                let mut seat = Seat { machine, number, sampler, guard: None };
                seat.relock();
                seat.run(plan)?;
                drop(seat.guard);
                sampler = seat.sampler;
                latencies.mark(number, 0);
            }
        }
    }
}

fn closed() -> Error {
    Error::VmState("the VM is closed".into())
}

impl<'a> Seat<'a> {
    fn relock(&mut self) {
        self.guard = Some(self.machine.lock_context(self.number));
    }

    /// The locked context.
    pub fn context(&mut self) -> &mut Context {
        self.guard
            .as_mut()
            .and_then(|g| g.as_mut())
            .expect("locked by this thread, and emptied only after it has ended")
    }

    /// Runs `f` with the context unlocked: the vCPU stands still, and others may look at it.
    pub fn unlocked<T>(&mut self, f: impl FnOnce() -> T) -> T {
        self.guard = None;
        let result = f();
        self.relock();
        result
    }

    fn run(&mut self, plan: Plan) -> Result<()> {
        match plan {
            Plan::Step => self.step_by_plan(0..0)?,
            Plan::StepRange { start, end } => self.step_by_plan(start..end)?,
            Plan::Run | Plan::Hold => self.run_guest()?,
        }
        self.settle_io()?;
        self.judge()?;
        self.context().cpu.park();
        Ok(())
    }

    fn run_guest(&mut self) -> Result<()> {
        if self.bring_text_out()? == Flow::Leave
            || self.resume_call()? == Flow::Leave
            || self.leave_site()? == Flow::Leave
        {
            return Ok(());
        }
        loop {
            if self.judge()? == Flow::Leave {
                return Ok(());
            }
            if self.machine.engine.is_requested(self.number) {
                return self.meet_before_safe_point();
            }
            let flow = if self.is_watching_by_steps() {
                self.run_watched()?
            } else {
                self.arm()?;
                self.run_once()?
            };
            if flow == Flow::Leave {
                return Ok(());
            }
        }
    }

    /// Runs the guest until an exit that is more than a question with a quick answer, and sees to that.
    fn run_once(&mut self) -> Result<Flow> {
        let Some((exit, entered)) = self.next_exit()? else { return Ok(Flow::Continue) };
        let time = if self.machine.has_bursts() { ticks().wrapping_sub(entered) } else { 0 };
        let flow = self.handle(exit)?;
        self.sampler.finish(&self.machine.stats.latencies, self.number);
        if flow == Flow::Continue && self.machine.has_bursts() {
            return self.burst_after(exit, time);
        }
        if flow == Flow::Continue && self.machine.judges_in_software() {
            return self.burst_after_hit(exit);
        }
        Ok(flow)
    }

    /// Finishes a pending port or memory access, so that the registers that others will read are true.
    pub fn settle_io(&mut self) -> Result<()> {
        while let Some(exit) = self.context().cpu.complete_io()? {
            // Whatever it is, what it began must be completed as well.
            self.handle(exit)?;
        }
        Ok(())
    }

    /// Counts and answers an exit.
    pub fn handle(&mut self, exit: Exit) -> Result<Flow> {
        // Port writes that KVM queued came before this exit.
        let (machine, number) = (self.machine, self.number);
        machine.drain(number, &|| machine.engine.is_requested(number))?;
        if let Some(kind) = quick::answer(machine, self.context().cpu.as_mut(), exit) {
            self.count(kind);
            return Ok(Flow::Continue);
        }
        match exit {
            Exit::IoOut { port, size, count: 1, value } => self.hypercall(port, size, value),
            Exit::IoOut { port, size, .. } => self.string_out(port, size),
            // Every port has answered.
            Exit::IoIn { .. } => Ok(Flow::Continue),
            Exit::MmioRead { address, size } => self.unknown_mmio(address, size, false),
            Exit::MmioWrite { address, size } => self.unknown_mmio(address, size, true),
            Exit::Hlt => {
                self.count(ExitKind::Hlt);
                Ok(Flow::Continue)
            }
            Exit::Debug(event) => {
                self.count(ExitKind::Debug);
                self.timed(|seat| seat.debug_event(event))
            }
            Exit::Shutdown => {
                self.count(ExitKind::Shutdown);
                let cpu = &mut self.context().cpu;
                let is_protected = cpu.system_registers()?.cr0 & CR0_PE != 0;
                let registers_lost = !is_protected && cpu.registers()?.rip == RESET_VECTOR;
                self.crash(CrashReason::TripleFault { registers_lost })
            }
            Exit::Interrupted => {
                self.count(ExitKind::Interrupted);
                Ok(Flow::Continue)
            }
            Exit::Unemulated => {
                self.count(ExitKind::Unemulated);
                self.timed(Self::unemulated)
            }
            Exit::Failed(Failure::Missing(what)) => self.missing(what),
            Exit::Failed(failure) => self.crash(CrashReason::Hypervisor { what: failure.to_string() }),
        }
    }

    pub fn count(&self, kind: ExitKind) {
        self.sampler.exit(kind);
        self.machine.stats.count(self.number, kind);
    }

    pub(crate) fn count_hypercall(&self, kind: hypercall::Kind) {
        self.sampler.hypercall(kind);
        self.machine.stats.count_hypercall(self.number, kind);
    }

    /// Does a handler's work, and notes how long it took if this exit is timed.
    fn timed<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let since = self.sampler.begin();
        let result = work(self);
        self.sampler.handled(since);
        result
    }

    fn hypercall(&mut self, port: u16, size: u8, value: u32) -> Result<Flow> {
        let Some(call) = hypercall::identify(port) else { return Ok(Flow::Continue) };
        self.count_hypercall(call.kind());
        let rdi = if call.needs_rdi() { self.context().cpu.registers()?.general[RDI] } else { 0 };
        self.call(PendingCall::new(call, port, usize::from(size), value, rdi))
    }

    /// String output. Bytes for the console are text like any other; no other port takes strings.
    fn string_out(&mut self, port: u16, size: u8) -> Result<Flow> {
        let mut flow = Flow::Continue;
        match hypercall::identify(port) {
            Some(call) if call.kind() == hypercall::Kind::SerialWriteByte && size == 1 => {
                let text = self.context().cpu.io_data().to_vec();
                for byte in text {
                    self.count_hypercall(call.kind());
                    flow = self.call(PendingCall::new(call, port, 1, byte.into(), byte.into()))?;
                }
            }
            _ => self.count(ExitKind::PortWrite),
        }
        Ok(flow)
    }

    /// Answers a hypercall, unless an earlier one still waits, or text that was written before it.
    pub(crate) fn call(&mut self, pending: PendingCall) -> Result<Flow> {
        if self.context().calls.is_empty() && self.take_queued()? {
            return self.dispatch(pending);
        }
        self.context().calls.push_back(pending);
        Ok(Flow::Leave)
    }

    /// Takes what KVM has queued, waiting for the console. False: the vCPU is asked to stop before.
    fn take_queued(&self) -> Result<bool> {
        let (machine, number) = (self.machine, self.number);
        machine.drain_all(number, &|| machine.engine.is_requested(number))
    }

    fn dispatch(&mut self, mut pending: PendingCall) -> Result<Flow> {
        let (machine, number) = (self.machine, self.number);
        let is_caught = machine.catches(pending.port.into());
        if is_caught && !pending.was_caught {
            pending.was_caught = true;
            self.context().calls.push_front(pending);
            return self.caught(pending.port, true);
        }
        let watched = self.snapshot()?;
        let since = self.sampler.begin();
        let cpu = &mut self.context().cpu;
        let mut mode: Option<Option<PagingMode>> = None;
        let mut translate = |address: u64| {
            let mode = mode.get_or_insert_with(|| cpu.system_registers().ok().map(|s| PagingMode::from(&s)));
            let found = paging::translate(&machine.memory, mode.as_ref()?, address).ok()?;
            Some((found.physical, found.remaining))
        };
        let mut request = Request {
            call: pending.call,
            data: pending.data,
            size: pending.size,
            rdi: pending.rdi,
            translate: &mut translate,
            cancelled: &|| machine.engine.is_requested(number),
            progress: &mut pending.progress,
        };
        let outcome = if watched.is_empty() {
            machine.services.dispatch(&mut request)
        } else {
            let (outcome, written) = record_writes(|| machine.services.dispatch(&mut request));
            self.note_changes(watched, &written)?;
            outcome
        };
        self.sampler.handled(since);
        match outcome {
            Outcome::Done if is_caught => self.caught(pending.port, false),
            Outcome::Done => Ok(Flow::Continue),
            Outcome::Exit(code) => self.exit(code),
            Outcome::Interrupted => {
                self.context().calls.push_front(pending);
                Ok(Flow::Leave)
            }
            Outcome::Crash(what) => self.crash(CrashReason::Hypercall { what }),
            Outcome::HostError(source) => {
                Err(Error::Host { what: "a host call on behalf of the guest failed".into(), source })
            }
        }
    }

    /// Stops the world for a hypercall, before or after its answer.
    fn caught(&mut self, port: u16, entry: bool) -> Result<Flow> {
        self.settle_io()?;
        let pc = self.context().cpu.registers()?.rip;
        self.stop(pc, StopReason::Hypercall { number: port.into(), entry })
    }

    /// Makes an interrupted hypercall again. Nothing of the guest runs before it is done.
    pub fn resume_call(&mut self) -> Result<Flow> {
        while !self.context().calls.is_empty() {
            if !self.take_queued()? {
                return Ok(Flow::Leave);
            }
            let Some(pending) = self.context().calls.pop_front() else { break };
            if self.dispatch(pending)? == Flow::Leave {
                return Ok(Flow::Leave);
            }
        }
        Ok(Flow::Continue)
    }

    fn unknown_mmio(&mut self, address: u64, size: usize, write: bool) -> Result<Flow> {
        self.count(if write { ExitKind::MmioWrite } else { ExitKind::MmioRead });
        self.crash(CrashReason::UnknownMmio { address, size, write })
    }

    /// The guest ends itself.
    fn exit(&mut self, code: i32) -> Result<Flow> {
        if self.machine.engine.is_debugging() {
            self.settle_io()?;
            let pc = self.context().cpu.registers()?.rip;
            return self.stop(pc, StopReason::Exit { code });
        }
        self.machine.engine.end(End::Exit(code));
        Ok(Flow::Leave)
    }

    /// The guest can't go on.
    pub fn crash(&mut self, reason: CrashReason) -> Result<Flow> {
        let registers = self.context().cpu.registers()?;
        let symbol = self.machine.symbol_at(registers.rip);
        let crash = Arc::new(Crash { vcpu: self.number, reason, registers, symbol });
        if self.machine.engine.is_debugging() {
            return self.stop(registers.rip, StopReason::Crash(crash));
        }
        self.machine.engine.end(End::Crash(crash));
        Ok(Flow::Leave)
    }

    /// Tells the engine of something that stops the world.
    pub fn stop(&mut self, pc: u64, reason: StopReason) -> Result<Flow> {
        self.machine.engine.stop(Event::new(self.number, pc, reason));
        Ok(Flow::Leave)
    }
}

thread_local! {
    /// The VM that this thread belongs to, and its vCPU.
    static THREAD: Cell<Option<(*const Machine, Option<u32>)>> = const { Cell::new(None) };
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Marks the calling thread as one of the VM's own, until it ends.
pub(crate) fn enter_thread(machine: &Machine, vcpu: Option<u32>) {
    THREAD.set(Some((std::ptr::from_ref(machine), vcpu)));
}

/// Whether the calling thread is one of the VM's own: whoever gets here is a callback, and must not wait for the VM.
pub fn is_own_thread(machine: &Machine) -> bool {
    THREAD.get().is_some_and(|(own, _)| std::ptr::eq(own, machine))
}

/// The vCPU of this VM whose breakpoint's callback runs on the calling thread. Its context is not locked.
pub fn current(machine: &Machine) -> Option<u32> {
    let (own, vcpu) = THREAD.get()?;
    vcpu.filter(|_| std::ptr::eq(own, machine) && IN_CALLBACK.get())
}

/// Marks the calling thread as inside a breakpoint's callback until the guard is dropped, and the callback's view of
/// the vCPU as dead from then on.
pub(crate) fn enter_callback(alive: &Arc<AtomicBool>) -> impl Drop + use<> {
    struct Leave(Arc<AtomicBool>);
    impl Drop for Leave {
        fn drop(&mut self) {
            self.0.store(false, Ordering::SeqCst);
            IN_CALLBACK.set(false);
        }
    }
    IN_CALLBACK.set(true);
    Leave(alive.clone())
}
