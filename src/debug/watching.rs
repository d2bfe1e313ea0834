//! What a vCPU's thread does for watchpoints: it notes accesses to what is watched (a debug register's word, an operand
//! of an instruction that it executes by itself, a host's write on behalf of the guest), and asks the watchpoints when
//! the instruction is done.

use std::ops::Range;
use std::sync::Arc;

use super::breakpoints::Breakpoint;
use super::stepping::{Emulation, is_repeated};
use super::watchpoints::{self, Recorder, Touch};
use crate::backend::{Access, DataAccess, DebugEvent};
use crate::error::Result;
use crate::vcpu::{Flow, Seat};
use crate::x86;

/// How many instructions are emulated before the CPU is entered for one, so that it takes interrupts.
const ENTER_EVERY: u32 = 64;

/// What a vCPU knows of watchpoints.
#[derive(Default)]
pub(crate) struct Watching {
    generation: u64,
    list: Arc<[Arc<Breakpoint>]>,
    stepped: bool,
    until_entry: u32,
    /// Noted, and the watchpoints not asked yet.
    pub(super) touches: Vec<(Arc<Breakpoint>, Touch)>,
}

impl Watching {
    /// The next instruction is executed on the CPU.
    pub(super) fn enter_next(&mut self) {
        self.until_entry = 0;
    }
}

/// The accesses of an instruction that the CPU is about to execute.
pub(super) struct Expected {
    recorder: Recorder,
    next: Option<u64>,
    pc: u64,
}

/// What a host call on behalf of the guest may change: the watched bytes before it.
pub(crate) type Snapshot = Vec<(Arc<Breakpoint>, Vec<u8>)>;

impl Seat<'_> {
    /// The enabled watchpoints.
    pub(super) fn watched(&mut self) -> Arc<[Arc<Breakpoint>]> {
        let machine = self.machine;
        let generation = machine.generation();
        let watching = &mut self.context().watching;
        if watching.generation != generation {
            (watching.list, watching.stepped) = machine.watches();
            watching.generation = generation;
        }
        watching.list.clone()
    }

    /// Whether a watchpoint needs every instruction to be executed by itself.
    pub(crate) fn is_watching_by_steps(&mut self) -> bool {
        self.machine.generation() != 0 && {
            self.watched();
            self.context().watching.stepped
        }
    }

    /// Asks the watchpoints that were touched. Each that says stop is a stop.
    pub(crate) fn judge(&mut self) -> Result<Flow> {
        if self.context().watching.touches.is_empty() {
            return Ok(Flow::Continue);
        }
        let touches = std::mem::take(&mut self.context().watching.touches);
        self.settle_io()?;
        let pc = self.context().cpu.registers()?.rip;
        let mut flow = Flow::Continue;
        for (breakpoint, touch) in touches {
            if let Some(reason) = self.ask(&breakpoint, pc, Some(touch))? {
                flow = self.stop(pc, reason)?;
            }
        }
        Ok(flow)
    }

    fn read_watched(&mut self, address: u64, length: u64) -> Result<Vec<u8>> {
        let mode = self.paging_mode()?;
        Ok(self.machine.view().read_vec(&mode, address, length))
    }

    /// Notes what debug registers have noticed. False: nothing of data.
    pub(super) fn note_hardware(&mut self, event: &DebugEvent) -> Result<bool> {
        if event.hardware == 0 && event.access.is_none() {
            return Ok(false);
        }
        let fired = |n: usize| event.hardware >> n.min(63) & 1 != 0;
        let places = &self.context().debug.hardware;
        let data = places.iter().enumerate().filter(|(n, place)| fired(*n) && place.access != Access::Execute);
        let pieces: Vec<_> = data.map(|(_, place)| (place.address, place.length)).collect();
        if pieces.is_empty() {
            return Ok(false);
        }
        let (pieces, write) = match event.access {
            Some(access) => (vec![(access.address, access.length)], Some(access.write)),
            None => (pieces, None),
        };
        for breakpoint in self.watched().iter() {
            let Some(watch) = &breakpoint.watch else { continue };
            let first = |(address, length): &(u64, u64)| {
                let access = DataAccess { address: *address, length: *length, write: false };
                watchpoints::overlap(breakpoint, watch, access)
            };
            let Some(address) = pieces.iter().find_map(first) else { continue };
            let new = self.read_watched(breakpoint.address, watch.length)?;
            if let Some(touch) = watchpoints::noticed(breakpoint, address, write, new) {
                self.context().watching.touches.push((breakpoint.clone(), touch));
            }
        }
        Ok(true)
    }

    /// What the instruction that the CPU is about to execute will access, as far as that is watched.
    pub(super) fn expect(&mut self, code: &[u8]) -> Result<Option<Expected>> {
        let watches = self.watched();
        if watches.is_empty() {
            return Ok(None);
        }
        let registers = self.context().cpu.registers()?;
        let system = self.context().cpu.system_registers()?;
        let x86::Accesses { memory, next } = x86::accesses(code, &registers, &system);
        let mode = (&system).into();
        let view = self.machine.view();
        let read = |address, length| view.read_vec(&mode, address, length);
        let mut recorder = Recorder::default();
        for access in memory {
            recorder.note(&watches, access, &read);
        }
        Ok(Some(Expected { recorder, next, pc: registers.rip }))
    }

    /// Notes what was expected of an instruction, now that the CPU has stopped behind it, or in a handler.
    pub(super) fn note_expected(&mut self, expected: Expected, code: &[u8]) -> Result<()> {
        let Expected { recorder, next, pc } = expected;
        let watches = self.watched();
        let rip = self.context().cpu.registers()?.rip;
        // Not where it should be, it has raised an exception, or an interrupt came before or after it.
        if rip == pc && !is_repeated(code) && next.is_some() {
            return Ok(());
        }
        let doubtful = next.is_some_and(|next| next != rip) && rip != pc;
        let mode = self.paging_mode()?;
        let view = self.machine.view();
        let read = |address, length| view.read_vec(&mode, address, length);
        let touches = recorder.finish(&watches, doubtful, &read);
        self.context().watching.touches.extend(touches);
        Ok(())
    }

    /// The watched bytes, before the host works on guest memory.
    pub(crate) fn snapshot(&mut self) -> Result<Snapshot> {
        if self.machine.generation() == 0 {
            return Ok(Vec::new());
        }
        let watches = self.watched();
        let mut snapshot = Vec::with_capacity(watches.len());
        for breakpoint in watches.iter() {
            let Some(watch) = &breakpoint.watch else { continue };
            snapshot.push((breakpoint.clone(), self.read_watched(breakpoint.address, watch.length)?));
        }
        Ok(snapshot)
    }

    /// Notes what the host has changed since, in the guest-physical ranges that it wrote.
    pub(crate) fn note_changes(&mut self, snapshot: Snapshot, written: &[Range<u64>]) -> Result<()> {
        if written.is_empty() {
            return Ok(());
        }
        let mode = self.paging_mode()?;
        let view = self.machine.view();
        for (breakpoint, old) in snapshot {
            let new = view.read_vec(&mode, breakpoint.address, old.len() as u64);
            let pieces: Vec<_> = view.pieces(&mode, breakpoint.address, old.len()).collect();
            let is_written = |n: usize| {
                let piece = pieces.iter().find(|(_, range, _)| range.contains(&n));
                let physical = piece.and_then(|(_, range, physical)| Some((*physical)? + (n - range.start) as u64));
                physical.is_some_and(|physical| written.iter().any(|range| range.contains(&physical)))
            };
            if let Some(touch) = watchpoints::changed(&breakpoint, &old, &new, is_written) {
                self.context().watching.touches.push((breakpoint, touch));
            }
        }
        Ok(())
    }

    /// Executes one instruction by itself, for a watchpoint that needs that: in the emulator, which is several times
    /// faster than a step, or on the CPU, which alone takes interrupts and knows all instructions.
    pub(crate) fn run_watched(&mut self) -> Result<Flow> {
        let pc = self.context().cpu.registers()?.rip;
        let site = self.machine.site_at(pc);
        if site.is_some() && self.context().passed != Some(pc) {
            return self.hit(pc);
        }
        let code = self.code_at(pc)?;
        let watching = &mut self.context().watching;
        if watching.until_entry > 0 {
            watching.until_entry -= 1;
            match self.emulate(&code)? {
                Emulation::Done => {
                    self.context().passed = None;
                    return Ok(Flow::Continue);
                }
                Emulation::Repeat => return Ok(Flow::Continue),
                Emulation::Fault(_) | Emulation::Unsupported => {}
            }
        }
        self.context().watching.until_entry = ENTER_EVERY;
        match site {
            Some(kind) => self.step_over(pc, kind),
            None => self.step_instruction(pc, false),
        }
    }
}
