//! SSE instructions on the vCPU's XMM registers: the checks before one may execute, its operands, and the call of the
//! host's own instruction through the table. Moves, which need no arithmetic, are in `sse_move`.

use iced_x86::{Mnemonic, OpKind, Register};

use super::Outcome;
use super::flags::{mask, sign_extend};
use super::operand::{Machine, Step, slot};
use super::sse_table::{Control, Entry, find};
use crate::registers::{CR0_TS, CR4_OSFXSR};

/// CR0: there is no coprocessor.
pub(super) const CR0_EM: u64 = 1 << 2;
/// CR4: unmasked SSE exceptions raise #XM.
const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// MXCSR's exception flags.
const EXCEPTION_FLAGS: u32 = 0x3f;
/// MXCSR's exception masks, which lie above the flags.
const EXCEPTION_MASKS: u32 = EXCEPTION_FLAGS << MASK_SHIFT;
/// How far above.
const MASK_SHIFT: u32 = 7;
/// MXCSR bits that every 64-bit processor has.
pub(super) const MXCSR_VALID: u32 = 0xffff;

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    if uses_mmx(m) {
        return Ok(false);
    }
    if super::sse_move::execute(m)? {
        return Ok(true);
    }
    let Some(entry) = find(m.instruction.mnemonic()) else { return Ok(false) };
    check_enabled(m)?;
    run(m, entry)?;
    Ok(true)
}

/// MMX instructions share their mnemonics with SSE ones.
fn uses_mmx(m: &Machine) -> bool {
    (0..m.instruction.op_count())
        .any(|n| m.instruction.op_kind(n) == OpKind::Register && m.instruction.op_register(n).is_mm())
}

/// Raises #UD or #NM where the control registers forbid SSE.
pub(super) fn check_enabled(m: &Machine) -> Step {
    let system = &m.cpu.system;
    if system.cr0 & CR0_EM != 0 || system.cr4 & CR4_OSFXSR == 0 {
        return Err(Outcome::fault(6));
    }
    if system.cr0 & CR0_TS != 0 { Err(Outcome::fault(7)) } else { Ok(()) }
}

/// Number of an XMM register that an operand names.
pub(super) fn xmm_index(m: &Machine, operand: u32) -> Option<usize> {
    if m.instruction.op_kind(operand) != OpKind::Register {
        return None;
    }
    let index = (m.instruction.op_register(operand) as usize).checked_sub(Register::XMM0 as usize)?;
    (index < 16).then_some(index)
}

/// Reads memory operand bytes, zero-extended to 16. Operands of 16 bytes have to be aligned.
pub(super) fn load_vector(m: &mut Machine, size: usize, is_aligned: bool) -> Step<u128> {
    let address = m.address()?;
    if is_aligned && size == 16 {
        m.check_alignment(address, 16)?;
    }
    let mut buffer = [0; 16];
    m.load_bytes(address, buffer.get_mut(..size).ok_or(Outcome::Unsupported)?)?;
    Ok(u128::from_le_bytes(buffer))
}

/// An operand as 16 bytes: an XMM register, memory, a sign-extended general register or an immediate.
fn operand(m: &mut Machine, number: u32) -> Step<u128> {
    if let Some(index) = xmm_index(m, number) {
        return Ok(m.cpu.fpu.xmm[index]);
    }
    match m.instruction.op_kind(number) {
        OpKind::Memory => {
            let size = m.instruction.memory_size().size();
            let value = load_vector(m, size, true)?;
            Ok(if is_from_integer(m) { widen(value, size) } else { value })
        }
        OpKind::Register => {
            let size = m.size(number)?;
            let value = m.read(number, size)?;
            Ok(widen(value.into(), size))
        }
        _ => Ok(m.instruction.try_immediate(number).map_err(|_| Outcome::Unsupported)?.into()),
    }
}

fn is_from_integer(m: &Machine) -> bool {
    matches!(m.instruction.mnemonic(), Mnemonic::Cvtsi2sd | Mnemonic::Cvtsi2ss)
}

/// An integer, sign-extended to 8 bytes.
fn widen(value: u128, size: usize) -> u128 {
    let low = super::operand::from_bytes(&value.to_le_bytes()[..size.min(8)]);
    sign_extend(low, size.min(8)).cast_unsigned().into()
}

fn run(m: &mut Machine, entry: Entry) -> Step {
    let source = operand(m, 1)?;
    let mut value = xmm_index(m, 0).map_or(0, |index| m.cpu.fpu.xmm[index]);
    let immediate = if m.instruction.op_count() == 3 { m.instruction.try_immediate(2).unwrap_or(0) } else { 0 };
    let immediate = immediate.to_le_bytes()[0];
    // SAFETY (all calls): `find` returned the function, so the host has the instruction; the references are valid.
    match entry {
        // SAFETY: see above.
        Entry::Plain(function) => unsafe { function(&raw mut value, &raw const source) },
        // SAFETY: see above.
        Entry::Immediate(function) => unsafe { function(&raw mut value, &raw const source, immediate) },
        Entry::Implicit(function) => {
            let implicit = m.cpu.fpu.xmm[0];
            // SAFETY: see above.
            unsafe { function(&raw mut value, &raw const source, &raw const implicit) }
        }
        Entry::Flags(function) => {
            // SAFETY: see above.
            unsafe { function(&raw mut value, &raw const source) }
            return set_flags(m, value);
        }
        // SAFETY: see above, and `under_mxcsr` passes a control that it has prepared.
        Entry::Float(f) => under_mxcsr(m, |control| unsafe { f(&raw mut value, &raw const source, control) })?,
        Entry::FloatImmediate(f) => {
            // SAFETY: as for `Float`.
            under_mxcsr(m, |control| unsafe { f(&raw mut value, &raw const source, control, immediate) })?;
        }
        Entry::ToInteger(narrow, wide) => {
            let f = if m.size(0)? == 8 { wide } else { narrow };
            // SAFETY: as for `Float`.
            under_mxcsr(m, |control| unsafe { f(&raw mut value, &raw const source, control) })?;
        }
        Entry::FloatFlags(f) => {
            // SAFETY: as for `Float`.
            under_mxcsr(m, |control| unsafe { f(&raw mut value, &raw const source, control) })?;
            return set_flags(m, value);
        }
    }
    set_destination(m, value)
}

fn set_flags(m: &mut Machine, value: u128) -> Step {
    m.set_arithmetic(low(value));
    Ok(())
}

fn low(value: u128) -> u64 {
    super::operand::from_bytes(&value.to_le_bytes()[..8])
}

/// Writes the result to operand 0, an XMM or a general register.
fn set_destination(m: &mut Machine, value: u128) -> Step {
    if let Some(index) = xmm_index(m, 0) {
        m.cpu.fpu.xmm[index] = value;
        return Ok(());
    }
    let register = m.instruction.op_register(0);
    let size = slot(register).ok_or(Outcome::Unsupported)?.size;
    m.set_register(register, low(value) & mask(size))
}

/// Runs a function under the guest's MXCSR and adds the flags that it raised. An exception that the guest has not
/// masked becomes #XM, and the caller then leaves the destination alone.
fn under_mxcsr(m: &mut Machine, function: impl FnOnce(*mut Control)) -> Step {
    let mxcsr = m.cpu.fpu.mxcsr & MXCSR_VALID;
    let mut control = Control { mxcsr: mxcsr & !EXCEPTION_FLAGS | EXCEPTION_MASKS, saved: 0 };
    function(&raw mut control);
    let raised = control.mxcsr & EXCEPTION_FLAGS;
    m.cpu.fpu.mxcsr |= raised;
    if raised & !(mxcsr >> MASK_SHIFT) == 0 {
        return Ok(());
    }
    let is_enabled = m.cpu.system.cr4 & CR4_OSXMMEXCPT != 0;
    Err(Outcome::fault(if is_enabled { 19 } else { 6 }))
}
