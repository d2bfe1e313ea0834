//! Shifts and rotates of registers, by an immediate (not zero, below the width) or by CL.

use super::super::block::{Block, Handler, Op};
use super::super::engine::Engine;
use super::super::lazy::Lazy;
use super::alu::{Quiet, sizes};
use super::int::Int;
use super::{next, reg, set};

/// Byte offset of CL.
const CL: u8 = 8;

/// What is computed of a value and a count of 1 to its width minus 1.
pub(in super::super) trait Shift {
    fn run<T: Int>(flags: &mut Lazy, value: T, count: u32) -> T;
}

pub(in super::super) struct Shl;
pub(in super::super) struct Shr;
pub(in super::super) struct Sar;
pub(in super::super) struct Rol;
pub(in super::super) struct Ror;

/// Sets the flags of a shift's result, with CF and OF.
#[inline(always)]
fn shifted<T: Int>(flags: &mut Lazy, r: T, carry: bool, overflow: bool) -> T {
    *flags = Lazy { result: r.sx(), low: 0, high: 0 };
    flags.set_carry_overflow(carry, overflow);
    r
}

#[inline(always)]
fn is_negative<T: Int>(value: T) -> bool {
    value.sx() >> 63 != 0
}

impl Shift for Shl {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Lazy, value: T, count: u32) -> T {
        let r = T::cut(value.zx() << count);
        let carry = value.zx() >> (T::BITS - count) & 1 != 0;
        shifted(flags, r, carry, is_negative(r) != carry)
    }
}

impl Shift for Shr {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Lazy, value: T, count: u32) -> T {
        let r = T::cut(value.zx() >> count);
        shifted(flags, r, value.zx() >> (count - 1) & 1 != 0, is_negative(value))
    }
}

impl Shift for Sar {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Lazy, value: T, count: u32) -> T {
        let r = T::cut((value.sx().cast_signed() >> count).cast_unsigned());
        shifted(flags, r, value.zx() >> (count - 1) & 1 != 0, false)
    }
}

impl Shift for Rol {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Lazy, value: T, count: u32) -> T {
        let r = T::cut(value.zx() << count | value.zx() >> (T::BITS - count));
        let carry = r.zx() & 1 != 0;
        flags.set_carry_overflow(carry, is_negative(r) != carry);
        r
    }
}

impl Shift for Ror {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Lazy, value: T, count: u32) -> T {
        let r = T::cut(value.zx() >> count | value.zx() << (T::BITS - count));
        let carry = is_negative(r);
        let next = r.zx() >> (T::BITS - 2) & 1 != 0;
        flags.set_carry_overflow(carry, carry != next);
        r
    }
}

impl<S: Shift> Shift for Quiet<S> {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Lazy, value: T, count: u32) -> T {
        let mut unused = *flags;
        S::run(&mut unused, value, count)
    }
}

/// The count of a shift by an immediate.
#[inline(always)]
pub(super) unsafe fn shift_count<T: Int>(op: *const Op) -> u32 {
    ((*op).imm.cast_unsigned() & (T::BITS - 1)).max(1)
}

unsafe fn by_immediate<S: Shift, T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let a = reg::<T>(e, (*op).r1);
    let r = S::run(&mut e.flags, a, shift_count::<T>(op));
    set(e, (*op).r1, r);
    next!(e, op)
}

/// Of a register, to another.
unsafe fn by_immediate_apart<S: Shift, T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let a = reg::<T>(e, (*op).base);
    let r = S::run(&mut e.flags, a, shift_count::<T>(op));
    set(e, (*op).r1, r);
    next!(e, op)
}

unsafe fn by_cl<S: Shift, T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let count = u32::from(reg::<u8>(e, CL)) & (T::BITS - 1);
    let value = reg::<T>(e, (*op).r1);
    // With a count of zero only the upper half of a 32-bit register changes.
    let r = if count == 0 { value } else { S::run(&mut e.flags, value, count) };
    set(e, (*op).r1, r);
    next!(e, op)
}

/// The functions for a shift, by [`size_index`](super::alu::size_index).
pub(in super::super) struct Functions {
    /// By an immediate of 1 to the width minus 1.
    pub immediate: [Handler; 4],
    /// By CL; only of 4 and 8 bytes, whose width is the count's modulus.
    pub by_cl: [Option<Handler>; 4],
    /// The same without flags.
    pub by_cl_quiet: [Option<Handler>; 4],
    /// Others for a shift by an immediate, of 4 and 8 bytes.
    pub variants: [Option<Variants>; 4],
}

/// The functions for a shift by an immediate, but the plain one.
pub(in super::super) struct Variants {
    /// Without flags.
    pub quiet: Handler,
    /// Of a register to another, with flags and without.
    pub apart: [Handler; 2],
}

pub(in super::super) const fn functions<S: Shift>() -> Functions {
    macro_rules! variants {
        ($int:ty) => {
            Some(Variants {
                quiet: by_immediate::<Quiet<S>, $int>,
                apart: [by_immediate_apart::<S, $int>, by_immediate_apart::<Quiet<S>, $int>],
            })
        };
    }
    Functions {
        immediate: sizes!(by_immediate, S;),
        by_cl: [None, None, Some(by_cl::<S, u32>), Some(by_cl::<S, u64>)],
        by_cl_quiet: [None, None, Some(by_cl::<Quiet<S>, u32>), Some(by_cl::<Quiet<S>, u64>)],
        variants: [None, None, variants!(u32), variants!(u64)],
    }
}

/// SHLX, SHRX and SARX: r1 = r2 shifted by the register at byte offset `base`, and no flags.
unsafe fn flagless<T: Int, const KIND: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let count = u32::from(reg::<u8>(e, (*op).base)) & (T::BITS - 1);
    let value = reg::<T>(e, (*op).r2);
    let r = match KIND {
        0 => T::cut(value.zx() << count),
        1 => T::cut(value.zx() >> count),
        _ => T::cut((value.sx().cast_signed() >> count).cast_unsigned()),
    };
    set(e, (*op).r1, r);
    next!(e, op)
}

/// RORX.
unsafe fn rorx<T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let count = (*op).imm.cast_unsigned() & (T::BITS - 1);
    let value = reg::<T>(e, (*op).r2).zx();
    let left = (T::BITS - count) & (T::BITS - 1);
    set(e, (*op).r1, T::cut(value >> count | value << left));
    next!(e, op)
}

/// SHLX (0), SHRX (1), SARX (2).
pub(in super::super) fn without_flags(kind: u8, size: usize) -> Handler {
    match (kind, size) {
        (0, 4) => flagless::<u32, 0>,
        (0, _) => flagless::<u64, 0>,
        (1, 4) => flagless::<u32, 1>,
        (1, _) => flagless::<u64, 1>,
        (_, 4) => flagless::<u32, 2>,
        (_, _) => flagless::<u64, 2>,
    }
}

/// RORX.
pub(in super::super) fn rotate_without_flags(size: usize) -> Handler {
    if size == 4 { rorx::<u32> } else { rorx::<u64> }
}
