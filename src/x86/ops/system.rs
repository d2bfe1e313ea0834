//! Instructions of ring 0 that kernels execute by the thousand, where they need no more than the CPU's own registers: a
//! kernel that maps its memory page by page reads CR3, drops a translation, and masks interrupts for each. Whatever is
//! not plain about one is the slow executor's.

use super::super::block::{Block, Handler, Op};
use super::super::engine::Engine;
use super::{Address, Indexed, next, redo, set};
use crate::registers::RFLAGS_IF;

/// CLI where it is allowed whatever the I/O privilege level is.
pub(in super::super) unsafe fn clear_interrupts(e: &mut Engine, op: *const Op) -> *mut Block {
    if e.core.privilege() != 0 {
        return redo(e, op);
    }
    e.core.state.core.registers.rflags &= !RFLAGS_IF;
    next!(e, op)
}

/// MOV from a control register that the CPU has by itself.
pub(in super::super) fn read_control(number: usize) -> Option<Handler> {
    Some(match number {
        0 => read::<0>,
        2 => read::<2>,
        3 => read::<3>,
        4 => read::<4>,
        _ => return None,
    })
}

unsafe fn read<const NUMBER: usize>(e: &mut Engine, op: *const Op) -> *mut Block {
    if e.core.privilege() != 0 || e.core.is_lent {
        return redo(e, op);
    }
    let system = &e.core.state.core.system;
    let value = match NUMBER {
        0 => system.cr0,
        2 => system.cr2,
        3 => system.cr3,
        _ => system.cr4,
    };
    set(e, (*op).r1, value);
    next!(e, op)
}

/// INVLPG. The immediate is the instruction's length.
pub(in super::super) unsafe fn invalidate(e: &mut Engine, op: *const Op) -> *mut Block {
    if e.core.privilege() != 0 || e.core.is_lent {
        return redo(e, op);
    }
    let address = Indexed::of(e, op);
    let before = e.core.mmu.generation;
    e.core.mmu.flush_page(address);
    if before == e.core.mmu.generation {
        return next!(e, op);
    }
    // What follows may have been mapped anew.
    e.stop_after(op);
    std::ptr::null_mut()
}
