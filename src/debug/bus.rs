//! Guest memory for the instruction emulator, which tells a [`Recorder`] of accesses to what is watched.

use std::sync::Arc;

use super::breakpoints::Breakpoint;
use super::view::View;
use super::watchpoints::{Recorder, Touch};
use crate::backend::DataAccess;
use crate::memory::GuestMemory;
use crate::paging::{self, PagingMode};
use crate::x86;

/// Guest-virtual memory for the emulator, with the permissions of the guest's page tables.
pub(super) struct GuestBus<'a> {
    pub view: View<'a>,
    pub memory: &'a GuestMemory,
    pub mode: PagingMode,
    pub user: bool,
    pub watches: &'a [Arc<Breakpoint>],
    pub recorder: Recorder,
    /// Of a repeated string instruction, one iteration is executed.
    pub one_iteration: bool,
    /// Nothing is written.
    pub is_trial: bool,
}

/// Bits of a page fault's error code (Intel SDM 3A, 4.7).
const FAULT_PRESENT: u32 = 1;
const FAULT_WRITE: u32 = 2;
const FAULT_USER: u32 = 4;

impl GuestBus<'_> {
    #[inline]
    fn note(&mut self, address: u64, length: usize, write: bool) {
        if !self.watches.is_empty() {
            let (view, mode) = (self.view, self.mode);
            let read = |address, length| view.read_vec(&mode, address, length);
            self.recorder.note(self.watches, DataAccess { address, length: length as u64, write }, &read);
        }
    }

    /// What the instruction that is executed now has done to what is watched.
    pub fn touches(self) -> Vec<(Arc<Breakpoint>, Touch)> {
        let read = |address, length| self.view.read_vec(&self.mode, address, length);
        self.recorder.finish(self.watches, false, &read)
    }

    fn check(&self, address: u64, length: usize, write: bool) -> Result<(), x86::BusError> {
        let mut done = 0u64;
        while done < length as u64 {
            let at = address.wrapping_add(done);
            let code = if write { FAULT_WRITE } else { 0 } | if self.user { FAULT_USER } else { 0 };
            let page = paging::translate(self.memory, &self.mode, at)
                .map_err(|_| x86::BusError::PageFault { address: at, error_code: code })?;
            let write_protect = self.user || self.mode.cr0 & crate::registers::CR0_WP != 0;
            if (write && !page.writable && write_protect) || (self.user && !page.user) {
                return Err(x86::BusError::PageFault { address: at, error_code: code | FAULT_PRESENT });
            }
            let piece = page.remaining.min(length as u64 - done);
            if !self.memory.contains(page.physical, piece) {
                return Err(x86::BusError::NotRam);
            }
            done += piece;
        }
        Ok(())
    }
}

impl x86::Bus for GuestBus<'_> {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), x86::BusError> {
        self.check(address, buffer.len(), false)?;
        self.note(address, buffer.len(), false);
        self.view.read(&self.mode, address, buffer).map_err(|_| x86::BusError::NotRam)
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), x86::BusError> {
        self.check(address, data.len(), true)?;
        self.note(address, data.len(), true);
        if self.is_trial {
            return Ok(());
        }
        self.view.write(&self.mode, address, data).map_err(|_| x86::BusError::NotRam)
    }

    fn fetch(&mut self, address: u64, buffer: &mut [u8; 15]) -> usize {
        if self.view.read(&self.mode, address, buffer).is_ok() { buffer.len() } else { 0 }
    }

    fn compare_exchange(
        &mut self,
        address: u64,
        size: usize,
        expected: u128,
        new: u128,
    ) -> Result<u128, x86::BusError> {
        self.check(address, size, true)?;
        self.note(address, size, true);
        if self.is_trial {
            return Ok(expected);
        }
        let page = paging::translate(self.memory, &self.mode, address).map_err(|_| x86::BusError::NotRam)?;
        self.memory.compare_exchange(page.physical, size, expected, new).ok_or(x86::BusError::NotRam)
    }

    fn one_iteration(&self) -> bool {
        self.one_iteration
    }

    fn read_tsc(&mut self) -> u64 {
        // SAFETY: RDTSC has no effect but its result.
        unsafe { std::arch::x86_64::_rdtsc() }
    }
}
