//! Atomic read-modify-writes of aligned integers of 4 and 8 bytes: XCHG, LOCK CMPXCHG, LOCK XADD, and LOCK before
//! arithmetic. What is not aligned is left to the slow executor.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use super::super::block::{Block, Handler, Op};
use super::super::engine::Engine;
use super::alu::{Add, Alu, And, Cmp, Dec, Inc, Or, Sub, Unary, Xor};
use super::int::Int;
use super::{Address, Indexed, next, place, redo, reg, set};

/// An integer in memory that several CPUs change.
pub(in super::super) trait Shared: Int {
    unsafe fn swap(at: *mut Self, new: Self) -> Self;
    /// What was there, if it was not `expected`.
    unsafe fn replace(at: *mut Self, expected: Self, new: Self) -> Result<Self, Self>;
    unsafe fn get(at: *mut Self) -> Self;
}

macro_rules! shared {
    ($int:ty, $atomic:ty) => {
        impl Shared for $int {
            #[inline(always)]
            unsafe fn swap(at: *mut Self, new: Self) -> Self {
                <$atomic>::from_ptr(at).swap(new, SeqCst)
            }
            #[inline(always)]
            unsafe fn replace(at: *mut Self, expected: Self, new: Self) -> Result<Self, Self> {
                <$atomic>::from_ptr(at).compare_exchange(expected, new, SeqCst, SeqCst)
            }
            #[inline(always)]
            unsafe fn get(at: *mut Self) -> Self {
                <$atomic>::from_ptr(at).load(SeqCst)
            }
        }
    };
}

shared!(u32, AtomicU32);
shared!(u64, AtomicU64);

/// The memory operand, if it is aligned and writable.
#[inline(always)]
unsafe fn aligned<T: Shared>(e: &mut Engine, op: *const Op) -> *mut T {
    let at = place::<T, true>(e, Indexed::of(e, op));
    if at.is_aligned() { at } else { std::ptr::null_mut() }
}

unsafe fn xchg<T: Shared>(e: &mut Engine, op: *const Op) -> *mut Block {
    let at = aligned::<T>(e, op);
    if at.is_null() {
        return redo(e, op);
    }
    let old = T::swap(at, reg::<T>(e, (*op).r2));
    set(e, (*op).r2, old);
    next!(e, op)
}

unsafe fn cmpxchg<T: Shared>(e: &mut Engine, op: *const Op) -> *mut Block {
    let at = aligned::<T>(e, op);
    if at.is_null() {
        return redo(e, op);
    }
    let expected = reg::<T>(e, 0);
    match T::replace(at, expected, reg::<T>(e, (*op).r2)) {
        Ok(old) => {
            Cmp::run(&mut e.flags, expected, old);
        }
        Err(old) => {
            Cmp::run(&mut e.flags, expected, old);
            set(e, 0, old);
        }
    }
    next!(e, op)
}

/// Changes memory until no other CPU came in between; returns the old value.
#[inline(always)]
unsafe fn update<T: Shared>(at: *mut T, change: impl Fn(T) -> T) -> T {
    let mut old = T::get(at);
    loop {
        match T::replace(at, old, change(old)) {
            Ok(old) => return old,
            Err(found) => old = found,
        }
    }
}

unsafe fn xadd<T: Shared>(e: &mut Engine, op: *const Op) -> *mut Block {
    let at = aligned::<T>(e, op);
    if at.is_null() {
        return redo(e, op);
    }
    let addend = reg::<T>(e, (*op).r2);
    let old = update(at, |old| old.plus(addend));
    Add::run(&mut e.flags, old, addend);
    set(e, (*op).r2, old);
    next!(e, op)
}

/// LOCK before an operation on memory and r2 or, with `IMMEDIATE`, a number.
unsafe fn binary<O: Alu, T: Shared, const IMMEDIATE: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    let at = aligned::<T>(e, op);
    if at.is_null() {
        return redo(e, op);
    }
    let b = if IMMEDIATE { T::cut(i64::from((*op).imm).cast_unsigned()) } else { reg::<T>(e, (*op).r2) };
    let before = e.flags;
    let old = update(at, |old| O::run(&mut { before }, old, b));
    O::run(&mut e.flags, old, b);
    next!(e, op)
}

unsafe fn single<O: Unary, T: Shared>(e: &mut Engine, op: *const Op) -> *mut Block {
    let at = aligned::<T>(e, op);
    if at.is_null() {
        return redo(e, op);
    }
    let before = e.flags;
    let old = update(at, |old| O::run(&mut { before }, old));
    O::run(&mut e.flags, old);
    next!(e, op)
}

/// Which instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Kind {
    Exchange,
    CompareExchange,
    ExchangeAdd,
    Add,
    Sub,
    And,
    Or,
    Xor,
    Inc,
    Dec,
}

fn of<T: Shared>(kind: Kind, is_immediate: bool) -> Handler {
    macro_rules! binary {
        ($op:ty) => {
            if is_immediate { binary::<$op, T, true> } else { binary::<$op, T, false> }
        };
    }
    match kind {
        Kind::Exchange => xchg::<T>,
        Kind::CompareExchange => cmpxchg::<T>,
        Kind::ExchangeAdd => xadd::<T>,
        Kind::Add => binary!(Add),
        Kind::Sub => binary!(Sub),
        Kind::And => binary!(And),
        Kind::Or => binary!(Or),
        Kind::Xor => binary!(Xor),
        Kind::Inc => single::<Inc, T>,
        Kind::Dec => single::<Dec, T>,
    }
}

/// The function for an instruction on memory.
pub(in super::super) fn locked(kind: Kind, size: usize, is_immediate: bool) -> Option<Handler> {
    match size {
        4 => Some(of::<u32>(kind, is_immediate)),
        8 => Some(of::<u64>(kind, is_immediate)),
        _ => None,
    }
}
