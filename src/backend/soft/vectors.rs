//! A set of interrupt vectors: 256 bits, as the IRR, ISR and TMR of a local APIC are.

/// One bit for each vector.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Vectors([u64; 4]);

fn place(vector: u8) -> (usize, u64) {
    (usize::from(vector >> 6), 1 << (vector & 63))
}

impl Vectors {
    /// Adds a vector; false if it was there.
    pub fn insert(&mut self, vector: u8) -> bool {
        let (word, bit) = place(vector);
        let was_there = self.0[word] & bit != 0;
        self.0[word] |= bit;
        !was_there
    }

    /// Takes a vector away.
    pub fn remove(&mut self, vector: u8) {
        let (word, bit) = place(vector);
        self.0[word] &= !bit;
    }

    /// Whether the vector is there.
    pub fn contains(&self, vector: u8) -> bool {
        let (word, bit) = place(vector);
        self.0[word] & bit != 0
    }

    /// The highest vector, which has the highest priority.
    #[inline]
    pub fn highest(&self) -> Option<u8> {
        let (word, bits) = (0..4u32).zip(self.0).rev().find(|(_, bits)| *bits != 0)?;
        u8::try_from(word * 64 + 63 - bits.leading_zeros()).ok()
    }

    /// Bits 32n to 32n+31, as the n-th register shows them.
    pub fn register(&self, n: u16) -> u32 {
        let word = self.0[usize::from(n / 2) & 3];
        let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
        u32::from_le_bytes(if n.is_multiple_of(2) { [a, b, c, d] } else { [e, f, g, h] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_highest_vector_is_found_among_any() {
        let mut set = Vectors::default();
        assert_eq!(set.highest(), None);
        for vector in [0u8, 31, 63, 64, 200, 255] {
            assert!(set.insert(vector) && !set.insert(vector));
            assert_eq!(set.highest(), Some(vector));
        }
        for (vector, next) in
            [(255, Some(200)), (200, Some(64)), (64, Some(63)), (63, Some(31)), (31, Some(0)), (0, None)]
        {
            set.remove(vector);
            assert_eq!((set.highest(), set.contains(vector)), (next, false));
        }
    }

    #[test]
    fn test_registers_show_32_vectors_each() {
        let mut set = Vectors::default();
        set.insert(33);
        set.insert(255);
        assert_eq!((0..8).map(|n| set.register(n)).collect::<Vec<_>>(), [0, 2, 0, 0, 0, 0, 0, 1 << 31]);
    }
}
