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
#[derive(Default)]
pub(super) struct Arena {
    chunks: Vec<Box<[Word]>>,
    /// Words of the last chunk that are taken.
    taken: usize,
    /// Words of all the chunks before it.
    before: usize,
}

impl Arena {
    /// Copies values to a place of their own. Returns the first.
    #[inline]
    pub fn keep<T: Copy>(&mut self, values: &[T]) -> *mut T {
        const { assert!(align_of::<T>() <= align_of::<Word>()) };
        let words = size_of_val(values).div_ceil(size_of::<Word>());
        let place = self.take(words).as_mut_ptr().cast::<T>();
        // SAFETY: so many bytes and no less were taken, aligned as T may be, and nobody else knows them.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), place, values.len()) };
        place
    }

    /// So many words.
    fn take(&mut self, words: usize) -> &mut [Word] {
        if self.chunks.last().is_none_or(|chunk| chunk.len() - self.taken < words) {
            self.grow(words);
        }
        let (from, chunk) = (self.taken, self.chunks.last_mut().expect("there is one now"));
        self.taken += words;
        &mut chunk[from..from + words]
    }

    #[cold]
    fn grow(&mut self, words: usize) {
        let last = self.chunks.last().map_or(0, |chunk| chunk.len());
        let size = (2 * last).clamp(FIRST, MOST).max(words);
        self.before += last;
        self.taken = 0;
        self.chunks.push(Box::new_uninit_slice(size));
    }

    /// Words that are taken, or were too few to be.
    pub fn words(&self) -> usize {
        self.before + self.taken
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
