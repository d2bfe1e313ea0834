//! The operations of the fast executor: small functions, specialised by operand form and size, that execute one
//! instruction and call the next one's function. The compiler turns these last calls into jumps when it optimises;
//! without that, the length of a block bounds their depth.
//!
//! One contract holds for all of them, and each relies on nothing else: the engine's registers are loaded, the operation
//! stands in the engine's current block and was made by `translate` for this very function, so its register fields are
//! offsets into [`Engine::regs`], and another operation follows unless the function ends blocks. An operation that can't
//! complete changes nothing and stops with [`Stop::Redo`].
// Truncation is what operand sizes mean here, and hosts have 64 bits.
#![allow(unsafe_op_in_unsafe_fn, clippy::missing_safety_doc, clippy::cast_possible_truncation)]

pub(super) mod alu;
pub(super) mod bit;
pub(super) mod data;
pub(super) mod flow;
pub(super) mod int;
pub(super) mod locked;
pub(super) mod multiply;
pub(super) mod pair;
pub(super) mod shift;
pub(super) mod string;
pub(super) mod vector;

use super::block::{Block, Op};
use super::engine::{Engine, Stop};
use super::mmu::{ENTRIES, PAGE_MASK};
use int::Int;

/// Goes on with the operation that follows.
macro_rules! next {
    ($engine:expr, $op:expr) => {{
        let next = $op.add(1);
        ((*next).run)($engine, next)
    }};
}
pub(super) use next;

/// Value of the register at byte offset `at`.
#[inline(always)]
pub(super) unsafe fn reg<T: Int>(e: &Engine, at: u8) -> T {
    e.regs.as_ptr().cast::<u8>().add(usize::from(at)).cast::<T>().read_unaligned()
}

/// Sets it: 4 bytes clear the upper half.
#[inline(always)]
pub(super) unsafe fn set<T: Int>(e: &mut Engine, at: u8, value: T) {
    let place = e.regs.as_mut_ptr().cast::<u8>().add(usize::from(at));
    if T::SIZE == 4 {
        place.cast::<u64>().write_unaligned(value.zx());
    } else {
        place.cast::<T>().write_unaligned(value);
    }
}

/// How a memory operand's address is made.
pub(super) trait Address {
    unsafe fn of(e: &Engine, op: *const Op) -> u64;
}

/// Of a base and a displacement.
pub(super) struct Based;

/// Of an index too.
pub(super) struct Indexed;

impl Address for Based {
    #[inline(always)]
    unsafe fn of(e: &Engine, op: *const Op) -> u64 {
        reg::<u64>(e, (*op).base).wrapping_add(i64::from((*op).disp).cast_unsigned())
    }
}

impl Address for Indexed {
    #[inline(always)]
    unsafe fn of(e: &Engine, op: *const Op) -> u64 {
        let index = reg::<u64>(e, (*op).index) << ((*op).scale & 3);
        Based::of(e, op).wrapping_add(index)
    }
}

/// Where `SIZE` bytes of guest memory are in the host; null if the slow executor has to make the access.
#[inline(always)]
pub(super) unsafe fn locate<const SIZE: usize, const WRITE: bool>(e: &mut Engine, address: u64) -> *mut u8 {
    let entry = e.core.mmu.data.get_unchecked((address >> 12) as usize & (ENTRIES - 1));
    let tag = if WRITE { entry.write } else { entry.read };
    if address.wrapping_add(SIZE as u64 - 1) & PAGE_MASK == tag {
        return address.wrapping_add(entry.addend) as *mut u8;
    }
    e.core.mmu.miss(address, SIZE, WRITE)
}

/// [`locate`] for an integer.
#[inline(always)]
pub(super) unsafe fn place<T: Int, const WRITE: bool>(e: &mut Engine, address: u64) -> *mut T {
    match T::SIZE {
        1 => locate::<1, WRITE>(e, address).cast(),
        2 => locate::<2, WRITE>(e, address).cast(),
        4 => locate::<4, WRITE>(e, address).cast(),
        _ => locate::<8, WRITE>(e, address).cast(),
    }
}

/// Where a value in guest memory is in the host, if the TLB knows.
#[inline(always)]
pub(super) unsafe fn hit<T, const WRITE: bool>(e: &Engine, address: u64) -> Option<*mut T> {
    let entry = e.core.mmu.data.get_unchecked((address >> 12) as usize & (ENTRIES - 1));
    let tag = if WRITE { entry.write } else { entry.read };
    let last = address.wrapping_add(size_of::<T>() as u64 - 1);
    (last & PAGE_MASK == tag).then(|| address.wrapping_add(entry.addend) as *mut T)
}

/// Where the one value in memory is that an operation is about. If the TLB doesn't know, the function returns, and the
/// operation is executed again, or by the slow executor; so it has changed nothing yet. Nothing is kept in registers
/// for that, which makes the fast way shorter than with [`place`].
macro_rules! find {
    ($type:ty, $is_write:expr, $engine:expr, $op:expr, $address:expr) => {{
        let address = $address;
        match $crate::x86::ops::hit::<$type, { $is_write }>($engine, address) {
            Some(at) => at,
            None => return $crate::x86::ops::missed($engine, $op, address, size_of::<$type>(), $is_write),
        }
    }};
}
pub(super) use find;

/// An operation whose access the TLB doesn't know. It is executed once that is different; where it can't be, as for an
/// access across pages, by itself, with an entry of the TLB that only serves it.
#[cold]
#[inline(never)]
pub(super) unsafe fn missed(e: &mut Engine, op: *const Op, address: u64, size: usize, is_write: bool) -> *mut Block {
    let host = e.core.mmu.miss(address, size, is_write);
    if host.is_null() {
        return redo(e, op);
    }
    if e.core.mmu.knows(address, size, is_write) {
        return ((*op).run)(e, op);
    }
    let alone = [*op, Op { run: executed, ..*op }];
    let kept = e.core.mmu.lend(address, size, host);
    let next = ((*op).run)(e, alone.as_ptr());
    e.core.mmu.take_back(address, kept);
    if next != EXECUTED {
        if e.at == alone.as_ptr() {
            e.at = op;
        }
        return next;
    }
    next!(e, op)
}

/// What [`executed`] returns: no block is there.
const EXECUTED: *mut Block = std::ptr::dangling_mut();

/// Stands behind an operation that is executed by itself.
unsafe fn executed(_: &mut Engine, _: *const Op) -> *mut Block {
    EXECUTED
}

/// Stops at an operation of which nothing is done.
#[cold]
#[inline(never)]
pub(super) unsafe fn redo(e: &mut Engine, op: *const Op) -> *mut Block {
    e.at = op;
    e.stop = Stop::Redo;
    std::ptr::null_mut()
}

/// Stops at a breakpoint.
pub(super) unsafe fn breakpoint(e: &mut Engine, op: *const Op) -> *mut Block {
    e.at = op;
    e.stop = Stop::Breakpoint;
    std::ptr::null_mut()
}

/// An instruction of the other families.
pub(super) unsafe fn slow(e: &mut Engine, op: *const Op) -> *mut Block {
    if e.slow(op) { next!(e, op) } else { std::ptr::null_mut() }
}
