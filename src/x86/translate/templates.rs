//! What instructions become, prepared: for each form and size of two operands an operation's function and all that is known of
//! it. What remains to be done of an instruction is to fill in its operands.

use super::super::block::{Handler, Op};
use super::super::notes::{Note, bit};
use super::super::ops::alu::{Forms, Functions, Joined};
use super::super::ops::pair::Second;

/// The row of two registers, as in [`Forms`].
pub(super) const REGISTERS: usize = 0;
/// The row of a register and an immediate.
pub(super) const IMMEDIATE: usize = 1;

/// An operation in want of its operands.
#[derive(Clone, Copy)]
pub(super) struct Template {
    pub run: Handler,
    /// What is known of it whatever the operands.
    note: Note,
    /// All bits, if it reads the first operand, a register.
    reads_first: u32,
    /// The same for the second one.
    reads_second: u32,
    /// All bits, if it changes the first one.
    writes_first: u32,
    /// What it may be joined with a branch as, with its operand size.
    pub joined: Option<(Joined, u8)>,
}

/// By form and size, as in [`Forms`].
pub(super) type Templates = [[Template; 4]; 8];

/// All bits, or none.
const fn all(is_set: bool) -> u32 {
    if is_set { u32::MAX } else { 0 }
}

impl Template {
    /// What is known of the operation on these registers.
    #[inline(always)]
    pub fn note(&self, r1: u8, r2: u8) -> Note {
        let reads = bit(r1) & self.reads_first | bit(r2) & self.reads_second;
        Note { reads, writes: bit(r1) & self.writes_first, ..self.note }
    }

    /// Of an operation on one register, which it changes.
    pub const fn of_register(run: Handler, note: Note, joined: Option<(Joined, u8)>) -> Self {
        let note = Note { is_pure: true, ..note };
        Self { run, note, reads_first: u32::MAX, reads_second: 0, writes_first: u32::MAX, joined }
    }

    /// Of an operation of which nothing is known.
    const fn plain(run: Handler) -> Self {
        Self { run, note: Note::NOTHING, reads_first: 0, reads_second: 0, writes_first: 0, joined: None }
    }
}

/// Bytes of the operands in a column of [`Forms`].
const fn size(column: usize) -> u8 {
    1 << column
}

const fn plain(forms: &Forms) -> Templates {
    let mut templates = [[Template::plain(forms[0][0]); 4]; 8];
    let mut place = 0;
    while place < 32 {
        templates[place / 4][place % 4] = Template::plain(forms[place / 4][place % 4]);
        place += 1;
    }
    templates
}

/// For an arithmetic instruction. `joined` is what it may be joined with a branch as, if it is on registers alone, or on a
/// register and an immediate; `second` what it may be in a pair, if it is on registers alone.
pub(super) const fn arithmetic(
    functions: Functions,
    joined: [Option<Joined>; 2],
    reads_flags: bool,
    second: Option<Second>,
) -> Templates {
    let mut templates = plain(functions.all);
    let mut place = 0;
    while place < 32 {
        let (row, column) = (place / 4, place % 4);
        let is_pure = row == REGISTERS || row == IMMEDIATE;
        let is_wide = size(column) >= 4;
        let mut note = Note { sets_flags: true, reads_flags, is_pure, size: size(column), ..Note::NOTHING };
        if let Some((quiet, apart)) = functions.quiet {
            note.quiet = Some(quiet[row][column]);
            if is_pure && is_wide {
                note.apart = Some(&apart[row][column - 2]);
            }
        }
        if row == REGISTERS && is_wide {
            note.second = second;
        }
        let template = &mut templates[row][column];
        template.note = note;
        template.reads_first = all(is_pure);
        template.reads_second = all(row == REGISTERS);
        template.writes_first = all(is_pure && functions.quiet.is_some());
        if is_pure && let Some(joined) = joined[row] {
            template.joined = Some((joined, size(column)));
        }
        place += 1;
    }
    templates
}

/// For MOV.
pub(super) const fn moves(forms: &Forms) -> Templates {
    let mut templates = plain(forms);
    let mut place = 0;
    while place < 8 {
        let (row, column) = (place / 4, place % 4);
        let is_wide = size(column) >= 4;
        let copies = row == REGISTERS && is_wide;
        let template = &mut templates[row][column];
        template.note = Note { is_pure: true, copies, size: size(column), ..Note::NOTHING };
        // Of a narrow register a part stays.
        template.reads_first = all(!is_wide);
        template.reads_second = all(row == REGISTERS);
        template.writes_first = u32::MAX;
        place += 1;
    }
    templates
}

impl super::Builder<'_> {
    /// Makes it the instruction's operation, joined with those before it if that can be.
    #[inline(always)]
    pub(super) fn place_as(&mut self, template: &Template, op: Op) -> Option<()> {
        let note = template.note(op.r1, op.r2);
        self.before = template.joined;
        self.ops.note(note);
        self.ops.push(op);
        if note.apart.is_some() && self.ops.join() {
            self.before = None;
        }
        if note.second.is_some() {
            self.ops.pair();
        }
        Some(())
    }
}
