//! What the builder of a block knows of its operations beyond what they execute, and what it makes of that: operations
//! whose flags nobody reads compute none, and a copy between registers is joined with the operation that changes it.

use super::block::{Handler, Op};

/// What an operation reads and leaves. The default holds for all: it may stop, so that all before it must be done.
#[derive(Clone, Copy, Default)]
pub(super) struct Note {
    /// A function that does the same without flags.
    pub quiet: Option<Handler>,
    /// It sets all arithmetic flags.
    pub sets_flags: bool,
    /// It only works on general registers and can't stop.
    pub is_pure: bool,
    /// A pure operation's look at flags.
    pub reads_flags: bool,
    /// General registers that a pure operation reads, a bit for each.
    pub reads: u32,
    /// Those that it writes.
    pub writes: u32,
    /// A pure operation that copies r2 to r1, of so many bytes.
    pub copies: Option<usize>,
    /// A function, and one without flags, for the operation of so many bytes with its first operand in `base` instead
    /// of r1.
    pub apart: Option<(usize, Handler, Handler)>,
}

/// The bit of the register that a byte offset lies in.
pub(super) fn bit(offset: u8) -> u32 {
    1 << (offset / 8)
}

impl Note {
    /// A pure operation that reads and writes these registers.
    pub fn pure(reads: u32, writes: u32) -> Self {
        Self { is_pure: true, reads, writes, ..Self::default() }
    }
}

/// The operations of a block in the making.
#[derive(Default)]
pub(super) struct Ops {
    pub list: Vec<Op>,
    notes: Vec<Note>,
}

/// So many operations may stand between a copy and the one that it is joined with.
const REACH: usize = 6;

impl Ops {
    pub fn clear(&mut self) {
        self.list.clear();
        self.notes.clear();
    }

    pub fn push(&mut self, op: Op, note: Note) {
        self.list.push(op);
        self.notes.push(note);
    }

    /// Takes the last operation away.
    pub fn pop(&mut self) -> Option<Op> {
        self.notes.pop();
        self.list.pop()
    }

    /// Adds an operation, joined with the copy that has made its first operand, if there is one. True if it was.
    pub fn push_joined(&mut self, mut op: Op, mut note: Note) -> bool {
        let found = note.apart.and_then(|(size, loud, quiet)| Some((self.find_copy(op.r1, size)?, loud, quiet)));
        if let Some((at, loud, quiet)) = found {
            let copy = self.list.remove(at);
            self.notes.remove(at);
            (op.run, note.quiet) = (loud, Some(quiet));
            op.base = copy.r2;
            // The second operand is what the copy would have made.
            if op.r2 == op.r1 {
                op.r2 = copy.r2;
            }
            note.reads |= bit(copy.r2);
        }
        self.push(op, note);
        found.is_some()
    }

    /// The copy to a register that may as well happen now: nobody has looked at it, nor changed what it copies.
    fn find_copy(&self, register: u8, size: usize) -> Option<usize> {
        let (mut reads, mut writes) = (0, 0);
        let from = self.list.len().saturating_sub(REACH);
        for at in (from..self.list.len()).rev() {
            let (op, note) = (&self.list[at], &self.notes[at]);
            if !note.is_pure {
                return None;
            }
            if note.copies == Some(size) && op.r1 == register {
                let is_free = (reads | writes) & bit(register) == 0 && writes & bit(op.r2) == 0 && op.r2 != register;
                return is_free.then_some(at);
            }
            reads |= note.reads;
            writes |= note.writes;
        }
        None
    }

    /// Lets operations compute no flags that are overwritten before anybody may look.
    pub fn drop_dead_flags(&mut self) {
        let mut is_read = true;
        for (op, note) in self.list.iter_mut().zip(&self.notes).rev() {
            if let Some(quiet) = note.quiet.filter(|_| !is_read) {
                op.run = quiet;
            }
            is_read = !note.is_pure || note.reads_flags || is_read && !note.sets_flags;
        }
    }
}
