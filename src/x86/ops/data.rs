//! Moves: MOV and its extending forms, LEA, XCHG, SETcc and CMOVcc, the sign extensions of the accumulator, and the
//! instructions on single flags.

use super::super::block::{Block, Handler, Op};
use super::super::engine::Engine;
use super::alu::{Forms, by_condition, by_size, holds, sizes};
use super::int::Int;
use super::{Address, Based, Indexed, find, next, reg, set};

/// Byte offset of RDX.
const RDX: u8 = 2 * 8;

unsafe fn mov_rr<T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let value = reg::<T>(e, (*op).r2);
    set(e, (*op).r1, value);
    next!(e, op)
}

unsafe fn mov_ri<T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    set(e, (*op).r1, T::cut(i64::from((*op).imm).cast_unsigned()));
    next!(e, op)
}

/// MOV of 64 bits: the upper half is the displacement.
pub(in super::super) unsafe fn mov_wide(e: &mut Engine, op: *const Op) -> *mut Block {
    let value = u64::from((*op).imm.cast_unsigned()) | u64::from((*op).disp.cast_unsigned()) << 32;
    set(e, (*op).r1, value);
    next!(e, op)
}

unsafe fn mov_rm<T: Int, A: Address>(e: &mut Engine, op: *const Op) -> *mut Block {
    let from = find!(T, false, e, op, A::of(e, op));
    set(e, (*op).r1, from.read_unaligned());
    next!(e, op)
}

unsafe fn mov_mr<T: Int, A: Address>(e: &mut Engine, op: *const Op) -> *mut Block {
    let to = find!(T, true, e, op, A::of(e, op));
    to.write_unaligned(reg::<T>(e, (*op).r2));
    next!(e, op)
}

unsafe fn mov_mi<T: Int, A: Address>(e: &mut Engine, op: *const Op) -> *mut Block {
    let to = find!(T, true, e, op, A::of(e, op));
    to.write_unaligned(T::cut(i64::from((*op).imm).cast_unsigned()));
    next!(e, op)
}

/// The functions for MOV, but of an immediate that needs 64 bits.
pub(in super::super) const MOVES: Forms = [
    sizes!(mov_rr;),
    sizes!(mov_ri;),
    sizes!(mov_rm; Based),
    sizes!(mov_rm; Indexed),
    sizes!(mov_mr; Based),
    sizes!(mov_mr; Indexed),
    sizes!(mov_mi; Based),
    sizes!(mov_mi; Indexed),
];

/// Extends `F` to `T`.
#[inline(always)]
fn extend<T: Int, F: Int, const SIGNED: bool>(value: F) -> T {
    T::cut(if SIGNED { value.sx() } else { value.zx() })
}

unsafe fn extend_r<T: Int, F: Int, const SIGNED: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    let value = reg::<F>(e, (*op).r2);
    set(e, (*op).r1, extend::<T, F, SIGNED>(value));
    next!(e, op)
}

unsafe fn extend_m<T: Int, F: Int, const SIGNED: bool, A: Address>(e: &mut Engine, op: *const Op) -> *mut Block {
    let from = find!(F, false, e, op, A::of(e, op));
    set(e, (*op).r1, extend::<T, F, SIGNED>(from.read_unaligned()));
    next!(e, op)
}

/// MOVZX, MOVSX and MOVSXD from `from` to `to` bytes; `address` is whether there is a memory operand, and an index.
pub(in super::super) fn extending(to: usize, from: usize, is_signed: bool, address: Option<bool>) -> Option<Handler> {
    macro_rules! forms {
        ($to:ty, $from:ty, $signed:literal) => {
            match address {
                None => extend_r::<$to, $from, $signed>,
                Some(false) => extend_m::<$to, $from, $signed, Based>,
                Some(true) => extend_m::<$to, $from, $signed, Indexed>,
            }
        };
    }
    let handler: Handler = match (to, from, is_signed) {
        (4 | 8, 1, false) => forms!(u32, u8, false),
        (4 | 8, 2, false) => forms!(u32, u16, false),
        (2, 1, false) => forms!(u16, u8, false),
        (4, 1, true) => forms!(u32, u8, true),
        (8, 1, true) => forms!(u64, u8, true),
        (4, 2, true) => forms!(u32, u16, true),
        (8, 2, true) => forms!(u64, u16, true),
        (8, 4, true) => forms!(u64, u32, true),
        (2, 1, true) => forms!(u16, u8, true),
        _ => return None,
    };
    Some(handler)
}

unsafe fn lea_of<T: Int, A: Address>(e: &mut Engine, op: *const Op) -> *mut Block {
    let address = A::of(e, op);
    set(e, (*op).r1, T::cut(address));
    next!(e, op)
}

/// LEA.
pub(in super::super) fn lea(size: usize, is_indexed: bool) -> Handler {
    if is_indexed { by_size!(size, lea_of; Indexed) } else { by_size!(size, lea_of; Based) }
}

unsafe fn xchg_rr<T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let (a, b) = (reg::<T>(e, (*op).r1), reg::<T>(e, (*op).r2));
    set(e, (*op).r1, b);
    set(e, (*op).r2, a);
    next!(e, op)
}

/// XCHG of registers.
pub(in super::super) fn exchange(size: usize) -> Handler {
    by_size!(size, xchg_rr;)
}

unsafe fn set_r<const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let value = u8::from(holds::<C>(e.flags));
    set(e, (*op).r1, value);
    next!(e, op)
}

unsafe fn set_m<const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let to = find!(u8, true, e, op, Indexed::of(e, op));
    to.write(u8::from(holds::<C>(e.flags)));
    next!(e, op)
}

/// SETcc.
pub(in super::super) fn set_condition(condition: u8, is_memory: bool) -> Handler {
    if is_memory { by_condition!(condition, set_m) } else { by_condition!(condition, set_r) }
}

unsafe fn cmov_rr<T: Int, const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let from = if holds::<C>(e.flags) { (*op).r2 } else { (*op).r1 };
    let value = reg::<T>(e, from);
    set(e, (*op).r1, value);
    next!(e, op)
}

unsafe fn cmov_rm<T: Int, const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let from = find!(T, false, e, op, Indexed::of(e, op));
    let value = if holds::<C>(e.flags) { from.read_unaligned() } else { reg::<T>(e, (*op).r1) };
    set(e, (*op).r1, value);
    next!(e, op)
}

/// CMOVcc.
pub(in super::super) fn conditional_move(size: usize, condition: u8, is_memory: bool) -> Option<Handler> {
    let handler: Handler = match (size, is_memory) {
        (4, false) => by_condition!(condition, cmov_rr, u32),
        (8, false) => by_condition!(condition, cmov_rr, u64),
        (4, true) => by_condition!(condition, cmov_rm, u32),
        (8, true) => by_condition!(condition, cmov_rm, u64),
        _ => return None,
    };
    Some(handler)
}

/// CDQE.
pub(in super::super) unsafe fn cdqe(e: &mut Engine, op: *const Op) -> *mut Block {
    let value = reg::<u32>(e, 0).sx();
    set(e, 0, value);
    next!(e, op)
}

/// CWDE.
pub(in super::super) unsafe fn cwde(e: &mut Engine, op: *const Op) -> *mut Block {
    let value = u32::cut(reg::<u16>(e, 0).sx());
    set(e, 0, value);
    next!(e, op)
}

/// CDQ.
pub(in super::super) unsafe fn cdq(e: &mut Engine, op: *const Op) -> *mut Block {
    let value = u32::cut((reg::<u32>(e, 0).sx().cast_signed() >> 63).cast_unsigned());
    set(e, RDX, value);
    next!(e, op)
}

/// CQO.
pub(in super::super) unsafe fn cqo(e: &mut Engine, op: *const Op) -> *mut Block {
    let value = (reg::<u64>(e, 0).cast_signed() >> 63).cast_unsigned();
    set(e, RDX, value);
    next!(e, op)
}

/// CLD and STD: the immediate is the new flag.
pub(in super::super) unsafe fn direction(e: &mut Engine, op: *const Op) -> *mut Block {
    const DF: u64 = 1 << 10;
    let flags = &mut e.core.state.core.registers.rflags;
    *flags = *flags & !DF | if (*op).imm != 0 { DF } else { 0 };
    next!(e, op)
}

/// CLC and STC: the immediate is the new flag.
pub(in super::super) unsafe fn carry(e: &mut Engine, op: *const Op) -> *mut Block {
    e.flags.set_carry((*op).imm != 0);
    next!(e, op)
}

/// CMC.
pub(in super::super) unsafe fn complement_carry(e: &mut Engine, op: *const Op) -> *mut Block {
    let carry = e.flags.carry();
    e.flags.set_carry(!carry);
    next!(e, op)
}
