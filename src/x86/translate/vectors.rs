//! Operations for vector instructions.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::super::block::Op;
use super::super::operand::slot;
use super::super::ops::vector::{self, FloatSource};
use super::super::vector_call::{Destination, Source, VectorCall};
use super::Builder;
use super::operands::{has_memory, offset, register_operand, with_memory};

impl Builder<'_> {
    pub(super) fn vector(&mut self, i: &Instruction) -> Option<()> {
        use Mnemonic as M;
        let xmm = |operand| xmm_operand(i, operand);
        match i.mnemonic() {
            M::Movaps | M::Movapd | M::Movdqa => self.whole(i, true),
            M::Movups | M::Movupd | M::Movdqu => self.whole(i, false),
            M::Movd => self.part(i, 4),
            M::Movq => self.part(i, 8),
            M::Movss if has_memory(i) => self.part(i, 4),
            M::Movsd if has_memory(i) && (xmm(0).is_some() || xmm(1).is_some()) => self.part(i, 8),
            M::Pxor | M::Xorps | M::Xorpd => self.bitwise(i, 0),
            M::Por | M::Orps | M::Orpd => self.bitwise(i, 1),
            M::Pand | M::Andps | M::Andpd => self.bitwise(i, 2),
            _ => None,
        }
        .or_else(|| self.vector_call(i))
    }

    fn whole(&mut self, i: &Instruction, is_aligned: bool) -> Option<()> {
        match (xmm_operand(i, 0), xmm_operand(i, 1)) {
            (Some(r1), Some(r2)) => self.place(Op { r1, r2, ..self.op(vector::move_rr) }),
            (Some(r1), None) => {
                self.place(with_memory(Op { r1, ..self.op(vector::load(is_aligned)) }, self.memory(i)?))
            }
            (None, Some(r2)) => {
                self.place(with_memory(Op { r2, ..self.op(vector::store(is_aligned)) }, self.memory(i)?))
            }
            _ => None,
        }
    }

    fn part(&mut self, i: &Instruction, size: usize) -> Option<()> {
        match (xmm_operand(i, 0), xmm_operand(i, 1)) {
            (Some(r1), None) => match register_operand(i, 1) {
                Some((r2, _)) => self.place(Op { r1, r2, ..self.op(vector::part_from_register(size)) }),
                None if has_memory(i) => {
                    self.place(with_memory(Op { r1, ..self.op(vector::part_from_memory(size)) }, self.memory(i)?))
                }
                None => None,
            },
            (None, Some(r2)) => match register_operand(i, 0) {
                Some((r1, _)) => self.place(Op { r1, r2, ..self.op(vector::part_to_register(size)) }),
                None if has_memory(i) => {
                    self.place(with_memory(Op { r2, ..self.op(vector::part_to_memory(size)) }, self.memory(i)?))
                }
                None => None,
            },
            _ => None,
        }
    }

    fn bitwise(&mut self, i: &Instruction, kind: u8) -> Option<()> {
        let (r1, r2) = (xmm_operand(i, 0)?, xmm_operand(i, 1)?);
        self.place(Op { r1, r2, ..self.op(vector::bitwise(kind)) })
    }

    /// Operations of the table, of 128 bits and less.
    fn vector_call(&mut self, i: &Instruction) -> Option<()> {
        let uses_mmx = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
        if i.encoding() != iced_x86::EncodingKind::Legacy || uses_mmx {
            return None;
        }
        let call = VectorCall::new(i).filter(|call| !call.is_vex && !call.is_wide)?;
        if let (Source::Memory { .. }, Destination::General(_)) = (call.source, call.destination) {
            return None;
        }
        if self.plain(i, &call).is_some() || self.float(i, &call).is_some() {
            return Some(());
        }
        let imm = i32::try_from(self.tables.vectors.len()).expect("at most 64");
        let op = Op { imm, ..self.op(vector::call) };
        let op = if let Source::Memory { .. } = call.source { with_memory(op, self.memory(i)?) } else { op };
        self.tables.vectors.push(call);
        self.place(op)
    }

    /// A floating-point operation that leaves MXCSR to the host's CPU.
    fn float(&mut self, i: &Instruction, call: &VectorCall) -> Option<()> {
        call.bare?;
        let (source, r2) = match call.source {
            Source::Register(number) => (FloatSource::Register, number),
            Source::General(register) => {
                slot(register).map(|place| (FloatSource::General(place.size), offset(place.index)))?
            }
            Source::Memory { size, is_signed: false, .. } => (FloatSource::Memory(size.into()), 0),
            _ => return None,
        };
        let is_comparison = call.destination == Destination::Flags;
        if !is_comparison && call.destination != Destination::Register(call.first) {
            return None;
        }
        let run = vector::float(source, is_comparison)?;
        let imm = i32::try_from(self.tables.vectors.len()).expect("at most 64");
        let op = Op { r1: call.first, r2, imm, ..self.op(run) };
        let op = if let FloatSource::Memory(_) = source { with_memory(op, self.memory(i)?) } else { op };
        self.tables.vectors.push(*call);
        self.place(op)
    }

    /// An operation that is a call of a function and no more.
    fn plain(&mut self, i: &Instruction, call: &VectorCall) -> Option<()> {
        use Mnemonic as M;
        if matches!(i.mnemonic(), M::Rcpps | M::Rcpss | M::Rsqrtps | M::Rsqrtss) {
            // Computed, with floating-point operations whose flags are not the guest's.
            return None;
        }
        let (function, r1, immediate) = call.plain()?;
        let imm = i32::try_from(self.tables.functions.len()).expect("at most 64");
        let op = match call.source {
            Source::Register(r2) => Op { r1, r2, imm, disp: immediate.into(), ..self.op(vector::plain) },
            _ if immediate == 0 => with_memory(Op { r1, imm, ..self.op(vector::plain_memory) }, self.memory(i)?),
            _ => return None,
        };
        self.tables.functions.push(function);
        self.place(op)
    }
}

/// Number of an XMM register that an operand names.
fn xmm_operand(i: &Instruction, operand: u32) -> Option<u8> {
    if operand >= i.op_count() || i.op_kind(operand) != OpKind::Register || !i.op_register(operand).is_xmm() {
        return None;
    }
    u8::try_from(i.op_register(operand) as usize - Register::XMM0 as usize).ok().filter(|n| *n < 16)
}
