//! The instructions of condition bytecode: one table gives each its number, its name, its operand and what it does to
//! the stack. `uhyve.condition.Opcode` is its twin, and a test compares the two.

/// The operand that follows an opcode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operand {
    /// None.
    None,
    /// Two bytes: an index into the constants.
    Constant,
    /// One byte: an index into [`RegisterId::NAMED`].
    Register,
    /// Two bytes: how many bytes to skip.
    Jump,
}

macro_rules! opcodes {
    ($($(#[doc = $doc:literal])* $variant:ident = $code:literal, $name:literal, $operand:ident, $pops:literal => $pushes:literal;)*) => {
        /// What one instruction does.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Opcode {
            $($(#[doc = $doc])* $variant = $code,)*
        }

        /// Every opcode's name and number: what `uhyve.condition.Opcode` must agree with.
        pub const OPCODES: &[(&str, u8)] = &[$(($name, $code)),*];

        impl Opcode {
            /// The opcode of that number.
            pub fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// What follows it.
            pub fn operand(self) -> Operand {
                match self {
                    $(Self::$variant => Operand::$operand,)*
                }
            }

            /// How many values it takes from the stack and how many it leaves. For the jumps that keep a value, this
            /// is the path that does not jump.
            pub(super) fn effect(self) -> (usize, usize) {
                match self {
                    $(Self::$variant => ($pops, $pushes),)*
                }
            }
        }
    };
}

opcodes! {
    /// Pushes a constant.
    Constant = 0, "CONSTANT", Constant, 0 => 1;
    /// Pushes a register, unsigned.
    Register = 1, "REGISTER", Register, 0 => 1;
    /// Pushes the number of the vCPU.
    Vcpu = 2, "VCPU", None, 0 => 1;
    /// Pushes how often the condition let a vCPU through so far.
    Hits = 3, "HITS", None, 0 => 1;
    /// Pushes how often a vCPU met the breakpoint, this time included.
    Reached = 4, "REACHED", None, 0 => 1;
    /// Replaces an address by the unsigned byte there.
    LoadU8 = 5, "LOAD_U8", None, 1 => 1;
    /// Replaces an address by the unsigned 16-bit number there.
    LoadU16 = 6, "LOAD_U16", None, 1 => 1;
    /// Replaces an address by the unsigned 32-bit number there.
    LoadU32 = 7, "LOAD_U32", None, 1 => 1;
    /// Replaces an address by the unsigned 64-bit number there.
    LoadU64 = 8, "LOAD_U64", None, 1 => 1;
    /// Replaces an address by the signed byte there.
    LoadI8 = 9, "LOAD_I8", None, 1 => 1;
    /// Replaces an address by the signed 16-bit number there.
    LoadI16 = 10, "LOAD_I16", None, 1 => 1;
    /// Replaces an address by the signed 32-bit number there.
    LoadI32 = 11, "LOAD_I32", None, 1 => 1;
    /// Replaces an address by the signed 64-bit number there.
    LoadI64 = 12, "LOAD_I64", None, 1 => 1;
    /// Wraps to 8 bits, unsigned.
    CastU8 = 13, "CAST_U8", None, 1 => 1;
    /// Wraps to 16 bits, unsigned.
    CastU16 = 14, "CAST_U16", None, 1 => 1;
    /// Wraps to 32 bits, unsigned.
    CastU32 = 15, "CAST_U32", None, 1 => 1;
    /// Wraps to 64 bits, unsigned.
    CastU64 = 16, "CAST_U64", None, 1 => 1;
    /// Wraps to 8 bits, signed.
    CastI8 = 17, "CAST_I8", None, 1 => 1;
    /// Wraps to 16 bits, signed.
    CastI16 = 18, "CAST_I16", None, 1 => 1;
    /// Wraps to 32 bits, signed.
    CastI32 = 19, "CAST_I32", None, 1 => 1;
    /// Wraps to 64 bits, signed.
    CastI64 = 20, "CAST_I64", None, 1 => 1;
    /// Sum.
    Add = 21, "ADD", None, 2 => 1;
    /// Difference.
    Subtract = 22, "SUBTRACT", None, 2 => 1;
    /// Product.
    Multiply = 23, "MULTIPLY", None, 2 => 1;
    /// Quotient, rounded towards minus infinity.
    FloorDivide = 24, "FLOOR_DIVIDE", None, 2 => 1;
    /// Remainder with the sign of the divisor.
    Modulo = 25, "MODULO", None, 2 => 1;
    /// Bitwise and.
    And = 26, "AND", None, 2 => 1;
    /// Bitwise or.
    Or = 27, "OR", None, 2 => 1;
    /// Bitwise exclusive or.
    Xor = 28, "XOR", None, 2 => 1;
    /// Shift to the left by 0 to 127.
    ShiftLeft = 29, "SHIFT_LEFT", None, 2 => 1;
    /// Arithmetic shift to the right by 0 to 127.
    ShiftRight = 30, "SHIFT_RIGHT", None, 2 => 1;
    /// Change of sign.
    Negate = 31, "NEGATE", None, 1 => 1;
    /// All bits inverted.
    Invert = 32, "INVERT", None, 1 => 1;
    /// 1 for zero, 0 for all else.
    Not = 33, "NOT", None, 1 => 1;
    /// Whether two values are equal.
    Equal = 34, "EQUAL", None, 2 => 1;
    /// Whether two values differ.
    NotEqual = 35, "NOT_EQUAL", None, 2 => 1;
    /// Whether the lower is less than the top.
    Less = 36, "LESS", None, 2 => 1;
    /// Whether the lower is at most the top.
    LessEqual = 37, "LESS_EQUAL", None, 2 => 1;
    /// Whether the lower is greater than the top.
    Greater = 38, "GREATER", None, 2 => 1;
    /// Whether the lower is at least the top.
    GreaterEqual = 39, "GREATER_EQUAL", None, 2 => 1;
    /// `value found element` becomes `value (found or value == element)`: one step of `in`.
    Member = 40, "MEMBER", None, 3 => 2;
    /// `a b` becomes `b`.
    DropSecond = 41, "DROP_SECOND", None, 2 => 1;
    /// Drops the top.
    Drop = 42, "DROP", None, 1 => 0;
    /// `a b` becomes `b a b`: keeps the middle of a chained comparison.
    Tuck = 43, "TUCK", None, 2 => 3;
    /// Jumps.
    Jump = 44, "JUMP", Jump, 0 => 0;
    /// Takes the top; jumps if it is zero.
    JumpIfZero = 45, "JUMP_IF_ZERO", Jump, 1 => 0;
    /// Jumps if the top is zero, else drops it: `and`.
    JumpIfZeroOrDrop = 46, "JUMP_IF_ZERO_OR_DROP", Jump, 1 => 0;
    /// Jumps if the top is not zero, else drops it: `or`.
    JumpIfNonzeroOrDrop = 47, "JUMP_IF_NONZERO_OR_DROP", Jump, 1 => 0;
}
