//! Data movement and arithmetic on general registers and memory: MOV to XADD, MUL to IDIV, the sign extensions, and the
//! compare-and-exchange family.

use iced_x86::{Mnemonic, OpKind, Register};

use super::Outcome;
use super::flags::{self, AF, ARITHMETIC, CF, OF, PF, SF, ZF, flag, mask, sign_bit, sign_extend, sign_zero_parity};
use super::operand::{Machine, Step};
use crate::registers::{RAX, RBX, RCX, RDX};

/// The divide error.
const DIVIDE_ERROR: Outcome = Outcome::fault(0);

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Mov => mov(m)?,
        M::Movzx => move_extended(m, false)?,
        M::Movsx | M::Movsxd => move_extended(m, true)?,
        M::Lea => lea(m)?,
        M::Add => binary(m, |a, b, _, size| flags::add(a, b, false, size))?,
        M::Adc => binary(m, flags::add)?,
        M::Sub => binary(m, |a, b, _, size| flags::subtract(a, b, false, size))?,
        M::Sbb => binary(m, flags::subtract)?,
        M::And => binary(m, |a, b, _, size| flags::logic(a & b, size))?,
        M::Or => binary(m, |a, b, _, size| flags::logic(a | b, size))?,
        M::Xor => binary(m, |a, b, _, size| flags::logic(a ^ b, size))?,
        M::Cmp => compare(m, |a, b, size| flags::subtract(a, b, false, size))?,
        M::Test => compare(m, |a, b, size| flags::logic(a & b, size))?,
        M::Inc => unary(m, ARITHMETIC & !CF, |a, size| flags::add(a, 1, false, size))?,
        M::Dec => unary(m, ARITHMETIC & !CF, |a, size| flags::subtract(a, 1, false, size))?,
        M::Neg => unary(m, ARITHMETIC, |a, size| flags::subtract(0, a, false, size))?,
        M::Not => unary(m, 0, |a, size| (!a & mask(size), 0))?,
        M::Movbe => move_swapped(m)?,
        M::Movnti => mov(m)?,
        M::Xlatb => xlat(m)?,
        M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => extend_accumulator(m),
        _ => return execute_rare(m),
    }
    Ok(true)
}

fn execute_rare(m: &mut Machine) -> Step<bool> {
    use Mnemonic as M;
    match m.instruction.mnemonic() {
        M::Imul if m.instruction.op_count() == 1 => multiply(m, true)?,
        M::Imul => multiply_truncated(m)?,
        M::Mul => multiply(m, false)?,
        M::Div => divide(m)?,
        M::Idiv => divide_signed(m)?,
        M::Xchg => exchange(m)?,
        M::Xadd => exchange_add(m)?,
        M::Cmpxchg => compare_exchange(m)?,
        M::Cmpxchg8b => compare_exchange_pair(m, 4)?,
        M::Cmpxchg16b => compare_exchange_pair(m, 8)?,
        _ => return Ok(false),
    }
    Ok(true)
}

fn mov(m: &mut Machine) -> Step {
    if let Some(selector) = selector(m, 1) {
        // A register takes the selector zero-extended, memory takes two bytes.
        let size = if m.instruction.op_kind(0) == OpKind::Memory { 2 } else { m.size(0)? };
        return m.write(0, size, selector);
    }
    let size = m.size(0)?;
    let value = m.read(1, size)?;
    m.write(0, size, value)
}

/// The selector that an operand names, if it is a segment register.
pub(super) fn selector(m: &Machine, operand: u32) -> Option<u64> {
    if m.instruction.op_kind(operand) != OpKind::Register {
        return None;
    }
    let system = &m.cpu.system;
    let segment = match m.instruction.op_register(operand) {
        Register::ES => system.es,
        Register::CS => system.cs,
        Register::SS => system.ss,
        Register::DS => system.ds,
        Register::FS => system.fs,
        Register::GS => system.gs,
        _ => return None,
    };
    Some(segment.selector.into())
}

fn move_extended(m: &mut Machine, is_signed: bool) -> Step {
    let (to, from) = (m.size(0)?, m.size(1)?);
    let value = m.read(1, from)?;
    m.write(0, to, if is_signed { sign_extend(value, from).cast_unsigned() } else { value })
}

fn move_swapped(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let value = m.read(1, size)?;
    m.write(0, size, value.swap_bytes() >> (64 - 8 * size))
}

fn lea(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let address = m.effective_address()?;
    m.write(0, size, address & mask(size))
}

fn xlat(m: &mut Machine) -> Step {
    let address = m.address()?;
    let value = m.load(address, 1)?;
    m.set_register(Register::AL, value)
}

fn binary(m: &mut Machine, compute: fn(u64, u64, bool, usize) -> (u64, u64)) -> Step {
    let size = m.size(0)?;
    let source = m.read(1, size)?;
    let carry = m.cpu.registers.rflags & CF != 0;
    m.modify(size, ARITHMETIC, |old| compute(old, source, carry, size))?;
    Ok(())
}

fn compare(m: &mut Machine, compute: fn(u64, u64, usize) -> (u64, u64)) -> Step {
    let size = m.size(0)?;
    let (a, b) = (m.read(0, size)?, m.read(1, size)?);
    m.set_arithmetic(compute(a, b, size).1);
    Ok(())
}

fn unary(m: &mut Machine, which: u64, compute: fn(u64, usize) -> (u64, u64)) -> Step {
    let size = m.size(0)?;
    m.modify(size, which, |old| compute(old, size))?;
    Ok(())
}

/// CBW, CWDE, CDQE (into the accumulator) and CWD, CDQ, CQO (into RDX).
fn extend_accumulator(m: &mut Machine) {
    use Mnemonic as M;
    let (from, to, into_rdx) = match m.instruction.mnemonic() {
        M::Cbw => (1, 2, false),
        M::Cwde => (2, 4, false),
        M::Cdqe => (4, 8, false),
        M::Cwd => (2, 2, true),
        M::Cdq => (4, 4, true),
        _ => (8, 8, true),
    };
    let extended = sign_extend(m.general(RAX, from), from);
    if into_rdx {
        m.set_general(RDX, to, (extended >> 63).cast_unsigned());
    } else {
        m.set_general(RAX, to, extended.cast_unsigned());
    }
}

/// The low and the next `size` bytes of a double-width product or dividend.
fn halves(value: u128, size: usize) -> (u64, u64) {
    let part = |wide: u128| super::operand::from_bytes(&wide.to_le_bytes()[..8]) & mask(size);
    (part(value), part(value >> (8 * size)))
}

/// MUL and IMUL with one operand: the product of the accumulator goes to AX or to RDX:RAX.
fn multiply(m: &mut Machine, is_signed: bool) -> Step {
    let size = m.size(0)?;
    let (a, b) = (m.general(RAX, size), m.read(0, size)?);
    let product = if is_signed {
        (i128::from(sign_extend(a, size)) * i128::from(sign_extend(b, size))).cast_unsigned()
    } else {
        u128::from(a) * u128::from(b)
    };
    let (low, high) = halves(product, size);
    let sign = if is_signed && low & sign_bit(size) != 0 { mask(size) } else { 0 };
    m.set_arithmetic(flag(high != sign, CF | OF) | sign_zero_parity(low, size));
    set_pair(m, size, low, high);
    Ok(())
}

/// Sets AX, or the pair of the accumulator and RDX.
fn set_pair(m: &mut Machine, size: usize, low: u64, high: u64) {
    if size == 1 {
        m.set_general(RAX, 2, low | high << 8);
    } else {
        m.set_general(RAX, size, low);
        m.set_general(RDX, size, high);
    }
}

/// IMUL with two or three operands.
fn multiply_truncated(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let first = if m.instruction.op_count() == 3 { 1 } else { 0 };
    let (a, b) = (m.read(first, size)?, m.read(first + 1, size)?);
    let product = i128::from(sign_extend(a, size)) * i128::from(sign_extend(b, size));
    let (low, _) = halves(product.cast_unsigned(), size);
    let fits = i128::from(sign_extend(low, size)) == product;
    m.write(0, size, low)?;
    m.set_arithmetic(flag(!fits, CF | OF) | sign_zero_parity(low, size));
    Ok(())
}

/// What DIV and IDIV divide: AX, or RDX:RAX.
fn dividend(m: &Machine, size: usize) -> u128 {
    if size == 1 {
        return m.general(RAX, 2).into();
    }
    u128::from(m.general(RDX, size)) << (8 * size) | u128::from(m.general(RAX, size))
}

fn divide(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let divisor = u128::from(m.read(0, size)?);
    let dividend = dividend(m, size);
    let quotient = dividend.checked_div(divisor).ok_or(DIVIDE_ERROR)?;
    if quotient > u128::from(mask(size)) {
        return Err(DIVIDE_ERROR);
    }
    set_pair(m, size, halves(quotient, size).0, halves(dividend % divisor, size).0);
    Ok(())
}

fn divide_signed(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let divisor = i128::from(sign_extend(m.read(0, size)?, size));
    let unused = 128 - 16 * size;
    let dividend = (dividend(m, size) << unused).cast_signed() >> unused;
    // Overflows (i128::MIN / -1) as well as a zero divisor give None.
    let quotient = dividend.checked_div(divisor).ok_or(DIVIDE_ERROR)?;
    let (low, _) = halves(quotient.cast_unsigned(), size);
    if i128::from(sign_extend(low, size)) != quotient {
        return Err(DIVIDE_ERROR);
    }
    set_pair(m, size, low, halves((dividend % divisor).cast_unsigned(), size).0);
    Ok(())
}

/// XCHG; with memory it is locked, prefix or not.
fn exchange(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let (memory, register) = if m.instruction.op_kind(1) == OpKind::Memory { (1, 0) } else { (0, 1) };
    let register = m.instruction.op_register(register);
    let new = m.register(register)?;
    if m.instruction.op_kind(memory) == OpKind::Memory {
        let address = m.address()?;
        let guess = m.load(address, size)?;
        let old = m.modify_locked(address, size, 0, guess, |_| (new, 0))?;
        return m.set_register(register, old);
    }
    let other = m.instruction.op_register(memory);
    let old = m.register(other)?;
    m.set_register(other, new)?;
    m.set_register(register, old)
}

fn exchange_add(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let source = m.instruction.op_register(1);
    let addend = m.register(source)?;
    if m.instruction.op_kind(0) == OpKind::Memory {
        let old = m.modify(size, ARITHMETIC, |old| flags::add(old, addend, false, size))?;
        return m.set_register(source, old);
    }
    let old = m.read(0, size)?;
    let (sum, flags) = flags::add(old, addend, false, size);
    // The destination is written last: with twice the same register the sum stays.
    m.set_register(source, old)?;
    m.write(0, size, sum)?;
    m.set_arithmetic(flags);
    Ok(())
}

fn compare_exchange(m: &mut Machine) -> Step {
    let size = m.size(0)?;
    let (expected, new) = (m.general(RAX, size), m.read(1, size)?);
    let old = if m.instruction.has_lock_prefix() {
        let address = m.address()?;
        let found = m.compare_exchange(address, size, expected.into(), new.into())?;
        super::operand::from_bytes(&found.to_le_bytes()[..size])
    } else {
        let old = m.read(0, size)?;
        // Memory is written in either case; of a register that differs, the upper half stays too.
        if old == expected || m.instruction.op_kind(0) == OpKind::Memory {
            m.write(0, size, if old == expected { new } else { old })?;
        }
        old
    };
    if old != expected {
        m.set_general(RAX, size, old);
    }
    m.set_arithmetic(flags::subtract(expected, old, false, size).1);
    Ok(())
}

/// CMPXCHG8B and CMPXCHG16B: RDX:RAX against memory, RCX:RBX to store; `half` is 4 or 8 bytes.
fn compare_exchange_pair(m: &mut Machine, half: usize) -> Step {
    let address = m.address()?;
    if half == 8 {
        m.check_alignment(address, 16)?;
    }
    let join = |high: u64, low: u64| u128::from(high) << (8 * half) | u128::from(low);
    let expected = join(m.general(RDX, half), m.general(RAX, half));
    let new = join(m.general(RCX, half), m.general(RBX, half));
    let old = m.compare_exchange(address, 2 * half, expected, new)?;
    if old != expected {
        let (low, high) = halves(old, half);
        m.set_general(RAX, half, low);
        m.set_general(RDX, half, high);
    }
    m.set_flags(ZF, flag(old == expected, ZF));
    Ok(())
}

/// LAHF's and SAHF's flags.
pub(super) const LOW_FLAGS: u64 = SF | ZF | AF | PF | CF;
