//! The arithmetic flags as fast operations leave them: not computed, but two words from which each follows when it is
//! asked for. The first is the result, sign-extended. The second holds carries: bit 63 is CF, bit 62 the carry into
//! the sign bit (CF xor OF), bit 3 AF; bit 0 inverts SF and bits 8 to 15 the parity, so that any six flags can be held.

use super::flags::{AF, ARITHMETIC, CF, OF, PF, SF, ZF, flag};

/// Flags that are known by their causes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Lazy {
    /// Result, sign-extended to 64 bits.
    pub result: u64,
    /// Inversions of SF and PF, and AF.
    pub low: u32,
    /// Carries out of the top bits, in the top bits.
    pub high: u32,
}

const CARRY: u32 = 1 << 31;
const CARRY_IN: u32 = 1 << 30;

impl Lazy {
    /// From flags as RFLAGS has them.
    #[inline]
    pub fn from_flags(flags: u64) -> Self {
        let result = u64::from(flags & ZF == 0);
        // The result's own parity flag is set for 0 and clear for 1.
        let parity_differs = (flags & PF != 0) != (result == 0);
        let low = u32::from(flags & SF != 0) | u32::from(parity_differs) << 8 | u32::from(flags & AF != 0) << 3;
        let carry = flags & CF != 0;
        let high = u32::from(carry) << 31 | u32::from(carry != (flags & OF != 0)) << 30;
        Self { result, low, high }
    }

    /// As RFLAGS has them.
    #[inline]
    pub fn to_flags(self) -> u64 {
        flag(self.carry(), CF)
            | flag(self.overflow(), OF)
            | flag(self.zero(), ZF)
            | flag(self.sign(), SF)
            | flag(self.parity(), PF)
            | flag(self.low & 8 != 0, AF)
    }

    /// `rflags` with these arithmetic flags.
    pub fn merge(self, rflags: u64) -> u64 {
        rflags & !ARITHMETIC | self.to_flags()
    }

    #[inline(always)]
    pub fn carry(self) -> bool {
        self.high & CARRY != 0
    }

    #[inline(always)]
    pub fn overflow(self) -> bool {
        (self.high ^ self.high << 1) & CARRY != 0
    }

    #[inline(always)]
    pub fn zero(self) -> bool {
        self.result == 0
    }

    #[inline(always)]
    pub fn sign(self) -> bool {
        (self.result >> 63 != 0) != (self.low & 1 != 0)
    }

    #[inline(always)]
    pub fn parity(self) -> bool {
        let [_, inverted, _, _] = self.low.to_le_bytes();
        let [byte, ..] = self.result.to_le_bytes();
        (byte ^ inverted).count_ones() & 1 == 0
    }

    /// Sets CF and keeps the rest.
    #[inline(always)]
    pub fn set_carry(&mut self, carry: bool) {
        let overflow = (self.high ^ self.high << 1) & CARRY;
        let carry = u32::from(carry) << 31;
        self.high = carry | (carry ^ overflow) >> 1;
    }

    /// Sets CF and OF and keeps the rest.
    #[inline(always)]
    pub fn set_carry_overflow(&mut self, carry: bool, overflow: bool) {
        self.high = u32::from(carry) << 31 | u32::from(carry != overflow) << 30;
    }

    /// CF in the place that [`Lazy::high`] has it in, and the carry-in bit that goes with no overflow.
    #[inline(always)]
    pub fn of_carry(high: u32, overflow: u32) -> u32 {
        let carry = high & CARRY;
        carry | ((carry ^ overflow & CARRY) >> 1 & CARRY_IN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_every_combination_of_flags_survives() {
        for bits in 0..64u64 {
            let flags = [CF, PF, AF, ZF, SF, OF].iter().enumerate().map(|(i, f)| flag(bits >> i & 1 != 0, *f)).sum();
            let lazy = Lazy::from_flags(flags);
            assert_eq!(lazy.to_flags(), flags);
            let mut other = lazy;
            other.set_carry(flags & CF == 0);
            assert_eq!(other.to_flags(), flags ^ CF);
            other.set_carry_overflow(false, true);
            assert_eq!(other.to_flags(), flags & !(CF | OF) | OF);
        }
    }
}
