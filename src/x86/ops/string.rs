//! REP MOVS and REP STOS, forward: page by page. Other string instructions are the slow executor's.

use super::super::block::{Block, Handler, Op};
use super::super::engine::{Engine, Stop};
use super::super::mmu::PAGE;
use super::super::string::CHUNK;
use super::{next, redo, reg, set};

const RAX: u8 = 0;
const RCX: u8 = 8;
const RSI: u8 = 6 * 8;
const RDI: u8 = 7 * 8;

/// Where the next piece is made, and its elements.
unsafe fn piece(e: &mut Engine, size: u64, moves: bool) -> Option<(*mut u8, *mut u8, u64)> {
    let (to, from) = (reg::<u64>(e, RDI), reg::<u64>(e, RSI));
    let room = |address: u64| PAGE - address % PAGE;
    let left = (reg::<u64>(e, RCX) - 1) % CHUNK + 1;
    let mut bytes = room(to).min(left * size);
    if moves {
        bytes = bytes.min(room(from));
        // Bytes that the copy itself makes are not its source.
        let distance = to.wrapping_sub(from);
        if distance != 0 {
            bytes = bytes.min(distance);
        }
    }
    let count = bytes / size;
    if count == 0 {
        return None;
    }
    let length = usize::try_from(count * size).ok()?;
    let source = if moves { e.core.mmu.place(from, length, false)? } else { std::ptr::null_mut() };
    let target = e.core.mmu.place(to, length, true)?;
    Some((target, source, count))
}

/// Does pieces up to the next multiple of [`CHUNK`]; true if the instruction is complete. What stops it before that is
/// the slow executor's, which goes on from where it stands.
#[inline(never)]
unsafe fn work(e: &mut Engine, op: *const Op, size: u64, moves: bool) -> bool {
    let is_backward = e.core.state.core.registers.rflags & 1 << 10 != 0;
    e.at = op;
    e.stop = Stop::Redo;
    if reg::<u64>(e, RCX) == 0 {
        return true;
    }
    loop {
        let found = if is_backward || e.core.is_stepped { None } else { piece(e, size, moves) };
        let Some((target, source, count)) = found else { return false };
        let bytes = count * size;
        if moves {
            std::ptr::copy(source, target, bytes as usize);
        } else {
            fill(target, bytes as usize, reg::<u64>(e, RAX), size as usize);
        }
        let left = reg::<u64>(e, RCX) - count;
        set(e, RCX, left);
        let to = reg::<u64>(e, RDI).wrapping_add(bytes);
        set(e, RDI, to);
        if moves {
            let from = reg::<u64>(e, RSI).wrapping_add(bytes);
            set(e, RSI, from);
        }
        if left.is_multiple_of(CHUNK) {
            e.stop = Stop::Again;
            return left == 0;
        }
    }
}

/// Repeats an element.
unsafe fn fill(target: *mut u8, bytes: usize, value: u64, size: usize) {
    let element = value.to_le_bytes();
    if element[..size].iter().all(|byte| *byte == element[0]) {
        std::ptr::write_bytes(target, element[0], bytes);
        return;
    }
    for at in (0..bytes).step_by(size) {
        std::ptr::copy_nonoverlapping(element.as_ptr(), target.add(at), size);
    }
}

unsafe fn repeated<const SIZE: u64, const MOVES: bool>(e: &mut Engine, op: *const Op) -> *mut Block {
    if !work(e, op, SIZE, MOVES) {
        return if e.stop == Stop::Redo { redo(e, op) } else { std::ptr::null_mut() };
    }
    next!(e, op)
}

/// REP MOVS or REP STOS with elements of that size.
pub(in super::super) fn string(size: usize, moves: bool) -> Handler {
    match (size, moves) {
        (1, true) => repeated::<1, true>,
        (2, true) => repeated::<2, true>,
        (4, true) => repeated::<4, true>,
        (_, true) => repeated::<8, true>,
        (1, false) => repeated::<1, false>,
        (2, false) => repeated::<2, false>,
        (4, false) => repeated::<4, false>,
        (_, false) => repeated::<8, false>,
    }
}
