//! Control flow and the stack: what ends blocks, and PUSH and POP.

use super::super::block::{Block, Handler, Op};
use super::super::engine::{Engine, START, Stop};
use super::alu::{by_condition, holds};
use super::{Address, Indexed, find, next, place, redo, reg, set};

/// Byte offset of RSP.
const RSP: u8 = 4 * 8;
/// Byte offset of RBP.
const RBP: u8 = 5 * 8;

/// Follows link `which` of the block, which leads to `target`.
#[inline(always)]
unsafe fn follow(e: &mut Engine, which: usize, target: u64) -> *mut Block {
    let block: &Block = &*e.block;
    let link = block.links.get_unchecked(which);
    if link.generation == e.core.mmu.generation {
        return link.block;
    }
    unlinked(e, which, target)
}

#[cold]
#[inline(never)]
unsafe fn unlinked(e: &mut Engine, which: usize, target: u64) -> *mut Block {
    e.rip = target;
    e.which = which;
    e.stop = Stop::Link;
    // Not known to the caller, so that its call is its last and needs no frame.
    std::hint::black_box(std::ptr::null_mut())
}

/// Goes to `offset` from the block's start.
#[inline(always)]
pub(in super::super) unsafe fn take(e: &mut Engine, offset: i32) -> *mut Block {
    let target = e.regs[START].wrapping_add(i64::from(offset).cast_unsigned());
    follow(e, 0, target)
}

/// Address of the instruction after the block.
#[inline(always)]
unsafe fn end(e: &Engine) -> u64 {
    e.regs[START].wrapping_add((*e.block).length)
}

/// Goes to what follows the block.
#[inline(always)]
pub(in super::super) unsafe fn fall_through(e: &mut Engine) -> *mut Block {
    let target = end(e);
    follow(e, 1, target)
}

/// Ends a block without a branch.
pub(in super::super) unsafe fn go_on(e: &mut Engine, _op: *const Op) -> *mut Block {
    fall_through(e)
}

/// Ends the block of one instruction, which has no links.
pub(in super::super) unsafe fn go_on_alone(e: &mut Engine, _op: *const Op) -> *mut Block {
    (e.rip, e.stop) = (end(e), Stop::Link);
    std::ptr::null_mut()
}

/// JMP to a relative address.
pub(in super::super) unsafe fn jump(e: &mut Engine, op: *const Op) -> *mut Block {
    take(e, (*op).disp)
}

unsafe fn jump_if<const C: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    if holds::<C>(e.flags) { take(e, (*op).disp) } else { fall_through(e) }
}

/// Jcc.
pub(in super::super) fn conditional(condition: u8) -> Handler {
    by_condition!(condition, jump_if)
}

/// Stores a word below RSP; the caller moves RSP if it succeeds.
#[inline(always)]
unsafe fn push_word(e: &mut Engine, value: u64) -> bool {
    let top = reg::<u64>(e, RSP).wrapping_sub(8);
    let at = place::<u64, true>(e, top);
    if at.is_null() {
        return false;
    }
    at.write_unaligned(value);
    set(e, RSP, top);
    true
}

/// Pushes a word, or leaves the operation.
macro_rules! push {
    ($engine:expr, $op:expr, $value:expr) => {{
        let top = reg::<u64>($engine, RSP).wrapping_sub(8);
        let at = find!(u64, true, $engine, $op, top);
        at.write_unaligned($value);
        set($engine, RSP, top);
    }};
}

/// CALL of a relative address.
pub(in super::super) unsafe fn call(e: &mut Engine, op: *const Op) -> *mut Block {
    let back = end(e);
    push!(e, op, back);
    take(e, (*op).disp)
}

/// CALL of an address in a register.
pub(in super::super) unsafe fn call_r(e: &mut Engine, op: *const Op) -> *mut Block {
    let target = reg::<u64>(e, (*op).r1);
    let back = end(e);
    if !e.core.mmu.is_canonical(target) {
        return redo(e, op);
    }
    push!(e, op, back);
    e.jump(target)
}

/// CALL of an address in memory.
pub(in super::super) unsafe fn call_m(e: &mut Engine, op: *const Op) -> *mut Block {
    let from = place::<u64, false>(e, Indexed::of(e, op));
    if from.is_null() {
        return redo(e, op);
    }
    let target = from.read_unaligned();
    let back = end(e);
    if !e.core.mmu.is_canonical(target) || !push_word(e, back) {
        return redo(e, op);
    }
    e.jump(target)
}

/// JMP to an address in a register.
pub(in super::super) unsafe fn jump_r(e: &mut Engine, op: *const Op) -> *mut Block {
    let target = reg::<u64>(e, (*op).r1);
    if !e.core.mmu.is_canonical(target) {
        return redo(e, op);
    }
    e.jump(target)
}

/// JMP to an address in memory.
pub(in super::super) unsafe fn jump_m(e: &mut Engine, op: *const Op) -> *mut Block {
    let from = find!(u64, false, e, op, Indexed::of(e, op));
    let target = from.read_unaligned();
    if !e.core.mmu.is_canonical(target) {
        return redo(e, op);
    }
    e.jump(target)
}

/// RET, with an immediate that is released.
pub(in super::super) unsafe fn ret(e: &mut Engine, op: *const Op) -> *mut Block {
    let top = reg::<u64>(e, RSP);
    let from = find!(u64, false, e, op, top);
    let target = from.read_unaligned();
    if !e.core.mmu.is_canonical(target) {
        return redo(e, op);
    }
    set(e, RSP, top.wrapping_add(8).wrapping_add(i64::from((*op).imm).cast_unsigned()));
    e.jump(target)
}

/// PUSH of a register.
pub(in super::super) unsafe fn push_r(e: &mut Engine, op: *const Op) -> *mut Block {
    let value = reg::<u64>(e, (*op).r1);
    push!(e, op, value);
    next!(e, op)
}

/// PUSH of an immediate.
pub(in super::super) unsafe fn push_i(e: &mut Engine, op: *const Op) -> *mut Block {
    push!(e, op, i64::from((*op).imm).cast_unsigned());
    next!(e, op)
}

/// PUSH of memory.
pub(in super::super) unsafe fn push_m(e: &mut Engine, op: *const Op) -> *mut Block {
    let from = place::<u64, false>(e, Indexed::of(e, op));
    if from.is_null() {
        return redo(e, op);
    }
    let value = from.read_unaligned();
    if !push_word(e, value) {
        return redo(e, op);
    }
    next!(e, op)
}

/// POP of a register.
pub(in super::super) unsafe fn pop_r(e: &mut Engine, op: *const Op) -> *mut Block {
    let top = reg::<u64>(e, RSP);
    let from = find!(u64, false, e, op, top);
    let value = from.read_unaligned();
    set(e, RSP, top.wrapping_add(8));
    set(e, (*op).r1, value);
    next!(e, op)
}

/// LEAVE.
pub(in super::super) unsafe fn leave(e: &mut Engine, op: *const Op) -> *mut Block {
    let top = reg::<u64>(e, RBP);
    let from = find!(u64, false, e, op, top);
    let value = from.read_unaligned();
    set(e, RBP, value);
    set(e, RSP, top.wrapping_add(8));
    next!(e, op)
}

/// PUSHFQ.
pub(in super::super) unsafe fn push_flags(e: &mut Engine, op: *const Op) -> *mut Block {
    /// Resume flag and virtual-8086 mode are not shown.
    const HIDDEN: u64 = 3 << 16;
    let value = e.flags.merge(e.core.state.core.registers.rflags) & !HIDDEN;
    push!(e, op, value);
    next!(e, op)
}
