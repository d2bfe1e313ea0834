//! The verifier of condition bytecode: it shows that every path through a program keeps the stack in bounds, ends, and
//! leaves one value. It trusts nobody: bytes come from Python, which may have made them up.

use super::opcode::{Opcode, Operand};
use super::{Instruction, MAX_CODE, MAX_STACK};
use crate::registers::RegisterId;

/// Why bytes are not a program. `at` is the position of the offending instruction in the code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// More than [`MAX_CODE`] bytes.
    #[error("condition bytecode has {length} bytes, at most {MAX_CODE} are allowed")]
    TooLong {
        /// How many.
        length: usize,
    },
    /// No instruction has this number.
    #[error("condition bytecode at {at}: {code:#04x} is no opcode")]
    Opcode {
        /// Where.
        at: usize,
        /// The byte.
        code: u8,
    },
    /// The code ends within an instruction.
    #[error("condition bytecode at {at}: the code ends within the instruction")]
    Truncated {
        /// Where.
        at: usize,
    },
    /// A constant or register that does not exist.
    #[error("condition bytecode at {at}: operand {operand} is out of range")]
    Operand {
        /// Where.
        at: usize,
        /// The index.
        operand: u16,
    },
    /// An instruction needs more values than there are.
    #[error("condition bytecode at {at}: the stack is too short")]
    Underflow {
        /// Where.
        at: usize,
    },
    /// The stack grows past [`MAX_STACK`].
    #[error("condition bytecode at {at}: the stack grows past {MAX_STACK} values")]
    Overflow {
        /// Where.
        at: usize,
    },
    /// A jump past the end, or into the middle of an instruction.
    #[error("condition bytecode: a jump leads to {to}, where no instruction starts")]
    Target {
        /// Its target.
        to: usize,
    },
    /// Two paths meet with stacks of different depth.
    #[error("condition bytecode at {at}: paths meet with {first} and {second} values on the stack")]
    Merge {
        /// Where they meet.
        at: usize,
        /// The depth of one.
        first: usize,
        /// The depth of the other.
        second: usize,
    },
    /// No path leads here.
    #[error("condition bytecode at {at}: no path leads here")]
    Unreachable {
        /// Where.
        at: usize,
    },
    /// The end is reached with none or several values.
    #[error("condition bytecode leaves {depth} values, exactly one is needed")]
    Result {
        /// How many.
        depth: usize,
    },
}

/// One pass over the code: since jumps only go forward, all paths to an instruction are known when it is met.
pub(super) struct Verifier<'a> {
    code: &'a [u8],
    constants: usize,
    /// The depth with which jumps arrive, by position in the code (its end included).
    arriving: Vec<Option<usize>>,
    /// The index of the instruction that starts at a position.
    indices: Vec<Option<u16>>,
    /// The depth before the next instruction; `None` after a jump that is always taken.
    depth: Option<usize>,
    max_stack: usize,
}

impl<'a> Verifier<'a> {
    pub(super) fn new(code: &'a [u8], constants: usize) -> Self {
        let positions = code.len() + 1;
        Self {
            code,
            constants,
            arriving: vec![None; positions],
            indices: vec![None; positions],
            depth: Some(0),
            max_stack: 0,
        }
    }

    /// The decoded instructions and the deepest stack that they need.
    pub(super) fn run(mut self) -> Result<(Box<[Instruction]>, usize), VerifyError> {
        let mut instructions = Vec::new();
        let mut at = 0;
        while at < self.code.len() {
            self.start(at, instructions.len())?;
            let (instruction, end) = self.decode(at)?;
            self.step(at, end, instruction)?;
            instructions.push(instruction);
            at = end;
        }
        self.start(at, instructions.len())?;
        match self.depth {
            Some(1) => {}
            depth => return Err(VerifyError::Result { depth: depth.unwrap_or(0) }),
        }
        self.link(&mut instructions)?;
        Ok((instructions.into(), self.max_stack))
    }

    /// Merges the paths that meet at a position.
    fn start(&mut self, at: usize, index: usize) -> Result<(), VerifyError> {
        self.indices[at] =
            Some(u16::try_from(index).expect("an instruction has a byte at least, and code 65,535 at most"));
        self.depth = match (self.depth, self.arriving[at]) {
            (Some(first), Some(second)) if first != second => return Err(VerifyError::Merge { at, first, second }),
            (None, None) => return Err(VerifyError::Unreachable { at }),
            (falling, arriving) => falling.or(arriving),
        };
        Ok(())
    }

    fn decode(&self, at: usize) -> Result<(Instruction, usize), VerifyError> {
        let code = self.code[at];
        let opcode = Opcode::from_code(code).ok_or(VerifyError::Opcode { at, code })?;
        let rest = &self.code[at + 1..];
        let (operand, size) = match (opcode.operand(), rest) {
            (Operand::None, _) => (0, 0),
            (Operand::Register, [index, ..]) => (u16::from(*index), 1),
            (Operand::Constant | Operand::Jump, [low, high, ..]) => (u16::from_le_bytes([*low, *high]), 2),
            _ => return Err(VerifyError::Truncated { at }),
        };
        let limit = match opcode.operand() {
            Operand::Constant => self.constants,
            Operand::Register => RegisterId::NAMED.len(),
            Operand::None | Operand::Jump => usize::MAX,
        };
        if usize::from(operand) >= limit {
            return Err(VerifyError::Operand { at, operand });
        }
        Ok((Instruction { opcode, operand }, at + 1 + size))
    }

    fn step(&mut self, at: usize, end: usize, instruction: Instruction) -> Result<(), VerifyError> {
        let depth = self.depth.expect("start() refuses code that no path reaches");
        let (pops, pushes) = instruction.opcode.effect();
        let after = depth.checked_sub(pops).ok_or(VerifyError::Underflow { at })? + pushes;
        if after > MAX_STACK {
            return Err(VerifyError::Overflow { at });
        }
        self.max_stack = self.max_stack.max(after);
        self.depth = (instruction.opcode != Opcode::Jump).then_some(after);
        if instruction.opcode.operand() == Operand::Jump {
            let keeps = matches!(instruction.opcode, Opcode::JumpIfZeroOrDrop | Opcode::JumpIfNonzeroOrDrop);
            self.arrive(end + usize::from(instruction.operand), if keeps { depth } else { after })?;
        }
        Ok(())
    }

    fn arrive(&mut self, to: usize, depth: usize) -> Result<(), VerifyError> {
        let known = self.arriving.get_mut(to).ok_or(VerifyError::Target { to })?;
        match *known {
            Some(first) if first != depth => Err(VerifyError::Merge { at: to, first, second: depth }),
            _ => {
                *known = Some(depth);
                Ok(())
            }
        }
    }

    /// Turns the jumps' distances in bytes into indices of instructions.
    fn link(&self, instructions: &mut [Instruction]) -> Result<(), VerifyError> {
        let starts = (0..self.code.len()).filter(|at| self.indices[*at].is_some());
        for (instruction, at) in instructions.iter_mut().zip(starts) {
            if instruction.opcode.operand() == Operand::Jump {
                let to = at + 3 + usize::from(instruction.operand);
                instruction.operand = self.indices[to].ok_or(VerifyError::Target { to })?;
            }
        }
        Ok(())
    }
}
