//! MMX instructions, those that SSE added among them. The eight registers are the x87 registers' mantissas; every
//! instruction makes TOP 0 and all registers valid, but EMMS all empty. Arithmetic is that of the 128-bit operations on the low 8
//! bytes.

use iced_x86::{Mnemonic, OpKind, Register};

use super::flags::mask;
use super::fpu::check_no_pending;
use super::fpu_environment::make_top_zero;
use super::masked::{byte_signs, destination_address, store_selected};
use super::operand::{Machine, Step};
use super::sse::{CR0_EM, load_vector, xmm_index};
use super::vector_call::low;
use super::{Outcome, sse, vector_call};
use crate::registers::CR0_TS;

/// What the exponent of a register becomes that MMX writes.
const EXPONENT: [u8; 2] = [0xff; 2];
/// The bits of an index byte that PSHUFB looks at in its 8-byte form.
const SHUFFLE_BITS: u64 = 0x8787_8787_8787_8787;

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    let mnemonic = m.instruction.mnemonic();
    let is_conversion = matches!(mnemonic, M::Cvtpi2ps | M::Cvtpi2pd);
    if mnemonic != M::Emms && !is_conversion && !names_register(m) {
        return Ok(false);
    }
    if is_conversion && m.instruction.op_kind(1) == OpKind::Memory {
        // Touches no MMX register, so that it leaves x87's state alone.
        sse::check_enabled(m)?;
        let source = load_vector(m, 8, false)?;
        convert_to_vector(m, source)?;
        return Ok(true);
    }
    check_enabled(m)?;
    match mnemonic {
        M::Emms => {
            enter(m);
            m.cpu.fpu.ftw = 0;
        }
        M::Movd | M::Movq | M::Movntq => move_value(m)?,
        M::Movq2dq
        | M::Movdq2q
        | M::Cvtpi2ps
        | M::Cvtpi2pd
        | M::Cvtps2pi
        | M::Cvttps2pi
        | M::Cvtpd2pi
        | M::Cvttpd2pi => {
            sse::check_enabled(m)?;
            with_xmm(m)?;
        }
        M::Maskmovq => masked_store(m)?,
        M::Pinsrw | M::Pextrw => word(m)?,
        M::Pmovmskb => {
            let signs = byte_signs(&value(m, 1)?.to_le_bytes());
            enter(m);
            m.write(0, 4, signs.into())?;
        }
        _ => arithmetic(m)?,
    }
    Ok(true)
}

fn names_register(m: &Machine) -> bool {
    (0..m.instruction.op_count())
        .any(|n| m.instruction.op_kind(n) == OpKind::Register && m.instruction.op_register(n).is_mm())
}

/// Raises #UD, #NM or #MF as for MMX.
fn check_enabled(m: &Machine) -> Step {
    if m.cpu.system.cr0 & CR0_EM != 0 {
        return Err(Outcome::fault(6));
    }
    if m.cpu.system.cr0 & CR0_TS != 0 {
        return Err(Outcome::fault(7));
    }
    check_no_pending(m)
}

/// Number of the MMX register that an operand names.
fn index(m: &Machine, operand: u32) -> Option<usize> {
    let register = m.instruction.op_register(operand);
    let is_register = m.instruction.op_kind(operand) == OpKind::Register && register.is_mm();
    is_register.then(|| register as usize - Register::MM0 as usize)
}

/// An operand's value, zero-extended to 8 bytes: an MMX or general register, memory, or an immediate.
fn value(m: &mut Machine, operand: u32) -> Step<u64> {
    if let Some(physical) = index(m, operand) {
        let top = usize::from(m.cpu.fpu.fsw >> 11 & 7);
        let register = &m.cpu.fpu.st[(physical + 8 - top) % 8];
        return Ok(super::operand::from_bytes(&register[..8]));
    }
    match m.instruction.op_kind(operand) {
        OpKind::Immediate8 => Ok(m.instruction.immediate8().into()),
        _ => {
            let size = m.size(operand)?;
            m.read(operand, size)
        }
    }
}

/// The transition from x87 to MMX, which every instruction makes that has not faulted.
fn enter(m: &mut Machine) {
    make_top_zero(&mut m.cpu.fpu);
    m.cpu.fpu.ftw = 0xff;
}

/// Makes the transition and sets the register that operand 0 names.
fn set(m: &mut Machine, value: u64) -> Step {
    let physical = index(m, 0).ok_or(Outcome::Unsupported)?;
    enter(m);
    let register = &mut m.cpu.fpu.st[physical];
    register[..8].copy_from_slice(&value.to_le_bytes());
    register[8..10].copy_from_slice(&EXPONENT);
    Ok(())
}

/// MOVD, MOVQ and MOVNTQ.
fn move_value(m: &mut Machine) -> Step {
    let value = value(m, 1)?;
    if index(m, 0).is_some() {
        return set(m, value);
    }
    let size = m.size(0)?;
    m.write(0, size, value & mask(size))?;
    enter(m);
    Ok(())
}

/// Moves and conversions between MMX and XMM registers.
fn with_xmm(m: &mut Machine) -> Step {
    if let Some(to) = xmm_index(m, 0) {
        let source = value(m, 1)?;
        if m.instruction.mnemonic() == Mnemonic::Movq2dq {
            m.cpu.fpu.xmm[to] = source.into();
        } else {
            convert_to_vector(m, source.into())?;
        }
        enter(m);
        return Ok(());
    }
    let source = match xmm_index(m, 1) {
        Some(from) => m.cpu.fpu.xmm[from],
        None => {
            let size = m.instruction.memory_size().size();
            load_vector(m, size, true)?
        }
    };
    let halved = source & u128::from(u64::MAX);
    let result = match m.instruction.mnemonic() {
        Mnemonic::Movdq2q => source,
        Mnemonic::Cvtps2pi => evaluate(m, Mnemonic::Cvtps2dq, 0, halved, 0)?,
        Mnemonic::Cvttps2pi => evaluate(m, Mnemonic::Cvttps2dq, 0, halved, 0)?,
        Mnemonic::Cvtpd2pi => evaluate(m, Mnemonic::Cvtpd2dq, 0, source, 0)?,
        _ => evaluate(m, Mnemonic::Cvttpd2dq, 0, source, 0)?,
    };
    set(m, low(result))
}

/// CVTPI2PS, which keeps the upper half, and CVTPI2PD.
fn convert_to_vector(m: &mut Machine, source: u128) -> Step {
    let to = xmm_index(m, 0).ok_or(Outcome::Unsupported)?;
    let low_half = u128::from(u64::MAX);
    let before = m.cpu.fpu.xmm[to];
    m.cpu.fpu.xmm[to] = if m.instruction.mnemonic() == Mnemonic::Cvtpi2pd {
        evaluate(m, Mnemonic::Cvtdq2pd, 0, source, 0)?
    } else {
        let singles = evaluate(m, Mnemonic::Cvtdq2ps, 0, source, 0)?;
        before & !low_half | singles & low_half
    };
    Ok(())
}

/// What an operation on 16 bytes makes of two operands.
fn evaluate(m: &mut Machine, mnemonic: Mnemonic, first: u128, source: u128, immediate: u8) -> Step<u128> {
    let result = vector_call::evaluate(m.cpu, mnemonic, [[first, 0], [source, 0]], immediate, false)?;
    result.map(|wide| wide[0]).ok_or(Outcome::Unsupported)
}

fn masked_store(m: &mut Machine) -> Step {
    let (data, selection) = (value(m, 1)?, value(m, 2)?);
    let address = destination_address(m)?;
    store_selected(m, address, &data.to_le_bytes(), byte_signs(&selection.to_le_bytes()))?;
    enter(m);
    Ok(())
}

/// PINSRW and PEXTRW.
fn word(m: &mut Machine) -> Step {
    let shift = 16 * u32::from(m.instruction.immediate8() & 3);
    if index(m, 0).is_none() {
        let word = value(m, 1)? >> shift & 0xffff;
        enter(m);
        return m.write(0, 4, word);
    }
    let word = m.read(1, 2)? & 0xffff;
    let kept = value(m, 0)? & !(0xffff << shift);
    set(m, kept | word << shift)
}

/// What is computed from two operands; where elements move, 128-bit operations need them in other places.
fn arithmetic(m: &mut Machine) -> Step {
    use Mnemonic as M;
    let (first, source) = (value(m, 0)?, value(m, 1)?);
    let both = u128::from(first) | u128::from(source) << 64;
    let immediate = if m.instruction.op_count() == 3 { m.instruction.immediate8() } else { 0 };
    let mnemonic = m.instruction.mnemonic();
    let (mnemonic, first, source, shift) = match mnemonic {
        M::Palignr => return set(m, aligned(first, source, immediate)),
        M::Pshufw => (M::Pshuflw, 0, source.into(), 0),
        M::Pshufb => (mnemonic, first.into(), (source & SHUFFLE_BITS).into(), 0),
        M::Punpckhbw => (M::Punpcklbw, first.into(), source.into(), 64),
        M::Punpckhwd => (M::Punpcklwd, first.into(), source.into(), 64),
        M::Punpckhdq => (M::Punpckldq, first.into(), source.into(), 64),
        M::Packsswb | M::Packssdw | M::Packuswb => (mnemonic, both, 0, 0),
        M::Phaddw | M::Phaddd | M::Phaddsw | M::Phsubw | M::Phsubd | M::Phsubsw => (mnemonic, both, 0, 0),
        _ => (mnemonic, u128::from(first), source.into(), 0),
    };
    let result = evaluate(m, mnemonic, first, source, immediate)?;
    set(m, low(result >> shift))
}

/// PALIGNR: 8 of the 16 bytes of both operands, from byte `immediate` on.
fn aligned(first: u64, source: u64, immediate: u8) -> u64 {
    let joined = u128::from(first) << 64 | u128::from(source);
    joined.checked_shr(8 * u32::from(immediate)).map_or(0, low)
}
