//! Guest memory as a debugger sees it: by virtual address through a vCPU's page tables, or by physical address; never
//! a planted byte, and writes go beneath them.

use std::sync::RwLock;

use super::breakpoints::Table;
use crate::error::GuestFault;
use crate::memory::GuestMemory;
use crate::paging::{self, PagingMode};

/// The memory of a VM, seen through its breakpoints.
#[derive(Clone, Copy)]
pub struct View<'a> {
    memory: &'a GuestMemory,
    table: &'a RwLock<Table>,
}

impl<'a> View<'a> {
    /// A view of `memory` with the planted bytes of `table`.
    pub fn new(memory: &'a GuestMemory, table: &'a RwLock<Table>) -> Self {
        Self { memory, table }
    }

    /// Fills `buffer` from guest-physical `address`.
    pub fn read_physical(&self, address: u64, buffer: &mut [u8]) -> Result<(), GuestFault> {
        self.memory.read(address, buffer)?;
        self.table.read().unwrap_or_else(|e| e.into_inner()).hide(address, buffer);
        Ok(())
    }

    /// Writes `data` to guest-physical `address`.
    pub fn write_physical(&self, address: u64, data: &[u8]) -> Result<(), GuestFault> {
        self.table.write().unwrap_or_else(|e| e.into_inner()).write_beneath(self.memory, address, data)
    }

    /// Fills `buffer` from guest-virtual `address`, page by page.
    pub fn read(&self, mode: &PagingMode, address: u64, buffer: &mut [u8]) -> Result<(), GuestFault> {
        let length = buffer.len();
        for (at, range, physical) in self.pieces(mode, address, length) {
            let fault = GuestFault { address: at, length: (length - range.start) as u64, is_virtual: true };
            self.read_physical(physical.ok_or(fault)?, &mut buffer[range]).map_err(|_| fault)?;
        }
        Ok(())
    }

    /// `length` bytes from guest-virtual `address`; none if one of them is not mapped.
    pub fn read_vec(&self, mode: &PagingMode, address: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        if self.read(mode, address, &mut bytes).is_err() {
            bytes.clear();
        }
        bytes
    }

    /// Fills as much of `buffer` as is mapped from guest-virtual `address` on; returns how many bytes.
    pub fn read_prefix(&self, mode: &PagingMode, address: u64, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for (_, range, physical) in self.pieces(mode, address, buffer.len()) {
            let end = range.end;
            let Some(physical) = physical else { break };
            if self.read_physical(physical, &mut buffer[range]).is_err() {
                break;
            }
            done = end;
        }
        done
    }

    /// Writes `data` to guest-virtual `address`, whatever the page's write permission. Nothing is written unless all of it can be.
    pub fn write(&self, mode: &PagingMode, address: u64, data: &[u8]) -> Result<(), GuestFault> {
        let pieces: Vec<_> = self.pieces(mode, address, data.len()).collect();
        for (at, range, physical) in &pieces {
            if !physical.is_some_and(|p| self.memory.contains(p, range.len() as u64)) {
                return Err(GuestFault { address: *at, length: (data.len() - range.start) as u64, is_virtual: true });
            }
        }
        for (_, range, physical) in pieces {
            self.write_physical(physical.expect("checked above"), &data[range])?;
        }
        Ok(())
    }

    /// The pages of a virtual range: virtual address, part of the range, physical address.
    pub(super) fn pieces(
        &self,
        mode: &PagingMode,
        address: u64,
        length: usize,
    ) -> impl Iterator<Item = (u64, std::ops::Range<usize>, Option<u64>)> {
        let mut done = 0;
        let (memory, mode) = (self.memory, *mode);
        std::iter::from_fn(move || {
            if done >= length {
                return None;
            }
            let at = address.wrapping_add(done as u64);
            let found = paging::translate(memory, &mode, at).ok();
            let remaining = found.as_ref().map_or(0x1000 - (at & 0xfff), |t| t.remaining);
            let piece = usize::try_from(remaining).unwrap_or(usize::MAX).min(length - done);
            let range = done..done + piece;
            done += piece;
            Some((at, range, found.map(|t| t.physical)))
        })
    }
}
