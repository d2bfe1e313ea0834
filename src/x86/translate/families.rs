//! What the builder of blocks knows of an instruction by its mnemonic alone: the family of operations that it is one of, and
//! which of them. It is looked up: what comes next is nothing that a host's CPU could foresee.

use iced_x86::Mnemonic;

/// The families of common operations. An instruction of one may still have a form that the family has no operation for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// None of them.
    Other,
    Branch,
    /// Jcc, by condition.
    Conditional,
    /// By the place in [`ARITHMETIC`](super::arithmetic::ARITHMETIC).
    Arithmetic,
    /// By the place in [`UNARY`](super::arithmetic::UNARY).
    Unary,
    Move,
    /// With zeros (0) or the sign.
    Extend,
    Address,
    /// SETcc, by condition.
    Set,
    /// CMOVcc, by condition.
    MoveIf,
    /// The accumulator's sign extensions.
    Accumulator,
    Stack,
    /// By the place in [`SHIFTS`](super::arithmetic::SHIFTS).
    Shift,
    Count,
    Vector,
}

/// A family, and which of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member {
    pub family: Family,
    pub number: u8,
}

/// More mnemonics than there are.
const MNEMONICS: usize = 2048;

/// By mnemonic.
static MEMBERS: [Member; MNEMONICS] = {
    use Mnemonic as M;
    let families: [(Family, &[Mnemonic]); 15] = [
        (Family::Branch, &[M::Jmp, M::Call, M::Ret]),
        (
            Family::Conditional,
            &[
                M::Jo,
                M::Jno,
                M::Jb,
                M::Jae,
                M::Je,
                M::Jne,
                M::Jbe,
                M::Ja,
                M::Js,
                M::Jns,
                M::Jp,
                M::Jnp,
                M::Jl,
                M::Jge,
                M::Jle,
                M::Jg,
            ],
        ),
        (Family::Arithmetic, &[M::Add, M::Adc, M::Sub, M::Sbb, M::And, M::Or, M::Xor, M::Cmp, M::Test]),
        (Family::Unary, &[M::Inc, M::Dec, M::Neg, M::Not]),
        (Family::Move, &[M::Mov]),
        (Family::Extend, &[M::Movzx, M::Movsx, M::Movsxd]),
        (Family::Address, &[M::Lea]),
        (
            Family::Set,
            &[
                M::Seto,
                M::Setno,
                M::Setb,
                M::Setae,
                M::Sete,
                M::Setne,
                M::Setbe,
                M::Seta,
                M::Sets,
                M::Setns,
                M::Setp,
                M::Setnp,
                M::Setl,
                M::Setge,
                M::Setle,
                M::Setg,
            ],
        ),
        (
            Family::MoveIf,
            &[
                M::Cmovo,
                M::Cmovno,
                M::Cmovb,
                M::Cmovae,
                M::Cmove,
                M::Cmovne,
                M::Cmovbe,
                M::Cmova,
                M::Cmovs,
                M::Cmovns,
                M::Cmovp,
                M::Cmovnp,
                M::Cmovl,
                M::Cmovge,
                M::Cmovle,
                M::Cmovg,
            ],
        ),
        (Family::Accumulator, &[M::Cdqe, M::Cwde, M::Cdq, M::Cqo]),
        (Family::Stack, &[M::Push, M::Pop, M::Leave]),
        (Family::Shift, &[M::Shl, M::Shr, M::Sar, M::Rol, M::Ror]),
        (Family::Shift, &[M::Sal]),
        (Family::Count, &[M::Imul, M::Mul, M::Div, M::Idiv, M::Bswap, M::Bt]),
        (Family::Vector, &[M::Movaps, M::Movups, M::Movdqa, M::Movdqu, M::Movd, M::Movq, M::Pxor, M::Xorps]),
    ];
    let mut members = [Member { family: Family::Other, number: 0 }; MNEMONICS];
    let mut list = 0;
    while list < families.len() {
        let (family, mnemonics) = families[list];
        let mut number = 0;
        while number < mnemonics.len() {
            // No list is longer than sixteen.
            #[allow(clippy::cast_possible_truncation)]
            let member = Member { family, number: number as u8 };
            members[mnemonics[number] as usize] = member;
            number += 1;
        }
        list += 1;
    }
    members
};

/// What an instruction with that mnemonic is.
#[inline(always)]
pub(super) fn member(mnemonic: Mnemonic) -> Member {
    MEMBERS.get(mnemonic as usize).copied().unwrap_or(Member { family: Family::Other, number: 0 })
}
