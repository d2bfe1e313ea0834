//! The x87 instructions on the FPU's control state: control and status words, initialisation, and the environment in
//! memory. They are written out because the host executes arithmetic with all exceptions masked (see `fpu`), and these
//! are what sets, shows and clears the masks and flags.

use super::Outcome;
use super::operand::{Machine, Step};
use crate::registers::FpuState;

/// The exception flags of the status word, and the masks in the same places of the control word.
pub(super) const EXCEPTIONS: u16 = 0x3f;
/// Status word: an unmasked exception is pending.
pub(super) const SUMMARY: u16 = 1 << 7;
/// Status word: a copy of [`SUMMARY`].
const BUSY: u16 = 1 << 15;
/// Status word: stack fault.
const STACK_FAULT: u16 = 1 << 6;
/// Position of the stack's top in the status word.
const TOP_SHIFT: u32 = 11;
/// Bits of the control word that can be changed.
const CONTROL_VALID: u16 = 0x1f3f;
/// A bit of the control word that always reads as 1.
const CONTROL_FIXED: u16 = 0x40;
/// The control word after FNINIT.
const CONTROL_INITIAL: u16 = 0x37f;
/// Bytes of the environment in its 32-bit format.
const ENVIRONMENT: usize = 28;
/// The same in the 16-bit format.
const SHORT_ENVIRONMENT: usize = 14;
/// Bytes of the registers, which FNSAVE writes behind the environment.
const REGISTERS: usize = 80;

/// Number of the physical register that ST0 is.
fn top(fsw: u16) -> usize {
    usize::from(fsw >> TOP_SHIFT & 7)
}

/// Sets control and status word as a processor does: fixed bits fixed, and the summary bits true.
pub(super) fn set_control_and_status(fpu: &mut FpuState, fcw: u16, fsw: u16) {
    fpu.fcw = fcw & CONTROL_VALID | CONTROL_FIXED;
    let is_pending = fsw & !fpu.fcw & EXCEPTIONS != 0;
    fpu.fsw = fsw & !(SUMMARY | BUSY) | if is_pending { SUMMARY | BUSY } else { 0 };
}

/// The same where the stack's top may change: the physical registers stay, so that ST0–ST7 rotate.
fn set_environment(fpu: &mut FpuState, fcw: u16, fsw: u16) {
    let distance = (top(fsw) + 8 - top(fpu.fsw)) % 8;
    fpu.st.rotate_left(distance);
    set_control_and_status(fpu, fcw, fsw);
}

/// Makes ST0 the first physical register, without changing registers.
pub(super) fn make_top_zero(fpu: &mut FpuState) {
    let (fcw, fsw) = (fpu.fcw, fpu.fsw & !(7 << TOP_SHIFT));
    set_environment(fpu, fcw, fsw);
}

/// FNINIT.
pub(super) fn initialise(fpu: &mut FpuState) {
    set_environment(fpu, CONTROL_INITIAL, 0);
    (fpu.ftw, fpu.fop, fpu.fip, fpu.fdp) = (0, 0, 0, 0);
}

/// FNCLEX.
pub(super) fn clear_exceptions(fpu: &mut FpuState) {
    fpu.fsw &= !(EXCEPTIONS | STACK_FAULT | SUMMARY | BUSY);
}

/// FLDCW.
pub(super) fn load_control(m: &mut Machine) -> Step {
    let value = m.read(0, 2)?.to_le_bytes();
    let status = m.cpu.fpu.fsw;
    set_control_and_status(&mut m.cpu.fpu, u16::from_le_bytes([value[0], value[1]]), status);
    Ok(())
}

/// The two bits for each physical register that the environment has: valid, zero, special, empty.
fn full_tags(fpu: &FpuState) -> u16 {
    (0..8).fold(0, |tags, physical| tags | tag(fpu, physical) << (2 * physical))
}

fn tag(fpu: &FpuState, physical: usize) -> u16 {
    if fpu.ftw >> physical & 1 == 0 {
        return 3;
    }
    let register = &fpu.st[(physical + 8 - top(fpu.fsw)) % 8];
    let mantissa = super::operand::from_bytes(&register[..8]);
    let exponent = u16::from_le_bytes([register[8], register[9]]) & 0x7fff;
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        _ if mantissa >> 63 == 0 => 2,
        _ => 0,
    }
}

/// One bit for each physical register: in use or empty.
fn abridged(tags: u16) -> u8 {
    (0..8).fold(0, |bits, physical| bits | u8::from(tags >> (2 * physical) & 3 != 3) << physical)
}

/// How the environment lies in memory: in words of two or four bytes.
#[derive(Clone, Copy)]
struct Layout {
    word: usize,
}

impl Layout {
    /// The one whose size, together with `registers` bytes, the operand has.
    fn of(m: &Machine, registers: usize) -> Step<Self> {
        match m.instruction.memory_size().size().checked_sub(registers) {
            Some(ENVIRONMENT) => Ok(Self { word: 4 }),
            Some(SHORT_ENVIRONMENT) => Ok(Self { word: 2 }),
            _ => Err(Outcome::Unsupported),
        }
    }

    /// Bytes of the environment.
    fn size(self) -> usize {
        7 * self.word
    }

    fn store(self, fpu: &FpuState) -> Vec<u8> {
        let low = |pointer: u64| u32::from_le_bytes(pointer.to_le_bytes()[..4].try_into().expect("4 bytes"));
        let opcode = if self.word == 4 { u32::from(fpu.fop) << 16 } else { 0 };
        let words = [
            0xffff_0000 | u32::from(fpu.fcw),
            0xffff_0000 | u32::from(fpu.fsw),
            0xffff_0000 | u32::from(full_tags(fpu)),
            low(fpu.fip),
            opcode,
            low(fpu.fdp),
            if self.word == 4 { 0xffff_0000 } else { 0 },
        ];
        words.iter().flat_map(|word| word.to_le_bytes()[..self.word].to_vec()).collect()
    }

    fn load(self, fpu: &mut FpuState, bytes: &[u8]) {
        let word = |n: usize| super::operand::from_bytes(&bytes[self.word * n..self.word * (n + 1)]);
        let half = |n: usize| u16::from_le_bytes([bytes[self.word * n], bytes[self.word * n + 1]]);
        set_environment(fpu, half(0), half(1));
        fpu.ftw = abridged(half(2));
        (fpu.fip, fpu.fdp) = (word(3), word(5));
        fpu.fop = if self.word == 4 { u16::from_le_bytes([bytes[18], bytes[19]]) & 0x7ff } else { 0 };
    }
}

/// FNSTENV, which masks all exceptions afterwards.
pub(super) fn store_environment(m: &mut Machine) -> Step {
    let (layout, address) = (Layout::of(m, 0)?, m.address()?);
    m.store_bytes(address, &layout.store(&m.cpu.fpu))?;
    let fpu = &mut m.cpu.fpu;
    set_control_and_status(fpu, fpu.fcw | EXCEPTIONS, fpu.fsw);
    Ok(())
}

/// FLDENV.
pub(super) fn load_environment(m: &mut Machine) -> Step {
    let mut bytes = [0; ENVIRONMENT];
    let (layout, address) = (Layout::of(m, 0)?, m.address()?);
    m.load_bytes(address, &mut bytes[..layout.size()])?;
    layout.load(&mut m.cpu.fpu, &bytes);
    Ok(())
}

/// FNSAVE, which initialises the FPU afterwards.
pub(super) fn save(m: &mut Machine) -> Step {
    let (layout, address) = (Layout::of(m, REGISTERS)?, m.address()?);
    let mut bytes = layout.store(&m.cpu.fpu);
    for register in &m.cpu.fpu.st {
        bytes.extend_from_slice(&register[..10]);
    }
    m.store_bytes(address, &bytes)?;
    initialise(&mut m.cpu.fpu);
    Ok(())
}

/// FRSTOR.
pub(super) fn restore(m: &mut Machine) -> Step {
    let mut bytes = [0; ENVIRONMENT + REGISTERS];
    let (layout, address) = (Layout::of(m, REGISTERS)?, m.address()?);
    m.load_bytes(address, &mut bytes[..layout.size() + REGISTERS])?;
    layout.load(&mut m.cpu.fpu, &bytes);
    for (register, place) in m.cpu.fpu.st.iter_mut().zip(bytes[layout.size()..].chunks_exact(10)) {
        *register = [0; 16];
        register[..10].copy_from_slice(place);
    }
    Ok(())
}
