//! The x87 instructions on the FPU's control state: control and status words, initialisation, and the environment in
//! memory. They are written out because the host executes arithmetic with all exceptions masked (see `fpu`), and these
//! are what sets, shows and clears the masks and flags.

use super::Outcome;
use super::operand::{Address, Machine, Step};
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
/// Bytes that FNSAVE writes.
const SAVED: usize = ENVIRONMENT + 80;

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

fn environment(fpu: &FpuState) -> [u8; ENVIRONMENT] {
    let low = |pointer: u64| u32::from_le_bytes(pointer.to_le_bytes()[..4].try_into().expect("4 bytes"));
    let words = [
        0xffff_0000 | u32::from(fpu.fcw),
        0xffff_0000 | u32::from(fpu.fsw),
        0xffff_0000 | u32::from(full_tags(fpu)),
        low(fpu.fip),
        u32::from(fpu.fop) << 16,
        low(fpu.fdp),
        0xffff_0000,
    ];
    let mut bytes = [0; ENVIRONMENT];
    for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn load_environment_from(fpu: &mut FpuState, bytes: &[u8]) {
    let half = |offset: usize| u16::from_le_bytes([bytes[offset], bytes[offset + 1]]);
    set_environment(fpu, half(0), half(4));
    fpu.ftw = abridged(half(8));
    fpu.fip = super::operand::from_bytes(&bytes[12..16]);
    fpu.fop = half(18) & 0x7ff;
    fpu.fdp = super::operand::from_bytes(&bytes[20..24]);
}

/// The operand's address, if it has the size of the 32-bit format.
fn address(m: &Machine, size: usize) -> Step<Address> {
    if m.instruction.memory_size().size() == size { m.address() } else { Err(Outcome::Unsupported) }
}

/// FNSTENV, which masks all exceptions afterwards.
pub(super) fn store_environment(m: &mut Machine) -> Step {
    let address = address(m, ENVIRONMENT)?;
    m.store_bytes(address, &environment(&m.cpu.fpu))?;
    let fpu = &mut m.cpu.fpu;
    set_control_and_status(fpu, fpu.fcw | EXCEPTIONS, fpu.fsw);
    Ok(())
}

/// FLDENV.
pub(super) fn load_environment(m: &mut Machine) -> Step {
    let mut bytes = [0; ENVIRONMENT];
    let address = address(m, ENVIRONMENT)?;
    m.load_bytes(address, &mut bytes)?;
    load_environment_from(&mut m.cpu.fpu, &bytes);
    Ok(())
}

/// FNSAVE, which initialises the FPU afterwards.
pub(super) fn save(m: &mut Machine) -> Step {
    let address = address(m, SAVED)?;
    let mut bytes = [0; SAVED];
    bytes[..ENVIRONMENT].copy_from_slice(&environment(&m.cpu.fpu));
    for (place, register) in bytes[ENVIRONMENT..].chunks_exact_mut(10).zip(&m.cpu.fpu.st) {
        place.copy_from_slice(&register[..10]);
    }
    m.store_bytes(address, &bytes)?;
    initialise(&mut m.cpu.fpu);
    Ok(())
}

/// FRSTOR.
pub(super) fn restore(m: &mut Machine) -> Step {
    let address = address(m, SAVED)?;
    let mut bytes = [0; SAVED];
    m.load_bytes(address, &mut bytes)?;
    load_environment_from(&mut m.cpu.fpu, &bytes);
    for (register, place) in m.cpu.fpu.st.iter_mut().zip(bytes[ENVIRONMENT..].chunks_exact(10)) {
        *register = [0; 16];
        register[..10].copy_from_slice(place);
    }
    Ok(())
}
