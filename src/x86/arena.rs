//! Room for plain values that are all given up at once, with the arena: taking some is a comparison and a copy, where the allocator's
//! price, twice for every block of code, is a good part of what it costs to run code for the first time.

use std::mem::MaybeUninit;

/// What rooms are made of, which is the largest alignment that values in them may have.
type Word = MaybeUninit<u64>;

/// Words of the first chunk; each further one has twice as many as the last, up to [`MOST`].
const FIRST: usize = 1 << 11;
/// Words of the largest chunks.
const MOST: usize = 1 << 16;

/// Values at places that do not change as long as it lives.
pub(super) struct Arena {
    chunks: Vec<Box<[Word]>>,
    /// What is free of the last chunk.
    free: *mut Word,
    left: usize,
    /// Words of all the chunks.
    size: usize,
}

impl Default for Arena {
    fn default() -> Self {
        Self { chunks: Vec::new(), free: std::ptr::null_mut(), left: 0, size: 0 }
    }
}

impl Arena {
    /// Copies values to a place of their own. Returns the first.
    #[inline]
    pub fn keep<T: Copy>(&mut self, values: &[T]) -> *mut T {
        if values.is_empty() {
            return std::ptr::dangling_mut();
        }
        let place = self.take::<T>(size_of_val(values));
        // SAFETY: so many bytes were taken, aligned as T may be, and nobody else knows them.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), place, values.len()) };
        place
    }

    /// Puts a value at a place of its own.
    #[inline]
    pub fn put<T: Copy>(&mut self, value: T) -> *mut T {
        let place = self.take::<T>(size_of::<T>());
        // SAFETY: so many bytes were taken, aligned as T may be, and nobody else knows them.
        unsafe { place.write(value) };
        place
    }

    /// So many bytes, for values of that type.
    #[inline]
    fn take<T>(&mut self, bytes: usize) -> *mut T {
        const { assert!(align_of::<T>() <= align_of::<Word>()) };
        let words = bytes.div_ceil(size_of::<Word>());
        if self.left < words {
            self.grow(words);
        }
        let place = self.free;
        // SAFETY: so many words are free behind it.
        self.free = unsafe { place.add(words) };
        self.left -= words;
        place.cast()
    }

    #[cold]
    fn grow(&mut self, words: usize) {
        let last = self.chunks.last().map_or(0, |chunk| chunk.len());
        let mut chunk = Box::new_uninit_slice((2 * last).clamp(FIRST, MOST).max(words));
        (self.free, self.left) = (chunk.as_mut_ptr(), chunk.len());
        self.size += chunk.len();
        self.chunks.push(chunk);
    }

    /// Words that are taken, or were too few to be.
    pub fn words(&self) -> usize {
        self.size - self.left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_values_stay_where_they_are_as_others_come() {
        let mut arena = Arena::default();
        let places: Vec<_> = (0..10_000u64).map(|n| arena.keep(&[n, n + 1, n + 2])).collect();
        let long = arena.keep(&[7u16; 1 << 19]);
        for (n, place) in (0..).zip(places) {
            // SAFETY: three words were kept there, and the arena is as it was.
            assert_eq!(unsafe { *place.cast::<[u64; 3]>() }, [n, n + 1, n + 2]);
        }
        // SAFETY: so many were kept there.
        assert!(unsafe { std::slice::from_raw_parts(long, 1 << 19) }.iter().all(|word| *word == 7));
        assert!(arena.words() >= 30_000 + (1 << 17));
    }
}
