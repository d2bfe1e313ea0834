//! Two instructions in one operation: a shift or an address, and the arithmetic that takes its result as second operand.
//! Between operations a value goes through memory, which takes a host's CPU longer than most of what is computed of it;
//! here it stays in a register on its way, and a jump is saved.

use super::super::block::{Block, Handler, Op};
use super::super::engine::Engine;
use super::alu::{Add, Alu, And, Or, Quiet, Sub, Xor};
use super::int::Int;
use super::shift::{Rol, Ror, Sar, Shift, Shl, Shr, shift_count};
use super::{Address, Based, Indexed, next, reg, set};

/// What the second operand is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum First {
    Shl,
    Shr,
    Sar,
    Rol,
    Ror,
    /// LEA of a base and a displacement.
    Based,
    /// LEA with an index.
    Indexed,
}

/// What is done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Second {
    Add,
    Sub,
    And,
    Or,
    Xor,
}

/// Makes the second operand of an operation: its flags are overwritten at once.
trait Make {
    unsafe fn of<T: Int>(e: &Engine, op: *const Op) -> T;
}

impl<A: Address> Make for A {
    #[inline(always)]
    unsafe fn of<T: Int>(e: &Engine, op: *const Op) -> T {
        T::cut(<A as Address>::of(e, op))
    }
}

/// A shift of the register in [`Op::base`].
struct Shifted<S>(std::marker::PhantomData<S>);

impl<S: Shift> Make for Shifted<S> {
    #[inline(always)]
    unsafe fn of<T: Int>(e: &Engine, op: *const Op) -> T {
        let mut unused = e.flags;
        S::run(&mut unused, reg::<T>(e, (*op).base), shift_count::<T>(op))
    }
}

/// r2 is made, and r1 computed of both.
unsafe fn both<M: Make, O: Alu, T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    let b = M::of::<T>(e, op);
    set(e, (*op).r2, b);
    let a = reg::<T>(e, (*op).r1);
    let r = O::run(&mut e.flags, a, b);
    set(e, (*op).r1, r);
    next!(e, op)
}

/// Functions by second operation, size (4 or 8 bytes), and whether flags are left out.
type Row = [[[Handler; 2]; 2]; 5];

/// The function for two instructions, and the same without flags; r1 is the first operand of the second instruction, r2 what
/// the first one makes of the rest.
pub(in super::super) fn pair(first: First, second: Second, size: u8) -> (Handler, Handler) {
    macro_rules! sizes {
        ($make:ty, $alu:ty) => {
            [
                [both::<$make, $alu, u32> as Handler, both::<$make, Quiet<$alu>, u32>],
                [both::<$make, $alu, u64>, both::<$make, Quiet<$alu>, u64>],
            ]
        };
    }
    macro_rules! row {
        ($make:ty) => {
            [sizes!($make, Add), sizes!($make, Sub), sizes!($make, And), sizes!($make, Or), sizes!($make, Xor)]
        };
    }
    /// In the order of [`First`].
    static PAIRS: [Row; 7] = [
        row!(Shifted<Shl>),
        row!(Shifted<Shr>),
        row!(Shifted<Sar>),
        row!(Shifted<Rol>),
        row!(Shifted<Ror>),
        row!(Based),
        row!(Indexed),
    ];
    let [loud, quiet] = PAIRS[first as usize][second as usize][usize::from(size == 8)];
    (loud, quiet)
}
