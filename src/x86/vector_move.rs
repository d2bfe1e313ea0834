//! SSE and AVX instructions that only move bits: loads, stores, merges, lane inserts and extracts, byte shifts of a whole
//! register, and MXCSR itself. They raise no floating-point exceptions. An AVX form takes what it keeps from a register
//! of its own and clears the destination's upper bits.

use iced_x86::{EncodingKind, Mnemonic, OpKind};

use super::Outcome;
use super::masked::{byte_signs, destination_address, store_selected};
use super::operand::{Machine, Step};
use super::sse::{check_enabled, load_vector, load_wide, xmm_index};
use super::vector_call::{MXCSR_VALID, Wide, is_wide, low, register, set_register, vector_index};

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Movaps | M::Movapd | M::Movdqa | M::Movntps | M::Movntpd | M::Movntdq | M::Movntdqa => whole(m, true)?,
        M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa => {
            whole(m, true)?
        }
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu => whole(m, false)?,
        M::Vmovups | M::Vmovupd | M::Vmovdqu | M::Vlddqu => whole(m, false)?,
        M::Movss | M::Vmovss => scalar(m, 4)?,
        M::Movsd if xmm_index(m, 0).or_else(|| xmm_index(m, 1)).is_some() => scalar(m, 8)?,
        M::Vmovsd => scalar(m, 8)?,
        M::Movd | M::Vmovd => low_or_general(m, 4)?,
        M::Movq | M::Vmovq => low_or_general(m, 8)?,
        M::Movlps | M::Movlpd | M::Vmovlps | M::Vmovlpd => half(m, 0)?,
        M::Movhps | M::Movhpd | M::Vmovhps | M::Vmovhpd => half(m, 64)?,
        M::Movhlps | M::Vmovhlps => merge(m, |to, from| to & HIGH | from >> 64)?,
        M::Movlhps | M::Vmovlhps => merge(m, |to, from| to & LOW | from << 64)?,
        M::Pslldq | M::Vpslldq => shift_bytes(m, |value, bits| value << bits)?,
        M::Psrldq | M::Vpsrldq => shift_bytes(m, |value, bits| value >> bits)?,
        M::Maskmovdqu | M::Vmaskmovdqu => masked_store(m)?,
        _ => return execute_lane(m),
    }
    Ok(true)
}

fn execute_lane(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Pinsrb | M::Vpinsrb => insert(m, 1)?,
        M::Pinsrw | M::Vpinsrw => insert(m, 2)?,
        M::Pinsrd | M::Vpinsrd => insert(m, 4)?,
        M::Pinsrq | M::Vpinsrq => insert(m, 8)?,
        M::Pextrb | M::Vpextrb => extract(m, 1)?,
        M::Pextrw | M::Vpextrw => extract(m, 2)?,
        M::Pextrd | M::Extractps | M::Vpextrd | M::Vextractps => extract(m, 4)?,
        M::Pextrq | M::Vpextrq => extract(m, 8)?,
        M::Insertps | M::Vinsertps => insert_single(m)?,
        M::Ldmxcsr | M::Vldmxcsr => load_control(m)?,
        M::Stmxcsr | M::Vstmxcsr => {
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

fn is_vex(m: &Machine) -> bool {
    m.instruction.encoding() == EncodingKind::VEX
}

/// Number of the operand that the destination's other bits come from: itself, or the second one of an AVX form.
fn base(m: &Machine) -> u32 {
    u32::from(is_vex(m))
}

/// The value of an XMM register operand.
fn xmm(m: &Machine, operand: u32) -> Step<u128> {
    Ok(m.cpu.fpu.xmm[xmm_index(m, operand).ok_or(Outcome::Unsupported)?])
}

/// Sets the XMM register that operand 0 names.
fn set_xmm(m: &mut Machine, value: u128) -> Step {
    let index = vector_index(m.instruction, 0).ok_or(Outcome::Unsupported)?;
    if is_vex(m) {
        set_register(m.cpu, index, [value, 0]);
    } else {
        m.cpu.fpu.xmm[usize::from(index)] = value;
    }
    Ok(())
}

fn is_memory(m: &Machine, operand: u32) -> bool {
    m.instruction.op_kind(operand) == OpKind::Memory
}

fn store_vector(m: &mut Machine, value: Wide, size: usize, is_aligned: bool) -> Step {
    let address = m.address()?;
    if is_aligned {
        m.check_alignment(address, size as u64)?;
    }
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&value[0].to_le_bytes());
    bytes[16..].copy_from_slice(&value[1].to_le_bytes());
    m.store_bytes(address, &bytes[..size])
}

/// MOVAPS and the like: 16 or 32 bytes.
fn whole(m: &mut Machine, is_aligned: bool) -> Step {
    // The MMX forms are sorted out before; what is left has a vector register on at least one side.
    check_enabled(m)?;
    let is_wide = is_wide(m.instruction);
    let size = if is_wide { 32 } else { 16 };
    let operand = |m: &Machine, n| vector_index(m.instruction, n).ok_or(Outcome::Unsupported);
    if is_memory(m, 0) {
        let value = register(m.cpu, operand(m, 1)?);
        return store_vector(m, value, size, is_aligned);
    }
    let value = if is_memory(m, 1) { load_wide(m, size, is_aligned)? } else { register(m.cpu, operand(m, 1)?) };
    if is_wide {
        set_register(m.cpu, operand(m, 0)?, value);
        return Ok(());
    }
    set_xmm(m, value[0])
}

/// MOVSS and MOVSD: a load clears the rest of the register, a register move keeps it.
fn scalar(m: &mut Machine, size: usize) -> Step {
    check_enabled(m)?;
    if is_memory(m, 0) {
        let value = xmm(m, 1)?;
        return store_vector(m, [value, 0], size, false);
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
    let base = base(m);
    let value = join(xmm(m, base)?, xmm(m, base + 1)?);
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
    let base = base(m);
    let value = u128::from(m.read(base + 1, 8)?) << shift;
    let kept = xmm(m, base)? & !(LOW << shift);
    set_xmm(m, kept | value)
}

/// PSLLDQ and PSRLDQ, on each half alone.
fn shift_bytes(m: &mut Machine, shift: fn(u128, u32) -> u128) -> Step {
    check_enabled(m)?;
    let bytes = u32::from(m.instruction.immediate8());
    let shifted = |value| if bytes > 15 { 0 } else { shift(value, 8 * bytes) };
    let from = vector_index(m.instruction, base(m)).ok_or(Outcome::Unsupported)?;
    let to = vector_index(m.instruction, 0).ok_or(Outcome::Unsupported)?;
    let value = register(m.cpu, from).map(shifted);
    if is_wide(m.instruction) {
        set_register(m.cpu, to, value);
        return Ok(());
    }
    set_xmm(m, value[0])
}

/// Bit position of the lane of `size` bytes that the last operand selects.
fn lane(m: &Machine, size: usize) -> u32 {
    let index = usize::from(m.instruction.immediate8()) & (16 / size - 1);
    u32::try_from(8 * size * index).expect("below 128")
}

fn insert(m: &mut Machine, size: usize) -> Step {
    check_enabled(m)?;
    let (shift, base) = (lane(m, size), base(m));
    let value = u128::from(m.read(base + 1, size)?) & lane_mask(size);
    let kept = xmm(m, base)? & !(lane_mask(size) << shift);
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
    let (control, base) = (u32::from(m.instruction.immediate8()), base(m));
    let source = match xmm_index(m, base + 1) {
        Some(index) => m.cpu.fpu.xmm[index] >> (32 * (control >> 6)),
        None => m.read(base + 1, 4)?.into(),
    };
    let shift = 32 * (control >> 4 & 3);
    let mut value = xmm(m, base)? & !(lane_mask(4) << shift) | (source & lane_mask(4)) << shift;
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

fn masked_store(m: &mut Machine) -> Step {
    check_enabled(m)?;
    let (data, selection) = (xmm(m, 1)?, xmm(m, 2)?);
    let address = destination_address(m)?;
    store_selected(m, address, &data.to_le_bytes(), byte_signs(&selection.to_le_bytes()))
}
