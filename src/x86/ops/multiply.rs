//! Multiplication and division, of 4 and 8 bytes.

use super::super::block::{Block, Handler, Op};
use super::super::engine::Engine;
use super::super::lazy::Lazy;
use super::int::Int;
use super::{Address, Indexed, find, next, redo, reg, set};

/// Byte offset of RDX.
const RDX: u8 = 2 * 8;

/// Flags of a product of which `low` is kept.
#[inline(always)]
fn product_flags<T: Int>(flags: &mut Lazy, low: T, overflows: bool) {
    *flags = Lazy { result: low.sx(), low: 0, high: u32::from(overflows) << 31 };
}

#[inline(always)]
fn signed_product<T: Int, const QUIET: bool>(flags: &mut Lazy, a: T, b: T) -> T {
    if QUIET {
        return T::cut(a.zx().wrapping_mul(b.zx()));
    }
    let product = i128::from(a.sx().cast_signed()) * i128::from(b.sx().cast_signed());
    let low = T::cut(product as u64);
    product_flags(flags, low, i128::from(low.sx().cast_signed()) != product);
    low
}

/// IMUL r1, r2.
unsafe fn imul_rr<T: Int, const QUIET: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    let (a, b) = (reg::<T>(e, (*op).r1), reg::<T>(e, (*op).r2));
    let r = signed_product::<T, QUIET>(&mut e.flags, a, b);
    set(e, (*op).r1, r);
    next!(e, op)
}

/// IMUL r1, r2, imm.
unsafe fn imul_rri<T: Int, const QUIET: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    let b = T::cut(i64::from((*op).imm).cast_unsigned());
    let a = reg::<T>(e, (*op).r2);
    let r = signed_product::<T, QUIET>(&mut e.flags, a, b);
    set(e, (*op).r1, r);
    next!(e, op)
}

/// IMUL r1, [memory].
unsafe fn imul_rm<T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let from = find!(T, false, e, op, Indexed::of(e, op));
    let a = reg::<T>(e, (*op).r1);
    let r = signed_product::<T, false>(&mut e.flags, a, from.read_unaligned());
    set(e, (*op).r1, r);
    next!(e, op)
}

/// IMUL with two or three operands: `form` 0 is a register, 1 an immediate, 2 memory.
pub(in super::super) fn truncated(size: usize, form: u8) -> Option<Handler> {
    let handler: Handler = match (size, form) {
        (4, 0) => imul_rr::<u32, false>,
        (8, 0) => imul_rr::<u64, false>,
        (4, 1) => imul_rri::<u32, false>,
        (8, 1) => imul_rri::<u64, false>,
        (4, 2) => imul_rm::<u32>,
        (8, 2) => imul_rm::<u64>,
        _ => return None,
    };
    Some(handler)
}

/// IMUL of registers (`form` 0) or of a register and an immediate, without flags.
pub(in super::super) fn truncated_quiet(size: usize, form: u8) -> Option<Handler> {
    match (size, form) {
        (4, 0) => Some(imul_rr::<u32, true>),
        (8, 0) => Some(imul_rr::<u64, true>),
        (4, 1) => Some(imul_rri::<u32, true>),
        (8, 1) => Some(imul_rri::<u64, true>),
        _ => None,
    }
}

/// MUL and IMUL of the accumulator and r1.
unsafe fn wide<T: Int, const SIGNED: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    let (a, b) = (reg::<T>(e, 0), reg::<T>(e, (*op).r1));
    let product = if SIGNED {
        (i128::from(a.sx().cast_signed()) * i128::from(b.sx().cast_signed())).cast_unsigned()
    } else {
        u128::from(a.zx()) * u128::from(b.zx())
    };
    let (low, high) = (T::cut(product as u64), T::cut((product >> T::BITS) as u64));
    let sign = if SIGNED { T::cut((low.sx().cast_signed() >> 63).cast_unsigned()) } else { T::cut(0) };
    product_flags(&mut e.flags, low, high != sign);
    set(e, 0, low);
    set(e, RDX, high);
    next!(e, op)
}

/// MUL and IMUL with one operand.
pub(in super::super) fn product(size: usize, is_signed: bool) -> Option<Handler> {
    let handler: Handler = match (size, is_signed) {
        (4, false) => wide::<u32, false>,
        (8, false) => wide::<u64, false>,
        (4, true) => wide::<u32, true>,
        (8, true) => wide::<u64, true>,
        _ => return None,
    };
    Some(handler)
}

/// DIV of EDX:EAX.
unsafe fn div32(e: &mut Engine, op: *const Op) -> *mut Block {
    let divisor = u64::from(reg::<u32>(e, (*op).r1));
    let dividend = u64::from(reg::<u32>(e, RDX)) << 32 | u64::from(reg::<u32>(e, 0));
    if divisor == 0 || dividend / divisor > u64::from(u32::MAX) {
        return redo(e, op);
    }
    set(e, 0, u32::cut(dividend / divisor));
    set(e, RDX, u32::cut(dividend % divisor));
    next!(e, op)
}

/// DIV of RDX:RAX, where RDX is zero.
unsafe fn div64(e: &mut Engine, op: *const Op) -> *mut Block {
    let divisor = reg::<u64>(e, (*op).r1);
    if divisor == 0 || reg::<u64>(e, RDX) != 0 {
        return redo(e, op);
    }
    let dividend = reg::<u64>(e, 0);
    set(e, 0, dividend / divisor);
    set(e, RDX, dividend % divisor);
    next!(e, op)
}

/// IDIV of EDX:EAX.
unsafe fn idiv32(e: &mut Engine, op: *const Op) -> *mut Block {
    let divisor = reg::<u32>(e, (*op).r1).sx().cast_signed();
    let dividend = (u64::from(reg::<u32>(e, RDX)) << 32 | u64::from(reg::<u32>(e, 0))).cast_signed();
    let quotient = dividend.checked_div(divisor).filter(|quotient| i32::try_from(*quotient).is_ok());
    let Some(quotient) = quotient else { return redo(e, op) };
    set(e, 0, u32::cut(quotient.cast_unsigned()));
    set(e, RDX, u32::cut((dividend % divisor).cast_unsigned()));
    next!(e, op)
}

/// IDIV of RDX:RAX, where RDX is the sign of RAX.
unsafe fn idiv64(e: &mut Engine, op: *const Op) -> *mut Block {
    let divisor = reg::<u64>(e, (*op).r1).cast_signed();
    let dividend = reg::<u64>(e, 0).cast_signed();
    if reg::<u64>(e, RDX).cast_signed() != dividend >> 63 {
        return redo(e, op);
    }
    let Some(quotient) = dividend.checked_div(divisor) else { return redo(e, op) };
    set(e, 0, quotient.cast_unsigned());
    set(e, RDX, (dividend % divisor).cast_unsigned());
    next!(e, op)
}

/// DIV and IDIV of a register.
pub(in super::super) fn division(size: usize, is_signed: bool) -> Option<Handler> {
    let handler: Handler = match (size, is_signed) {
        (4, false) => div32,
        (8, false) => div64,
        (4, true) => idiv32,
        (8, true) => idiv64,
        _ => return None,
    };
    Some(handler)
}
