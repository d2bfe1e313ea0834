//! String instructions, alone and repeated. A repeated one executes a bounded chunk and leaves registers so that it can
//! be continued or interrupted, as between two iterations on a processor.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::Outcome;
use super::flags::{self, DF, ZF};
use super::operand::{Address, Machine, Step};
use crate::registers::{RAX, RCX, RDI, RSI};

/// A step ends where the count of what is left is a multiple of this: the number of steps that an instruction takes then
/// does not depend on how it is executed.
pub(super) const CHUNK: u64 = 4096;
/// The most bytes that MOVS and STOS handle with one access.
const BLOCK: usize = 512;
/// Pages are where an access may begin to fault.
const PAGE: u64 = 4096;

/// Which of the five instructions.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Move,
    Store,
    Load,
    Compare,
    Scan,
}

/// A string instruction, taken apart.
struct Operation {
    kind: Kind,
    /// Bytes of an element.
    size: usize,
    /// Bytes of RSI, RDI and RCX that count: the address size.
    width: usize,
    /// Base of the segment that the source is read from.
    base: u64,
    /// Added to the pointers after each element.
    delta: u64,
}

/// Kind and element size. SSE's MOVSD and CMPSD share a mnemonic with the string instructions.
fn kind(instruction: &Instruction) -> Option<(Kind, usize)> {
    use Mnemonic as M;
    let kind = match instruction.mnemonic() {
        M::Movsb => (Kind::Move, 1),
        M::Movsw => (Kind::Move, 2),
        M::Movsd => (Kind::Move, 4),
        M::Movsq => (Kind::Move, 8),
        M::Stosb => (Kind::Store, 1),
        M::Stosw => (Kind::Store, 2),
        M::Stosd => (Kind::Store, 4),
        M::Stosq => (Kind::Store, 8),
        M::Lodsb => (Kind::Load, 1),
        M::Lodsw => (Kind::Load, 2),
        M::Lodsd => (Kind::Load, 4),
        M::Lodsq => (Kind::Load, 8),
        M::Cmpsb => (Kind::Compare, 1),
        M::Cmpsw => (Kind::Compare, 2),
        M::Cmpsd => (Kind::Compare, 4),
        M::Cmpsq => (Kind::Compare, 8),
        M::Scasb => (Kind::Scan, 1),
        M::Scasw => (Kind::Scan, 2),
        M::Scasd => (Kind::Scan, 4),
        M::Scasq => (Kind::Scan, 8),
        _ => return None,
    };
    let is_vector = instruction.op_count() > 2
        || (0..instruction.op_count()).any(|n| {
            instruction.op_kind(n) == OpKind::Memory
                || instruction.op_kind(n) == OpKind::Register && instruction.op_register(n).is_xmm()
        });
    if is_vector { None } else { Some(kind) }
}

/// Executes the instruction if it belongs here; false if it does not.
pub(super) fn execute(m: &mut Machine) -> Step<bool> {
    let Some((kind, size)) = kind(m.instruction) else { return Ok(false) };
    let is_short = (0..m.instruction.op_count())
        .any(|n| matches!(m.instruction.op_kind(n), OpKind::MemorySegESI | OpKind::MemoryESEDI));
    let backward = m.cpu.registers.rflags & DF != 0;
    let size_wide = size as u64;
    let operation = Operation {
        kind,
        size,
        width: if is_short { 4 } else { 8 },
        base: m.segment_base(),
        delta: if backward { size_wide.wrapping_neg() } else { size_wide },
    };
    if m.instruction.has_rep_prefix() || m.instruction.has_repne_prefix() {
        repeat(m, &operation)?;
    } else {
        operation.element(m)?;
    }
    Ok(true)
}

/// Executes iterations up to the next multiple of [`CHUNK`], or one, as the bus says. A fault in a later iteration shows when the instruction is
/// stepped again; the count then is no multiple.
fn repeat(m: &mut Machine, operation: &Operation) -> Step {
    let mut done = 0;
    let is_single = m.bus.one_iteration();
    loop {
        let left = m.general(RCX, operation.width);
        if left == 0 || done > 0 && operation.is_settled(m) {
            return Ok(());
        }
        if done > 0 && (is_single || left.is_multiple_of(CHUNK)) {
            break;
        }
        let mut count = if is_single { 0 } else { operation.block(m, (left - 1) % CHUNK + 1) };
        if count == 0 {
            match operation.element(m) {
                Err(_) if done > 0 => break,
                result => result?,
            }
            count = 1;
        }
        m.set_general(RCX, operation.width, left - count);
        done += count;
    }
    m.cpu.registers.rip = m.instruction.ip();
    Err(Outcome::Repeat)
}

impl Operation {
    /// Whether a comparison ends the repetition.
    fn is_settled(&self, m: &Machine) -> bool {
        let is_equal = m.cpu.registers.rflags & ZF != 0;
        matches!(self.kind, Kind::Compare | Kind::Scan) && is_equal == m.instruction.has_repne_prefix()
    }

    fn source(&self, m: &Machine) -> Address {
        Address { linear: m.general(RSI, self.width).wrapping_add(self.base), is_stack: false }
    }

    fn destination(&self, m: &Machine) -> Address {
        Address { linear: m.general(RDI, self.width), is_stack: false }
    }

    /// Moves the pointers that the instruction uses by `delta`.
    fn advance(&self, m: &mut Machine, delta: u64) {
        let uses_source = matches!(self.kind, Kind::Move | Kind::Load | Kind::Compare);
        for (register, is_used) in [(RSI, uses_source), (RDI, self.kind != Kind::Load)] {
            if is_used {
                m.set_general(register, self.width, m.general(register, self.width).wrapping_add(delta));
            }
        }
    }

    /// One iteration. An error leaves everything as it was.
    fn element(&self, m: &mut Machine) -> Step {
        let size = self.size;
        match self.kind {
            Kind::Move => {
                let value = m.load(self.source(m), size)?;
                m.store(self.destination(m), size, value)?;
            }
            Kind::Store => m.store(self.destination(m), size, m.general(RAX, size))?,
            Kind::Load => {
                let value = m.load(self.source(m), size)?;
                m.set_general(RAX, size, value);
            }
            Kind::Compare => {
                let (a, b) = (m.load(self.source(m), size)?, m.load(self.destination(m), size)?);
                m.set_arithmetic(flags::subtract(a, b, false, size).1);
            }
            Kind::Scan => {
                let value = m.load(self.destination(m), size)?;
                m.set_arithmetic(flags::subtract(m.general(RAX, size), value, false, size).1);
            }
        }
        self.advance(m, self.delta);
        Ok(())
    }

    /// Does several iterations of a forward MOVS or STOS with one access and returns their number; 0 if that is not
    /// possible. Bytes that the copy itself produces are not its source, and no page border lies inside.
    fn block(&self, m: &mut Machine, left: u64) -> u64 {
        if !matches!(self.kind, Kind::Move | Kind::Store) || m.cpu.registers.rflags & DF != 0 || self.width != 8 {
            return 0;
        }
        let (source, destination) = (self.source(m), self.destination(m));
        let room = |address: Address| PAGE - address.linear % PAGE;
        let mut bytes = (BLOCK as u64).min(room(destination)).min(left.saturating_mul(self.size as u64));
        if self.kind == Kind::Move {
            let distance = destination.linear.wrapping_sub(source.linear);
            bytes = bytes.min(room(source)).min(if distance == 0 { u64::MAX } else { distance });
        }
        let count = bytes / self.size as u64;
        if count < 2 {
            return 0;
        }
        let length = usize::try_from(count).expect("at most 512") * self.size;
        let mut buffer = [0; BLOCK];
        let filled = self.fill(m, source, &mut buffer[..length]);
        if filled.and_then(|()| m.store_bytes(destination, &buffer[..length])).is_err() {
            return 0;
        }
        self.advance(m, length as u64);
        count
    }

    /// What a block stores.
    fn fill(&self, m: &mut Machine, source: Address, buffer: &mut [u8]) -> Step {
        if self.kind == Kind::Move {
            return m.load_bytes(source, buffer);
        }
        let element = m.general(RAX, self.size).to_le_bytes();
        for place in buffer.chunks_exact_mut(self.size) {
            place.copy_from_slice(&element[..self.size]);
        }
        Ok(())
    }
}
