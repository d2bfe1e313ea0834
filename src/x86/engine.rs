//! The fast executor: runs blocks of pre-decoded operations, links them, and says where it has to stop. What it can't do
//! itself (faults, devices, system instructions) it leaves to the slow executor, at the exact instruction and with
//! nothing of it done.

use std::collections::HashSet;

use super::block::{Block, Cache, Link, Op};
use super::core::Core;
use super::lazy::Lazy;
use super::mmu::{Mmu, PAGE, PAGE_MASK};
use super::string::CHUNK;
use super::translate::{Place, Workshop, is_cut, translate};
use super::vector::Control;
use super::vector_call::{EXCEPTION_FLAGS, MXCSR_VALID};
use super::{MAX_LENGTH, Outcome, execute_family};
use crate::memory::GuestMemory;
use crate::registers::{RCX, Registers};

/// Entries of the cache for indirect jumps and returns.
const JUMPS: usize = 4096;
/// Entries of the cache for single instructions.
const SINGLES: usize = 1024;

/// [`Engine::regs`]: the first 16 are the general registers.
pub(super) const REGISTERS: usize = 20;
/// The register that is always zero.
pub(super) const ZERO: usize = 16;
/// The register that holds the block's address.
pub(super) const START: usize = 17;
/// The register that holds the base of FS.
pub(super) const FS: usize = 18;
/// The register that holds the base of GS.
pub(super) const GS: usize = 19;

/// Why a chain of operations ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The next block is larger than what is left of the budget.
    Budget,
    /// A direct branch that is not linked: [`Engine::which`].
    Link,
    /// An indirect branch whose target is not in the jump cache.
    Lookup,
    /// The instruction at [`Engine::at`] needs the slow executor; nothing of it is done.
    Redo,
    /// The instruction at [`Engine::at`] is done, and the block must not go on.
    Next,
    /// The instruction at [`Engine::at`] is repeated, and a part of it done.
    Again,
    /// A breakpoint at [`Engine::at`].
    Breakpoint,
}

/// Where an indirect jump went before. Of zeros alone, it is nowhere: generations begin with 1.
#[derive(Clone, Copy)]
pub(super) struct Jump {
    pub rip: u64,
    pub generation: u64,
    pub block: *mut Block,
}

/// A CPU with the registers that fast operations work on.
#[repr(C)]
pub(super) struct Engine {
    /// General registers and the constants behind them, while blocks run.
    pub regs: [u64; REGISTERS],
    /// Arithmetic flags, while blocks run.
    pub flags: Lazy,
    /// Instructions that may still retire after the current block.
    pub budget: u64,
    /// Where a block that has ended leads.
    pub rip: u64,
    /// The block that runs.
    pub block: *mut Block,
    pub at: *const Op,
    /// Where [`Stop::Next`] goes on.
    next: u64,
    /// The link that [`Stop::Link`] is about.
    pub which: usize,
    pub stop: Stop,
    /// What functions of vector operations get.
    pub vector_source: u128,
    pub vector_control: Control,
    pub vector_target: u128,
    /// The host's MXCSR while it gathers the guest's flags.
    host_mxcsr: Option<u32>,
    /// Everything else.
    pub core: Core,
    jumps: Box<[Jump; JUMPS]>,
    singles: Box<[Jump; SINGLES]>,
    cache: Cache,
    /// The state is in [`Engine::regs`] and [`Engine::flags`].
    is_loaded: bool,
    /// Where blocks are made.
    workshop: Workshop,
    breakpoints: HashSet<u64>,
    seen_code: u64,
}

/// MXCSR as a thread begins: all exceptions masked, rounding to nearest, no flags.
const DEFAULT_MXCSR: u32 = 0x1f80;

/// Loads MXCSR; returns what it was.
#[inline(never)]
fn exchange_mxcsr(new: u32) -> u32 {
    let mut old = 0u32;
    // SAFETY: reads and writes the two words, and the host's MXCSR gets a value that it has had or the default one:
    // only flags, which nothing in the host looks at, differ from what compiled code expects.
    unsafe {
        std::arch::asm!("stmxcsr [{old}]", "ldmxcsr [{new}]", old = in(reg) &raw mut old, new = in(reg) &raw const new);
    }
    old
}

// SAFETY: the pointers are into blocks that the engine owns itself.
unsafe impl Send for Engine {}

/// A cache without jumps, in memory that the host need not give before it is used: a CPU for a few instructions touches
/// little of it.
fn no_jumps<const N: usize>() -> Box<[Jump; N]> {
    let layout = std::alloc::Layout::new::<[Jump; N]>();
    // SAFETY: the layout is not empty.
    let first = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<[Jump; N]>();
    if first.is_null() {
        std::alloc::handle_alloc_error(layout);
    }
    // SAFETY: allocated for it, and zeros are jumps to nowhere.
    unsafe { Box::from_raw(first) }
}

/// Notes that a block was made of `length` bytes of a page.
fn note_code(mmu: &mut Mmu, seen: &mut u64, physical: u64, length: u64) {
    let lines = mmu.memory.code_lines();
    if lines.add(physical, length.max(1)) {
        // Our own news; another CPU's would have raised it once more.
        *seen += u64::from(lines.generation() == *seen + 1);
        mmu.forbid_writes(physical);
    } else if lines.generation() != *seen {
        // Another CPU of this memory may have found code in the page, and this one still writes there.
        mmu.forbid_writes(physical);
    }
}

impl Engine {
    pub fn new(memory: &GuestMemory) -> Self {
        Self {
            regs: [0; REGISTERS],
            flags: Lazy::default(),
            budget: 0,
            rip: 0,
            block: std::ptr::null_mut(),
            at: std::ptr::null(),
            next: 0,
            which: 0,
            stop: Stop::Budget,
            vector_source: 0,
            vector_control: Control { mxcsr: 0x1f80, saved: 0, immediate: 0, third: 0 },
            vector_target: 0,
            host_mxcsr: None,
            core: Core::new(memory),
            jumps: no_jumps(),
            singles: no_jumps(),
            cache: Cache::default(),
            is_loaded: false,
            workshop: Workshop::default(),
            breakpoints: HashSet::new(),
            seen_code: memory.code_lines().generation(),
        }
    }

    /// Chooses the linear addresses before which blocks stop.
    pub fn set_breakpoints(&mut self, breakpoints: &[u64]) {
        let new: HashSet<u64> = breakpoints.iter().copied().collect();
        let changed: Vec<u64> = self.breakpoints.symmetric_difference(&new).copied().collect();
        if !changed.is_empty() {
            self.breakpoints = new;
            self.cache.drop_at(&changed);
            self.core.mmu.next_generation();
        }
    }

    /// Whether there is a breakpoint at [`Engine::rip`]: blocks of one instruction do not look.
    fn stops_here(&self) -> bool {
        !self.breakpoints.is_empty() && self.breakpoints.contains(&self.rip)
    }

    /// Whether there is a breakpoint.
    pub fn has_breakpoint(&self, address: u64) -> bool {
        self.breakpoints.contains(&address)
    }

    /// Sees to it that the state is where fast operations have it.
    pub fn load(&mut self) {
        if !self.is_loaded {
            self.take_registers();
        }
    }

    /// Copies the state to where fast operations have it.
    fn take_registers(&mut self) {
        self.is_loaded = true;
        let core = &self.core.state.core;
        self.regs[..16].copy_from_slice(&core.registers.general);
        self.regs[ZERO] = 0;
        self.regs[FS] = core.system.fs.base;
        self.regs[GS] = core.system.gs.base;
        self.flags = Lazy::from_flags(core.registers.rflags);
    }

    /// The other way round.
    fn store(&mut self) {
        let registers = &mut self.core.state.core.registers;
        registers.general.copy_from_slice(&self.regs[..16]);
        registers.rflags = self.flags.merge(registers.rflags);
    }

    /// General registers and flags, wherever they are.
    pub fn registers(&self) -> Registers {
        let mut registers = self.core.state.core.registers;
        if self.is_loaded {
            registers.general.copy_from_slice(&self.regs[..16]);
            registers.rflags = self.flags.merge(registers.rflags);
        }
        registers
    }

    /// Sees to it that the state is all in [`Core::state`]: before anything but [`Engine::run`] looks at general registers
    /// or arithmetic flags, or changes any register.
    pub fn settle(&mut self) {
        if self.is_loaded {
            self.store();
            self.is_loaded = false;
        }
    }

    /// Drops blocks whose code has changed since the last look.
    fn check_code(&mut self) {
        let lines = self.core.mmu.memory.code_lines();
        let generation = lines.generation();
        if generation == self.seen_code {
            return;
        }
        self.seen_code = generation;
        if self.cache.drop_changed(lines) {
            self.core.mmu.next_generation();
        }
        // Pages may have got code by another CPU: their write tags go.
        self.core.mmu.flush_data();
    }

    /// Executes up to `budget` instructions from RIP on, or until a stop that is not the engine's own business:
    /// [`Stop::Budget`], [`Stop::Redo`] or [`Stop::Breakpoint`]. State, RIP and the count are exact afterwards; after a
    /// single step, registers and flags stay where the next one needs them until [`Engine::settle`].
    pub fn run(&mut self, budget: u64) -> Stop {
        self.check_code();
        self.load();
        let target = self.core.state.instructions + budget;
        self.budget = budget;
        self.rip = self.core.state.core.registers.rip;
        let stop = self.run_loaded();
        self.take_float_flags();
        if budget != 1 || stop != Stop::Budget {
            self.settle();
        }
        self.core.state.core.registers.rip = self.rip;
        self.core.state.instructions = target - self.budget;
        stop
    }

    /// Executes the instruction at RIP as [`Engine::run`] with a budget of 1 does, if that is a common one that was met
    /// before. False: nothing is done. The state is loaded, and there is no breakpoint.
    #[inline(always)]
    pub fn step(&mut self) -> bool {
        let rip = self.core.state.core.registers.rip;
        let known = &self.singles[Self::single_slot(rip)];
        let is_known = known.rip == rip && known.generation == self.core.mmu.generation;
        if !is_known || self.core.mmu.memory.code_lines().generation() != self.seen_code {
            return false;
        }
        self.block = known.block;
        self.regs[START] = rip;
        // SAFETY: blocks that the cache of the current generation knows are alive, and this is the first operation of the
        // current one.
        let next = unsafe {
            let first = (*known.block).first;
            ((*first).run)(self, first)
        };
        if self.host_mxcsr.is_some() {
            self.take_float_flags();
        }
        self.core.state.core.registers.rip = if !next.is_null() {
            // SAFETY: a block that the cache knows, as above.
            unsafe { (*next).rip }
        } else if matches!(self.stop, Stop::Link | Stop::Lookup) {
            self.rip
        } else {
            match self.after_step(rip) {
                Some(rip) => rip,
                None => return false,
            }
        };
        self.core.state.instructions += 1;
        true
    }

    /// Where a single step from `rip` leads that has not ended its block. `None`: nothing of it is done.
    #[cold]
    #[inline(never)]
    fn after_step(&self, rip: u64) -> Option<u64> {
        match self.stop {
            Stop::Next => Some(self.next),
            Stop::Again => Some(rip),
            Stop::Link | Stop::Lookup => Some(self.rip),
            Stop::Redo | Stop::Breakpoint | Stop::Budget => None,
        }
    }

    fn run_loaded(&mut self) -> Stop {
        if self.budget == 1 && self.stops_here() {
            return Stop::Breakpoint;
        }
        let mut block = if self.budget == 1 { self.find_single() } else { self.find() };
        loop {
            if block.is_null() {
                return Stop::Redo;
            }
            // SAFETY: `find` returned it just now, so it is alive.
            unsafe { self.chain(block) };
            block = match self.stop {
                Stop::Budget | Stop::Link | Stop::Lookup if self.budget == 0 => return Stop::Budget,
                Stop::Budget if self.stops_here() => return Stop::Breakpoint,
                Stop::Budget => self.find_single(),
                Stop::Link => self.find_link(),
                Stop::Lookup => self.find(),
                Stop::Redo | Stop::Breakpoint => {
                    self.rewind(self.at);
                    return self.stop;
                }
                Stop::Again => {
                    self.rewind(self.at);
                    self.budget -= 1;
                    self.check_code();
                    if self.budget == 0 {
                        return Stop::Budget;
                    }
                    self.find()
                }
                Stop::Next => {
                    self.rewind(self.at);
                    self.rip = self.next;
                    self.budget -= 1;
                    self.check_code();
                    if self.budget == 0 {
                        return Stop::Budget;
                    }
                    self.find()
                }
            };
        }
    }

    /// Sets RIP to an operation of the current block and gives back the budget of what was not executed.
    fn rewind(&mut self, at: *const Op) {
        // SAFETY: block and operation are alive: nothing was dropped since they ran.
        let (block, op) = unsafe { (&*self.block, &*at) };
        self.rip = block.rip.wrapping_add(op.at.into());
        self.budget += block.count - u64::from(op.number);
    }

    /// Runs blocks until one does not know the next.
    ///
    /// # Safety
    /// The block is alive.
    unsafe fn chain(&mut self, mut block: *mut Block) {
        loop {
            // SAFETY: blocks are dropped only outside of this function, and links to dropped ones are not followed.
            let current = unsafe { &*block };
            if self.budget < current.count {
                self.rip = current.rip;
                self.stop = Stop::Budget;
                return;
            }
            self.budget -= current.count;
            self.block = block;
            self.regs[START] = current.rip;
            // SAFETY: the first operation of the current block.
            block = unsafe { ((*current.first).run)(self, current.first) };
            if block.is_null() {
                return;
            }
        }
    }

    /// The block at `rip`, for an unlinked branch, which is linked.
    fn find_link(&mut self) -> *mut Block {
        let (from, which) = (self.block, self.which);
        let before = self.core.mmu.generation;
        let next = self.find();
        if !next.is_null() && before == self.core.mmu.generation {
            // SAFETY: no block was dropped since `from` ran, as that would have raised the generation.
            let from = unsafe { &mut *from };
            if !from.is_single {
                from.links[which] = Link { block: next, generation: before };
            }
        }
        next
    }

    /// The place of an address in the jump cache.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)]
    fn jump_slot(rip: u64) -> usize {
        ((rip ^ rip >> 12) & (JUMPS as u64 - 1)) as usize
    }

    /// The place of an address in the cache of single instructions.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)]
    fn single_slot(rip: u64) -> usize {
        (rip & (SINGLES as u64 - 1)) as usize
    }

    /// The block of an indirect branch's target, if it was found before.
    #[inline(always)]
    pub fn jump(&mut self, rip: u64) -> *mut Block {
        let jump = &self.jumps[Self::jump_slot(rip)];
        if jump.rip == rip && jump.generation == self.core.mmu.generation {
            return jump.block;
        }
        self.rip = rip;
        self.stop = Stop::Lookup;
        std::ptr::null_mut()
    }

    /// The block at [`Engine::rip`]; null if the slow executor has to look.
    fn find(&mut self) -> *mut Block {
        let slot = Self::jump_slot(self.rip);
        let known = self.jumps[slot];
        if known.rip == self.rip && known.generation == self.core.mmu.generation {
            return known.block;
        }
        let block = self.look_up(false);
        if !block.is_null() {
            self.jumps[slot] = Jump { rip: self.rip, generation: self.core.mmu.generation, block };
        }
        block
    }

    /// The block of the one instruction at [`Engine::rip`].
    fn find_single(&mut self) -> *mut Block {
        let slot = Self::single_slot(self.rip);
        let known = self.singles[slot];
        if known.rip == self.rip && known.generation == self.core.mmu.generation {
            return known.block;
        }
        let block = self.look_up(true);
        if !block.is_null() {
            self.singles[slot] = Jump { rip: self.rip, generation: self.core.mmu.generation, block };
        }
        block
    }

    /// Whether these bytes, which are some, are still at a place in RAM.
    fn has_code(&self, physical: u64, code: &[u8]) -> bool {
        let Some(host) = self.core.mmu.host(physical, code.len() as u64) else { return false };
        let mut bytes = [0; 64];
        let is_same = |(number, piece): (usize, &[u8])| {
            // SAFETY: a piece of what `host` is valid for, which nobody refers to; it fits the buffer.
            unsafe { std::ptr::copy_nonoverlapping(host.add(64 * number), bytes.as_mut_ptr(), piece.len()) };
            bytes[..piece.len()] == *piece
        };
        !code.is_empty() && code.chunks(64).enumerate().all(is_same)
    }

    /// The page into which the instruction at a place crosses. `None`: it doesn't; the error: there is none.
    #[inline(always)]
    fn rest(&mut self, rip: u64, physical: u64) -> Result<Option<u64>, ()> {
        if PAGE - physical % PAGE >= MAX_LENGTH as u64 { Ok(None) } else { self.rest_near_end(rip, physical) }
    }

    /// The same close to the page's end.
    #[inline(never)]
    fn rest_near_end(&mut self, rip: u64, physical: u64) -> Result<Option<u64>, ()> {
        // Of a lent CPU, whose code others change unseen, only what lies in one page is looked at again.
        if self.core.is_lent || !is_cut(&self.core.mmu, physical) {
            return Ok(None);
        }
        let next = (rip | !PAGE_MASK).wrapping_add(1);
        if !self.core.mmu.is_canonical(next) {
            return Err(());
        }
        self.core.mmu.translate_code(next).map(Some).map_err(|_| ())
    }

    /// A known block, if what it was made from is still there.
    fn known(&mut self, rip: u64, physical: u64, is_single: bool) -> Option<*mut Block> {
        let block = self.cache.get(rip, physical, is_single)?;
        // SAFETY: the cache keeps it.
        let known = unsafe { &*block };
        let is_there = if known.rest.is_some() {
            self.rest(rip, physical) == Ok(known.rest)
        } else {
            !self.core.is_lent || self.has_code(physical, known.code())
        };
        if is_there {
            return Some(block);
        }
        self.cache.remove(block);
        self.core.mmu.next_generation();
        None
    }

    #[inline(never)]
    fn look_up(&mut self, is_single: bool) -> *mut Block {
        let rip = self.rip;
        if !self.core.mmu.is_canonical(rip) {
            return std::ptr::null_mut();
        }
        let Ok(physical) = self.core.mmu.translate_code(rip) else { return std::ptr::null_mut() };
        if let Some(block) = self.known(rip, physical, is_single) {
            return block;
        }
        if self.cache.is_full() {
            self.cache.clear();
            self.core.mmu.next_generation();
        }
        self.core.mmu.note_code_page(rip);
        let Ok(rest) = self.rest(rip, physical) else { return std::ptr::null_mut() };
        let (place, workshop) = (Place { rip, physical, rest }, &mut self.workshop);
        let Some(mut draft) = translate(&self.core.mmu, place, is_single, workshop, &self.breakpoints) else {
            return std::ptr::null_mut();
        };
        if !self.core.is_lent {
            draft.code = &[];
        }
        let length = draft.length.max(1);
        let first = length.min(PAGE - physical % PAGE);
        note_code(&mut self.core.mmu, &mut self.seen_code, physical, first);
        if let Some(rest) = rest {
            note_code(&mut self.core.mmu, &mut self.seen_code, rest, length - first);
        }
        self.cache.insert(&draft, self.core.mmu.memory.code_lines())
    }

    /// Has the host's MXCSR gather the flags of floating-point operations, until [`Engine::take_float_flags`]. False if
    /// the guest's rounding and masks are not those that a host's thread has: then each operation loads the guest's.
    #[inline(always)]
    pub fn gathers_float_flags(&mut self) -> bool {
        if self.core.state.core.fpu.mxcsr & !EXCEPTION_FLAGS & MXCSR_VALID != DEFAULT_MXCSR {
            return false;
        }
        if self.host_mxcsr.is_none() {
            self.host_mxcsr = Some(exchange_mxcsr(DEFAULT_MXCSR));
        }
        true
    }

    /// Adds the flags that were gathered to the guest's.
    #[inline(always)]
    pub fn take_float_flags(&mut self) {
        if let Some(host) = self.host_mxcsr.take() {
            self.core.state.core.fpu.mxcsr |= exchange_mxcsr(host) & EXCEPTION_FLAGS;
        }
    }

    /// Ends the block behind an operation whose immediate is the length of its instruction.
    #[cold]
    pub fn stop_after(&mut self, op: *const Op) {
        // SAFETY: an operation of the current block, both of which are alive.
        let (block, instruction) = unsafe { (&*self.block, &*op) };
        self.at = op;
        self.stop = Stop::Next;
        self.next =
            block.rip.wrapping_add(instruction.at.into()).wrapping_add(i64::from(instruction.imm).cast_unsigned());
    }

    /// Executes an instruction of the other families in the middle of a block; false if the block must stop.
    #[inline(never)]
    pub fn slow(&mut self, op: *const Op) -> bool {
        // SAFETY: the operation is of the current block, which is alive, and its immediate a number of that block's table.
        let (op, decoded) = unsafe {
            let op = &*op;
            (op, &*(*self.block).tables.slow.add(usize::try_from(op.imm).expect("a small number")))
        };
        if self.core.is_stepped && decoded.instruction.has_rep_prefix() | decoded.instruction.has_repne_prefix() {
            // One iteration at a time, which is the slow executor's.
            (self.at, self.stop) = (op, Stop::Redo);
            return false;
        }
        let before = self.core.mmu.memory.code_lines().generation();
        self.take_float_flags();
        self.store();
        self.core.state.core.registers.rip = decoded.instruction.ip();
        let (cpu, mut bus) = self.core.bus(None);
        let outcome = execute_family(cpu, &mut bus, &decoded.instruction, &decoded.code[..decoded.instruction.len()]);
        self.at = op;
        match outcome {
            Outcome::Done => {
                self.take_registers();
                self.stop = Stop::Next;
                self.next = decoded.instruction.next_ip();
                before == self.core.mmu.memory.code_lines().generation()
            }
            Outcome::Repeat => {
                self.take_registers();
                // Cut short by what the slow executor will find out, it has not retired.
                self.stop = if self.regs[RCX].is_multiple_of(CHUNK) { Stop::Again } else { Stop::Redo };
                false
            }
            _ => {
                self.stop = Stop::Redo;
                false
            }
        }
    }
}
