//! Byte swaps, bit tests and bit counts of registers.

use super::super::block::{Block, Handler, Op};
use super::super::engine::Engine;
use super::super::flags::{CF, ZF, flag};
use super::super::lazy::Lazy;
use super::int::Int;
use super::{next, reg, set};

unsafe fn swap32(e: &mut Engine, op: *const Op) -> *mut Block {
    let value = reg::<u32>(e, (*op).r1).swap_bytes();
    set(e, (*op).r1, value);
    next!(e, op)
}

unsafe fn swap64(e: &mut Engine, op: *const Op) -> *mut Block {
    let value = reg::<u64>(e, (*op).r1).swap_bytes();
    set(e, (*op).r1, value);
    next!(e, op)
}

/// BSWAP.
pub(in super::super) fn swap(size: usize) -> Option<Handler> {
    match size {
        4 => Some(swap32),
        8 => Some(swap64),
        _ => None,
    }
}

/// BT (0), BTS (1), BTR (2), BTC (3) of r1; the bit is in r2 or, with `IMMEDIATE`, in the operation.
unsafe fn test<T: Int, const KIND: u8, const IMMEDIATE: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    let number = if IMMEDIATE { (*op).imm.cast_unsigned() } else { reg::<u32>(e, (*op).r2) } & (T::BITS - 1);
    let (value, bit) = (reg::<T>(e, (*op).r1), T::cut(1u64 << number));
    e.flags.set_carry(value & bit != T::cut(0));
    match KIND {
        0 => {}
        1 => set(e, (*op).r1, value | bit),
        2 => set(e, (*op).r1, value & !bit),
        _ => set(e, (*op).r1, value ^ bit),
    }
    next!(e, op)
}

/// BT and its relatives on registers.
pub(in super::super) fn bit_test(kind: u8, size: usize, is_immediate: bool) -> Option<Handler> {
    macro_rules! kinds {
        ($int:ty, $immediate:literal) => {
            match kind {
                0 => test::<$int, 0, $immediate>,
                1 => test::<$int, 1, $immediate>,
                2 => test::<$int, 2, $immediate>,
                _ => test::<$int, 3, $immediate>,
            }
        };
    }
    let handler: Handler = match (size, is_immediate) {
        (4, false) => kinds!(u32, false),
        (8, false) => kinds!(u64, false),
        (4, true) => kinds!(u32, true),
        (8, true) => kinds!(u64, true),
        _ => return None,
    };
    Some(handler)
}

/// BSF (0), BSR (1), TZCNT (2), LZCNT (3), POPCNT (4) of r2 into r1.
unsafe fn count<T: Int, const KIND: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let source = reg::<T>(e, (*op).r2);
    let (value, is_zero) = (source.zx(), source == T::cut(0));
    let trailing = value.trailing_zeros().min(T::BITS);
    let leading = value.leading_zeros() - (64 - T::BITS);
    let flags = e.flags.to_flags();
    match KIND {
        0 | 1 => {
            e.flags = Lazy::from_flags(flags & !ZF | flag(is_zero, ZF));
            if !is_zero {
                let r = if KIND == 0 { trailing } else { T::BITS - 1 - leading };
                set(e, (*op).r1, T::cut(r.into()));
            }
        }
        2 | 3 => {
            let r = if KIND == 2 { trailing } else { leading };
            e.flags = Lazy::from_flags(flags & !(ZF | CF) | flag(is_zero, CF) | flag(r == 0, ZF));
            set(e, (*op).r1, T::cut(r.into()));
        }
        _ => {
            e.flags = Lazy::from_flags(flag(is_zero, ZF));
            set(e, (*op).r1, T::cut(value.count_ones().into()));
        }
    }
    next!(e, op)
}

/// The bit counts between registers.
pub(in super::super) fn bit_count(kind: u8, size: usize) -> Option<Handler> {
    macro_rules! kinds {
        ($int:ty) => {
            match kind {
                0 => count::<$int, 0>,
                1 => count::<$int, 1>,
                2 => count::<$int, 2>,
                3 => count::<$int, 3>,
                _ => count::<$int, 4>,
            }
        };
    }
    let handler: Handler = match size {
        4 => kinds!(u32),
        8 => kinds!(u64),
        _ => return None,
    };
    Some(handler)
}

/// ANDN: r1 = !base & r2.
unsafe fn andn<T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let r = !reg::<T>(e, (*op).base) & reg::<T>(e, (*op).r2);
    super::alu::logic(&mut e.flags, r);
    set(e, (*op).r1, r);
    next!(e, op)
}

/// ANDN of registers.
pub(in super::super) fn and_not(size: usize) -> Handler {
    if size == 4 { andn::<u32> } else { andn::<u64> }
}
