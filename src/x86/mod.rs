//! An emulator of single x86-64 instructions on a vCPU's state. It exists for two masters: a KVM whose kernel emulator
//! gives up on an instruction (the VMM executes it here), and a debugger that steps over a planted breakpoint without
//! lifting it. iced-x86 decodes; integer instructions are written out in Rust; SSE and x87 arithmetic is done by the
//! host's own CPU, so that rounding, NaNs and exception flags are the hardware's. Only 64-bit mode is known.

mod accesses;
mod arena;
mod avx_lane;
mod avx_masked;
mod avx_table;
mod bits;
mod block;
mod bus;
mod control;
mod core;
pub mod cpu;
mod cpuid;
mod debug_registers;
mod engine;
mod exception;
mod features;
mod flags;
mod fpu;
mod fpu_environment;
pub mod hooks;
mod integer;
mod lazy;
mod masked;
mod mmu;
mod mmx;
mod msr;
mod notes;
mod operand;
mod ops;
pub mod platform;
mod port;
mod privileged;
mod segment;
mod shift;
mod sse;
mod sse_table;
mod sse_text;
pub mod state;
mod string;
mod system;
#[cfg(test)]
mod tests;
mod translate;
mod vector;
mod vector_asm;
mod vector_call;
mod vector_move;
mod vector_soft;
mod xsave;

pub use cpu::{Cpu, CpuExit, Missing};
pub use cpuid::cpuid;
pub use hooks::{DebugOptions, Hooks, WatchKind, Watchpoint};
pub use platform::{MsrReply, Nothing, Platform, Reply};
pub use state::{Fault, Msrs, State};

use iced_x86::{
    CpuidFeature, Decoder, DecoderError, DecoderOptions, Formatter as _, Instruction, IntelFormatter, Mnemonic,
    Register,
};

use crate::registers::{
    CR0_PE, CR0_PG, CR0_WP, CR4_OSFXSR, CR4_PAE, EFER_LMA, EFER_LME, RFLAGS_RF, Segment, segment_attributes,
};
use crate::registers::{FpuState, Registers, SystemRegisters};
pub use accesses::{Accesses, accesses};
pub use features::{Features, features};
use operand::Machine;
pub use vector::{Control, Operation, VectorFn, operation};
pub use vector_call::{Destination, Source, VectorCall, Wide};

/// The longest instruction that the architecture allows, in bytes.
pub const MAX_LENGTH: usize = 15;

/// What an instruction may read and write: the state of one vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuState {
    /// General registers, RIP and RFLAGS.
    pub registers: Registers,
    /// Segment and control registers. Only `WRFSBASE` and `WRGSBASE` change them; see [`Needs::writes_system`].
    pub system: SystemRegisters,
    /// x87 and SSE registers.
    pub fpu: FpuState,
    /// Upper halves of YMM0–YMM15. Only the XSAVE family reads and writes them, where XCR0 enables AVX.
    pub ymm_high: [u128; 16],
    /// XCR0: the state components that XSAVE manages.
    pub xcr0: u64,
    /// `IA32_TSC_AUX`, for RDTSCP and RDPID.
    pub tsc_aux: u64,
}

impl Default for CpuState {
    /// Ring 0 in 64-bit mode with four-level paging, SSE enabled, everything else zero. A caller for whom
    /// [`needs`] says that `system` and `fpu` are not needed fills in [`CpuState::registers`] only.
    fn default() -> Self {
        let code = segment_attributes::P | segment_attributes::S | segment_attributes::L | 0xb;
        let system = SystemRegisters {
            cs: Segment { selector: 8, base: 0, limit: u32::MAX, attributes: code },
            cr0: CR0_PE | CR0_WP | CR0_PG,
            cr4: CR4_PAE | CR4_OSFXSR,
            efer: EFER_LME | EFER_LMA,
            ..SystemRegisters::default()
        };
        Self {
            registers: Registers { rflags: 2, ..Registers::default() },
            system,
            fpu: FpuState::default(),
            ymm_high: [0; 16],
            xcr0: 1,
            tsc_aux: 0,
        }
    }
}

/// Why an access to guest memory did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BusError {
    /// The guest's page tables forbid it: the guest gets a page fault.
    PageFault {
        /// The address for CR2.
        address: u64,
        /// The error code that the processor pushes.
        error_code: u32,
    },
    /// The address is mapped but not to RAM, or the access can't be done atomically where it has to be.
    NotRam,
    /// The address is not aligned, and the guest has asked to be told: #AC.
    Unaligned,
}

/// Guest memory as one vCPU sees it: guest-virtual (linear) addresses, translated with the vCPU's current page tables
/// and privilege level.
///
/// The implementor deals with accesses that cross a page and must make each call all or nothing: when a call returns
/// an error, it has changed no byte. Addresses are canonical when they arrive. Plain reads and writes of up to 8
/// aligned bytes should not tear, since other vCPUs may be running.
pub trait Bus {
    /// Reads `buffer.len()` bytes (1 to 832) from `address`.
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), BusError>;

    /// Writes all of `data` (1 to 832 bytes) at `address`.
    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), BusError>;

    /// Reads up to 15 bytes of code from `address` and returns how many could be read.
    fn fetch(&mut self, address: u64, buffer: &mut [u8; MAX_LENGTH]) -> usize;

    /// The guest's time-stamp counter, now.
    fn read_tsc(&mut self) -> u64;

    /// Whether a repeated string instruction executes one iteration and then is [`Outcome::Repeat`], as between two
    /// traps. Otherwise it executes as many as are convenient.
    fn one_iteration(&self) -> bool {
        false
    }

    /// Atomically, with regard to every running vCPU: reads `size` (1, 2, 4, 8 or 16) bytes at `address` and, if they
    /// equal `expected`, stores `new`. Returns what was there before. Needs write permission in either case. Values
    /// are zero-extended. An implementor that can't do this for the address (unaligned, for example) returns
    /// [`BusError::NotRam`], and the instruction is then [`Outcome::Unsupported`].
    fn compare_exchange(&mut self, address: u64, size: usize, expected: u128, new: u128) -> Result<u128, BusError>;

    /// 64 random bits for RDRAND and RDSEED; `None` (the default) makes these two [`Outcome::Unsupported`].
    fn random(&mut self) -> Option<u64> {
        None
    }
}

/// What became of an instruction.
///
/// Registers and memory are unchanged unless it is [`Outcome::Done`] or [`Outcome::Repeat`], with one exception that
/// the architecture demands: a [`Outcome::Fault`] with vector 19 (#XM) leaves the flags that explain it in MXCSR.
/// Injecting a fault (with CR2 for a page fault) and the trap that RFLAGS.TF asks for are the caller's business.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// Executed; RIP is at the next instruction.
    Done,
    /// A part of a repeated string instruction is executed; RIP is still at it, and another step continues it.
    Repeat,
    /// The instruction raises an exception; RIP is at it.
    Fault {
        /// Exception vector.
        vector: u8,
        /// The error code to push, for the vectors that have one.
        error_code: Option<u32>,
        /// The address for CR2, for a page fault.
        address: Option<u64>,
    },
    /// Not an instruction that this emulator knows, or not on this operand or in this mode.
    Unsupported,
}

impl Outcome {
    /// A fault without an error code.
    pub(crate) const fn fault(vector: u8) -> Self {
        Self::Fault { vector, error_code: None, address: None }
    }

    /// A fault with error code 0, such as #GP(0).
    pub(crate) const fn fault_zero(vector: u8) -> Self {
        Self::Fault { vector, error_code: Some(0), address: None }
    }
}

impl From<BusError> for Outcome {
    fn from(error: BusError) -> Self {
        match error {
            BusError::PageFault { address, error_code } => {
                Self::Fault { vector: 14, error_code: Some(error_code), address: Some(address) }
            }
            BusError::NotRam => Self::Unsupported,
            BusError::Unaligned => Self::fault_zero(17),
        }
    }
}

/// Which registers beyond [`CpuState::registers`] an instruction depends on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// [`CpuState::fpu`] (and for the XSAVE family `ymm_high` and `xcr0`).
    pub fpu: bool,
    /// [`CpuState::system`]. Where it is false, only the mode is looked at (CS.L and the privilege level, CR0.AM, CR4's
    /// LA57 and CET), and [`CpuState::default`]'s values do for a guest in 64-bit mode with four-level paging.
    pub system: bool,
    /// [`CpuState::system`] is changed, so that the caller has to write it back.
    pub writes_system: bool,
}

/// Fetches the instruction at RIP, executes it and advances RIP.
pub fn step(cpu: &mut CpuState, bus: &mut dyn Bus) -> Outcome {
    let mut code = [0; MAX_LENGTH];
    let available = bus.fetch(cpu.registers.rip, &mut code).min(MAX_LENGTH);
    step_bytes(cpu, bus, &code[..available])
}

/// Executes the instruction that `code` starts with as if it stood at RIP: a debugger passes the bytes that a planted
/// breakpoint covers. Bytes after the instruction are ignored.
pub fn step_bytes(cpu: &mut CpuState, bus: &mut dyn Bus, code: &[u8]) -> Outcome {
    match decode(code, cpu.registers.rip) {
        Ok(instruction) => execute(cpu, bus, &instruction, &code[..instruction.len()]),
        Err(outcome) => outcome,
    }
}

/// Executes a decoded instruction; `code` is its own bytes, `instruction.ip()` its address.
fn execute(cpu: &mut CpuState, bus: &mut dyn Bus, instruction: &Instruction, code: &[u8]) -> Outcome {
    if cpu.system.cs.attributes & segment_attributes::L == 0 || checks_alignment(cpu) {
        return Outcome::Unsupported;
    }
    execute_family(cpu, bus, instruction, code)
}

/// [`execute`] in a mode that is known to do.
fn execute_family(cpu: &mut CpuState, bus: &mut dyn Bus, instruction: &Instruction, code: &[u8]) -> Outcome {
    let before = cpu.registers;
    cpu.registers.rip = instruction.next_ip();
    let mut machine = Machine { cpu, bus, instruction, code };
    match run(&mut machine) {
        Ok(()) => {
            cpu.registers.rflags &= !RFLAGS_RF;
            Outcome::Done
        }
        Err(Outcome::Repeat) => Outcome::Repeat,
        Err(outcome) => {
            cpu.registers = before;
            outcome
        }
    }
}

/// Tries one family of instructions after the other, the commonest first. Each says whether the instruction is its own.
fn run(machine: &mut Machine) -> operand::Step {
    const FAMILIES: [fn(&mut Machine) -> operand::Step<bool>; 9] = [
        integer::execute,
        control::execute,
        shift::execute,
        bits::execute,
        string::execute,
        sse::execute,
        system::execute,
        xsave::execute,
        fpu::execute,
    ];
    for family in FAMILIES {
        if family(machine)? {
            return Ok(());
        }
    }
    Err(Outcome::Unsupported)
}

/// Whether the instruction that `code` starts with is a matter of the CPU's own registers, a few MSRs (STAR, LSTAR, FMASK,
/// KERNEL_GS_BASE) and memory: no device, no other MSR, not the time, nothing that a hypervisor keeps elsewhere.
pub fn is_self_contained(code: &[u8]) -> bool {
    use Mnemonic as M;
    let Ok(instruction) = decode(code, 0) else { return false };
    let is_own = match instruction.mnemonic() {
        M::Int | M::Int1 | M::Syscall | M::Sysretq | M::Iretq | M::Iretd | M::Iret | M::Swapgs | M::Retf => true,
        M::Lar | M::Lsl | M::Verr | M::Verw | M::Stac | M::Clac | M::Lss | M::Lfs | M::Lgs | M::Enter | M::Leave => {
            true
        }
        _ => !privileged::needs_machine(&instruction),
    };
    is_own && !core::shows_machine(&instruction)
}

/// Whether `code` starts with SWAPGS.
pub fn is_swapgs(code: &[u8]) -> bool {
    code.starts_with(&[0x0f, 0x01, 0xf8])
}

/// Whether every unaligned access would raise #AC, which is not emulated.
fn checks_alignment(cpu: &CpuState) -> bool {
    const CR0_AM: u64 = 1 << 18;
    const RFLAGS_AC: u64 = 1 << 18;
    cpu.registers.rflags & RFLAGS_AC != 0 && cpu.system.cr0 & CR0_AM != 0 && cpu.system.cs.selector & 3 == 3
}

/// The first instruction of `code`, or what executing it comes to if there is none.
fn decode(code: &[u8], rip: u64) -> Result<Instruction, Outcome> {
    let code = &code[..code.len().min(MAX_LENGTH)];
    let mut decoder = Decoder::with_ip(64, code, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => Ok(instruction),
        // Cut short by the end of readable memory: the caller has to see.
        DecoderError::NoMoreBytes => Err(Outcome::Unsupported),
        _ if is_too_long(code) => Err(Outcome::fault_zero(13)),
        _ => Err(Outcome::fault(6)),
    }
}

/// Whether what makes bytes invalid is that the instruction does not end within [`MAX_LENGTH`]. iced reports that as
/// any other invalid instruction; given fewer bytes, it says that some are missing.
#[cold]
fn is_too_long(code: &[u8]) -> bool {
    if code.len() < MAX_LENGTH {
        return false;
    }
    let mut decoder = Decoder::new(64, &code[..MAX_LENGTH - 1], DecoderOptions::NONE);
    let _ = decoder.decode();
    decoder.last_error() == DecoderError::NoMoreBytes
}

/// Which registers the first instruction of `code` depends on. For bytes that are no instruction: none.
pub fn needs(code: &[u8]) -> Needs {
    let Ok(instruction) = decode(code, 0) else { return Needs::default() };
    let fpu = instruction.cpuid_features().iter().any(|feature| uses_fpu(*feature));
    let writes_system = matches!(instruction.mnemonic(), Mnemonic::Wrfsbase | Mnemonic::Wrgsbase);
    let system = fpu || writes_system || reads_system(&instruction);
    Needs { fpu, system, writes_system }
}

/// Whether instructions of that feature work on the x87, SSE or AVX registers.
fn uses_fpu(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::SSE4A
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::GFNI
            | F::FXSR
            | F::XSAVE
            | F::XSAVEC
            | F::XSAVEOPT
            | F::XSAVES
            | F::AVX
            | F::AVX2
            | F::F16C
            | F::FMA
            | F::VAES
            | F::VPCLMULQDQ
    )
}

/// Whether the instruction looks at a segment base, a selector or a control register.
fn reads_system(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let mnemonic = matches!(
        instruction.mnemonic(),
        M::Rdfsbase | M::Rdgsbase | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Xgetbv | M::Wait
    );
    let is_segment = |register: Register| register.is_segment_register();
    let operand = (0..instruction.op_count())
        .any(|n| instruction.op_kind(n) == iced_x86::OpKind::Register && is_segment(instruction.op_register(n)));
    mnemonic || operand || is_segment(instruction.segment_prefix())
}

/// The first instruction of `code` in Intel syntax, with absolute addresses as it stands at `rip`; `(bad)` if there is
/// none.
pub fn disassemble(code: &[u8], rip: u64) -> String {
    let Ok(instruction) = decode(code, rip) else { return "(bad)".to_owned() };
    let mut formatter = IntelFormatter::new();
    let options = formatter.options_mut();
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_uppercase_hex(false);
    options.set_branch_leading_zeros(false);
    options.set_space_after_operand_separator(true);
    let mut text = String::new();
    formatter.format(&instruction, &mut text);
    text
}

/// Length in bytes of the first instruction of `code`; `None` if there is none.
pub fn length(code: &[u8]) -> Option<usize> {
    decode(code, 0).ok().map(|instruction| instruction.len())
}
