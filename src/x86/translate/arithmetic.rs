//! Operations for arithmetic, shifts and bits, with what is known of them.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::super::block::{Handler, Op};
use super::super::notes::{Note, bit as of};
use super::super::ops::alu::{
    self, Functions, Joined, UnaryFunctions, comparisons, functions, size_index, unary_functions,
};
use super::super::ops::pair::{First, Second};
use super::super::ops::{bit, multiply, shift};
use super::Builder;
use super::operands::{immediate, register_operand, with_memory};
use super::templates::{self, Template, Templates};
use crate::registers::RCX;

/// One that can be joined with a branch only as a comparison with an immediate can, or not at all.
const fn plain(functions: Functions, joined: Option<Joined>, second: Second) -> Templates {
    templates::arithmetic(functions, [None, joined], false, Some(second))
}

const fn with_carry(functions: Functions) -> Templates {
    templates::arithmetic(functions, [None; 2], true, None)
}

const fn comparison(functions: Functions, of_registers: Joined, with_immediate: Joined) -> Templates {
    templates::arithmetic(functions, [Some(of_registers), Some(with_immediate)], false, None)
}

/// In the order of [`families`](super::families).
pub(super) static ARITHMETIC: [Templates; 9] = [
    plain(functions::<alu::Add>(), Some(Joined::AddImmediate), Second::Add),
    with_carry(functions::<alu::Adc>()),
    plain(functions::<alu::Sub>(), Some(Joined::SubImmediate), Second::Sub),
    with_carry(functions::<alu::Sbb>()),
    plain(functions::<alu::And>(), None, Second::And),
    plain(functions::<alu::Or>(), None, Second::Or),
    plain(functions::<alu::Xor>(), None, Second::Xor),
    comparison(comparisons::<alu::Cmp>(), Joined::CmpRegister, Joined::CmpImmediate),
    comparison(comparisons::<alu::Test>(), Joined::TestRegister, Joined::TestImmediate),
];

/// An arithmetic instruction with one operand.
pub(super) struct Unary {
    of_register: [Template; 4],
    of_memory: [Handler; 4],
}

const fn unary<O: alu::Unary>(joined: Option<Joined>, sets_flags: bool) -> Unary {
    let UnaryFunctions { of_register, quiet, of_memory } = unary_functions::<O>();
    let mut templates = [Template::of_register(of_register[0], Note::NOTHING, None); 4];
    let mut column = 0;
    while column < 4 {
        let note = Note { quiet: Some(quiet[column]), sets_flags, ..Note::NOTHING };
        let joined = match joined {
            Some(joined) => Some((joined, 1 << column)),
            None => None,
        };
        templates[column] = Template::of_register(of_register[column], note, joined);
        column += 1;
    }
    Unary { of_register: templates, of_memory }
}

/// In the order of [`families`](super::families).
pub(super) static UNARY: [Unary; 4] = [
    unary::<alu::Inc>(Some(Joined::Inc), false),
    unary::<alu::Dec>(Some(Joined::Dec), false),
    unary::<alu::Neg>(None, true),
    unary::<alu::Invert>(None, false),
];

/// A shift or rotation.
pub(super) struct Shifting {
    /// By an immediate of 1 to the width minus 1.
    by_immediate: [Template; 4],
    /// By CL.
    by_cl: [Option<Handler>; 4],
    by_cl_quiet: [Option<Handler>; 4],
}

/// `first` is what it is in a pair, with the value that it shifts in `base`.
const fn shifting<S: shift::Shift>(first: First, sets_flags: bool) -> Shifting {
    let functions: &'static shift::Functions = const { &shift::functions::<S>() };
    let mut templates = [Template::of_register(functions.immediate[0], Note::NOTHING, None); 4];
    let mut column = 0;
    while column < 4 {
        let mut note = Note { sets_flags, size: 1 << column, ..Note::NOTHING };
        if let Some(variants) = &functions.variants[column] {
            note.quiet = Some(variants.quiet);
            note.apart = Some(&variants.apart);
            note.first = Some(first);
        }
        templates[column] = Template::of_register(functions.immediate[column], note, None);
        column += 1;
    }
    Shifting { by_immediate: templates, by_cl: functions.by_cl, by_cl_quiet: functions.by_cl_quiet }
}

/// In the order of [`families`](super::families).
pub(super) static SHIFTS: [Shifting; 5] = [
    shifting::<shift::Shl>(First::Shl, true),
    shifting::<shift::Shr>(First::Shr, true),
    shifting::<shift::Sar>(First::Sar, true),
    shifting::<shift::Rol>(First::Rol, false),
    shifting::<shift::Ror>(First::Ror, false),
];

impl Builder<'_> {
    pub(super) fn unary(&mut self, i: &Instruction, which: &'static Unary) -> Option<()> {
        if let Some((r1, size)) = register_operand(i, 0) {
            let template = &which.of_register[size_index(size)];
            return self.place_as(template, Op { r1, ..self.op(template.run) });
        }
        self.ops.nothing_known();
        let run = which.of_memory[size_index(i.memory_size().size())];
        self.place(with_memory(self.op(run), self.memory(i)?))
    }

    pub(super) fn shifted(&mut self, i: &Instruction, which: &'static Shifting) -> Option<()> {
        let (r1, size) = register_operand(i, 0)?;
        let column = size_index(size);
        if i.op1_kind() == OpKind::Register {
            let note = Note::pure(of(r1) | 1 << RCX, of(r1));
            self.ops.note(Note { quiet: which.by_cl_quiet[column], ..note });
            return self.place(Op { r1, ..self.op(which.by_cl[column]?) });
        }
        let count = i.immediate8() & if size == 8 { 63 } else { 31 };
        if count == 0 || usize::from(count) >= 8 * size {
            return None;
        }
        let template = &which.by_immediate[column];
        // The base is r1 unless a copy is joined with the shift.
        self.place_as(template, Op { r1, base: r1, imm: count.into(), ..self.op(template.run) })
    }

    /// Shifts of BMI2.
    pub(super) fn shifted_without_flags(&mut self, i: &Instruction) -> Option<()> {
        use Mnemonic as M;
        match i.mnemonic() {
            M::Shlx => self.shift_without_flags(i, 0),
            M::Shrx => self.shift_without_flags(i, 1),
            M::Sarx => self.shift_without_flags(i, 2),
            M::Rorx => {
                let ((r1, size), (r2, _)) = (register_operand(i, 0)?, register_operand(i, 1)?);
                self.ops.note(Note::pure(of(r2), of(r1)));
                let run = shift::rotate_without_flags(size);
                self.place(Op { r1, r2, imm: i.immediate8().into(), ..self.op(run) })
            }
            _ => None,
        }
    }

    fn shift_without_flags(&mut self, i: &Instruction, kind: u8) -> Option<()> {
        let ((r1, size), (r2, _), (base, _)) =
            (register_operand(i, 0)?, register_operand(i, 1)?, register_operand(i, 2)?);
        self.ops.note(Note::pure(of(r2) | of(base), of(r1)));
        self.place(Op { r1, r2, base, ..self.op(shift::without_flags(kind, size)) })
    }

    /// Multiplication, division, and operations on bits.
    pub(super) fn counted(&mut self, i: &Instruction) -> Option<()> {
        use Mnemonic as M;
        let mut one = |run: Option<Handler>| self.place(Op { r1: register_operand(i, 0)?.0, ..self.op(run?) });
        let size = register_operand(i, 0).map_or(0, |(_, size)| size);
        match i.mnemonic() {
            M::Imul if i.op_count() == 1 => one(multiply::product(size, true)),
            M::Mul => one(multiply::product(size, false)),
            M::Div => one(multiply::division(size, false)),
            M::Idiv => one(multiply::division(size, true)),
            M::Imul => self.truncated(i, size),
            M::Bswap => {
                let (r1, _) = register_operand(i, 0)?;
                self.ops.note(Note::pure(of(r1), of(r1)));
                self.place(Op { r1, ..self.op(bit::swap(size)?) })
            }
            M::Bt => self.bit_test(i, 0, size),
            M::Bts => self.bit_test(i, 1, size),
            M::Btr => self.bit_test(i, 2, size),
            M::Btc => self.bit_test(i, 3, size),
            M::Bsf => self.bit_count(i, 0, size),
            M::Bsr => self.bit_count(i, 1, size),
            M::Tzcnt => self.bit_count(i, 2, size),
            M::Lzcnt => self.bit_count(i, 3, size),
            M::Popcnt => self.bit_count(i, 4, size),
            M::Andn => {
                let ((r1, size), (base, _)) = (register_operand(i, 0)?, register_operand(i, 1)?);
                let (r2, _) = register_operand(i, 2)?;
                self.ops.note(Note { sets_flags: true, ..Note::pure(of(base) | of(r2), of(r1)) });
                self.place(Op { r1, base, r2, ..self.op(bit::and_not(size)) })
            }
            _ => None,
        }
    }

    fn truncated(&mut self, i: &Instruction, size: usize) -> Option<()> {
        let (r1, _) = register_operand(i, 0)?;
        let note = |reads, form| Note {
            quiet: multiply::truncated_quiet(size, form),
            sets_flags: true,
            ..Note::pure(reads, of(r1))
        };
        if i.op_count() == 3 {
            let (r2, _) = register_operand(i, 1)?;
            self.ops.note(note(of(r2), 1));
            return self.place(Op { r1, r2, imm: immediate(i, 2)?, ..self.op(multiply::truncated(size, 1)?) });
        }
        if let Some((r2, _)) = register_operand(i, 1) {
            self.ops.note(note(of(r1) | of(r2), 0));
            return self.place(Op { r1, r2, ..self.op(multiply::truncated(size, 0)?) });
        }
        self.place(with_memory(Op { r1, ..self.op(multiply::truncated(size, 2)?) }, self.memory(i)?))
    }

    fn bit_test(&mut self, i: &Instruction, kind: u8, size: usize) -> Option<()> {
        let (r1, _) = register_operand(i, 0)?;
        let second = register_operand(i, 1).map_or(0, |(r2, _)| of(r2));
        self.ops.note(Note::pure(of(r1) | second, if kind == 0 { 0 } else { of(r1) }));
        if let Some((r2, _)) = register_operand(i, 1) {
            return self.place(Op { r1, r2, ..self.op(bit::bit_test(kind, size, false)?) });
        }
        self.place(Op { r1, imm: i.immediate8().into(), ..self.op(bit::bit_test(kind, size, true)?) })
    }

    fn bit_count(&mut self, i: &Instruction, kind: u8, size: usize) -> Option<()> {
        let ((r1, _), (r2, _)) = (register_operand(i, 0)?, register_operand(i, 1)?);
        // BSF and BSR may leave their destination as it is.
        self.ops.note(Note::pure(of(r1) | of(r2), of(r1)));
        self.place(Op { r1, r2, ..self.op(bit::bit_count(kind, size)?) })
    }
}
