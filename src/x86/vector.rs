//! Vector operations: what the SSE and AVX instructions compute, as small functions on 128-bit halves that the host's own
//! CPU executes. An instruction of 256 bits works on its two halves one after the other, since all but a few (see
//! `avx_lane`) keep the halves apart: so AVX2 needs no more of the host than the 128-bit forms.

use std::sync::LazyLock;

use iced_x86::Mnemonic;

/// `dst = operation(dst, src)` on one half.
///
/// # Safety
/// `dst` and `src` are valid for 16 bytes, aligned or not; `control` is valid, its `mxcsr` masks every exception and has
/// no reserved bit set; the host has the instruction. [`operation`] answers only with functions that the host has.
pub type VectorFn = unsafe fn(dst: *mut u128, src: *const u128, control: *mut Control);

/// What an operation gets beside its two operands.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Control {
    /// In: the guest's rounding control, all exceptions masked, no flags. Out: the same with the flags raised. Looked
    /// at by operations with [`Operation::is_float`] alone.
    pub mxcsr: u32,
    /// The host's MXCSR while the guest's is loaded.
    pub saved: u32,
    /// The immediate operand; bits that the instruction ignores may be set.
    pub immediate: u64,
    /// The third operand of operations with [`Operation::uses_third`].
    pub third: u128,
}

/// What `dst` holds after the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The destination register's new value.
    Vector,
    /// A general register's value, in the low 8 bytes.
    General,
    /// The arithmetic flags, in the low 8 bytes.
    Flags,
}

/// How the 256-bit form of an instruction comes from two 128-bit operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Halves {
    /// Each half of the destination from the same half of the source.
    Alike,
    /// The same, but the upper half takes the immediate's bits from this one on.
    Immediate(u8),
    /// Both halves take the whole 128-bit source, which is a count.
    Count,
    /// The source is narrower: its first so many bytes make the lower half, the next ones the upper.
    Spread(u8),
    /// The low 8 bytes of both results together are a 128-bit result.
    Narrow,
    /// The upper half's answer is shifted left by so many bits and joined with the lower half's.
    Joined(u8),
    /// Flags that are set if both halves set them.
    Both,
}

/// The floating-point elements that an operation computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elements {
    /// Bytes of an element: 2, 4 or 8.
    pub size: u8,
    /// How many of them there are in a half, from the lowest on.
    pub count: u8,
}

impl Elements {
    /// What the end of an instruction's name says, for arithmetic whose results may underflow.
    const fn of(name: &str) -> Option<Self> {
        let name = name.as_bytes();
        if name.len() < 4 || matches!([name[0], name[1], name[2]], [b'm', b'i', b'n'] | [b'm', b'a', b'x']) {
            return None;
        }
        match [name[name.len() - 2], name[name.len() - 1]] {
            [b'p', b's'] => Some(Self { size: 4, count: 4 }),
            [b'p', b'd'] => Some(Self { size: 8, count: 2 }),
            [b's', b's'] => Some(Self { size: 4, count: 1 }),
            [b's', b'd'] => Some(Self { size: 8, count: 1 }),
            [b'p', b'h'] => Some(Self { size: 2, count: 4 }),
            _ => None,
        }
    }

    /// Whether any of them is a denormal number.
    pub fn has_denormal(self, half: u128) -> bool {
        let bits = 8 * u32::from(self.size);
        let fraction = match self.size {
            2 => 10,
            4 => f32::MANTISSA_DIGITS - 1,
            _ => f64::MANTISSA_DIGITS - 1,
        };
        (0..u32::from(self.count)).any(|n| {
            let magnitude = half >> (bits * n) & (u128::MAX >> (129 - bits));
            magnitude != 0 && magnitude >> fraction == 0
        })
    }
}

/// A vector operation.
#[derive(Clone, Copy)]
pub struct Operation {
    /// What to call.
    pub function: VectorFn,
    /// What to call instead where the answer is a general register of 8 bytes.
    pub to_wide: Option<VectorFn>,
    /// What to call instead where the host's MXCSR is the guest's and gathers its flags.
    pub bare: Option<VectorFn>,
    /// What it answers.
    pub answer: Answer,
    /// Depends on MXCSR and raises its exceptions.
    pub is_float: bool,
    /// Has a third operand: XMM0 for SSE instructions, a register that is named for AVX ones.
    pub uses_third: bool,
    /// What becomes of 256 bits.
    pub halves: Halves,
    /// What it computes, if that may underflow.
    pub elements: Option<Elements>,
}

impl Operation {
    /// An operation that ignores MXCSR and answers with a vector.
    pub(super) const fn plain(function: VectorFn) -> Self {
        Self {
            function,
            to_wide: None,
            bare: None,
            answer: Answer::Vector,
            is_float: false,
            uses_third: false,
            halves: Halves::Alike,
            elements: None,
        }
    }

    /// One under MXCSR that answers with a vector.
    pub(super) const fn float(function: VectorFn) -> Self {
        Self { is_float: true, ..Self::plain(function) }
    }

    /// The same with a function that leaves MXCSR alone.
    pub(super) const fn with_bare(self, bare: VectorFn) -> Self {
        Self { bare: Some(bare), ..self }
    }

    /// The same for an instruction whose name, in small letters, says what it computes.
    pub(super) const fn named(self, name: &str) -> Self {
        Self { elements: Elements::of(name), ..self }
    }

    /// The same with another kind of answer.
    pub(super) const fn answers(self, answer: Answer) -> Self {
        Self { answer, ..self }
    }

    /// The same with a third operand.
    pub(super) const fn with_third(self) -> Self {
        Self { uses_third: true, ..self }
    }

    /// The same with another way to 256 bits.
    pub(super) const fn with(self, halves: Halves) -> Self {
        Self { halves, ..self }
    }
}

/// The operation of an instruction, for its SSE, AVX and (on the low 8 bytes) MMX forms; `None` if it is no vector
/// arithmetic or the host does not have it.
pub fn operation(mnemonic: Mnemonic) -> Option<&'static Operation> {
    static OPERATIONS: LazyLock<Vec<Option<Operation>>> = LazyLock::new(|| {
        Mnemonic::values()
            .map(|mnemonic| super::sse_table::find(mnemonic).or_else(|| super::avx_table::find(mnemonic)))
            .collect()
    });
    OPERATIONS.get(mnemonic as usize)?.as_ref()
}
