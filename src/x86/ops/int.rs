//! Integers of the four operand sizes.

use std::ops::{BitAnd, BitOr, BitXor, Not};

/// An unsigned integer of 1, 2, 4 or 8 bytes.
pub trait Int:
    Copy + Eq + Ord + BitAnd<Output = Self> + BitOr<Output = Self> + BitXor<Output = Self> + Not<Output = Self>
{
    /// Bytes.
    const SIZE: usize;
    /// Bits.
    const BITS: u32;
    /// Zero-extended.
    fn zx(self) -> u64;
    /// Sign-extended.
    fn sx(self) -> u64;
    /// The low bits of a value.
    fn cut(value: u64) -> Self;
    /// The topmost bits, at the top of 32.
    fn top(self) -> u32;
    /// Sum that wraps.
    fn plus(self, other: Self) -> Self;
    /// Difference that wraps.
    fn minus(self, other: Self) -> Self;
}

macro_rules! int {
    ($int:ty, $signed:ty) => {
        #[allow(clippy::cast_possible_truncation, clippy::cast_lossless)]
        impl Int for $int {
            const SIZE: usize = size_of::<$int>();
            const BITS: u32 = <$int>::BITS;
            #[inline(always)]
            fn zx(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sx(self) -> u64 {
                self as $signed as i64 as u64
            }
            #[inline(always)]
            fn cut(value: u64) -> Self {
                value as $int
            }
            #[inline(always)]
            fn top(self) -> u32 {
                if Self::BITS == 64 { (self as u64 >> 32) as u32 } else { (self as u32) << (32 - Self::BITS.min(32)) }
            }
            #[inline(always)]
            fn plus(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn minus(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
        }
    };
}

int!(u8, i8);
int!(u16, i16);
int!(u32, i32);
int!(u64, i64);
