//! Two-operand arithmetic and logic, INC, DEC, NEG, NOT, and comparisons joined with the branch that follows them.

use std::marker::PhantomData;

use super::super::block::{Block, Handler, Op};
use super::super::engine::Engine;
use super::super::lazy::Lazy;
use super::flow::{fall_through, take};
use super::int::Int;
use super::{Address, Based, Indexed, find, next, reg, set};

/// What is computed of two operands, with its flags.
pub(in super::super) trait Alu {
    /// Whether the result is kept.
    const WRITES: bool = true;
    fn run<T: Int>(flags: &mut Lazy, a: T, b: T) -> T;
}

macro_rules! alu {
    ($($name:ident $(: $writes:literal)?, |$flags:ident, $a:ident, $b:ident| $body:expr;)*) => {
        $(pub(in super::super) struct $name;
        impl Alu for $name {
            $(const WRITES: bool = $writes;)?
            #[inline(always)]
            fn run<T: Int>($flags: &mut Lazy, $a: T, $b: T) -> T {
                $body
            }
        })*
    };
}

alu! {
    Add, |flags, a, b| sum(flags, a, b, a.plus(b));
    Adc, |flags, a, b| { let r = a.plus(b).plus(carry(flags)); sum(flags, a, b, r) };
    Sub, |flags, a, b| difference(flags, a, b, a.minus(b));
    Sbb, |flags, a, b| { let r = a.minus(b).minus(carry(flags)); difference(flags, a, b, r) };
    Cmp: false, |flags, a, b| difference(flags, a, b, a.minus(b));
    And, |flags, a, b| logic(flags, a & b);
    Or, |flags, a, b| logic(flags, a | b);
    Xor, |flags, a, b| logic(flags, a ^ b);
    Test: false, |flags, a, b| logic(flags, a & b);
}

#[inline(always)]
fn carry<T: Int>(flags: &Lazy) -> T {
    T::cut(flags.carry().into())
}

/// Sets flags of the sum `r` of `a`, `b` and a carry.
#[inline(always)]
fn sum<T: Int>(flags: &mut Lazy, a: T, b: T, r: T) -> T {
    carries(flags, (a & b) | ((a | b) & !r), r)
}

/// Sets flags of the difference `r` of `a`, `b` and a borrow.
#[inline(always)]
fn difference<T: Int>(flags: &mut Lazy, a: T, b: T, r: T) -> T {
    carries(flags, (!a & b) | ((!a | b) & r), r)
}

#[inline(always)]
fn carries<T: Int>(flags: &mut Lazy, carries: T, r: T) -> T {
    flags.result = r.sx();
    flags.low = carries.zx() as u32 & 8;
    flags.high = carries.top();
    r
}

/// Sets flags of a logical result.
#[inline(always)]
pub(in super::super) fn logic<T: Int>(flags: &mut Lazy, r: T) -> T {
    *flags = Lazy { result: r.sx(), low: 0, high: 0 };
    r
}

/// The same without flags.
pub(in super::super) struct Quiet<O>(PhantomData<O>);

impl<O: Alu> Alu for Quiet<O> {
    const WRITES: bool = O::WRITES;
    #[inline(always)]
    fn run<T: Int>(flags: &mut Lazy, a: T, b: T) -> T {
        let mut unused = *flags;
        O::run(&mut unused, a, b)
    }
}

/// Between registers.
unsafe fn rr<O: Alu, T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let (a, b) = (reg::<T>(e, (*op).r1), reg::<T>(e, (*op).r2));
    let r = O::run(&mut e.flags, a, b);
    if O::WRITES {
        set(e, (*op).r1, r);
    }
    next!(e, op)
}

/// The immediate, sign-extended.
#[inline(always)]
unsafe fn immediate<T: Int>(op: *const Op) -> T {
    T::cut(i64::from((*op).imm).cast_unsigned())
}

/// A register and an immediate.
unsafe fn ri<O: Alu, T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let a = reg::<T>(e, (*op).r1);
    let r = O::run(&mut e.flags, a, immediate(op));
    if O::WRITES {
        set(e, (*op).r1, r);
    }
    next!(e, op)
}

/// Of registers, to another.
unsafe fn apart_rr<O: Alu, T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let (a, b) = (reg::<T>(e, (*op).base), reg::<T>(e, (*op).r2));
    let r = O::run(&mut e.flags, a, b);
    set(e, (*op).r1, r);
    next!(e, op)
}

/// Of a register and an immediate, to another.
unsafe fn apart_ri<O: Alu, T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let a = reg::<T>(e, (*op).base);
    let r = O::run(&mut e.flags, a, immediate(op));
    set(e, (*op).r1, r);
    next!(e, op)
}

/// A register and memory.
unsafe fn rm<O: Alu, T: Int, A: Address>(e: &mut Engine, op: *const Op) -> *mut Block {
    let from = find!(T, false, e, op, A::of(e, op));
    let a = reg::<T>(e, (*op).r1);
    let r = O::run(&mut e.flags, a, from.read_unaligned());
    if O::WRITES {
        set(e, (*op).r1, r);
    }
    next!(e, op)
}

/// Memory and a register.
unsafe fn mr<O: Alu, T: Int, A: Address>(e: &mut Engine, op: *const Op) -> *mut Block {
    let address = A::of(e, op);
    let at = if O::WRITES { find!(T, true, e, op, address) } else { find!(T, false, e, op, address) };
    let b = reg::<T>(e, (*op).r2);
    let r = O::run(&mut e.flags, at.read_unaligned(), b);
    if O::WRITES {
        at.write_unaligned(r);
    }
    next!(e, op)
}

/// Memory and an immediate.
unsafe fn mi<O: Alu, T: Int, A: Address>(e: &mut Engine, op: *const Op) -> *mut Block {
    let address = A::of(e, op);
    let at = if O::WRITES { find!(T, true, e, op, address) } else { find!(T, false, e, op, address) };
    let r = O::run(&mut e.flags, at.read_unaligned(), immediate(op));
    if O::WRITES {
        at.write_unaligned(r);
    }
    next!(e, op)
}

/// Rows of [`Forms`]: two registers, a register and an immediate, a register and memory, memory and a register, memory
/// and an immediate; of those with memory, the second one of each is for an address with an index.
const FORMS: usize = 8;

/// Chooses a function by operand size. It is looked up: which one it will be is nothing that a host's CPU could foresee.
macro_rules! by_size {
    ($size:expr, $name:ident $(, $first:ty)*; $($rest:ty),*) => {
        $crate::x86::ops::alu::sizes!($name $(, $first)*; $($rest),*)[$crate::x86::ops::alu::size_index($size)]
    };
}
pub(in super::super) use by_size;

/// The functions for the operand sizes.
macro_rules! sizes {
    ($name:ident $(, $first:ty)*; $($rest:ty),*) => {
        [
            $name::<$($first,)* u8 $(, $rest)*> as Handler,
            $name::<$($first,)* u16 $(, $rest)*> as Handler,
            $name::<$($first,)* u32 $(, $rest)*> as Handler,
            $name::<$($first,)* u64 $(, $rest)*> as Handler,
        ]
    };
}
pub(in super::super) use sizes;

/// The place of an operand size of 1, 2, 4 or 8 bytes in [`sizes`].
#[inline(always)]
pub(in super::super) fn size_index(size: usize) -> usize {
    size.trailing_zeros() as usize & 3
}

/// The functions for an operation, by form and [`size_index`].
pub(in super::super) type Forms = [[Handler; 4]; FORMS];

/// The functions for an arithmetic instruction.
#[derive(Clone, Copy)]
pub(in super::super) struct Functions {
    /// By form and size.
    pub all: &'static Forms,
    /// The same without flags, and others for [`apart`], if it has a result.
    pub quiet: Option<(&'static Forms, &'static Apart)>,
}

/// The functions for an operation with its first operand apart from where the result goes: on a register or an immediate,
/// of 4 or 8 bytes, with flags and without.
pub(in super::super) type Apart = [[[Handler; 2]; 2]; 2];

/// The functions for operation `O`.
struct Table<O>(PhantomData<O>);

impl<O: Alu> Table<O> {
    const ALL: Forms = [
        sizes!(rr, O;),
        sizes!(ri, O;),
        sizes!(rm, O; Based),
        sizes!(rm, O; Indexed),
        sizes!(mr, O; Based),
        sizes!(mr, O; Indexed),
        sizes!(mi, O; Based),
        sizes!(mi, O; Indexed),
    ];
    const APART: Apart = [
        [[apart_rr::<O, u32>, apart_rr::<Quiet<O>, u32>], [apart_rr::<O, u64>, apart_rr::<Quiet<O>, u64>]],
        [[apart_ri::<O, u32>, apart_ri::<Quiet<O>, u32>], [apart_ri::<O, u64>, apart_ri::<Quiet<O>, u64>]],
    ];
}

/// The functions for an operation that has a result.
pub(in super::super) const fn functions<O: Alu>() -> Functions {
    Functions { all: &Table::<O>::ALL, quiet: Some((&Table::<Quiet<O>>::ALL, &Table::<O>::APART)) }
}

/// The functions for an operation that has none.
pub(in super::super) const fn comparisons<O: Alu>() -> Functions {
    Functions { all: &Table::<O>::ALL, quiet: None }
}

/// What is computed of one operand.
pub(in super::super) trait Unary {
    fn run<T: Int>(flags: &mut Lazy, a: T) -> T;
}

macro_rules! unary {
    ($($name:ident, |$flags:ident, $a:ident| $body:expr;)*) => {
        $(pub(in super::super) struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn run<T: Int>($flags: &mut Lazy, $a: T) -> T {
                $body
            }
        })*
    };
}

unary! {
    Inc, |flags, a| { let r = a.plus(T::cut(1)); keeping_carry(flags, a & !r, r) };
    Dec, |flags, a| { let r = a.minus(T::cut(1)); keeping_carry(flags, !a & T::cut(1) | (!a | T::cut(1)) & r, r) };
    Neg, |flags, a| difference(flags, T::cut(0), a, T::cut(0).minus(a));
    Invert, |_flags, a| !a;
}

impl<O: Unary> Unary for Quiet<O> {
    #[inline(always)]
    fn run<T: Int>(flags: &mut Lazy, a: T) -> T {
        let mut unused = *flags;
        O::run(&mut unused, a)
    }
}

/// Sets all flags but CF. `out` are the carries out of each bit.
#[inline(always)]
fn keeping_carry<T: Int>(flags: &mut Lazy, out: T, r: T) -> T {
    let high = out.top();
    flags.result = r.sx();
    // For INC the lowest carry is that of `a & 1`, which is in `a & !r`.
    flags.low = out.zx() as u32 & 8;
    flags.high = Lazy::of_carry(flags.high, high ^ high << 1);
    r
}

unsafe fn unary_r<O: Unary, T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let a = reg::<T>(e, (*op).r1);
    let r = O::run(&mut e.flags, a);
    set(e, (*op).r1, r);
    next!(e, op)
}

unsafe fn unary_m<O: Unary, T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let at = find!(T, true, e, op, Indexed::of(e, op));
    let r = O::run(&mut e.flags, at.read_unaligned());
    at.write_unaligned(r);
    next!(e, op)
}

/// The functions for an operation on one operand.
pub(in super::super) struct UnaryFunctions {
    pub of_register: [Handler; 4],
    /// The same without flags.
    pub quiet: [Handler; 4],
    pub of_memory: [Handler; 4],
}

pub(in super::super) const fn unary_functions<O: Unary>() -> UnaryFunctions {
    UnaryFunctions {
        of_register: sizes!(unary_r, O;),
        quiet: sizes!(unary_r, Quiet<O>;),
        of_memory: sizes!(unary_m, O;),
    }
}

/// Whether condition `C` holds after `a - b`. Conditions of one flag alone come from the flags.
#[inline(always)]
fn compares<T: Int, const C: u8>(a: T, b: T, flags: Lazy) -> bool {
    let (signed_a, signed_b) = (a.sx().cast_signed(), b.sx().cast_signed());
    match C {
        2 => a < b,
        3 => a >= b,
        4 => a == b,
        5 => a != b,
        6 => a <= b,
        7 => a > b,
        8 => flags.result >> 63 != 0,
        9 => flags.result >> 63 == 0,
        12 => signed_a < signed_b,
        13 => signed_a >= signed_b,
        14 => signed_a <= signed_b,
        15 => signed_a > signed_b,
        _ => holds::<C>(flags),
    }
}

/// Whether condition `C` (as in opcodes) holds.
#[inline(always)]
pub(in super::super) fn holds<const C: u8>(f: Lazy) -> bool {
    let is_true = match C >> 1 {
        0 => f.overflow(),
        1 => f.carry(),
        2 => f.zero(),
        3 => f.carry() || f.zero(),
        4 => f.sign(),
        5 => f.parity(),
        6 => f.sign() != f.overflow(),
        _ => f.zero() || f.sign() != f.overflow(),
    };
    is_true != (C & 1 != 0)
}

/// Ends a block with a branch to [`Op::disp`].
#[inline(always)]
pub(in super::super) unsafe fn branch(e: &mut Engine, op: *const Op, is_taken: bool) -> *mut Block {
    if is_taken { take(e, (*op).disp) } else { fall_through(e) }
}

unsafe fn cmp_rr<T: Int, const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let (a, b) = (reg::<T>(e, (*op).r1), reg::<T>(e, (*op).r2));
    Cmp::run(&mut e.flags, a, b);
    let is_taken = compares::<T, C>(a, b, e.flags);
    branch(e, op, is_taken)
}

unsafe fn cmp_ri<T: Int, const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let (a, b) = (reg::<T>(e, (*op).r1), immediate::<T>(op));
    Cmp::run(&mut e.flags, a, b);
    let is_taken = compares::<T, C>(a, b, e.flags);
    branch(e, op, is_taken)
}

unsafe fn test_rr<T: Int, const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let (a, b) = (reg::<T>(e, (*op).r1), reg::<T>(e, (*op).r2));
    let r = Test::run(&mut e.flags, a, b);
    let is_taken = compares::<T, C>(r, T::cut(0), e.flags);
    branch(e, op, is_taken)
}

unsafe fn test_ri<T: Int, const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let a = reg::<T>(e, (*op).r1);
    let r = Test::run(&mut e.flags, a, immediate(op));
    let is_taken = compares::<T, C>(r, T::cut(0), e.flags);
    branch(e, op, is_taken)
}

unsafe fn sub_ri<T: Int, const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let (a, b) = (reg::<T>(e, (*op).r1), immediate::<T>(op));
    let r = Sub::run(&mut e.flags, a, b);
    set(e, (*op).r1, r);
    let is_taken = compares::<T, C>(a, b, e.flags);
    branch(e, op, is_taken)
}

unsafe fn add_ri<T: Int, const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let a = reg::<T>(e, (*op).r1);
    let r = Add::run(&mut e.flags, a, immediate(op));
    set(e, (*op).r1, r);
    let is_taken = holds::<C>(e.flags);
    branch(e, op, is_taken)
}

unsafe fn dec_r<T: Int, const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let a = reg::<T>(e, (*op).r1);
    let r = Dec::run(&mut e.flags, a);
    set(e, (*op).r1, r);
    let is_taken = holds::<C>(e.flags);
    branch(e, op, is_taken)
}

unsafe fn inc_r<T: Int, const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    let a = reg::<T>(e, (*op).r1);
    let r = Inc::run(&mut e.flags, a);
    set(e, (*op).r1, r);
    let is_taken = holds::<C>(e.flags);
    branch(e, op, is_taken)
}

/// Chooses a function by condition.
macro_rules! by_condition {
    ($condition:expr, $name:ident $(, $type:ty)*) => {
        $crate::x86::ops::alu::conditions!($name $(, $type)*)[usize::from($condition & 15)]
    };
}
pub(in super::super) use by_condition;

/// The functions for all conditions.
macro_rules! conditions {
    ($name:ident $(, $type:ty)*) => {
        [
            $name::<$($type,)* 0> as Handler, $name::<$($type,)* 1>, $name::<$($type,)* 2>, $name::<$($type,)* 3>,
            $name::<$($type,)* 4>, $name::<$($type,)* 5>, $name::<$($type,)* 6>, $name::<$($type,)* 7>,
            $name::<$($type,)* 8>, $name::<$($type,)* 9>, $name::<$($type,)* 10>, $name::<$($type,)* 11>,
            $name::<$($type,)* 12>, $name::<$($type,)* 13>, $name::<$($type,)* 14>, $name::<$($type,)* 15>,
        ]
    };
}
pub(in super::super) use conditions;

/// What may be joined with a conditional branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Joined {
    CmpRegister,
    CmpImmediate,
    TestRegister,
    TestImmediate,
    SubImmediate,
    AddImmediate,
    Dec,
    Inc,
}

/// The function for an operation and a branch.
pub(in super::super) fn joined(what: Joined, size: usize, condition: u8) -> Option<Handler> {
    macro_rules! row {
        ($name:ident) => {
            [conditions!($name, u8), conditions!($name, u32), conditions!($name, u64)]
        };
    }
    /// In the order of [`Joined`].
    static JOINED: [[[Handler; 16]; 3]; 8] = [
        row!(cmp_rr),
        row!(cmp_ri),
        row!(test_rr),
        row!(test_ri),
        row!(sub_ri),
        row!(add_ri),
        row!(dec_r),
        row!(inc_r),
    ];
    let size = [Some(0), None, Some(1), Some(2)][size_index(size)]?;
    Some(JOINED[what as usize][size][usize::from(condition & 15)])
}
