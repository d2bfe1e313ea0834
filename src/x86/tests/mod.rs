//! Tests of the emulator: against the host's own CPU with random instructions and operands (`native`, `compare`), and
//! against the manuals where the host can't be asked (`behaviour`).
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod behaviour;
mod compare;
mod crossing;
mod differential;
mod forms;
mod inventory;
mod lent;
mod machine;
mod native;
mod random;
mod stepping;
mod system;
mod translation;
mod vectors;

use super::{Bus, BusError, MAX_LENGTH};

/// Guest memory of one range; everything else is a page fault.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Memory {
    pub base: u64,
    pub bytes: Vec<u8>,
    pub code: Vec<u8>,
    pub writes: usize,
}

impl Memory {
    pub fn new(base: u64, length: usize) -> Self {
        Self { base, bytes: vec![0; length], code: Vec::new(), writes: 0 }
    }

    fn range(&self, address: u64, length: usize, is_write: bool) -> Result<std::ops::Range<usize>, BusError> {
        let start = address.wrapping_sub(self.base);
        if start >= self.bytes.len() as u64 || start as usize + length > self.bytes.len() {
            return Err(BusError::PageFault { address, error_code: u32::from(is_write) * 2 });
        }
        Ok(start as usize..start as usize + length)
    }
}

impl Bus for Memory {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), BusError> {
        buffer.copy_from_slice(&self.bytes[self.range(address, buffer.len(), false)?]);
        Ok(())
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), BusError> {
        let range = self.range(address, data.len(), true)?;
        self.bytes[range].copy_from_slice(data);
        self.writes += 1;
        Ok(())
    }

    fn fetch(&mut self, _address: u64, buffer: &mut [u8; MAX_LENGTH]) -> usize {
        let length = self.code.len().min(MAX_LENGTH);
        buffer[..length].copy_from_slice(&self.code[..length]);
        length
    }

    fn read_tsc(&mut self) -> u64 {
        0x1234_5678_9abc_def0
    }

    fn compare_exchange(&mut self, address: u64, size: usize, expected: u128, new: u128) -> Result<u128, BusError> {
        let range = self.range(address, size, true)?;
        let mut old = [0; 16];
        old[..size].copy_from_slice(&self.bytes[range.clone()]);
        let old = u128::from_le_bytes(old);
        if old == expected {
            self.bytes[range].copy_from_slice(&new.to_le_bytes()[..size]);
            self.writes += 1;
        }
        Ok(old)
    }
}

/// A small deterministic generator (xorshift64*).
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A value that is often a boundary.
    pub fn value(&mut self) -> u64 {
        const EDGES: [u64; 16] = [
            0,
            1,
            2,
            7,
            8,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
        ];
        match self.below(4) {
            0 => self.pick(&EDGES),
            1 => self.pick(&EDGES).wrapping_neg(),
            2 => self.below(300),
            _ => self.next(),
        }
    }

    /// A vector whose lanes are often floating-point boundaries.
    pub fn vector(&mut self) -> u128 {
        const SINGLES: [u32; 14] = [
            0,
            0x8000_0000,
            0x3f80_0000,
            0xbf80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            1,
            0x7f7f_ffff,
            0x0080_0000,
            0x4f00_0000,
            0x3fc0_0000,
            0x4b7f_ffff,
        ];
        let single = |r: &mut Self| u128::from(r.pick(&SINGLES));
        let double = |r: &mut Self| {
            let value = f64::from(f32::from_bits(r.pick(&SINGLES)));
            let value = match r.below(4) {
                0 => value * 1.5,
                1 => value + 0.25,
                _ => value,
            };
            u128::from(value.to_bits())
        };
        match self.below(3) {
            0 => single(self) | single(self) << 32 | single(self) << 64 | single(self) << 96,
            1 => double(self) | double(self) << 64,
            _ => u128::from(self.value()) | u128::from(self.value()) << 64,
        }
    }
}
