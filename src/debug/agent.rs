//! GDB's agent expressions: the bytecode in which gdb sends the condition of a breakpoint to the target, so that a false
//! one costs no round trip (GDB manual, appendix "The GDB Agent Expression Mechanism").
//!
//! It is a machine of its own beside [`super::condition`]'s and not translated to that: its numbers are 64 bits wide and
//! wrap where Python's don't, it jumps backwards, and it reaches into the stack (`pick`, `rot`), for all of which
//! the other machine would need instructions that no Python condition uses. What they share are [`Context`] and the errors.
//!
//! [`AgentProgram::verify`] shows once that jumps lead to instructions, that the stack stays in bounds, and that all
//! registers are known; loops are bounded when it runs, by [`MAX_STEPS`]. Opcodes that trace, print, use floating point or
//! trace state variables are refused: a program with them is none that the target can judge, and gdb is to do it.

use std::collections::HashMap;

use super::condition::{Context, EvaluateError, MAX_CODE, MAX_STACK, VerifyError, load};
use crate::registers::RegisterId;

/// The instructions that one evaluation may execute: gdb's own conditions have no loops, and a few dozen instructions.
pub const MAX_STEPS: usize = 10_000;

/// A verified agent expression. Evaluating it can't panic, allocate, or run for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentProgram {
    instructions: Box<[Instruction]>,
}

/// A decoded instruction. The operand of a jump is the index of its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Instruction {
    Constant(u64),
    Register(RegisterId),
    /// Reads so many bytes at the address on top.
    Load(u8),
    Binary(Binary),
    LogicalNot,
    BitNot,
    /// Keeps so many bits (1 to 63) of the top.
    SignExtend(u8),
    ZeroExtend(u8),
    /// Copies the value that lies so far below the top.
    Pick(u8),
    Pop,
    Swap,
    /// The top becomes the third.
    Rotate,
    Jump(usize),
    JumpIfNonzero(usize),
    End,
    /// Changes nothing: an extension to 64 bits or more.
    Nothing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Binary {
    Add,
    Subtract,
    Multiply,
    DivideSigned,
    DivideUnsigned,
    RemainderSigned,
    RemainderUnsigned,
    ShiftLeft,
    ShiftRightSigned,
    ShiftRightUnsigned,
    And,
    Or,
    Xor,
    Equal,
    LessSigned,
    LessUnsigned,
}

impl Instruction {
    /// How many values it needs, and how many it leaves in their place.
    fn effect(self) -> (usize, usize) {
        match self {
            Self::Constant(_) | Self::Register(_) => (0, 1),
            Self::Load(_) | Self::LogicalNot | Self::BitNot | Self::SignExtend(_) | Self::ZeroExtend(_) => (1, 1),
            Self::Binary(_) => (2, 1),
            Self::Pick(below) => (usize::from(below) + 1, usize::from(below) + 2),
            Self::Pop | Self::JumpIfNonzero(_) => (1, 0),
            Self::Swap => (2, 2),
            Self::Rotate => (3, 3),
            Self::Jump(_) | Self::Nothing => (0, 0),
            Self::End => (1, 1),
        }
    }

    fn target(self) -> Option<usize> {
        match self {
            Self::Jump(target) | Self::JumpIfNonzero(target) => Some(target),
            _ => None,
        }
    }
}

impl AgentProgram {
    /// Checks bytecode and decodes it. `register` maps the register numbers of the target description.
    pub fn verify(code: &[u8], register: &dyn Fn(u16) -> Option<RegisterId>) -> Result<Self, VerifyError> {
        if code.len() > MAX_CODE {
            return Err(VerifyError::TooLong { length: code.len() });
        }
        let (mut instructions, positions) = decode(code, register)?;
        let indices: HashMap<usize, usize> = positions.iter().enumerate().map(|(index, at)| (*at, index)).collect();
        for instruction in &mut instructions {
            if let Instruction::Jump(target) | Instruction::JumpIfNonzero(target) = instruction {
                *target = *indices.get(target).ok_or(VerifyError::Target { to: *target })?;
            }
        }
        check_depths(&instructions, &positions, code.len())?;
        Ok(Self { instructions: instructions.into() })
    }

    /// Whether the condition holds: its value is not zero.
    pub fn evaluate<C: Context + ?Sized>(&self, context: &mut C) -> Result<bool, EvaluateError> {
        self.value(context).map(|value| value != 0)
    }

    fn value<C: Context + ?Sized>(&self, context: &mut C) -> Result<u64, EvaluateError> {
        let mut stack = Stack { values: [0; MAX_STACK], depth: 0 };
        let mut next = 0;
        for _ in 0..MAX_STEPS {
            let instruction = self.instructions[next];
            next += 1;
            match instruction {
                Instruction::Constant(value) => stack.push(value),
                Instruction::Register(id) => stack.push(context.register(id)?),
                Instruction::Load(size) => *stack.top() = read(context, *stack.top(), size)?,
                Instruction::Binary(operation) => {
                    let right = stack.pop();
                    let top = stack.top();
                    *top = operation.apply(*top, right)?;
                }
                Instruction::LogicalNot => *stack.top() = u64::from(*stack.top() == 0),
                Instruction::BitNot => *stack.top() = !*stack.top(),
                Instruction::SignExtend(bits) => *stack.top() = sign_extend(*stack.top(), bits),
                Instruction::ZeroExtend(bits) => *stack.top() &= (1 << bits) - 1,
                Instruction::Pick(below) => stack.push(stack.values[stack.depth - 1 - usize::from(below)]),
                Instruction::Pop => drop(stack.pop()),
                Instruction::Swap => stack.rotate(2),
                Instruction::Rotate => stack.rotate(3),
                Instruction::Jump(target) => next = target,
                Instruction::JumpIfNonzero(target) => {
                    if stack.pop() != 0 {
                        next = target;
                    }
                }
                Instruction::End => return Ok(stack.pop()),
                Instruction::Nothing => {}
            }
        }
        Err(EvaluateError::Endless(MAX_STEPS))
    }
}

/// The values of a running program. `verify` has shown that every access is in bounds.
struct Stack {
    values: [u64; MAX_STACK],
    depth: usize,
}

impl Stack {
    fn push(&mut self, value: u64) {
        self.values[self.depth] = value;
        self.depth += 1;
    }

    fn pop(&mut self) -> u64 {
        self.depth -= 1;
        self.values[self.depth]
    }

    fn top(&mut self) -> &mut u64 {
        &mut self.values[self.depth - 1]
    }

    /// Moves the top below the `count - 1` values under it.
    fn rotate(&mut self, count: usize) {
        self.values[self.depth - count..self.depth].rotate_right(1);
    }
}

impl Binary {
    /// Sixty-four bits that wrap. A shift by 64 or more moves every bit out, as the mathematical operation does.
    fn apply(self, a: u64, b: u64) -> Result<u64, EvaluateError> {
        let (signed_a, signed_b) = (a.cast_signed(), b.cast_signed());
        let count = u32::try_from(b).unwrap_or(u32::MAX);
        let divides =
            matches!(self, Self::DivideSigned | Self::DivideUnsigned | Self::RemainderSigned | Self::RemainderUnsigned);
        if divides && b == 0 {
            return Err(EvaluateError::DivisionByZero);
        }
        Ok(match self {
            Self::Add => a.wrapping_add(b),
            Self::Subtract => a.wrapping_sub(b),
            Self::Multiply => a.wrapping_mul(b),
            Self::DivideSigned => signed_a.wrapping_div(signed_b).cast_unsigned(),
            Self::DivideUnsigned => a / b,
            Self::RemainderSigned => signed_a.wrapping_rem(signed_b).cast_unsigned(),
            Self::RemainderUnsigned => a % b,
            Self::ShiftLeft => a.checked_shl(count).unwrap_or(0),
            Self::ShiftRightSigned => (signed_a >> count.min(63)).cast_unsigned(),
            Self::ShiftRightUnsigned => a.checked_shr(count).unwrap_or(0),
            Self::And => a & b,
            Self::Or => a | b,
            Self::Xor => a ^ b,
            Self::Equal => u64::from(a == b),
            Self::LessSigned => u64::from(signed_a < signed_b),
            Self::LessUnsigned => u64::from(a < b),
        })
    }
}

fn sign_extend(value: u64, bits: u8) -> u64 {
    let unused = 64 - u32::from(bits);
    ((value << unused).cast_signed() >> unused).cast_unsigned()
}

fn read<C: Context + ?Sized>(context: &mut C, address: u64, size: u8) -> Result<u64, EvaluateError> {
    let address = address.into();
    Ok(match size {
        1 => u8::from_le_bytes(load(context, address)?).into(),
        2 => u16::from_le_bytes(load(context, address)?).into(),
        4 => u32::from_le_bytes(load(context, address)?).into(),
        _ => u64::from_le_bytes(load(context, address)?),
    })
}

/// The instructions and where each starts. Targets of jumps are still positions in the code.
fn decode(
    code: &[u8],
    register: &dyn Fn(u16) -> Option<RegisterId>,
) -> Result<(Vec<Instruction>, Vec<usize>), VerifyError> {
    let (mut instructions, mut positions) = (Vec::new(), Vec::new());
    let mut reader = Reader { code, next: 0 };
    while reader.next < code.len() {
        positions.push(reader.next);
        instructions.push(reader.instruction(register)?);
    }
    Ok((instructions, positions))
}

struct Reader<'a> {
    code: &'a [u8],
    next: usize,
}

impl Reader<'_> {
    /// An operand; the instruction that it belongs to starts at `at`. Operands are big-endian.
    fn operand<const SIZE: usize>(&mut self, at: usize) -> Result<[u8; SIZE], VerifyError> {
        let bytes = self.code[self.next..].first_chunk().ok_or(VerifyError::Truncated { at })?;
        self.next += SIZE;
        Ok(*bytes)
    }

    fn instruction(&mut self, register: &dyn Fn(u16) -> Option<RegisterId>) -> Result<Instruction, VerifyError> {
        let at = self.next;
        let [code] = self.operand(at)?;
        if let Some(operation) = binary(code) {
            return Ok(Instruction::Binary(operation));
        }
        Ok(match code {
            0x0e => Instruction::LogicalNot,
            0x12 => Instruction::BitNot,
            0x16 | 0x2a => {
                let [bits] = self.operand(at)?;
                match bits {
                    0 => return Err(VerifyError::Operand { at, operand: 0 }),
                    64.. => Instruction::Nothing,
                    _ if code == 0x16 => Instruction::SignExtend(bits),
                    _ => Instruction::ZeroExtend(bits),
                }
            }
            0x17..=0x1a => Instruction::Load(1 << (code - 0x17)),
            0x20 => Instruction::JumpIfNonzero(u16::from_be_bytes(self.operand(at)?).into()),
            0x21 => Instruction::Jump(u16::from_be_bytes(self.operand(at)?).into()),
            0x22 => Instruction::Constant(u8::from_be_bytes(self.operand(at)?).into()),
            0x23 => Instruction::Constant(u16::from_be_bytes(self.operand(at)?).into()),
            0x24 => Instruction::Constant(u32::from_be_bytes(self.operand(at)?).into()),
            0x25 => Instruction::Constant(u64::from_be_bytes(self.operand(at)?)),
            0x26 => {
                let number = u16::from_be_bytes(self.operand(at)?);
                Instruction::Register(register(number).ok_or(VerifyError::Operand { at, operand: number })?)
            }
            0x27 => Instruction::End,
            0x28 => Instruction::Pick(0),
            0x29 => Instruction::Pop,
            0x2b => Instruction::Swap,
            0x32 => Instruction::Pick(u8::from_be_bytes(self.operand(at)?)),
            0x33 => Instruction::Rotate,
            _ => return Err(VerifyError::Opcode { at, code }),
        })
    }
}

fn binary(code: u8) -> Option<Binary> {
    Some(match code {
        0x02 => Binary::Add,
        0x03 => Binary::Subtract,
        0x04 => Binary::Multiply,
        0x05 => Binary::DivideSigned,
        0x06 => Binary::DivideUnsigned,
        0x07 => Binary::RemainderSigned,
        0x08 => Binary::RemainderUnsigned,
        0x09 => Binary::ShiftLeft,
        0x0a => Binary::ShiftRightSigned,
        0x0b => Binary::ShiftRightUnsigned,
        0x0f => Binary::And,
        0x10 => Binary::Or,
        0x11 => Binary::Xor,
        0x13 => Binary::Equal,
        0x14 => Binary::LessSigned,
        0x15 => Binary::LessUnsigned,
        _ => return None,
    })
}

/// Follows every path from the first instruction; each must meet an instruction with one and the same depth.
fn check_depths(instructions: &[Instruction], positions: &[usize], end: usize) -> Result<(), VerifyError> {
    let mut depths: Vec<Option<usize>> = vec![None; instructions.len()];
    let mut waiting = vec![(0, 0)];
    while let Some((index, depth)) = waiting.pop() {
        let Some(&instruction) = instructions.get(index) else { return Err(VerifyError::Truncated { at: end }) };
        let at = positions[index];
        if let Some(first) = depths[index].replace(depth) {
            if first != depth {
                return Err(VerifyError::Merge { at, first, second: depth });
            }
            continue;
        }
        let (needed, left) = instruction.effect();
        let after = depth.checked_sub(needed).ok_or(VerifyError::Underflow { at })? + left;
        if after > MAX_STACK {
            return Err(VerifyError::Overflow { at });
        }
        waiting.extend(instruction.target().map(|target| (target, after)));
        if !matches!(instruction, Instruction::Jump(_) | Instruction::End) {
            waiting.push((index + 1, after));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
