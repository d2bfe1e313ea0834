//! What the builder of a block knows of its operations beyond what they execute, and what it makes of that: operations
//! whose flags nobody reads compute none, and a copy between registers is joined with the operation that changes it.

use super::block::{Handler, LONGEST, Op};
use super::ops::pair::{First, Second, pair};
use super::ops::redo;

/// What an operation reads and leaves. The default holds for all: it may stop, so that all before it must be done.
#[derive(Clone, Copy, Default)]
pub(super) struct Note {
    /// A function that does the same without flags.
    pub quiet: Option<Handler>,
    /// Functions, with flags and without, for the operation with its first operand in `base` instead of r1.
    pub apart: Option<&'static [Handler; 2]>,
    /// General registers that a pure operation reads, a bit for each.
    pub reads: u32,
    /// Those that it writes.
    pub writes: u32,
    /// It sets all arithmetic flags.
    pub sets_flags: bool,
    /// It only works on general registers and can't stop.
    pub is_pure: bool,
    /// A pure operation's look at flags.
    pub reads_flags: bool,
    /// A pure operation that copies r2 to r1.
    pub copies: bool,
    /// Bytes of the operands of an operation that copies, has its first operand apart, or may be one of a pair.
    pub size: u8,
    /// It may be the first of a pair: it sets r1, and its flags are of no use to the second one.
    pub first: Option<First>,
    /// It may be the second: it changes r1 by r2.
    pub second: Option<Second>,
}

/// The bit of the register that a byte offset lies in.
pub(super) fn bit(offset: u8) -> u32 {
    1 << (offset / 8)
}

impl Note {
    /// Of an operation of which nothing is known.
    pub const NOTHING: Self = Self {
        quiet: None,
        apart: None,
        reads: 0,
        writes: 0,
        sets_flags: false,
        is_pure: false,
        reads_flags: false,
        copies: false,
        size: 0,
        first: None,
        second: None,
    };

    /// A pure operation that reads and writes these registers.
    pub fn pure(reads: u32, writes: u32) -> Self {
        Self { is_pure: true, reads, writes, ..Self::NOTHING }
    }
}

/// The operations of a block in the making. They are written where they stay: a copy of what has just been written piece
/// by piece makes the host's CPU wait.
pub(super) struct Ops {
    list: Box<[Op; MOST]>,
    count: usize,
    /// Those of [`Ops::list`], and of the operation to come.
    notes: Box<[Note; MOST]>,
    /// Registers that the block copies others to, a bit for each.
    copied: u32,
}

/// More operations than a block ever has.
const MOST: usize = LONGEST + 4;
/// So many operations may stand between a copy and the one that it is joined with.
const REACH: usize = 6;

impl Default for Ops {
    fn default() -> Self {
        let none = Op { run: redo, imm: 0, disp: 0, base: 0, index: 0, scale: 0, r1: 0, r2: 0, number: 0, at: 0 };
        Self { list: Box::new([none; MOST]), count: 0, notes: Box::new([Note::NOTHING; MOST]), copied: 0 }
    }
}

impl Ops {
    pub fn clear(&mut self) {
        (self.count, self.copied) = (0, 0);
    }

    pub fn as_slice(&self) -> &[Op] {
        &self.list[..self.count]
    }

    /// Says what is known of the operation to come.
    #[inline(always)]
    pub fn note(&mut self, note: Note) {
        self.notes[self.count] = note;
        self.copied |= if note.copies { note.writes } else { 0 };
    }

    /// Says that nothing is known of it.
    #[inline(always)]
    pub fn nothing_known(&mut self) {
        self.notes[self.count] = Note::NOTHING;
    }

    #[inline(always)]
    pub fn push(&mut self, op: Op) {
        self.list[self.count] = op;
        self.count += 1;
    }

    /// Takes the last operation away.
    pub fn pop(&mut self) -> Option<Op> {
        self.count = self.count.checked_sub(1)?;
        Some(self.list[self.count])
    }

    /// Joins the last operation with the copy that has made its first operand, if there is one. True if it did.
    #[inline(always)]
    pub fn join(&mut self) -> bool {
        let Some(last) = self.count.checked_sub(1) else { return false };
        // Most operations have no copy before them that is theirs.
        self.notes[last].writes & self.copied != 0 && self.join_at(last)
    }

    #[inline(never)]
    fn join_at(&mut self, last: usize) -> bool {
        let Some([loud, quiet]) = self.notes[last].apart.copied() else { return false };
        let Some(at) = self.find_copy(last) else { return false };
        let copied = self.list[at].r2;
        let (op, note) = (&mut self.list[last], &mut self.notes[last]);
        (op.run, note.quiet, note.apart, note.second) = (loud, Some(quiet), None, None);
        op.base = copied;
        // The second operand is what the copy would have made.
        if op.r2 == op.r1 {
            op.r2 = copied;
        }
        note.reads |= bit(copied);
        self.list.copy_within(at + 1..=last, at);
        self.notes.copy_within(at + 1..=last, at);
        self.count -= 1;
        true
    }

    /// The copy to the last operation's first register that may as well happen then: nobody has looked at it, nor changed what it copies.
    fn find_copy(&self, last: usize) -> Option<usize> {
        let (register, size) = (self.list[last].r1, self.notes[last].size);
        let (mut reads, mut writes) = (0, 0);
        for at in (last.saturating_sub(REACH)..last).rev() {
            let (op, note) = (&self.list[at], &self.notes[at]);
            if !note.is_pure {
                return None;
            }
            if note.copies && note.size == size && op.r1 == register {
                let is_free = (reads | writes) & bit(register) == 0 && writes & bit(op.r2) == 0 && op.r2 != register;
                return is_free.then_some(at);
            }
            reads |= note.reads;
            writes |= note.writes;
        }
        None
    }

    /// Makes a pair of the last two operations, if they are one. True if they were.
    #[inline]
    pub fn pair(&mut self) -> bool {
        let Some(last) = self.count.checked_sub(1).filter(|last| *last > 0) else { return false };
        let note = &self.notes[last];
        let Some(second) = note.second else { return false };
        let before = &self.notes[last - 1];
        match before.first {
            Some(first) if before.size == note.size => self.pair_at(last, pair(first, second, note.size)),
            _ => false,
        }
    }

    fn pair_at(&mut self, last: usize, (loud, quiet): (Handler, Handler)) -> bool {
        let (first, second) = (self.list[last - 1], self.list[last]);
        if second.r2 != first.r1 || second.r1 == first.r1 {
            return false;
        }
        // What is read and written is what both do together: none of it can stop.
        let (reads, writes) = (self.notes[last - 1].reads | self.notes[last].reads, bit(first.r1) | bit(second.r1));
        let Op { number, at, r1, r2, .. } = second;
        self.list[last - 1] = Op { run: loud, r1, r2, number, at, ..first };
        self.count -= 1;
        self.notes[last - 1] = Note { quiet: Some(quiet), sets_flags: true, ..Note::pure(reads, writes) };
        true
    }

    /// Lets operations compute no flags that are overwritten before anybody may look.
    pub fn drop_dead_flags(&mut self) {
        let mut is_read = true;
        let count = self.count;
        for (op, note) in self.list[..count].iter_mut().zip(&self.notes[..count]).rev() {
            if let Some(quiet) = note.quiet.filter(|_| !is_read) {
                op.run = quiet;
            }
            is_read = !note.is_pure | note.reads_flags | is_read & !note.sets_flags;
        }
    }
}
