//! Operands of instructions as operations have them.

use iced_x86::{Instruction, OpKind, Register};

use super::super::block::Op;
use super::super::engine::{FS, GS, START, ZERO};
use super::super::operand::find_slot;
use super::super::ops::alu::size_index;
use super::Builder;
use super::templates::{IMMEDIATE, REGISTERS, Templates};

/// Where a general register lies among the engine's.
#[derive(Clone, Copy)]
struct Place {
    /// Byte offset.
    offset: u8,
    /// Bytes; 0 if it is no general register.
    size: u8,
}

/// By number of the register.
static PLACES: [Place; 256] = {
    let mut places = [Place { offset: 0, size: 0 }; 256];
    let mut n = 0;
    while n < Register::R15 as usize + 1 {
        if let Some(found) = find_slot(n) {
            // There are sixteen registers, of at most 8 bytes.
            #[allow(clippy::cast_possible_truncation)]
            let place = Place { offset: 8 * found.index as u8 + (found.shift / 8) as u8, size: found.size as u8 };
            places[n] = place;
        }
        n += 1;
    }
    places
};

#[inline(always)]
fn place(register: Register) -> Place {
    PLACES[register as u8 as usize]
}

/// Byte offset of a register in the engine's.
pub(super) const fn offset(register: usize) -> u8 {
    // There are twenty.
    #[allow(clippy::cast_possible_truncation)]
    let offset = (8 * register) as u8;
    offset
}

/// Byte offset and size of a general register that an operand names.
#[inline(always)]
pub(super) fn register_operand(i: &Instruction, operand: u32) -> Option<(u8, usize)> {
    // What an instruction has not got is no register: there is no need to count.
    if i.op_kind(operand) != OpKind::Register {
        return None;
    }
    let Place { offset, size } = place(i.op_register(operand));
    (size != 0).then_some((offset, usize::from(size)))
}

pub(super) fn has_memory(i: &Instruction) -> bool {
    i.op_kinds().any(|kind| kind == OpKind::Memory)
}

/// What counts of an instruction's immediate, by kind of operand: nothing, [`SIGNED`], or these bits.
static IMMEDIATES: [u32; 32] = {
    let mut kinds = [0; 32];
    kinds[OpKind::Immediate8 as usize] = 0xff;
    kinds[OpKind::Immediate16 as usize] = 0xffff;
    kinds[OpKind::Immediate32 as usize] = u32::MAX;
    kinds[OpKind::Immediate32to64 as usize] = u32::MAX;
    kinds[OpKind::Immediate8to16 as usize] = SIGNED;
    kinds[OpKind::Immediate8to32 as usize] = SIGNED;
    kinds[OpKind::Immediate8to64 as usize] = SIGNED;
    kinds
};

/// One byte with its sign.
const SIGNED: u32 = 1;

/// An immediate that fits 32 bits, sign-extended. Of a 32-bit operation the low half alone counts.
#[inline(always)]
pub(super) fn immediate(i: &Instruction, operand: u32) -> Option<i32> {
    let bits = IMMEDIATES[i.op_kind(operand) as usize & 31];
    let value = if bits == SIGNED { i.immediate8to32() } else { (i.immediate32() & bits).cast_signed() };
    (bits != 0).then_some(value)
}

/// A memory operand.
#[derive(Clone, Copy)]
pub(super) struct Memory {
    pub base: u8,
    pub index: u8,
    scale: u8,
    disp: i32,
    pub is_indexed: bool,
}

#[inline(always)]
pub(super) fn with_memory(op: Op, memory: Memory) -> Op {
    let Memory { base, index, scale, disp, .. } = memory;
    Op { base, index, scale, disp, ..op }
}

/// The first row of templates for a register and memory.
const FROM_MEMORY: usize = 2;
/// The first row for memory and a register.
const TO_MEMORY: usize = 4;
/// The first row for memory and an immediate.
const MEMORY_IMMEDIATE: usize = 6;

impl Builder<'_> {
    /// The memory operand, if operations can have it.
    pub(super) fn memory(&self, i: &Instruction) -> Option<Memory> {
        let wide = |register: Register| {
            let Place { offset, size } = place(register);
            (size == 8).then_some(offset)
        };
        let zero = offset(ZERO);
        let mut displacement = i.memory_displacement64();
        let (base_register, index_register) = (i.memory_base(), i.memory_index());
        let has_index = index_register != Register::None;
        let mut index = if has_index { wide(index_register)? } else { zero };
        let mut scale = u8::try_from(i.memory_index_scale().trailing_zeros()).ok()?;
        let mut base = if base_register == Register::RIP {
            displacement = displacement.wrapping_sub(self.rip);
            offset(START)
        } else if base_register != Register::None {
            wide(base_register)?
        } else if !has_index && i.memory_displ_size() == 4 {
            return None;
        } else {
            zero
        };
        let mut is_indexed = has_index;
        let segment = match i.segment_prefix() {
            Register::FS => offset(FS),
            Register::GS => offset(GS),
            _ => zero,
        };
        if segment != zero {
            if base == zero {
                base = segment;
            } else if has_index {
                return None;
            } else {
                (index, scale, is_indexed) = (segment, 0, true);
            }
        }
        let disp = i32::try_from(displacement.cast_signed()).ok()?;
        Some(Memory { base, index, scale, disp, is_indexed })
    }

    /// An operation on two operands of any form.
    pub(super) fn two_operands(&mut self, i: &Instruction, templates: &'static Templates) -> Option<()> {
        let (to, from) = (i.op0_kind(), i.op1_kind());
        if to == OpKind::Memory || from == OpKind::Memory {
            return self.two_with_memory(i, templates);
        }
        let Place { offset: r1, size } = place(i.op0_register());
        if to != OpKind::Register || size == 0 {
            return None;
        }
        let column = size_index(usize::from(size));
        if from == OpKind::Register {
            let Place { offset: r2, size } = place(i.op1_register());
            let template = &templates[REGISTERS][column];
            return if size == 0 { None } else { self.place_as(template, Op { r1, r2, ..self.op(template.run) }) };
        }
        let (template, imm) = (&templates[IMMEDIATE][column], immediate(i, 1)?);
        self.place_as(template, Op { r1, imm, ..self.op(template.run) })
    }

    /// The same where one is in memory.
    #[inline(never)]
    fn two_with_memory(&mut self, i: &Instruction, templates: &'static Templates) -> Option<()> {
        let memory = self.memory(i)?;
        let (first, second) = (register_operand(i, 0), register_operand(i, 1));
        let (row, size) = match (first, second) {
            (Some((_, size)), _) => (FROM_MEMORY, size),
            (None, Some(_)) if i.op0_kind() == OpKind::Memory => (TO_MEMORY, i.memory_size().size()),
            (None, None) if i.op0_kind() == OpKind::Memory => (MEMORY_IMMEDIATE, i.memory_size().size()),
            _ => return None,
        };
        let imm = if row == MEMORY_IMMEDIATE { immediate(i, 1)? } else { 0 };
        let template = &templates[row + usize::from(memory.is_indexed)][size_index(size)];
        let (r1, r2) = (first.map_or(0, |(r1, _)| r1), second.map_or(0, |(r2, _)| r2));
        self.place_as(template, with_memory(Op { r1, r2, imm, ..self.op(template.run) }, memory))
    }
}
