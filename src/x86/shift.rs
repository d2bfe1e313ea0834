//! Shifts and rotates, with the flags as the manuals and measured processors set them: nothing changes when the masked
//! count is zero, and OF, undefined for counts above one, follows the formula for one.

use iced_x86::Mnemonic;

use super::flags::{ARITHMETIC, CF, OF, flag, mask, sign_bit, sign_extend, sign_zero_parity};
use super::operand::{Machine, Step};

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Shl | M::Sal => shift(m, ARITHMETIC, shift_left)?,
        M::Shr => shift(m, ARITHMETIC, shift_right)?,
        M::Sar => shift(m, ARITHMETIC, shift_right_signed)?,
        M::Rol => shift(m, CF | OF, rotate_left)?,
        M::Ror => shift(m, CF | OF, rotate_right)?,
        M::Rcl => shift(m, CF | OF, rotate_left_through_carry)?,
        M::Rcr => shift(m, CF | OF, rotate_right_through_carry)?,
        M::Shld => shift_double(m, double_left)?,
        M::Shrd => shift_double(m, double_right)?,
        M::Shlx => shift_without_flags(m, |value, count, size| value << count & mask(size))?,
        M::Shrx => shift_without_flags(m, |value, count, _| value >> count)?,
        M::Sarx => shift_without_flags(m, |value, count, size| (sign_extend(value, size) >> count).cast_unsigned())?,
        M::Rorx => rotate_without_flags(m)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// A count as the processor masks it.
fn masked_count(count: u64, size: usize) -> u64 {
    count & if size == 8 { 0x3f } else { 0x1f }
}

/// Computes result and flags from the value, a non-zero count, the old CF and the size.
type Shift = fn(u64, u64, bool, usize) -> (u64, u64);

fn shift(m: &mut Machine, which: u64, compute: Shift) -> Step {
    let size = m.size(0)?;
    let count = masked_count(m.read(1, 1)?, size);
    let carry = m.cpu.registers.rflags & CF != 0;
    if count == 0 {
        // The destination is still written: a 32-bit register's upper half becomes zero.
        m.modify(size, 0, |old| (old, 0))?;
    } else {
        m.modify(size, which, |old| compute(old, count, carry, size))?;
    }
    Ok(())
}

fn is_negative(value: u64, size: usize) -> bool {
    value & sign_bit(size) != 0
}

fn shift_left(value: u64, count: u64, _carry: bool, size: usize) -> (u64, u64) {
    let wide = u128::from(value) << count;
    let carry = wide >> (8 * size) & 1 != 0;
    let result = value << count & mask(size);
    (result, flag(carry, CF) | flag(is_negative(result, size) != carry, OF) | sign_zero_parity(result, size))
}

fn shift_right(value: u64, count: u64, _carry: bool, size: usize) -> (u64, u64) {
    let carry = value >> (count - 1) & 1 != 0;
    let result = value >> count;
    (result, flag(carry, CF) | flag(is_negative(value, size), OF) | sign_zero_parity(result, size))
}

fn shift_right_signed(value: u64, count: u64, _carry: bool, size: usize) -> (u64, u64) {
    let signed = sign_extend(value, size);
    let carry = signed >> (count - 1) & 1 != 0;
    let result = (signed >> count).cast_unsigned() & mask(size);
    (result, flag(carry, CF) | sign_zero_parity(result, size))
}

/// `value` rotated left by less than its width.
fn rotated(value: u64, left: u64, size: usize) -> u64 {
    let bits = 8 * size as u64;
    if left == 0 { value } else { (value << left | value >> (bits - left)) & mask(size) }
}

fn rotate_left(value: u64, count: u64, _carry: bool, size: usize) -> (u64, u64) {
    let result = rotated(value, count % (8 * size as u64), size);
    let carry = result & 1 != 0;
    (result, flag(carry, CF) | flag(is_negative(result, size) != carry, OF))
}

fn rotate_right(value: u64, count: u64, _carry: bool, size: usize) -> (u64, u64) {
    let bits = 8 * size as u64;
    let result = rotated(value, (bits - count % bits) % bits, size);
    let carry = is_negative(result, size);
    let next = result & sign_bit(size) >> 1 != 0;
    (result, flag(carry, CF) | flag(carry != next, OF))
}

fn rotate_left_through_carry(value: u64, count: u64, carry: bool, size: usize) -> (u64, u64) {
    let (mut result, mut carry) = (value, carry);
    for _ in 0..count % (8 * size as u64 + 1) {
        let out = is_negative(result, size);
        result = (result << 1 | u64::from(carry)) & mask(size);
        carry = out;
    }
    (result, flag(carry, CF) | flag(is_negative(result, size) != carry, OF))
}

fn rotate_right_through_carry(value: u64, count: u64, carry: bool, size: usize) -> (u64, u64) {
    let (mut result, mut carry) = (value, carry);
    for _ in 0..count % (8 * size as u64 + 1) {
        let out = result & 1 != 0;
        result = result >> 1 | flag(carry, sign_bit(size));
        carry = out;
    }
    let differ = is_negative(result, size) != (result & sign_bit(size) >> 1 != 0);
    (result, flag(carry, CF) | flag(differ, OF))
}

/// Computes result and flags from the destination, the source, a non-zero count and the size.
type DoubleShift = fn(u64, u64, u64, usize) -> (u64, u64);

fn shift_double(m: &mut Machine, compute: DoubleShift) -> Step {
    let size = m.size(0)?;
    let count = masked_count(m.read(2, 1)?, size);
    let source = m.read(1, size)?;
    if count == 0 {
        m.modify(size, 0, |old| (old, 0))?;
    } else {
        m.modify(size, ARITHMETIC, |old| compute(old, source, count, size))?;
    }
    Ok(())
}

/// Flags of SHLD and SHRD: OF says that the sign changed.
fn double_flags(old: u64, result: u64, carry: bool, size: usize) -> u64 {
    let changed = is_negative(old ^ result, size);
    flag(carry, CF) | flag(changed, OF) | sign_zero_parity(result, size)
}

/// With 16 bits and a count above 16, for which the result is undefined, bits of the destination follow the source.
fn double_left(old: u64, source: u64, count: u64, size: usize) -> (u64, u64) {
    let bits = 8 * size as u64;
    let joined = u128::from(old) << bits | u128::from(source);
    let (result, carry) = if count <= bits {
        (joined << count >> bits, old >> (bits - count))
    } else {
        (joined << (count - bits) | u128::from(old) >> (2 * bits - count), source >> (2 * bits - count))
    };
    let result = low_half(result) & mask(size);
    (result, double_flags(old, result, carry & 1 != 0, size))
}

fn double_right(old: u64, source: u64, count: u64, size: usize) -> (u64, u64) {
    let bits = 8 * size as u64;
    let joined = u128::from(source) << bits | u128::from(old);
    let again = if size == 8 { joined } else { joined | u128::from(old) << (2 * bits) };
    let result = low_half(again >> count) & mask(size);
    let carry = again >> (count - 1) & 1 != 0;
    (result, double_flags(old, result, carry, size))
}

fn low_half(value: u128) -> u64 {
    super::operand::from_bytes(&value.to_le_bytes()[..8])
}

fn shift_without_flags(m: &mut Machine, compute: fn(u64, u64, usize) -> u64) -> Step {
    let size = m.size(0)?;
    let value = m.read(1, size)?;
    let count = masked_count(m.read(2, size)?, size);
    m.write(0, size, compute(value, count, size))
}

fn rotate_without_flags(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let value = m.read(1, size)?;
    let count = masked_count(m.read(2, 1)?, size);
    m.write(0, size, rotate_right(value, count, false, size).0)
}
