//! SSE moves, and the operations that the host's own instructions do. Where the control registers forbid SSE, and where
//! an operand that must be aligned is not, the slow executor raises what there is to raise.

use super::super::block::{Block, Handler, Op};
use super::super::engine::Engine;
use super::super::vector::Control;
use super::{Address, Indexed, locate, next, redo, reg, set};
use crate::registers::{CR0_TS, CR4_OSFXSR};

/// Whether SSE may execute.
#[inline(always)]
fn is_enabled(e: &Engine) -> bool {
    const CR0_EM: u64 = 1 << 2;
    let system = &e.core.state.core.system;
    system.cr0 & (CR0_EM | CR0_TS) == 0 && system.cr4 & CR4_OSFXSR != 0
}

#[inline(always)]
unsafe fn xmm(e: &mut Engine, number: u8) -> *mut u128 {
    e.core.state.core.fpu.xmm.as_mut_ptr().add(usize::from(number & 15))
}

/// 16 bytes between registers.
pub(in super::super) unsafe fn move_rr(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) {
        return redo(e, op);
    }
    *xmm(e, (*op).r1) = *xmm(e, (*op).r2);
    next!(e, op)
}

unsafe fn load16<const ALIGNED: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    let address = Indexed::of(e, op);
    if !is_enabled(e) || ALIGNED && address & 15 != 0 {
        return redo(e, op);
    }
    let from = locate::<16, false>(e, address);
    if from.is_null() {
        return redo(e, op);
    }
    *xmm(e, (*op).r1) = from.cast::<u128>().read_unaligned();
    next!(e, op)
}

unsafe fn store16<const ALIGNED: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    let address = Indexed::of(e, op);
    if !is_enabled(e) || ALIGNED && address & 15 != 0 {
        return redo(e, op);
    }
    let to = locate::<16, true>(e, address);
    if to.is_null() {
        return redo(e, op);
    }
    to.cast::<u128>().write_unaligned(*xmm(e, (*op).r2));
    next!(e, op)
}

/// A load of 16 bytes.
pub(in super::super) fn load(is_aligned: bool) -> Handler {
    if is_aligned { load16::<true> } else { load16::<false> }
}

/// A store of 16 bytes.
pub(in super::super) fn store(is_aligned: bool) -> Handler {
    if is_aligned { store16::<true> } else { store16::<false> }
}

/// 4 or 8 bytes from memory; the rest of the register is cleared.
unsafe fn load_part<const SIZE: usize>(e: &mut Engine, op: *const Op) -> *mut Block {
    let from = locate::<SIZE, false>(e, Indexed::of(e, op));
    if from.is_null() || !is_enabled(e) {
        return redo(e, op);
    }
    let value =
        if SIZE == 4 { from.cast::<u32>().read_unaligned().into() } else { from.cast::<u64>().read_unaligned() };
    *xmm(e, (*op).r1) = value.into();
    next!(e, op)
}

/// 4 or 8 bytes to memory.
unsafe fn store_part<const SIZE: usize>(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) {
        return redo(e, op);
    }
    let to = locate::<SIZE, true>(e, Indexed::of(e, op));
    if to.is_null() {
        return redo(e, op);
    }
    let value = *xmm(e, (*op).r2);
    if SIZE == 4 {
        to.cast::<u32>().write_unaligned(value as u32)
    } else {
        to.cast::<u64>().write_unaligned(value as u64)
    }
    next!(e, op)
}

/// MOVSS, MOVSD, MOVD and MOVQ from memory.
pub(in super::super) fn part_from_memory(size: usize) -> Handler {
    if size == 4 { load_part::<4> } else { load_part::<8> }
}

/// The same to memory.
pub(in super::super) fn part_to_memory(size: usize) -> Handler {
    if size == 4 { store_part::<4> } else { store_part::<8> }
}

unsafe fn from_general<const SIZE: usize>(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) {
        return redo(e, op);
    }
    let value = if SIZE == 4 { reg::<u32>(e, (*op).r2).into() } else { reg::<u64>(e, (*op).r2) };
    *xmm(e, (*op).r1) = value.into();
    next!(e, op)
}

unsafe fn to_general<const SIZE: usize>(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) {
        return redo(e, op);
    }
    let value = *xmm(e, (*op).r2);
    if SIZE == 4 {
        set(e, (*op).r1, value as u32)
    } else {
        set(e, (*op).r1, value as u64)
    }
    next!(e, op)
}

/// MOVD and MOVQ from a general register.
pub(in super::super) fn part_from_register(size: usize) -> Handler {
    if size == 4 { from_general::<4> } else { from_general::<8> }
}

/// The same to a general register.
pub(in super::super) fn part_to_register(size: usize) -> Handler {
    if size == 4 { to_general::<4> } else { to_general::<8> }
}

/// PXOR, XORPS and XORPD (0), POR and relatives (1), PAND and relatives (2), between registers.
unsafe fn logic<const KIND: u8>(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) {
        return redo(e, op);
    }
    let (to, from) = (xmm(e, (*op).r1), *xmm(e, (*op).r2));
    match KIND {
        0 => *to ^= from,
        1 => *to |= from,
        _ => *to &= from,
    }
    next!(e, op)
}

/// The bitwise operations.
pub(in super::super) fn bitwise(kind: u8) -> Handler {
    match kind {
        0 => logic::<0>,
        1 => logic::<1>,
        _ => logic::<2>,
    }
}

/// An operation on two registers that needs nothing else: the immediate is its number in the block.
pub(in super::super) unsafe fn plain(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) || !operate(e, op) {
        return redo(e, op);
    }
    next!(e, op)
}

#[inline(never)]
unsafe fn operate(e: &mut Engine, op: *const Op) -> bool {
    let block = &*e.block;
    let Some((function, to, from)) = block.vectors.get((*op).imm as usize).and_then(|call| call.plain()) else {
        return false;
    };
    let mut control = Control { mxcsr: 0x1f80, saved: 0, immediate: 0, third: 0 };
    let source = *xmm(e, from);
    function(xmm(e, to), &raw const source, &raw mut control);
    true
}

/// Any other operation, with its memory operand of up to 16 bytes; #XM and the like are the slow executor's.
pub(in super::super) unsafe fn call(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) || !run(e, op) {
        return redo(e, op);
    }
    next!(e, op)
}

#[inline(never)]
unsafe fn run(e: &mut Engine, op: *const Op) -> bool {
    use super::super::vector_call::{Destination, Source};
    let block = &*e.block;
    let Some(call) = block.vectors.get((*op).imm as usize) else { return false };
    let mut memory = [0; 2];
    if let Source::Memory { size, is_aligned, .. } = call.source {
        let address = Indexed::of(e, op);
        if is_aligned && address & 15 != 0 {
            return false;
        }
        let from = match size {
            16 => locate::<16, false>(e, address),
            8 => locate::<8, false>(e, address),
            4 => locate::<4, false>(e, address),
            _ => return false,
        };
        if from.is_null() {
            return false;
        }
        std::ptr::copy_nonoverlapping(from, memory.as_mut_ptr().cast::<u8>(), size.into());
    }
    match (call.destination, call.source) {
        (Destination::Register(_), Source::General(_)) => {
            e.core.state.core.registers.general.copy_from_slice(&e.regs[..16]);
            call.run(&mut e.core.state.core, &memory).is_ok()
        }
        (Destination::Register(_), _) => call.run(&mut e.core.state.core, &memory).is_ok(),
        (Destination::Flags, _) => {
            let done = call.run(&mut e.core.state.core, &memory).is_ok();
            if done {
                e.flags = super::super::lazy::Lazy::from_flags(e.core.state.core.registers.rflags);
            }
            done
        }
        (Destination::General(_), _) => {
            e.core.state.core.registers.general.copy_from_slice(&e.regs[..16]);
            let done = call.run(&mut e.core.state.core, &memory).is_ok();
            e.regs[..16].copy_from_slice(&e.core.state.core.registers.general);
            done
        }
    }
}
