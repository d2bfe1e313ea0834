//! SSE moves, and the operations that the host's own instructions do. Where the control registers forbid SSE, and where
//! an operand that must be aligned is not, the slow executor raises what there is to raise.

use std::arch::x86_64::{
    __m128i, _mm_and_si128, _mm_cvtsi64_si128, _mm_loadu_si128, _mm_or_si128, _mm_storeu_si128, _mm_xor_si128,
};

use super::super::block::{Block, Handler, Op};
use super::super::engine::Engine;
use super::super::lazy::Lazy;
use super::int::Int;
use super::{Address, Indexed, find, locate, next, redo, reg, set};
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

/// The register's value in one of the host's vector registers. Stores of 16 bytes are what later loads of 16 bytes get
/// their value from without a wait, as two of 8 bytes are not.
#[inline(always)]
unsafe fn value(e: &mut Engine, number: u8) -> __m128i {
    _mm_loadu_si128(xmm(e, number).cast())
}

#[inline(always)]
unsafe fn set_value(e: &mut Engine, number: u8, value: __m128i) {
    _mm_storeu_si128(xmm(e, number).cast(), value);
}

/// 16 bytes between registers.
pub(in super::super) unsafe fn move_rr(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) {
        return redo(e, op);
    }
    let from = value(e, (*op).r2);
    set_value(e, (*op).r1, from);
    next!(e, op)
}

unsafe fn load16<const ALIGNED: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    let address = Indexed::of(e, op);
    if !is_enabled(e) || ALIGNED && address & 15 != 0 {
        return redo(e, op);
    }
    let from = find!(__m128i, false, e, op, address);
    set_value(e, (*op).r1, _mm_loadu_si128(from));
    next!(e, op)
}

unsafe fn store16<const ALIGNED: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    let address = Indexed::of(e, op);
    if !is_enabled(e) || ALIGNED && address & 15 != 0 {
        return redo(e, op);
    }
    let to = find!(__m128i, true, e, op, address);
    _mm_storeu_si128(to, value(e, (*op).r2));
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
unsafe fn load_part<T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) {
        return redo(e, op);
    }
    let from = find!(T, false, e, op, Indexed::of(e, op));
    set_value(e, (*op).r1, _mm_cvtsi64_si128(from.read_unaligned().zx().cast_signed()));
    next!(e, op)
}

/// 4 or 8 bytes to memory.
unsafe fn store_part<T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) {
        return redo(e, op);
    }
    let to = find!(T, true, e, op, Indexed::of(e, op));
    to.write_unaligned(T::cut(*xmm(e, (*op).r2) as u64));
    next!(e, op)
}

/// MOVSS, MOVSD, MOVD and MOVQ from memory.
pub(in super::super) fn part_from_memory(size: usize) -> Handler {
    if size == 4 { load_part::<u32> } else { load_part::<u64> }
}

/// The same to memory.
pub(in super::super) fn part_to_memory(size: usize) -> Handler {
    if size == 4 { store_part::<u32> } else { store_part::<u64> }
}

unsafe fn from_general<const SIZE: usize>(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) {
        return redo(e, op);
    }
    let from = if SIZE == 4 { reg::<u32>(e, (*op).r2).into() } else { reg::<u64>(e, (*op).r2) };
    set_value(e, (*op).r1, _mm_cvtsi64_si128(from.cast_signed()));
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
    let (a, b) = (value(e, (*op).r1), value(e, (*op).r2));
    let r = match KIND {
        0 => _mm_xor_si128(a, b),
        1 => _mm_or_si128(a, b),
        _ => _mm_and_si128(a, b),
    };
    set_value(e, (*op).r1, r);
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

/// An operation on two registers that needs no more than an immediate, in [`Op::disp`]. Its function is the block's
/// whose number is [`Op::imm`].
pub(in super::super) unsafe fn plain(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) {
        return redo(e, op);
    }
    // Apart from the destination, and not among the locals: whose address is known elsewhere would keep the last call
    // from being a jump.
    let source = value(e, (*op).r2);
    _mm_storeu_si128((&raw mut e.vector_source).cast(), source);
    e.vector_control.immediate = i64::from((*op).disp).cast_unsigned();
    let function = *(*e.block).tables.functions.add((*op).imm as usize);
    let to = xmm(e, (*op).r1);
    function(to, &raw const e.vector_source, &raw mut e.vector_control);
    next!(e, op)
}

/// The same with 16 bytes of memory, which have to be aligned, and no immediate but 0.
pub(in super::super) unsafe fn plain_memory(e: &mut Engine, op: *const Op) -> *mut Block {
    let address = Indexed::of(e, op);
    if !is_enabled(e) || address & 15 != 0 {
        return redo(e, op);
    }
    let from = find!(u128, false, e, op, address);
    e.vector_control.immediate = 0;
    let function = *(*e.block).tables.functions.add((*op).imm as usize);
    let to = xmm(e, (*op).r1);
    function(to, from, &raw mut e.vector_control);
    next!(e, op)
}

/// Where the source of a floating-point operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum FloatSource {
    /// A vector register.
    Register,
    /// A general register of so many bytes.
    General(usize),
    /// So many bytes of memory.
    Memory(usize),
}

/// Calls a floating-point operation with its source in [`Engine::vector_source`].
#[inline(always)]
unsafe fn calculate<const FLAGS: bool>(e: &mut Engine, op: *const Op, source: __m128i) {
    _mm_storeu_si128((&raw mut e.vector_source).cast(), source);
    let function = (*(*e.block).tables.vectors.add((*op).imm as usize)).bare.unwrap_unchecked();
    if FLAGS {
        let first = value(e, (*op).r1);
        _mm_storeu_si128((&raw mut e.vector_target).cast(), first);
        function(&raw mut e.vector_target, &raw const e.vector_source, &raw mut e.vector_control);
        e.flags = Lazy::from_flags(e.vector_target as u64);
    } else {
        let to = xmm(e, (*op).r1);
        function(to, &raw const e.vector_source, &raw mut e.vector_control);
    }
}

unsafe fn float_r<const FLAGS: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) || !e.gathers_float_flags() {
        return call(e, op);
    }
    let source = value(e, (*op).r2);
    calculate::<FLAGS>(e, op, source);
    next!(e, op)
}

unsafe fn float_general<T: Int>(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) || !e.gathers_float_flags() {
        return call(e, op);
    }
    let source = _mm_cvtsi64_si128(reg::<T>(e, (*op).r2).sx().cast_signed());
    calculate::<false>(e, op, source);
    next!(e, op)
}

unsafe fn float_m<T: Int, const FLAGS: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    if !is_enabled(e) || !e.gathers_float_flags() {
        return call(e, op);
    }
    let from = find!(T, false, e, op, Indexed::of(e, op));
    calculate::<FLAGS>(e, op, _mm_cvtsi64_si128(from.read_unaligned().zx().cast_signed()));
    next!(e, op)
}

unsafe fn float_m16(e: &mut Engine, op: *const Op) -> *mut Block {
    let address = Indexed::of(e, op);
    if !is_enabled(e) || !e.gathers_float_flags() || address & 15 != 0 {
        return call(e, op);
    }
    let from = find!(__m128i, false, e, op, address);
    calculate::<false>(e, op, _mm_loadu_si128(from));
    next!(e, op)
}

/// The function for a floating-point operation with a bare function, whose call in the block has the number
/// [`Op::imm`]; its first operand is r1, and a register that is its source r2.
pub(in super::super) fn float(source: FloatSource, is_comparison: bool) -> Option<Handler> {
    use FloatSource::{General, Memory, Register};
    let handler: Handler = match (source, is_comparison) {
        (Register, false) => float_r::<false>,
        (Register, true) => float_r::<true>,
        (General(4), false) => float_general::<u32>,
        (General(8), false) => float_general::<u64>,
        (Memory(4), false) => float_m::<u32, false>,
        (Memory(4), true) => float_m::<u32, true>,
        (Memory(8), false) => float_m::<u64, false>,
        (Memory(8), true) => float_m::<u64, true>,
        (Memory(16), false) => float_m16,
        _ => return None,
    };
    Some(handler)
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
    let call = &*(*e.block).tables.vectors.add((*op).imm as usize);
    e.take_float_flags();
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
