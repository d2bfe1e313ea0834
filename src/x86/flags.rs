//! The arithmetic flags: pure functions that compute a result of 1, 2, 4 or 8 bytes together with CF, PF, AF, ZF, SF
//! and OF as the processor sets them. Operands arrive zero-extended and results leave so.

use iced_x86::ConditionCode;

/// Carry.
pub(super) const CF: u64 = 1;
/// Parity of the low byte.
pub(super) const PF: u64 = 1 << 2;
/// Carry out of bit 3.
pub(super) const AF: u64 = 1 << 4;
/// Zero.
pub(super) const ZF: u64 = 1 << 6;
/// Sign.
pub(super) const SF: u64 = 1 << 7;
/// Direction of string instructions.
pub(super) const DF: u64 = 1 << 10;
/// Signed overflow.
pub(super) const OF: u64 = 1 << 11;
/// All flags that arithmetic sets.
pub(super) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

/// The bits that an operand of `size` bytes has.
pub(super) const fn mask(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

/// The topmost bit of an operand of `size` bytes.
pub(super) const fn sign_bit(size: usize) -> u64 {
    1 << (8 * size - 1)
}

/// `value`, sign-extended from `size` bytes.
pub(super) const fn sign_extend(value: u64, size: usize) -> i64 {
    let unused = 64 - 8 * size;
    (value << unused).cast_signed() >> unused
}

/// `flag` if `condition` holds, else nothing.
pub(super) const fn flag(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

/// SF, ZF and PF of a result.
pub(super) const fn sign_zero_parity(value: u64, size: usize) -> u64 {
    flag(value & sign_bit(size) != 0, SF) | flag(value == 0, ZF) | flag((value & 0xff).count_ones() & 1 == 0, PF)
}

/// `a + b + carry` and its flags.
pub(super) const fn add(a: u64, b: u64, carry: bool, size: usize) -> (u64, u64) {
    let result = a.wrapping_add(b).wrapping_add(carry as u64) & mask(size);
    let carries = (a & b) | ((a | b) & !result);
    let overflow = (a ^ result) & (b ^ result);
    (result, carry_flags(a ^ b ^ result, carries, overflow, size) | sign_zero_parity(result, size))
}

/// `a - b - borrow` and its flags.
pub(super) const fn subtract(a: u64, b: u64, borrow: bool, size: usize) -> (u64, u64) {
    let result = a.wrapping_sub(b).wrapping_sub(borrow as u64) & mask(size);
    let borrows = (!a & b) | ((!a | b) & result);
    let overflow = (a ^ b) & (a ^ result);
    (result, carry_flags(a ^ b ^ result, borrows, overflow, size) | sign_zero_parity(result, size))
}

/// AF, CF and OF from the vectors of carries into and out of each bit.
const fn carry_flags(into: u64, out: u64, overflow: u64, size: usize) -> u64 {
    (into & AF) | flag(out & sign_bit(size) != 0, CF) | flag(overflow & sign_bit(size) != 0, OF)
}

/// Flags of AND, OR, XOR and TEST: CF and OF clear (AF, undefined, too).
pub(super) const fn logic(result: u64, size: usize) -> (u64, u64) {
    (result, sign_zero_parity(result, size))
}

/// Whether a condition holds under these flags. [`ConditionCode::None`] never does.
pub(super) fn holds(condition: ConditionCode, flags: u64) -> bool {
    let set = |bits: u64| flags & bits != 0;
    let less = set(SF) != set(OF);
    match condition {
        ConditionCode::None => false,
        ConditionCode::o => set(OF),
        ConditionCode::no => !set(OF),
        ConditionCode::b => set(CF),
        ConditionCode::ae => !set(CF),
        ConditionCode::e => set(ZF),
        ConditionCode::ne => !set(ZF),
        ConditionCode::be => set(CF | ZF),
        ConditionCode::a => !set(CF | ZF),
        ConditionCode::s => set(SF),
        ConditionCode::ns => !set(SF),
        ConditionCode::p => set(PF),
        ConditionCode::np => !set(PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || set(ZF),
        ConditionCode::g => !less && !set(ZF),
    }
}
