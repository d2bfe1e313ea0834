//! Stopping at hypercalls: before one is answered, and after.

use std::collections::HashSet;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Which hypercalls stop the world.
#[derive(Default)]
pub struct Catch {
    is_on: AtomicBool,
    /// All, if `None`.
    numbers: RwLock<Option<HashSet<u64>>>,
}

impl Catch {
    /// Stops at these, by their port or address; `Some(None)` at all, `None` at none.
    pub fn set(&self, wanted: Option<Option<HashSet<u64>>>) {
        self.is_on.store(wanted.is_some(), Ordering::SeqCst);
        *self.numbers.write().unwrap_or_else(|e| e.into_inner()) = wanted.flatten();
    }

    /// Whether the hypercall with that number stops the world. Cheap while none does.
    #[inline]
    pub fn wants(&self, number: u64) -> bool {
        self.is_on.load(Ordering::Relaxed) && self.is_chosen(number)
    }

    #[cold]
    fn is_chosen(&self, number: u64) -> bool {
        self.numbers.read().unwrap_or_else(|e| e.into_inner()).as_ref().is_none_or(|n| n.contains(&number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_catch_of_all_of_some_and_of_none() {
        let catch = Catch::default();
        assert!(!catch.wants(0x540));
        catch.set(Some(None));
        assert!(catch.wants(0x540));
        catch.set(Some(Some(HashSet::from([0x400]))));
        assert!(catch.wants(0x400) && !catch.wants(0x540));
        catch.set(None);
        assert!(!catch.wants(0x400));
    }
}
