//! A guest's file descriptors. Numbers go upwards from 3, are not given out twice and say nothing about the host's.
//! The table's lock is held to look a number up, never while a file is used.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use super::{OpenFile, lock};

/// More open files than this are `EMFILE`: they are descriptors of the host process too.
pub const MAX_OPEN: usize = 512;

/// The first number that isn't a standard stream.
pub const FIRST: i32 = 3;

/// The table; a slot without a file belongs to an open call that is under way.
#[derive(Debug)]
pub struct Descriptors(Mutex<Table>);

#[derive(Debug)]
struct Table {
    slots: HashMap<i32, Option<Arc<OpenFile>>>,
    next: i32,
}

impl Default for Descriptors {
    fn default() -> Self {
        Self(Mutex::new(Table { slots: HashMap::new(), next: FIRST }))
    }
}

impl Descriptors {
    /// Gives the file that `open` opens a number. `open` is not called if there is no number left.
    pub fn insert(&self, open: impl FnOnce() -> Result<OpenFile, Errno>) -> Result<i32, Errno> {
        let number = {
            let mut table = lock(&self.0);
            if table.slots.len() >= MAX_OPEN {
                return Err(Errno::EMFILE);
            }
            let number = table.next;
            table.next = number.checked_add(1).ok_or(Errno::EMFILE)?;
            table.slots.insert(number, None);
            number
        };
        let result = open();
        let mut table = lock(&self.0);
        match result {
            Ok(file) => {
                table.slots.insert(number, Some(Arc::new(file)));
                Ok(number)
            }
            Err(e) => {
                table.slots.remove(&number);
                Err(e)
            }
        }
    }

    /// The open file of that number.
    pub fn get(&self, number: i32) -> Result<Arc<OpenFile>, Errno> {
        lock(&self.0).slots.get(&number).cloned().flatten().ok_or(Errno::EBADF)
    }

    /// Closes a number; the host's descriptor is closed when the last call that uses it ends.
    pub fn close(&self, number: i32) -> Result<(), Errno> {
        let mut table = lock(&self.0);
        if !matches!(table.slots.get(&number), Some(Some(_))) {
            return Err(Errno::EBADF);
        }
        let file = table.slots.remove(&number);
        drop(table);
        drop(file);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Result<OpenFile, Errno> {
        Ok(OpenFile::bytes(Arc::from(&b"x"[..])))
    }

    #[test]
    fn test_numbers_are_not_given_out_twice_and_end_at_the_limit() {
        let table = Descriptors::default();
        assert_eq!(table.insert(file), Ok(3));
        assert_eq!(table.close(3), Ok(()));
        assert_eq!(table.close(3), Err(Errno::EBADF));
        assert_eq!(table.insert(|| Err(Errno::ENOENT)), Err(Errno::ENOENT));
        assert_eq!(table.insert(file), Ok(5));
        for _ in 1..MAX_OPEN {
            table.insert(file).unwrap();
        }
        assert_eq!(table.insert(|| unreachable!()), Err(Errno::EMFILE));
        assert!(table.get(5).is_ok());
        assert_eq!(table.get(-1).unwrap_err(), Errno::EBADF);
    }
}
