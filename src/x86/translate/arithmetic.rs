//! Operations for arithmetic, shifts and bits, with what is known of them.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::super::block::{Handler, Op};
use super::super::engine::ZERO;
use super::super::notes::{Note, bit as of};
use super::super::ops::alu::{self, Form, Functions, Joined, comparisons, functions};
use super::super::ops::pair::{First, Second};
use super::super::ops::{bit, multiply, shift};
use super::{Builder, bytes, immediate, offset, register_operand, with_memory};
use crate::registers::RCX;

/// An arithmetic instruction with two operands.
struct Arithmetic {
    functions: Functions,
    /// What it may be joined with a branch as, if it is on registers alone, or on a register and an immediate.
    joined: [Option<Joined>; 2],
    reads_flags: bool,
    /// What it may be in a pair, if it is on registers alone.
    second: Option<Second>,
}

/// One that can be joined with a branch only as a comparison with an immediate can, or not at all.
const fn plain(functions: Functions, joined: Option<Joined>, second: Second) -> Arithmetic {
    Arithmetic { functions, joined: [None, joined], reads_flags: false, second: Some(second) }
}

const fn with_carry(functions: Functions) -> Arithmetic {
    Arithmetic { functions, joined: [None; 2], reads_flags: true, second: None }
}

const fn comparison(functions: Functions, of_registers: Joined, with_immediate: Joined) -> Arithmetic {
    let joined = [Some(of_registers), Some(with_immediate)];
    Arithmetic { functions, joined, reads_flags: false, second: None }
}

static ADD: Arithmetic = plain(functions::<alu::Add>(), Some(Joined::AddImmediate), Second::Add);
static ADC: Arithmetic = with_carry(functions::<alu::Adc>());
static SUB: Arithmetic = plain(functions::<alu::Sub>(), Some(Joined::SubImmediate), Second::Sub);
static SBB: Arithmetic = with_carry(functions::<alu::Sbb>());
static AND: Arithmetic = plain(functions::<alu::And>(), None, Second::And);
static OR: Arithmetic = plain(functions::<alu::Or>(), None, Second::Or);
static XOR: Arithmetic = plain(functions::<alu::Xor>(), None, Second::Xor);
static CMP: Arithmetic = comparison(comparisons::<alu::Cmp>(), Joined::CmpRegister, Joined::CmpImmediate);
static TEST: Arithmetic = comparison(comparisons::<alu::Test>(), Joined::TestRegister, Joined::TestImmediate);

impl Builder<'_> {
    pub(super) fn arithmetic(&mut self, i: &Instruction) -> Option<()> {
        use Mnemonic as M;
        let which = match i.mnemonic() {
            M::Add => &ADD,
            M::Adc => &ADC,
            M::Sub => &SUB,
            M::Sbb => &SBB,
            M::Cmp => &CMP,
            M::And => &AND,
            M::Or => &OR,
            M::Xor => &XOR,
            M::Test => &TEST,
            M::Inc => return self.unary(i, alu::unary::<alu::Inc>, alu::unary_quiet::<alu::Inc>, Some(Joined::Inc)),
            M::Dec => return self.unary(i, alu::unary::<alu::Dec>, alu::unary_quiet::<alu::Dec>, Some(Joined::Dec)),
            M::Neg => return self.unary(i, alu::unary::<alu::Neg>, alu::unary_quiet::<alu::Neg>, None),
            M::Not => return self.unary(i, alu::unary::<alu::Invert>, |_| None, None),
            _ => return None,
        };
        let Functions { all, quiet } = which.functions;
        let choose = |form: Form, size, is_indexed| all[form.index(is_indexed)][alu::size_index(size)];
        let (op, form, size) = self.two_operands(i, choose)?;
        let row = form.index(op.index != offset(ZERO));
        let reads = of(op.r1) | if form == Form::RegisterRegister { of(op.r2) } else { 0 };
        let writes = if quiet.is_some() { of(op.r1) } else { 0 };
        self.ops.note(Note {
            quiet: quiet.map(|(quiet, _)| quiet[row][alu::size_index(size)]),
            apart: quiet.and_then(|(_, apart)| alu::apart(apart, form, size)),
            sets_flags: true,
            reads_flags: which.reads_flags,
            is_pure: matches!(form, Form::RegisterRegister | Form::RegisterImmediate),
            size: bytes(size),
            second: which.second.filter(|_| form == Form::RegisterRegister && size >= 4),
            ..Note::pure(reads, writes)
        });
        self.before = which.joined.get(row).copied().flatten().map(|joined| (joined, size));
        self.place(op)
    }

    fn unary(
        &mut self,
        i: &Instruction,
        choose: fn(bool, usize) -> Handler,
        quiet: fn(usize) -> Option<Handler>,
        joined: Option<Joined>,
    ) -> Option<()> {
        if let Some((r1, size)) = register_operand(i, 0) {
            self.before = joined.map(|joined| (joined, size));
            self.ops.note(Note {
                quiet: quiet(size),
                sets_flags: i.mnemonic() == Mnemonic::Neg,
                ..Note::pure(of(r1), of(r1))
            });
            return self.place(Op { r1, ..self.op(choose(false, size)) });
        }
        self.place(with_memory(self.op(choose(true, i.memory_size().size())), self.memory(i)?))
    }

    pub(super) fn shifted(&mut self, i: &Instruction) -> Option<()> {
        use Mnemonic as M;
        let (r1, size) = register_operand(i, 0)?;
        let choose: Shifting = match i.mnemonic() {
            M::Shl | M::Sal => shifting::<shift::Shl>(First::Shl),
            M::Shr => shifting::<shift::Shr>(First::Shr),
            M::Sar => shifting::<shift::Sar>(First::Sar),
            M::Rol => shifting::<shift::Rol>(First::Rol),
            M::Ror => shifting::<shift::Ror>(First::Ror),
            M::Shlx => return self.shift_without_flags(i, 0),
            M::Shrx => return self.shift_without_flags(i, 1),
            M::Sarx => return self.shift_without_flags(i, 2),
            M::Rorx => {
                let (r2, _) = register_operand(i, 1)?;
                self.ops.note(Note::pure(of(r2), of(r1)));
                return self.place(Op {
                    r1,
                    r2,
                    imm: i.immediate8().into(),
                    ..self.op(shift::rotate_without_flags(size))
                });
            }
            _ => return None,
        };
        if i.op_kind(1) == OpKind::Register {
            let note = Note::pure(of(r1) | 1 << RCX, of(r1));
            self.ops.note(Note { quiet: (choose.by_cl_quiet)(size), ..note });
            return self.place(Op { r1, ..self.op((choose.by_cl)(size)?) });
        }
        let count = i.immediate8() & if size == 8 { 63 } else { 31 };
        if count == 0 || usize::from(count) >= 8 * size {
            return None;
        }
        let variants = (choose.variants)(size);
        self.ops.note(Note {
            quiet: variants.map(|(quiet, ..)| quiet),
            apart: variants.map(|(_, apart, quiet)| (apart, quiet)),
            size: bytes(size),
            sets_flags: !matches!(i.mnemonic(), M::Rol | M::Ror),
            first: Some(choose.first).filter(|_| size >= 4),
            ..Note::pure(of(r1), of(r1))
        });
        // The base is r1 unless a copy is joined with the shift.
        self.place(Op { r1, base: r1, imm: count.into(), ..self.op((choose.by_immediate)(size)) })
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

/// The functions for a shift, by size.
struct Shifting {
    /// What it is in a pair, with the value that it shifts in `base`.
    first: First,
    by_immediate: fn(usize) -> Handler,
    variants: fn(usize) -> Option<(Handler, Handler, Handler)>,
    by_cl: fn(usize) -> Option<Handler>,
    by_cl_quiet: fn(usize) -> Option<Handler>,
}

fn shifting<S: shift::Shift>(first: First) -> Shifting {
    Shifting {
        first,
        by_immediate: shift::immediate::<S>,
        variants: shift::variants::<S>,
        by_cl: shift::variable::<S>,
        by_cl_quiet: shift::variable_quiet::<S>,
    }
}
