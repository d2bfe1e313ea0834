//! The frames of a vCPU: where it is, who called it, with what was inlined where, down to the beginning of its stack.

use super::dwarf::{DebugInfo, SourceLine};
use super::unwind::{self, FrameRegisters};
use super::view::View;
use crate::paging::{self, PagingMode};
use crate::registers::Registers;
use crate::vm::Machine;

/// The most frames that a backtrace has, inlined ones included.
pub const MAX_FRAMES: usize = 4096;

/// A frame of a vCPU's stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The address of its next instruction: behind the call, for a frame that has called.
    pub pc: u64,
    /// The canonical frame address: the stack pointer before the call, behind the return address. `None` where the
    /// walk ends without knowing it.
    pub cfa: Option<u64>,
    /// The function, by debug information, else by symbol.
    pub function: Option<String>,
    /// The symbol that covers `pc`, and the offset.
    pub symbol: Option<(String, u64)>,
    /// The source line.
    pub source: Option<SourceLine>,
    /// The code of this function is a part of the next frame's.
    pub is_inlined: bool,
}

/// The frames that begin with `registers`, the innermost first, at most `limit`.
pub fn backtrace(machine: &Machine, mode: &PagingMode, registers: &Registers, limit: usize) -> Vec<Frame> {
    let limit = limit.min(MAX_FRAMES);
    let mut frames = Vec::new();
    let mut registers = FrameRegisters::from(registers);
    let mut is_return = false;
    while frames.len() < limit {
        let step = step(machine, mode, &registers, is_return);
        describe(machine, registers.pc, is_return, step.map(|s| s.cfa), &mut frames);
        match step.filter(|step| is_code(machine, mode, step.caller.pc)) {
            Some(step) => (registers, is_return) = (step.caller, !step.is_signal),
            None => break,
        }
    }
    frames.truncate(limit);
    frames
}

/// The canonical frame address of the innermost frame, and where it returns to.
pub fn caller(machine: &Machine, mode: &PagingMode, registers: &Registers) -> Option<(u64, u64)> {
    let registers = FrameRegisters::from(registers);
    let step = step(machine, mode, &registers, false).filter(|step| is_code(machine, mode, step.caller.pc))?;
    Some((step.cfa, step.caller.pc))
}

/// What is known of an address: its function, with what was inlined there, the innermost first.
pub fn describe_address(machine: &Machine, pc: u64) -> Vec<Frame> {
    let mut frames = Vec::new();
    describe(machine, pc, false, None, &mut frames);
    frames
}

fn step(machine: &Machine, mode: &PagingMode, frame: &FrameRegisters, is_return: bool) -> Option<unwind::Step> {
    let (info, bias, view) = (machine.debug_info(), machine.layout.load_bias(), machine.view());
    let mut read = |address| word(view, mode, address);
    if !is_return && !unwind::is_covered(info, frame.pc.wrapping_sub(bias)) && is_entry(machine, frame.pc) {
        return unwind::caller_at_entry(frame, &mut read);
    }
    unwind::caller(info, bias, frame, is_return, &mut read)
}

fn is_entry(machine: &Machine, pc: u64) -> bool {
    machine.symbols().symbolize(pc).is_some_and(|(_, offset)| offset == 0)
}

fn word(view: View<'_>, mode: &PagingMode, address: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    address.checked_add(7)?;
    view.read(mode, address, &mut bytes).ok()?;
    Some(u64::from_le_bytes(bytes))
}

/// Whether a return address can be one.
fn is_code(machine: &Machine, mode: &PagingMode, pc: u64) -> bool {
    paging::translate(&machine.memory, mode, pc).is_ok_and(|t| t.executable && machine.memory.contains(t.physical, 1))
}

/// The frames of one function, with what was inlined into it at `pc`.
fn describe(machine: &Machine, pc: u64, is_return: bool, cfa: Option<u64>, frames: &mut Vec<Frame>) {
    let lookup = pc.wrapping_sub(u64::from(is_return));
    let symbols = machine.symbols();
    let symbol = symbols.symbolize(lookup).map(|(symbol, offset)| (symbol.name, offset + u64::from(is_return)));
    let info: &DebugInfo = machine.debug_info();
    let address = lookup.wrapping_sub(machine.layout.load_bias());
    let functions = info.functions(address);
    let mut source = info.line(address);
    if functions.is_empty() {
        let function = symbol.as_ref().map(|(name, _)| name.clone());
        frames.push(Frame { pc, cfa, function, symbol, source, is_inlined: false });
        return;
    }
    let last = functions.len() - 1;
    for (n, function) in functions.into_iter().enumerate() {
        let is_inlined = n < last;
        let outermost = || symbol.as_ref().filter(|_| !is_inlined).map(|(name, _)| name.clone());
        let name = function.name.or_else(outermost);
        frames.push(Frame { pc, cfa, function: name, symbol: symbol.clone(), source, is_inlined });
        source = function.call;
    }
}
