//! SSE instructions that only move bits: loads, stores, merges, lane inserts and extracts, byte shifts of a whole
//! register, and MXCSR itself. They raise no floating-point exceptions.

use iced_x86::{Mnemonic, OpKind};

use super::Outcome;
use super::operand::{Machine, Step, from_bytes};
use super::sse::{MXCSR_VALID, check_enabled, load_vector, xmm_index};

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Movaps | M::Movapd | M::Movdqa | M::Movntps | M::Movntpd | M::Movntdq | M::Movntdqa => whole(m, true)?,
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu => whole(m, false)?,
        M::Movss => scalar(m, 4)?,
        M::Movsd if xmm_index(m, 0).or_else(|| xmm_index(m, 1)).is_some() => scalar(m, 8)?,
        M::Movd => low_or_general(m, 4)?,
        M::Movq => low_or_general(m, 8)?,
        M::Movlps | M::Movlpd => half(m, 0)?,
        M::Movhps | M::Movhpd => half(m, 64)?,
        M::Movhlps => merge(m, |to, from| to & HIGH | from >> 64)?,
        M::Movlhps => merge(m, |to, from| to & LOW | from << 64)?,
        M::Pslldq => shift_bytes(m, |value, bits| value << bits)?,
        M::Psrldq => shift_bytes(m, |value, bits| value >> bits)?,
        _ => return execute_lane(m),
    }
    Ok(true)
}

fn execute_lane(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Pinsrb => insert(m, 1)?,
        M::Pinsrw => insert(m, 2)?,
        M::Pinsrd => insert(m, 4)?,
        M::Pinsrq => insert(m, 8)?,
        M::Pextrb => extract(m, 1)?,
        M::Pextrw => extract(m, 2)?,
        M::Pextrd | M::Extractps => extract(m, 4)?,
        M::Pextrq => extract(m, 8)?,
        M::Insertps => insert_single(m)?,
        M::Ldmxcsr => load_control(m)?,
        M::Stmxcsr => {
            check_enabled(m)?;
            m.write(0, 4, m.cpu.fpu.mxcsr.into())?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// The low 64 bits.
const LOW: u128 = u64::MAX as u128;
/// The high 64 bits.
const HIGH: u128 = !LOW;

/// All bits of `size` bytes, 16 included.
fn lane_mask(size: usize) -> u128 {
    u128::MAX >> (128 - 8 * size)
}

fn low(value: u128) -> u64 {
    from_bytes(&value.to_le_bytes()[..8])
}

/// The value of an XMM register operand.
fn xmm(m: &Machine, operand: u32) -> Step<u128> {
    Ok(m.cpu.fpu.xmm[xmm_index(m, operand).ok_or(Outcome::Unsupported)?])
}

/// Sets the XMM register that operand 0 names.
fn set_xmm(m: &mut Machine, value: u128) -> Step {
    let index = xmm_index(m, 0).ok_or(Outcome::Unsupported)?;
    m.cpu.fpu.xmm[index] = value;
    Ok(())
}

fn is_memory(m: &Machine, operand: u32) -> bool {
    m.instruction.op_kind(operand) == OpKind::Memory
}

fn store_vector(m: &mut Machine, value: u128, size: usize, is_aligned: bool) -> Step {
    let address = m.address()?;
    if is_aligned && size == 16 {
        m.check_alignment(address, 16)?;
    }
    m.store_bytes(address, &value.to_le_bytes()[..size])
}

/// MOVAPS and the like: 16 bytes.
fn whole(m: &mut Machine, is_aligned: bool) -> Step {
    // The MMX forms are sorted out before; what is left has an XMM register on at least one side.
    check_enabled(m)?;
    if is_memory(m, 0) {
        let value = xmm(m, 1)?;
        return store_vector(m, value, 16, is_aligned);
    }
    let value = if is_memory(m, 1) { load_vector(m, 16, is_aligned)? } else { xmm(m, 1)? };
    set_xmm(m, value)
}

/// MOVSS and MOVSD: a load clears the rest of the register, a register move keeps it.
fn scalar(m: &mut Machine, size: usize) -> Step {
    check_enabled(m)?;
    if is_memory(m, 0) {
        let value = xmm(m, 1)?;
        return store_vector(m, value, size, false);
    }
    if is_memory(m, 1) {
        let value = load_vector(m, size, false)?;
        return set_xmm(m, value);
    }
    let keep = !lane_mask(size);
    merge(m, |to, from| to & keep | from & !keep)
}

fn merge(m: &mut Machine, join: impl Fn(u128, u128) -> u128) -> Step {
    check_enabled(m)?;
    let value = join(xmm(m, 0)?, xmm(m, 1)?);
    set_xmm(m, value)
}

/// MOVD and MOVQ: between the low bytes of an XMM register and a general register, memory or another XMM register.
fn low_or_general(m: &mut Machine, size: usize) -> Step {
    check_enabled(m)?;
    if let (Some(_), Some(from)) = (xmm_index(m, 0), xmm_index(m, 1)) {
        return set_xmm(m, m.cpu.fpu.xmm[from] & LOW);
    }
    if xmm_index(m, 0).is_some() {
        let value = m.read(1, size)?;
        return set_xmm(m, value.into());
    }
    let value = low(xmm(m, 1)?);
    m.write(0, size, value)
}

/// MOVLPS, MOVHPS and their relatives: 8 bytes of memory and the half of a register that begins at bit `shift`.
fn half(m: &mut Machine, shift: u32) -> Step {
    check_enabled(m)?;
    if is_memory(m, 0) {
        let value = low(xmm(m, 1)? >> shift);
        return m.write(0, 8, value);
    }
    let value = u128::from(m.read(1, 8)?) << shift;
    let kept = xmm(m, 0)? & !(LOW << shift);
    set_xmm(m, kept | value)
}

fn shift_bytes(m: &mut Machine, shift: fn(u128, u32) -> u128) -> Step {
    check_enabled(m)?;
    let bytes = u32::from(m.instruction.immediate8());
    let value = if bytes > 15 { 0 } else { shift(xmm(m, 0)?, 8 * bytes) };
    set_xmm(m, value)
}

/// Bit position of the lane of `size` bytes that the last operand selects.
fn lane(m: &Machine, size: usize) -> u32 {
    let index = usize::from(m.instruction.immediate8()) & (16 / size - 1);
    u32::try_from(8 * size * index).expect("below 128")
}

fn insert(m: &mut Machine, size: usize) -> Step {
    check_enabled(m)?;
    let shift = lane(m, size);
    let value = u128::from(m.read(1, size)?) & lane_mask(size);
    let kept = xmm(m, 0)? & !(lane_mask(size) << shift);
    set_xmm(m, kept | value << shift)
}

/// PEXTRB to PEXTRQ: a general register takes the lane zero-extended.
fn extract(m: &mut Machine, size: usize) -> Step {
    check_enabled(m)?;
    let value = low(xmm(m, 1)? >> lane(m, size) & lane_mask(size));
    m.write(0, size, value)
}

/// INSERTPS: bits 7–6 of the immediate select the source lane (of a register), 5–4 the destination, 3–0 lanes to
/// clear.
fn insert_single(m: &mut Machine) -> Step {
    check_enabled(m)?;
    let control = u32::from(m.instruction.immediate8());
    let source = match xmm_index(m, 1) {
        Some(index) => m.cpu.fpu.xmm[index] >> (32 * (control >> 6)),
        None => m.read(1, 4)?.into(),
    };
    let shift = 32 * (control >> 4 & 3);
    let mut value = xmm(m, 0)? & !(lane_mask(4) << shift) | (source & lane_mask(4)) << shift;
    for lane in (0..4).filter(|lane| control >> lane & 1 != 0) {
        value &= !(lane_mask(4) << (32 * lane));
    }
    set_xmm(m, value)
}

fn load_control(m: &mut Machine) -> Step {
    check_enabled(m)?;
    let value = u32::try_from(m.read(0, 4)?).expect("4 bytes");
    if value & !MXCSR_VALID != 0 {
        return Err(Outcome::fault_zero(13));
    }
    m.cpu.fpu.mxcsr = value;
    Ok(())
}
