//! Breakpoint conditions as bytecode for a small stack machine over `i128`. `uhyve.condition` compiles a Python
//! expression to it; [`Program::verify`] proves once that every path keeps the stack in bounds and ends (jumps only go
//! forward), so that [`Program::evaluate`], which runs on a vCPU's thread for each hit, needs neither checks of the code
//! nor memory from the heap. Arithmetic is Python's on integers; what leaves `i128` is an error, never a wrong value.
//!
//! Code is a sequence of an opcode byte and, where [`Opcode::operand`] says so, a little-endian operand. A comparison
//! or a logical operator yields 0 or 1; a jump's operand counts bytes from the end of the jump.

mod opcode;
mod verify;

pub use opcode::{OPCODES, Opcode, Operand};
pub use verify::VerifyError;

use self::verify::Verifier;
use crate::error::{Error, GuestFault};
use crate::registers::RegisterId;

/// The deepest stack that a program may need.
pub const MAX_STACK: usize = 64;

/// Most programs need no more: they get a stack that is cheaper to set up.
const SMALL_STACK: usize = 8;

/// The longest program in bytes.
pub const MAX_CODE: usize = 0xffff;

/// What a program can ask about the vCPU at its breakpoint.
///
/// Implementors answer for one hit: all calls of one evaluation must see the same vCPU, standing still.
pub trait Context {
    /// The value of a register. A failure to fetch it (an ioctl's) is [`EvaluateError::Register`].
    fn register(&mut self, register: RegisterId) -> Result<u64, EvaluateError>;
    /// Fills `buffer` (1, 2, 4 or 8 bytes, never past the end of the address space) from guest-virtual `address`, with
    /// the bytes that the guest would see: not those that a debugger planted.
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), GuestFault>;
    /// The number of the vCPU.
    fn vcpu(&self) -> u32;
    /// How many times this breakpoint's condition let a vCPU through so far.
    fn hits(&self) -> u64;
    /// How many times a vCPU met this breakpoint, this time included.
    fn reached(&self) -> u64;
}

/// Why a condition has no value. The breakpoint stops and shows this.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// It reads memory that the guest has not mapped.
    #[error("the condition reads memory that isn't there: {0}")]
    Unmapped(#[from] GuestFault),
    /// It reads memory at a number that is no 64-bit address.
    #[error("the condition reads memory at {0}, which is not a 64-bit address (u64(…) wraps a number to one)")]
    Address(i128),
    /// `//` or `%` by zero.
    #[error("the condition divides by zero")]
    DivisionByZero,
    /// A number left the range of a signed 128-bit integer.
    #[error("a number in the condition exceeds 128 bits")]
    Overflow,
    /// A shift by a negative count or by more than 127.
    #[error("the condition shifts by {0}: a shift count is 0 to 127")]
    Shift(i128),
    /// It executed more instructions than it may.
    #[error("the condition has not ended after {0} instructions")]
    Endless(usize),
    /// The vCPU's register could not be fetched.
    #[error("the condition needs a register that can't be read: {0}")]
    Register(#[source] Box<Error>),
}

/// A decoded instruction. The operand of a jump is the index of its target instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    opcode: Opcode,
    operand: u16,
}

/// A verified condition. Evaluating it can't panic, loop or allocate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    instructions: Box<[Instruction]>,
    constants: Box<[i128]>,
    max_stack: usize,
}

impl Program {
    /// Checks bytecode and decodes it.
    pub fn verify(code: &[u8], constants: &[i128]) -> Result<Self, VerifyError> {
        if code.len() > MAX_CODE {
            return Err(VerifyError::TooLong { length: code.len() });
        }
        Verifier::new(code, constants.len()).run().map(|(instructions, max_stack)| Self {
            instructions,
            constants: constants.into(),
            max_stack,
        })
    }

    /// Whether the condition holds: its value is not zero.
    pub fn evaluate<C: Context + ?Sized>(&self, context: &mut C) -> Result<bool, EvaluateError> {
        if self.max_stack <= SMALL_STACK {
            self.run::<SMALL_STACK, C>(context)
        } else {
            self.run::<MAX_STACK, C>(context)
        }
        .map(|value| value != 0)
    }

    /// Whether all registers that it names lie in [`crate::registers::Registers`], so that system registers need not
    /// be fetched.
    pub fn uses_only_general_registers(&self) -> bool {
        let registers = self.instructions.iter().filter(|instruction| instruction.opcode == Opcode::Register);
        registers.map(|instruction| register(instruction.operand)).all(RegisterId::is_general)
    }

    /// Whether it reads guest memory.
    pub fn reads_memory(&self) -> bool {
        self.instructions.iter().any(|instruction| load_size(instruction.opcode).is_some())
    }

    #[inline]
    fn run<const DEPTH: usize, C: Context + ?Sized>(&self, context: &mut C) -> Result<i128, EvaluateError> {
        let mut stack = Stack::<DEPTH> { values: [0; DEPTH], depth: 0 };
        let mut next = 0;
        while let Some(&Instruction { opcode, operand }) = self.instructions.get(next) {
            next += 1;
            match opcode {
                Opcode::Constant => stack.push(self.constants[usize::from(operand)]),
                Opcode::Register => stack.push(context.register(register(operand))?.into()),
                Opcode::Vcpu => stack.push(context.vcpu().into()),
                Opcode::Hits => stack.push(context.hits().into()),
                Opcode::Reached => stack.push(context.reached().into()),
                Opcode::LoadU8 => {
                    stack.change(|address| load::<1, C>(context, address).map(|v| u8::from_le_bytes(v).into()))?
                }
                Opcode::LoadU16 => {
                    stack.change(|address| load::<2, C>(context, address).map(|v| u16::from_le_bytes(v).into()))?
                }
                Opcode::LoadU32 => {
                    stack.change(|address| load::<4, C>(context, address).map(|v| u32::from_le_bytes(v).into()))?
                }
                Opcode::LoadU64 => {
                    stack.change(|address| load::<8, C>(context, address).map(|v| u64::from_le_bytes(v).into()))?
                }
                Opcode::LoadI8 => {
                    stack.change(|address| load::<1, C>(context, address).map(|v| i8::from_le_bytes(v).into()))?
                }
                Opcode::LoadI16 => {
                    stack.change(|address| load::<2, C>(context, address).map(|v| i16::from_le_bytes(v).into()))?
                }
                Opcode::LoadI32 => {
                    stack.change(|address| load::<4, C>(context, address).map(|v| i32::from_le_bytes(v).into()))?
                }
                Opcode::LoadI64 => {
                    stack.change(|address| load::<8, C>(context, address).map(|v| i64::from_le_bytes(v).into()))?
                }
                Opcode::CastU8 => stack.change(|value| Ok(value & 0xff))?,
                Opcode::CastU16 => stack.change(|value| Ok(value & 0xffff))?,
                Opcode::CastU32 => stack.change(|value| Ok(value & 0xffff_ffff))?,
                Opcode::CastU64 => stack.change(|value| Ok(value & 0xffff_ffff_ffff_ffff))?,
                Opcode::CastI8 => stack.change(|value| Ok(value << 120 >> 120))?,
                Opcode::CastI16 => stack.change(|value| Ok(value << 112 >> 112))?,
                Opcode::CastI32 => stack.change(|value| Ok(value << 96 >> 96))?,
                Opcode::CastI64 => stack.change(|value| Ok(value << 64 >> 64))?,
                Opcode::Add => stack.combine(|a, b| a.checked_add(b).ok_or(EvaluateError::Overflow))?,
                Opcode::Subtract => stack.combine(|a, b| a.checked_sub(b).ok_or(EvaluateError::Overflow))?,
                Opcode::Multiply => stack.combine(|a, b| a.checked_mul(b).ok_or(EvaluateError::Overflow))?,
                Opcode::FloorDivide => stack.combine(|a, b| divide(a, b).map(|(quotient, _)| quotient))?,
                Opcode::Modulo => stack.combine(modulo)?,
                Opcode::And => stack.combine(|a, b| Ok(a & b))?,
                Opcode::Or => stack.combine(|a, b| Ok(a | b))?,
                Opcode::Xor => stack.combine(|a, b| Ok(a ^ b))?,
                Opcode::ShiftLeft => stack.combine(shift_left)?,
                Opcode::ShiftRight => stack.combine(|a, b| Ok(a >> shift_count(b)?))?,
                Opcode::Negate => stack.change(|value| value.checked_neg().ok_or(EvaluateError::Overflow))?,
                Opcode::Invert => stack.change(|value| Ok(!value))?,
                Opcode::Not => stack.change(|value| Ok((value == 0).into()))?,
                Opcode::Equal => stack.combine(|a, b| Ok((a == b).into()))?,
                Opcode::NotEqual => stack.combine(|a, b| Ok((a != b).into()))?,
                Opcode::Less => stack.combine(|a, b| Ok((a < b).into()))?,
                Opcode::LessEqual => stack.combine(|a, b| Ok((a <= b).into()))?,
                Opcode::Greater => stack.combine(|a, b| Ok((a > b).into()))?,
                Opcode::GreaterEqual => stack.combine(|a, b| Ok((a >= b).into()))?,
                Opcode::Member => {
                    let element = stack.pop();
                    let found = stack.pop();
                    let value = *stack.top();
                    stack.push(found | i128::from(value == element));
                }
                Opcode::DropSecond => {
                    let top = stack.pop();
                    *stack.top() = top;
                }
                Opcode::Drop => drop(stack.pop()),
                Opcode::Tuck => {
                    let top = stack.pop();
                    let second = std::mem::replace(stack.top(), top);
                    stack.push(second);
                    stack.push(top);
                }
                Opcode::Jump => next = usize::from(operand),
                Opcode::JumpIfZero => {
                    if stack.pop() == 0 {
                        next = usize::from(operand);
                    }
                }
                Opcode::JumpIfZeroOrDrop | Opcode::JumpIfNonzeroOrDrop => {
                    if (*stack.top() == 0) == (opcode == Opcode::JumpIfZeroOrDrop) {
                        next = usize::from(operand);
                    } else {
                        stack.pop();
                    }
                }
            }
        }
        Ok(stack.pop())
    }
}

/// The values of a running program. `verify` has shown that every access is in bounds.
struct Stack<const DEPTH: usize> {
    values: [i128; DEPTH],
    depth: usize,
}

impl<const DEPTH: usize> Stack<DEPTH> {
    #[inline(always)]
    fn push(&mut self, value: i128) {
        self.values[self.depth] = value;
        self.depth += 1;
    }

    #[inline(always)]
    fn pop(&mut self) -> i128 {
        self.depth -= 1;
        self.values[self.depth]
    }

    #[inline(always)]
    fn top(&mut self) -> &mut i128 {
        &mut self.values[self.depth - 1]
    }

    #[inline(always)]
    fn change(&mut self, operation: impl FnOnce(i128) -> Result<i128, EvaluateError>) -> Result<(), EvaluateError> {
        let top = self.top();
        *top = operation(*top)?;
        Ok(())
    }

    #[inline(always)]
    fn combine(
        &mut self,
        operation: impl FnOnce(i128, i128) -> Result<i128, EvaluateError>,
    ) -> Result<(), EvaluateError> {
        let right = self.pop();
        let left = self.top();
        *left = operation(*left, right)?;
        Ok(())
    }
}

#[inline(always)]
fn register(operand: u16) -> RegisterId {
    RegisterId::NAMED[usize::from(operand)].1
}

#[inline]
pub(super) fn load<const SIZE: usize, C: Context + ?Sized>(
    context: &mut C,
    address: i128,
) -> Result<[u8; SIZE], EvaluateError> {
    let start = u64::try_from(address).map_err(|_| EvaluateError::Address(address))?;
    let length = SIZE as u64;
    if start.checked_add(length - 1).is_none() {
        return Err(GuestFault { address: start, length, is_virtual: true }.into());
    }
    let mut bytes = [0; SIZE];
    context.read(start, &mut bytes)?;
    Ok(bytes)
}

/// Quotient and remainder, floored. 128-bit division is a library call several times slower than the CPU's own
/// instruction, which serves numbers of 64 bits.
#[inline]
fn divide(a: i128, b: i128) -> Result<(i128, i128), EvaluateError> {
    if b == 0 {
        return Err(EvaluateError::DivisionByZero);
    }
    if let (Ok(a), Ok(b)) = (u64::try_from(a), u64::try_from(b)) {
        return Ok(((a / b).into(), (a % b).into()));
    }
    let quotient = a.checked_div(b).ok_or(EvaluateError::Overflow)?;
    let remainder = a - quotient * b;
    let floored = remainder != 0 && (remainder < 0) != (b < 0);
    Ok(if floored { (quotient - 1, remainder + b) } else { (quotient, remainder) })
}

#[inline]
fn modulo(a: i128, b: i128) -> Result<i128, EvaluateError> {
    if b == -1 { Ok(0) } else { divide(a, b).map(|(_, remainder)| remainder) }
}

#[inline]
fn shift_count(count: i128) -> Result<u32, EvaluateError> {
    u32::try_from(count).ok().filter(|count| *count <= 127).ok_or(EvaluateError::Shift(count))
}

#[inline]
fn shift_left(value: i128, count: i128) -> Result<i128, EvaluateError> {
    let count = shift_count(count)?;
    let shifted = value << count;
    if shifted >> count == value { Ok(shifted) } else { Err(EvaluateError::Overflow) }
}

fn load_size(opcode: Opcode) -> Option<usize> {
    match opcode {
        Opcode::LoadU8 | Opcode::LoadI8 => Some(1),
        Opcode::LoadU16 | Opcode::LoadI16 => Some(2),
        Opcode::LoadU32 | Opcode::LoadI32 => Some(4),
        Opcode::LoadU64 | Opcode::LoadI64 => Some(8),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
