//! Operations for moves, addresses, conditions and the stack.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::super::block::{Handler, Op};
use super::super::notes::{Note, bit as of};
use super::super::ops::pair::First;
use super::super::ops::{data, flow};
use super::operands::{has_memory, immediate, register_operand, with_memory};
use super::templates::{self, Templates};
use super::{Builder, bytes};
use crate::registers::{RAX, RDX};

static MOVES: Templates = templates::moves(&data::MOVES);

impl Builder<'_> {
    /// Moves that are none of the families', and what is done to single flags.
    pub(super) fn moved(&mut self, i: &Instruction) -> Option<()> {
        use Mnemonic as M;
        match i.mnemonic() {
            M::Movnti => self.mov(i),
            M::Xchg => {
                let ((r1, size), (r2, _)) = (register_operand(i, 0)?, register_operand(i, 1)?);
                self.ops.note(Note::pure(of(r1) | of(r2), of(r1) | of(r2)));
                self.place(Op { r1, r2, ..self.op(data::exchange(size)) })
            }
            M::Cld => self.place(self.op(data::direction)),
            M::Std => self.place(Op { imm: 1, ..self.op(data::direction) }),
            M::Clc => self.place(self.op(data::carry)),
            M::Stc => self.place(Op { imm: 1, ..self.op(data::carry) }),
            M::Cmc => self.place(self.op(data::complement_carry)),
            M::Pushfq => self.stack(i),
            _ => None,
        }
    }

    /// LEA.
    pub(super) fn address(&mut self, i: &Instruction) -> Option<()> {
        let (r1, size) = register_operand(i, 0)?;
        // A segment does not count, and only a 64-bit address is known.
        if matches!(i.segment_prefix(), Register::FS | Register::GS) {
            return None;
        }
        let memory = self.memory(i)?;
        let reads = of(memory.base) | of(memory.index) | narrow(r1, size);
        let first = if memory.is_indexed { First::Indexed } else { First::Based };
        let first = if size >= 4 { Some(first) } else { None };
        self.ops.note(Note { first, size: bytes(size), ..Note::pure(reads, of(r1)) });
        self.place(with_memory(Op { r1, ..self.op(data::lea(size, memory.is_indexed)) }, memory))
    }

    /// CDQE and the like.
    pub(super) fn accumulator(&mut self, i: &Instruction) -> Option<()> {
        match i.mnemonic() {
            Mnemonic::Cdqe => self.pure(data::cdqe, RAX, RAX),
            Mnemonic::Cwde => self.pure(data::cwde, RAX, RAX),
            Mnemonic::Cdq => self.pure(data::cdq, RAX, RDX),
            Mnemonic::Cqo => self.pure(data::cqo, RAX, RDX),
            _ => None,
        }
    }

    /// An operation that only works on these registers.
    fn pure(&mut self, run: Handler, reads: usize, writes: usize) -> Option<()> {
        self.ops.note(Note::pure(1 << reads, 1 << writes));
        self.place(self.op(run))
    }

    pub(super) fn mov(&mut self, i: &Instruction) -> Option<()> {
        if i.op1_kind() == OpKind::Immediate64 {
            let (r1, _) = register_operand(i, 0)?;
            let bytes = i.immediate64().to_le_bytes();
            let half = |at: usize| i32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
            self.ops.note(Note::pure(0, of(r1)));
            return self.place(Op { r1, imm: half(0), disp: half(4), ..self.op(data::mov_wide) });
        }
        self.two_operands(i, &MOVES)
    }

    pub(super) fn extended(&mut self, i: &Instruction, is_signed: bool) -> Option<()> {
        let (r1, to) = register_operand(i, 0)?;
        if let Some((r2, from)) = register_operand(i, 1) {
            self.ops.note(Note::pure(of(r2) | narrow(r1, to), of(r1)));
            return self.place(Op { r1, r2, ..self.op(data::extending(to, from, is_signed, None)?) });
        }
        let (memory, from) = (self.memory(i)?, i.memory_size().size());
        let run = data::extending(to, from, is_signed, Some(memory.is_indexed))?;
        self.place(with_memory(Op { r1, ..self.op(run) }, memory))
    }

    /// SETcc.
    pub(super) fn set_if(&mut self, i: &Instruction, condition: u8) -> Option<()> {
        if let Some((r1, _)) = register_operand(i, 0) {
            self.ops.note(Note { reads_flags: true, ..Note::pure(of(r1), of(r1)) });
            return self.place(Op { r1, ..self.op(data::set_condition(condition, false)) });
        }
        self.place(with_memory(self.op(data::set_condition(condition, true)), self.memory(i)?))
    }

    /// CMOVcc.
    pub(super) fn move_if(&mut self, i: &Instruction, condition: u8) -> Option<()> {
        let (r1, size) = register_operand(i, 0)?;
        if let Some((r2, _)) = register_operand(i, 1) {
            self.ops.note(Note { reads_flags: true, ..Note::pure(of(r1) | of(r2), of(r1)) });
            return self.place(Op { r1, r2, ..self.op(data::conditional_move(size, condition, false)?) });
        }
        let op = Op { r1, ..self.op(data::conditional_move(size, condition, true)?) };
        self.place(with_memory(op, self.memory(i)?))
    }

    pub(super) fn stack(&mut self, i: &Instruction) -> Option<()> {
        match i.code() {
            Code::Push_r64 => self.place(Op { r1: register_operand(i, 0)?.0, ..self.op(flow::push_r) }),
            Code::Pushq_imm8 | Code::Pushq_imm32 => self.place(Op { imm: immediate(i, 0)?, ..self.op(flow::push_i) }),
            Code::Push_rm64 if has_memory(i) => self.place(with_memory(self.op(flow::push_m), self.memory(i)?)),
            Code::Pop_r64 => self.place(Op { r1: register_operand(i, 0)?.0, ..self.op(flow::pop_r) }),
            Code::Leaveq => self.place(self.op(flow::leave)),
            Code::Pushfq => self.place(self.op(flow::push_flags)),
            _ => None,
        }
    }
}

/// The bit of a register of which a result of that size leaves a part.
fn narrow(register: u8, size: usize) -> u32 {
    if size < 4 { of(register) } else { 0 }
}
