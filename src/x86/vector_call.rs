//! A vector instruction taken apart once: which operation, on which registers, with which memory operand. It executes
//! without the decoded instruction, so that an engine that keeps decoded code can keep this instead.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::flags::{ARITHMETIC, CF, ZF, mask, sign_extend};
use super::operand::{Slot, Step, from_bytes, slot};
use super::vector::{Answer, Control, Halves, Operation, VectorFn, operation};
use super::{CpuState, Outcome};

/// CR4: unmasked SSE exceptions raise #XM.
const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// MXCSR's exception flags.
pub(super) const EXCEPTION_FLAGS: u32 = 0x3f;
/// Those that are found before anything is computed: invalid operation, denormal operand, division by zero.
const EARLY_EXCEPTIONS: u32 = 7;
/// MXCSR's flag for underflow.
const UNDERFLOW: u32 = 1 << 4;
/// MXCSR: results that underflow become zero.
const FLUSH_TO_ZERO: u32 = 1 << 15;
/// MXCSR's exception masks, which lie above the flags.
const EXCEPTION_MASKS: u32 = EXCEPTION_FLAGS << MASK_SHIFT;
/// How far above.
const MASK_SHIFT: u32 = 7;
/// MXCSR bits that every 64-bit processor has.
pub const MXCSR_VALID: u32 = 0xffff;

/// A vector register's two halves.
pub type Wide = [u128; 2];

/// Where the second operand comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A vector register.
    Register(u8),
    /// A general register, whose value is sign-extended.
    General(Register),
    /// Memory: the caller loads it and hands it to [`VectorCall::run`].
    Memory {
        /// Bytes.
        size: u8,
        /// Must be aligned to 16 bytes.
        is_aligned: bool,
        /// An integer that is to be sign-extended to 8 bytes.
        is_signed: bool,
    },
    /// A number in the instruction, which the call holds.
    Immediate,
}

/// Where the result goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// A vector register.
    Register(u8),
    /// A general register.
    General(Register),
    /// RFLAGS.
    Flags,
}

/// A vector instruction, ready to be executed any number of times.
#[derive(Clone, Copy)]
pub struct VectorCall {
    operation: &'static Operation,
    function: VectorFn,
    /// What to call instead where the host's MXCSR is the guest's: an SSE instruction whose destination is its first
    /// operand, or the flags.
    pub(super) bare: Option<VectorFn>,
    /// Where the result goes.
    pub destination: Destination,
    /// The register that the destination begins as.
    pub first: u8,
    /// The register of the third operand.
    pub third: u8,
    /// The second operand.
    pub source: Source,
    immediate: u8,
    /// Has 256 bits.
    pub is_wide: bool,
    /// Has a VEX prefix: AVX's checks apply, and bits beyond the result are cleared.
    pub is_vex: bool,
}

/// Number of the XMM or YMM register that an operand names.
pub(super) fn vector_index(instruction: &Instruction, operand: u32) -> Option<u8> {
    if instruction.op_kind(operand) != OpKind::Register {
        return None;
    }
    let register = instruction.op_register(operand);
    let first = if register.is_ymm() { Register::YMM0 } else { Register::XMM0 };
    let index = (register as usize).checked_sub(first as usize)?;
    u8::try_from(index).ok().filter(|index| *index < 16)
}

/// Whether any operand has 256 bits.
pub(super) fn is_wide(instruction: &Instruction) -> bool {
    (0..instruction.op_count())
        .any(|n| instruction.op_kind(n) == OpKind::Register && instruction.op_register(n).is_ymm())
}

/// How the operands of an instruction serve its operation, by their numbers.
struct Roles {
    first: u32,
    source: u32,
    third: Option<u32>,
}

impl Roles {
    /// `None` for encodings other than SSE and VEX ones, and for counts of operands that no operation has.
    fn of(instruction: &Instruction, operation: &Operation) -> Option<Self> {
        let count = instruction.op_count();
        let ends_in_immediate = instruction.op_kind(count.checked_sub(1)?) == OpKind::Immediate8;
        let count = if ends_in_immediate && operation.halves != Halves::Count { count - 1 } else { count };
        match (instruction.encoding(), count) {
            (EncodingKind::Legacy, 2) => Some(Self { first: 0, source: 1, third: None }),
            (EncodingKind::VEX, 2) => Some(Self { first: 0, source: 1, third: None }),
            (EncodingKind::VEX, 3) if operation.uses_third => Some(Self { first: 0, source: 2, third: Some(1) }),
            (EncodingKind::VEX, 3) => Some(Self { first: 1, source: 2, third: None }),
            (EncodingKind::VEX, 4) => Some(Self { first: 1, source: 2, third: Some(3) }),
            _ => None,
        }
    }
}

impl VectorCall {
    /// The call for an SSE, AVX or FMA instruction; `None` if it is none that is executed this way (moves, MMX, what
    /// exchanges halves) or the host does not have it.
    pub fn new(instruction: &Instruction) -> Option<Self> {
        let (mnemonic, is_one_operand) = with_immediate_permutation(instruction);
        let operation = operation(mnemonic)?;
        let mut roles = Roles::of(instruction, operation)?;
        if is_one_operand {
            roles.first = roles.source;
        }
        let destination = destination(instruction, operation)?;
        let is_to_wide = matches!(destination, Destination::General(register) if register.is_gpr64());
        let function = operation.to_wide.filter(|_| is_to_wide).unwrap_or(operation.function);
        let is_vex = instruction.encoding() == EncodingKind::VEX;
        let source = source(instruction, roles.source, is_vex)?;
        let first = vector_index(instruction, roles.first);
        // The destination's old value does not matter where it is a general register.
        let first = first.or(matches!(destination, Destination::General(_)).then_some(0))?;
        let third = match roles.third {
            Some(operand) => vector_index(instruction, operand)?,
            None => 0,
        };
        let last = instruction.op_count() - 1;
        let has_immediate = instruction.op_kind(last) == OpKind::Immediate8;
        let immediate = if has_immediate { instruction.immediate8() } else { 0 };
        let is_wide = is_wide(instruction) || matches!(source, Source::Memory { size: 32, .. });
        let is_simple = !is_vex && matches!(destination, Destination::Register(_) | Destination::Flags);
        let bare = operation.bare.filter(|_| is_simple);
        Some(Self { operation, function, bare, destination, first, third, source, immediate, is_wide, is_vex })
    }

    /// The function, the destination's number and the immediate, where the call comes to no more than that and a source
    /// of 16 bytes: an SSE instruction that needs neither MXCSR nor a third operand.
    pub(super) fn plain(&self) -> Option<(VectorFn, u8, u8)> {
        let is_whole = matches!(self.source, Source::Register(_) | Source::Memory { size: 16, is_aligned: true, .. });
        match self.destination {
            Destination::Register(to)
                if is_whole
                    && to == self.first
                    && !self.is_vex
                    && !self.operation.is_float
                    && !self.operation.uses_third =>
            {
                Some((self.function, to, self.immediate))
            }
            _ => None,
        }
    }

    /// Executes the call. `memory` is what a memory operand holds, zero-extended; anything else has it ignored. #XM is
    /// the only fault; it leaves its flags in MXCSR.
    ///
    /// The caller has checked that the control registers allow SSE or AVX.
    pub fn run(&self, cpu: &mut CpuState, memory: &Wide) -> Step {
        let source = self.source_value(cpu, memory)?;
        let first = register(cpu, self.first);
        let result = self.compute(cpu, first, source)?;
        self.store(cpu, result)
    }

    /// The result for operands that are given.
    pub(super) fn compute(&self, cpu: &mut CpuState, first: Wide, source: Wide) -> Step<Wide> {
        let guest = cpu.fpu.mxcsr & MXCSR_VALID;
        // Where underflow is not masked, its results are not flushed to zero.
        let traps_underflow = guest & UNDERFLOW << MASK_SHIFT == 0;
        let guest = if traps_underflow { guest & !FLUSH_TO_ZERO } else { guest };
        let third = if self.operation.uses_third { register(cpu, self.third) } else { [0; 2] };
        let mut control = Control {
            mxcsr: guest & !EXCEPTION_FLAGS | EXCEPTION_MASKS,
            saved: 0,
            immediate: self.immediate.into(),
            third: third[0],
        };
        let mut result = [first[0], 0];
        self.call(&mut result[0], source[0], &mut control);
        if self.is_wide {
            result[1] = first[1];
            control.third = third[1];
            let source = self.upper_source(source, &mut control);
            self.call(&mut result[1], source, &mut control);
        }
        if self.operation.is_float {
            let mut raised = control.mxcsr & EXCEPTION_FLAGS;
            if traps_underflow && self.is_tiny(result) {
                raised |= UNDERFLOW;
            }
            raise(cpu, raised)?;
        }
        Ok(if self.is_wide { self.joined(result) } else { result })
    }

    /// Whether a result is tiny, exact or not: masked underflow shows in MXCSR where it is inexact alone.
    #[cold]
    fn is_tiny(&self, result: Wide) -> bool {
        let Some(elements) = self.operation.elements else { return false };
        elements.has_denormal(result[0]) || self.is_wide && elements.has_denormal(result[1])
    }

    fn call(&self, value: &mut u128, source: u128, control: &mut Control) {
        // SAFETY: the references are valid, `compute` has masked all exceptions and cleared reserved bits, and
        // `operation` answered with the function, so the host has the instruction.
        unsafe { (self.function)(value, &raw const source, control) }
    }

    /// What the upper half's source is, with the immediate adjusted.
    fn upper_source(&self, source: Wide, control: &mut Control) -> u128 {
        match self.operation.halves {
            Halves::Count => source[0],
            Halves::Spread(bytes) => source[0] >> (8 * bytes),
            Halves::Immediate(bits) => {
                control.immediate >>= bits;
                source[1]
            }
            _ => source[1],
        }
    }

    /// The two halves' answers as the instruction's.
    fn joined(&self, [low, high]: Wide) -> Wide {
        match self.operation.halves {
            Halves::Narrow => [low & u128::from(u64::MAX) | high << 64, 0],
            Halves::Joined(bits) => [low & mask32() | (high & mask32()) << bits, 0],
            Halves::Both => [low & high & u128::from(CF | ZF), 0],
            _ => [low, high],
        }
    }

    /// The second operand's value.
    fn source_value(&self, cpu: &CpuState, memory: &Wide) -> Step<Wide> {
        Ok(match self.source {
            Source::Register(index) => register(cpu, index),
            Source::General(register) => {
                let Slot { index, shift, size } = slot(register).ok_or(Outcome::Unsupported)?;
                [widen(cpu.registers.general[index] >> shift, size), 0]
            }
            Source::Memory { size, is_signed: true, .. } => [widen(low(memory[0]), size.into()), 0],
            Source::Memory { .. } => *memory,
            Source::Immediate => [self.immediate.into(), 0],
        })
    }

    fn store(&self, cpu: &mut CpuState, result: Wide) -> Step {
        match self.destination {
            Destination::Register(index) if self.is_vex => set_register(cpu, index, result),
            Destination::Register(index) => cpu.fpu.xmm[usize::from(index)] = result[0],
            Destination::General(register) => {
                let Slot { index, size, .. } = slot(register).ok_or(Outcome::Unsupported)?;
                cpu.registers.general[index] = low(result[0]) & mask(size);
            }
            Destination::Flags => {
                let flags = &mut cpu.registers.rflags;
                *flags = *flags & !ARITHMETIC | low(result[0]) & ARITHMETIC;
            }
        }
        Ok(())
    }
}

/// What an operation makes of two operands; `None` if there is none for the mnemonic. #XM as in [`VectorCall::run`].
pub(super) fn evaluate(
    cpu: &mut CpuState,
    mnemonic: Mnemonic,
    [first, source]: [Wide; 2],
    immediate: u8,
    is_wide: bool,
) -> Step<Option<Wide>> {
    let Some(operation) = operation(mnemonic) else { return Ok(None) };
    let call = VectorCall {
        operation,
        function: operation.function,
        bare: None,
        destination: Destination::Register(0),
        first: 0,
        third: 0,
        source: Source::Immediate,
        immediate,
        is_wide,
        is_vex: false,
    };
    call.compute(cpu, first, source).map(Some)
}

/// VPERMILPS and VPERMILPD with an immediate are VPSHUFD and, with its operand twice, VSHUFPD.
fn with_immediate_permutation(instruction: &Instruction) -> (Mnemonic, bool) {
    let has_immediate = instruction.op_count() == 3 && instruction.op_kind(2) == OpKind::Immediate8;
    match instruction.mnemonic() {
        Mnemonic::Vpermilps if has_immediate => (Mnemonic::Vpshufd, false),
        Mnemonic::Vpermilpd if has_immediate => (Mnemonic::Vshufpd, true),
        mnemonic => (mnemonic, false),
    }
}

fn destination(instruction: &Instruction, operation: &Operation) -> Option<Destination> {
    match operation.answer {
        Answer::Vector => vector_index(instruction, 0).map(Destination::Register),
        Answer::General => slot(instruction.op0_register()).map(|_| Destination::General(instruction.op0_register())),
        Answer::Flags => Some(Destination::Flags),
    }
}

fn source(instruction: &Instruction, operand: u32, is_vex: bool) -> Option<Source> {
    if let Some(index) = vector_index(instruction, operand) {
        return Some(Source::Register(index));
    }
    match instruction.op_kind(operand) {
        OpKind::Memory => {
            let size = u8::try_from(instruction.memory_size().size()).ok().filter(|size| (1..=32).contains(size))?;
            let is_signed = matches!(
                instruction.mnemonic(),
                Mnemonic::Cvtsi2sd | Mnemonic::Cvtsi2ss | Mnemonic::Vcvtsi2sd | Mnemonic::Vcvtsi2ss
            );
            Some(Source::Memory { size, is_aligned: !is_vex && size == 16, is_signed })
        }
        OpKind::Register => {
            slot(instruction.op_register(operand)).map(|_| Source::General(instruction.op_register(operand)))
        }
        OpKind::Immediate8 => Some(Source::Immediate),
        _ => None,
    }
}

/// A vector register as 32 bytes.
pub(super) fn register(cpu: &CpuState, index: u8) -> Wide {
    let index = usize::from(index);
    [cpu.fpu.xmm[index], cpu.ymm_high[index]]
}

/// Sets all of a vector register.
pub(super) fn set_register(cpu: &mut CpuState, index: u8, value: Wide) {
    let index = usize::from(index);
    (cpu.fpu.xmm[index], cpu.ymm_high[index]) = (value[0], value[1]);
}

/// Adds flags to MXCSR. An exception that the guest has not masked becomes #XM, and the caller then leaves the
/// destination alone; when it is one that is found before computing, those found afterwards do not show.
pub(super) fn raise(cpu: &mut CpuState, raised: u32) -> Step {
    let unmasked = raised & !(cpu.fpu.mxcsr >> MASK_SHIFT);
    if unmasked == 0 {
        cpu.fpu.mxcsr |= raised;
        return Ok(());
    }
    cpu.fpu.mxcsr |= if unmasked & EARLY_EXCEPTIONS != 0 { raised & EARLY_EXCEPTIONS } else { raised };
    let is_enabled = cpu.system.cr4 & CR4_OSXMMEXCPT != 0;
    Err(Outcome::fault(if is_enabled { 19 } else { 6 }))
}

/// The low 8 bytes.
pub(super) fn low(value: u128) -> u64 {
    from_bytes(&value.to_le_bytes()[..8])
}

/// A mask's bits, of which there are at most 32.
const fn mask32() -> u128 {
    u32::MAX as u128
}

/// An integer of `size` bytes, sign-extended to 8.
fn widen(value: u64, size: usize) -> u128 {
    sign_extend(value, size.min(8)).cast_unsigned().into()
}
