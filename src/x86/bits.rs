//! Bit tests, bit scans and counts, byte swaps, BMI1 and BMI2, ADX, and the CRC32 instruction.

use iced_x86::{Mnemonic, OpKind};

use super::flags::{CF, OF, SF, ZF, flag, mask, sign_bit, sign_extend, sign_zero_parity};
use super::operand::{Machine, Step};
use crate::registers::RDX;

/// The polynomial of CRC-32C, bit-reversed.
const CASTAGNOLI: u64 = 0x82f6_3b78;

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Bt => bit_test(m, None)?,
        M::Bts => bit_test(m, Some(|value, bit| value | bit))?,
        M::Btr => bit_test(m, Some(|value, bit| value & !bit))?,
        M::Btc => bit_test(m, Some(|value, bit| value ^ bit))?,
        M::Bsf => scan(m, |value| value.trailing_zeros())?,
        M::Bsr => scan(m, |value| 63 - value.leading_zeros())?,
        M::Popcnt => population_count(m)?,
        M::Lzcnt => count_zeros(m, |value, size| (value << (64 - 8 * size) | !mask_top(size)).leading_zeros())?,
        M::Tzcnt => count_zeros(m, |value, size| (value | !mask(size)).trailing_zeros())?,
        M::Bswap => swap_bytes(m)?,
        M::Crc32 => crc32(m)?,
        M::Adcx => add_carry(m, CF)?,
        M::Adox => add_carry(m, OF)?,
        _ => return execute_bmi(m),
    }
    Ok(true)
}

/// The bits that an operand of `size` bytes occupies when it is shifted to the top of 64.
fn mask_top(size: usize) -> u64 {
    mask(size) << (64 - 8 * size)
}

fn execute_bmi(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Andn => and_not(m)?,
        M::Bextr => extract_field(m)?,
        M::Blsi => lowest(m, |a| a & a.wrapping_neg(), |a| a != 0)?,
        M::Blsr => lowest(m, |a| a & a.wrapping_sub(1), |a| a == 0)?,
        M::Blsmsk => lowest(m, |a| a ^ a.wrapping_sub(1), |a| a == 0)?,
        M::Bzhi => zero_high(m)?,
        M::Mulx => multiply(m)?,
        M::Pdep => deposit_or_extract(m, deposit)?,
        M::Pext => deposit_or_extract(m, extract)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// BT and, with a change, BTS, BTR and BTC. A bit number in a register reaches beyond a memory operand.
fn bit_test(m: &mut Machine, change: Option<fn(u64, u64) -> u64>) -> Step {
    let size = m.size(0)?;
    let bits = 8 * size as u64;
    let number = m.read(1, size)?;
    let bit = 1 << (number % bits);
    let answer = move |old: u64| flag(old & bit != 0, CF);
    if m.instruction.op_kind(0) != OpKind::Memory {
        let old = match change {
            None => m.read(0, size)?,
            Some(change) => m.modify(size, 0, |old| (change(old, bit), 0))?,
        };
        m.set_flags(CF, answer(old));
        return Ok(());
    }
    let mut address = m.address()?;
    if m.instruction.op_kind(1) == OpKind::Register {
        let units = sign_extend(number, size) >> bits.trailing_zeros();
        let offset = units.wrapping_mul(i64::try_from(size).expect("at most 8"));
        address.linear = offset_address(m, offset)?;
    }
    let old = match change {
        None => m.load(address, size)?,
        Some(change) => m.modify_at(address, size, 0, |old| (change(old, bit), 0))?,
    };
    m.set_flags(CF, answer(old));
    Ok(())
}

/// The memory operand's linear address with an offset that wraps as the effective address does.
fn offset_address(m: &Machine, offset: i64) -> Step<u64> {
    let effective = m.effective_address()?.wrapping_add(offset.cast_unsigned());
    let effective = if m.has_32_bit_address() { effective & mask(4) } else { effective };
    Ok(effective.wrapping_add(m.segment_base()))
}

/// BSF and BSR. With a zero source the destination keeps its value (AMD documents it, Intel does it).
fn scan(m: &mut Machine, find: fn(u64) -> u32) -> Step {
    let size = m.size(0)?;
    let source = m.read(1, size)?;
    if source != 0 {
        m.write(0, size, find(source).into())?;
    }
    m.set_flags(ZF, flag(source == 0, ZF));
    Ok(())
}

fn population_count(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let source = m.read(1, size)?;
    m.write(0, size, source.count_ones().into())?;
    m.set_arithmetic(flag(source == 0, ZF));
    Ok(())
}

fn count_zeros(m: &mut Machine, count: fn(u64, usize) -> u32) -> Step {
    let size = m.size(0)?;
    let source = m.read(1, size)?;
    let result = u64::from(count(source, size));
    m.write(0, size, result)?;
    m.set_flags(CF | ZF, flag(source == 0, CF) | flag(result == 0, ZF));
    Ok(())
}

/// BSWAP; of 16 bits, for which it is undefined, it makes 0 as processors do.
fn swap_bytes(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let value = m.read(0, size)?;
    let swapped = if size == 2 { 0 } else { value.swap_bytes() >> (64 - 8 * size) };
    m.write(0, size, swapped)
}

fn crc32(m: &mut Machine) -> Step {
    let (to, from) = (m.size(0)?, m.size(1)?);
    let source = m.read(1, from)?;
    let mut crc = m.read(0, 4)? & mask(4);
    for byte in &source.to_le_bytes()[..from] {
        crc ^= u64::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ flag(crc & 1 != 0, CASTAGNOLI);
        }
    }
    m.write(0, to, crc)
}

/// ADCX and ADOX: an addition with carry through one flag alone.
fn add_carry(m: &mut Machine, carry: u64) -> Step {
    let size = m.size(0)?;
    let (a, b) = (m.read(0, size)?, m.read(1, size)?);
    let sum = u128::from(a) + u128::from(b) + u128::from(m.cpu.registers.rflags & carry != 0);
    m.write(0, size, a.wrapping_add(b).wrapping_add(u64::from(m.cpu.registers.rflags & carry != 0)))?;
    m.set_flags(carry, flag(sum >> (8 * size) != 0, carry));
    Ok(())
}

fn and_not(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let result = !m.read(1, size)? & m.read(2, size)?;
    m.write(0, size, result)?;
    m.set_arithmetic(sign_zero_parity(result, size));
    Ok(())
}

fn extract_field(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let (source, control) = (m.read(1, size)?, m.read(2, size)?);
    let (start, length) = (control & 0xff, control >> 8 & 0xff);
    let shifted = if start < 64 { source >> start } else { 0 };
    let result = if length < 64 { shifted & ((1 << length) - 1) } else { shifted };
    m.write(0, size, result)?;
    m.set_arithmetic(flag(result == 0, ZF));
    Ok(())
}

/// BLSI, BLSR and BLSMSK; `carries` computes CF from the source.
fn lowest(m: &mut Machine, compute: fn(u64) -> u64, carries: fn(u64) -> bool) -> Step {
    let size = m.size(0)?;
    let source = m.read(1, size)?;
    let result = compute(source) & mask(size);
    m.write(0, size, result)?;
    let flags = flag(result & sign_bit(size) != 0, SF) | flag(result == 0, ZF);
    m.set_arithmetic(flag(carries(source), CF) | flags);
    Ok(())
}

fn zero_high(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let (source, index) = (m.read(1, size)?, m.read(2, size)? & 0xff);
    let is_beyond = index >= 8 * size as u64;
    let result = if is_beyond { source } else { source & ((1 << index) - 1) };
    m.write(0, size, result)?;
    let flags = flag(result & sign_bit(size) != 0, SF) | flag(result == 0, ZF);
    m.set_arithmetic(flag(is_beyond, CF) | flags);
    Ok(())
}

/// MULX: RDX times operand 2; the low half goes to operand 1, then the high half to operand 0.
fn multiply(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let product = u128::from(m.general(RDX, size)) * u128::from(m.read(2, size)?);
    let bytes = product.to_le_bytes();
    m.write(1, size, super::operand::from_bytes(&bytes[..size]))?;
    m.write(0, size, super::operand::from_bytes(&bytes[size..2 * size]))
}

fn deposit_or_extract(m: &mut Machine, compute: fn(u64, u64) -> u64) -> Step {
    let size = m.size(0)?;
    let (source, selection) = (m.read(1, size)?, m.read(2, size)?);
    m.write(0, size, compute(source, selection))
}

/// PDEP: the source's low bits, in order, to the places that `selection` names.
fn deposit(mut source: u64, mut selection: u64) -> u64 {
    let mut result = 0;
    while selection != 0 {
        let place = selection & selection.wrapping_neg();
        result |= flag(source & 1 != 0, place);
        source >>= 1;
        selection ^= place;
    }
    result
}

/// PEXT: the source's bits from the places that `selection` names, packed into the low bits.
fn extract(source: u64, mut selection: u64) -> u64 {
    let (mut result, mut next) = (0, 1u64);
    while selection != 0 {
        let place = selection & selection.wrapping_neg();
        result |= flag(source & place != 0, next);
        next = next.wrapping_shl(1);
        selection ^= place;
    }
    result
}
