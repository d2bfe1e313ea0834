//! From a frame to its caller: by the call frame information of the image (`.eh_frame`, `.debug_frame`), by the frame
//! pointer where an address has none. Stack and tables may be anything: every step has a bound, and a stack that does
//! not grow towards its beginning ends the walk.

use gimli::{
    BaseAddresses, CfaRule, CieOrFde, DebugFrame, EhFrame, EndianSlice, Evaluation, EvaluationResult, LittleEndian,
    Register, RegisterRule, UnwindContext, UnwindSection, Value, X86_64,
};

use super::dwarf::{DebugInfo, Slice};
use crate::registers::{RBP, RBX, RSP, Registers};

/// Entries of both tables together.
const MAX_ENTRIES: usize = 1 << 21;
/// Bytes of one entry, of an FDE or a CIE: every frame of a walk executes those of its own.
const MAX_ENTRY: usize = 1 << 16;
/// Operations of one DWARF expression.
const MAX_OPERATIONS: u32 = 1000;
/// DWARF's numbers of the general registers, by ours.
const DWARF_NUMBERS: [Register; 16] = [
    X86_64::RAX,
    X86_64::RCX,
    X86_64::RDX,
    X86_64::RBX,
    X86_64::RSP,
    X86_64::RBP,
    X86_64::RSI,
    X86_64::RDI,
    X86_64::R8,
    X86_64::R9,
    X86_64::R10,
    X86_64::R11,
    X86_64::R12,
    X86_64::R13,
    X86_64::R14,
    X86_64::R15,
];
/// What a callee keeps unless its frame information says otherwise: RBX, RBP, R12 to R15.
const KEPT_BY_CALLEES: [usize; 6] = [RBX, RBP, 12, 13, 14, 15];

/// The registers of a frame, as far as they are known.
#[derive(Debug, Clone, Copy)]
pub(super) struct FrameRegisters {
    pub general: [Option<u64>; 16],
    pub pc: u64,
}

impl From<&Registers> for FrameRegisters {
    fn from(registers: &Registers) -> Self {
        Self { general: registers.general.map(Some), pc: registers.rip }
    }
}

/// One step of a walk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// The canonical frame address: the stack pointer of the caller, behind the return address.
    pub cfa: u64,
    /// The caller.
    pub caller: FrameRegisters,
    /// The frame was entered by an exception or a signal: the caller has not called.
    pub is_signal: bool,
}

/// Guest memory, as the walk reads it: a word at a virtual address.
pub(super) type ReadWord<'a> = dyn FnMut(u64) -> Option<u64> + 'a;

#[derive(Debug, Clone, Copy)]
struct Entry {
    begin: u64,
    end: u64,
    offset: usize,
    is_eh: bool,
}

/// Where the frame information of each address is.
pub(super) struct FrameTable {
    entries: Vec<Entry>,
}

impl FrameTable {
    /// Lists the entries of an image.
    pub fn new(info: &DebugInfo) -> Self {
        let mut entries = Vec::new();
        list(&eh_frame(info), &bases(info), true, &mut entries);
        list(&debug_frame(info), &bases(info), false, &mut entries);
        entries.sort_by_key(|entry: &Entry| (entry.begin, !entry.is_eh));
        Self { entries }
    }

    fn find(&self, address: u64) -> Option<Entry> {
        let after = self.entries.partition_point(|entry| entry.begin <= address);
        let near = self.entries[..after].iter().rev().take(4);
        near.into_iter().find(|entry| address < entry.end).copied()
    }
}

fn eh_frame(info: &DebugInfo) -> EhFrame<Slice<'_>> {
    let mut section = EhFrame::from(EndianSlice::new(info.section(".eh_frame").0, LittleEndian));
    section.set_address_size(8);
    section
}

fn debug_frame(info: &DebugInfo) -> DebugFrame<Slice<'_>> {
    let mut section = DebugFrame::from(EndianSlice::new(info.section(".debug_frame").0, LittleEndian));
    section.set_address_size(8);
    section
}

fn bases(info: &DebugInfo) -> BaseAddresses {
    let address = |name| info.section(name).1;
    BaseAddresses::default().set_eh_frame(address(".eh_frame")).set_text(address(".text")).set_got(address(".got"))
}

fn list<'a, S: UnwindSection<Slice<'a>>>(section: &S, bases: &BaseAddresses, is_eh: bool, found: &mut Vec<Entry>)
where
    S::Offset: std::hash::Hash,
{
    let mut entries = section.entries(bases);
    // Many entries share a common part; it is read once.
    let mut common = std::collections::HashMap::new();
    while let Ok(Some(entry)) = entries.next() {
        if found.len() >= MAX_ENTRIES {
            break;
        }
        let CieOrFde::Fde(partial) = entry else { continue };
        let parsed = partial.parse(|section, bases, offset| {
            if let Some(known) = common.get(&offset) {
                return Ok(gimli::CommonInformationEntry::clone(known));
            }
            let read = section.cie_from_offset(bases, offset)?;
            common.insert(offset, read.clone());
            Ok(read)
        });
        let Ok(entry) = parsed else { continue };
        if entry.entry_len().max(entry.cie().entry_len()) > MAX_ENTRY {
            continue;
        }
        let begin = entry.initial_address();
        if let Some(end) = begin.checked_add(entry.len()).filter(|end| *end > begin && begin != 0) {
            found.push(Entry { begin, end, offset: entry.offset(), is_eh });
        }
    }
}

/// The caller of a frame whose code lies `bias` bytes above the image's addresses. `is_return`: the frame has called,
/// and its program counter is behind the call.
pub(super) fn caller(
    info: &DebugInfo,
    bias: u64,
    frame: &FrameRegisters,
    is_return: bool,
    read: &mut ReadWord<'_>,
) -> Option<Step> {
    let address = frame.pc.wrapping_sub(bias).wrapping_sub(u64::from(is_return));
    let found = info.frames().find(address).map(|entry| {
        if entry.is_eh {
            by_information(&eh_frame(info), info, entry, address, bias, frame, read)
        } else {
            by_information(&debug_frame(info), info, entry, address, bias, frame, read)
        }
    });
    match found {
        Some(step) => step,
        None => by_frame_pointer(frame, read),
    }
}

fn by_information<'a, S: UnwindSection<Slice<'a>>>(
    section: &S,
    info: &DebugInfo,
    entry: Entry,
    address: u64,
    bias: u64,
    frame: &FrameRegisters,
    read: &mut ReadWord<'_>,
) -> Option<Step> {
    let bases = bases(info);
    let entry = section.fde_from_offset(&bases, S::Offset::from(entry.offset), S::cie_from_offset).ok()?;
    let encoding = entry.cie().encoding();
    let mut context = UnwindContext::new();
    let row = entry.unwind_info_for_address(section, &bases, &mut context, address).ok()?;
    let cfa = match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => value(frame, *register)?.wrapping_add_signed(*offset),
        CfaRule::Expression(expression) => evaluate(expression.get(section).ok()?, encoding, bias, frame, None, read)?,
    };
    let mut rule = |register: Register| -> Recovered {
        match row.register(register) {
            None => Recovered::Unspecified,
            Some(RegisterRule::SameValue) => Recovered::from(value(frame, register)),
            Some(RegisterRule::Offset(offset)) => Recovered::from(read(cfa.wrapping_add_signed(offset))),
            Some(RegisterRule::ValOffset(offset)) => Recovered::Value(cfa.wrapping_add_signed(offset)),
            Some(RegisterRule::Register(other)) => Recovered::from(value(frame, other)),
            Some(RegisterRule::Expression(expression)) => {
                let at = expression
                    .get(section)
                    .ok()
                    .and_then(|expression| evaluate(expression, encoding, bias, frame, Some(cfa), read));
                Recovered::from(at.and_then(&mut *read))
            }
            Some(RegisterRule::ValExpression(expression)) => Recovered::from(
                expression
                    .get(section)
                    .ok()
                    .and_then(|expression| evaluate(expression, encoding, bias, frame, Some(cfa), read)),
            ),
            Some(_) => Recovered::Lost,
        }
    };
    let pc = rule(entry.cie().return_address_register()).value()?;
    let mut general = [None; 16];
    for (n, register) in DWARF_NUMBERS.into_iter().enumerate() {
        general[n] = match rule(register) {
            Recovered::Unspecified if n == RSP => Some(cfa),
            Recovered::Unspecified if KEPT_BY_CALLEES.contains(&n) => frame.general[n],
            other => other.value(),
        };
    }
    let is_signal = entry.is_signal_trampoline();
    sound(frame, Step { cfa, caller: FrameRegisters { general, pc }, is_signal })
}

/// What is known of a caller's register.
enum Recovered {
    Value(u64),
    Unspecified,
    Lost,
}

impl From<Option<u64>> for Recovered {
    fn from(value: Option<u64>) -> Self {
        value.map_or(Self::Lost, Self::Value)
    }
}

impl Recovered {
    fn value(self) -> Option<u64> {
        if let Self::Value(value) = self { Some(value) } else { None }
    }
}

/// A step that goes on towards the beginning of the stack. An exception may have changed the stack.
fn sound(frame: &FrameRegisters, step: Step) -> Option<Step> {
    let goes_on = frame.general[RSP].is_some_and(|stack| step.cfa > stack);
    (step.caller.pc != 0 && (goes_on || step.is_signal)).then_some(step)
}

/// By `push rbp; mov rbp, rsp`, which code without frame information may have begun with.
fn by_frame_pointer(frame: &FrameRegisters, read: &mut ReadWord<'_>) -> Option<Step> {
    let (pointer, stack) = (frame.general[RBP]?, frame.general[RSP]?);
    if pointer < stack || !pointer.is_multiple_of(8) {
        return None;
    }
    let cfa = pointer.checked_add(16)?;
    let pc = read(pointer + 8)?;
    let mut general = [None; 16];
    general[RSP] = Some(cfa);
    general[RBP] = read(pointer);
    sound(frame, Step { cfa, caller: FrameRegisters { general, pc }, is_signal: false })
}

/// At the first instruction of a function without frame information, the return address is on top of the stack.
pub(super) fn caller_at_entry(frame: &FrameRegisters, read: &mut ReadWord<'_>) -> Option<Step> {
    let stack = frame.general[RSP]?;
    let mut caller = *frame;
    caller.pc = read(stack)?;
    caller.general[RSP] = Some(stack.checked_add(8)?);
    sound(frame, Step { cfa: stack + 8, caller, is_signal: false })
}

/// Whether an address has frame information.
pub(super) fn is_covered(info: &DebugInfo, address: u64) -> bool {
    info.frames().find(address).is_some()
}

fn value(frame: &FrameRegisters, register: Register) -> Option<u64> {
    if register == X86_64::RA {
        return Some(frame.pc);
    }
    frame.general[DWARF_NUMBERS.iter().position(|known| *known == register)?]
}

fn evaluate(
    expression: gimli::Expression<Slice<'_>>,
    encoding: gimli::Encoding,
    bias: u64,
    frame: &FrameRegisters,
    initial: Option<u64>,
    read: &mut ReadWord<'_>,
) -> Option<u64> {
    let mut evaluation: Evaluation<Slice<'_>> = expression.evaluation(encoding);
    evaluation.set_max_iterations(MAX_OPERATIONS);
    if let Some(initial) = initial {
        evaluation.set_initial_value(initial);
    }
    let mut result = evaluation.evaluate().ok()?;
    // Each answer is an operation, too.
    for _ in 0..MAX_OPERATIONS {
        result = match result {
            EvaluationResult::Complete => {
                let piece = evaluation.as_result().last()?;
                return match piece.location {
                    gimli::Location::Address { address } => Some(address),
                    gimli::Location::Value { value } => value.to_u64(u64::MAX).ok(),
                    _ => None,
                };
            }
            EvaluationResult::RequiresRegister { register, .. } => {
                evaluation.resume_with_register(Value::Generic(value(frame, register)?)).ok()?
            }
            EvaluationResult::RequiresMemory { address, size, .. } if (1..=8).contains(&size) => {
                let word = read(address)? & (u64::MAX >> (64 - 8 * u32::from(size)));
                evaluation.resume_with_memory(Value::Generic(word)).ok()?
            }
            EvaluationResult::RequiresRelocatedAddress(address) => {
                evaluation.resume_with_relocated_address(address.wrapping_add(bias)).ok()?
            }
            _ => return None,
        };
    }
    None
}
