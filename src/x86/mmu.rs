//! Address translation: walks of the guest's page tables (Intel SDM volume 3, chapter 5) with all permission bits and
//! accessed and dirty updates, and the software TLB in front of them.
//!
//! A data entry answers "may an access of this size happen here, and where in the host" with one comparison: the page of
//! the access's last byte against a tag for reads or one for writes. An access that crosses a page never matches. A page
//! has no write tag while it is clean, holds decoded code, or is watched: the slow path then sees the write.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::hooks::{WatchKind, Watchpoint};
use crate::memory::GuestMemory;
use crate::registers::{CR0_PG, CR0_WP, CR4_LA57, EFER_NXE, SystemRegisters};

/// Data entries.
pub(super) const ENTRIES: usize = 1024;
/// Code entries.
const CODE_ENTRIES: usize = 64;
/// Bytes of a page.
pub(super) const PAGE: u64 = 4096;
/// The bits of an address that name its page.
pub(super) const PAGE_MASK: u64 = !(PAGE - 1);
/// A tag that no page has.
const NONE: u64 = u64::MAX;
/// Bits of a physical address.
pub(super) const PHYSICAL_BITS: u32 = 46;
/// The largest access that the fast path makes.
const BOUNCE: usize = 64;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a page fault's error code.
const FAULT_PRESENT: u32 = 1;
const FAULT_WRITE: u32 = 1 << 1;
const FAULT_USER: u32 = 1 << 2;
const FAULT_RESERVED: u32 = 1 << 3;
const FAULT_FETCH: u32 = 1 << 4;

const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const RFLAGS_AC: u64 = 1 << 18;

/// What an access does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    Execute,
}

/// A translated page in the TLB.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Entry {
    /// The page if it may be read, else [`NONE`].
    pub read: u64,
    /// The page if it may be written, else [`NONE`].
    pub write: u64,
    /// Added to a linear address it gives the host's.
    pub addend: u64,
    /// Guest-physical page.
    pub physical: u64,
}

const EMPTY: Entry = Entry { read: NONE, write: NONE, addend: 0, physical: 0 };

/// The registers that translation depends on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Mode {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// Accesses are ring 3's.
    pub is_user: bool,
    /// Supervisor accesses to user pages are allowed under SMAP.
    pub access_allowed: bool,
}

impl Mode {
    pub fn new(system: &SystemRegisters, rflags: u64) -> Self {
        Self {
            cr0: system.cr0,
            cr3: system.cr3,
            cr4: system.cr4,
            efer: system.efer,
            is_user: system.cs.selector & 3 == 3,
            access_allowed: system.cr4 & CR4_SMAP == 0 || rflags & RFLAGS_AC != 0,
        }
    }
}

/// Where a page leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// Guest-physical address of the byte asked for.
    pub physical: u64,
    /// Writes need no further check: allowed, and the page is dirty already.
    pub writable: bool,
    /// The level of the tables that it was found on: pages of 4 KiB are on the first.
    pub level: usize,
}

/// An access that a watchpoint reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Watched {
    /// Which watchpoint.
    pub index: usize,
    pub address: u64,
    pub length: u64,
    pub is_write: bool,
}

// SAFETY: the host pointer is into RAM that `memory` keeps alive; every access through it is a copy or atomic.
unsafe impl Send for Mmu {}

/// Translation and the TLB of one CPU.
#[repr(C)]
pub(super) struct Mmu {
    /// Data translations, by the low bits of the page number.
    pub data: [Entry; ENTRIES],
    /// Which of them may hold a translation, a bit for each: all of them are much to go through where few are in use.
    filled: [u64; ENTRIES / 64],
    code: [(u64, u64); CODE_ENTRIES],
    bounce: [u8; BOUNCE],
    /// Pages that code was looked up in since the generation changed.
    code_pages: Pages,
    /// Pages of 2 MiB that translations may be cached of, by [`large`].
    large_pages: Pages,
    /// The same may hold for pages of 1 GiB.
    has_huge: bool,
    host: *mut u8,
    start: u64,
    size: u64,
    /// Guest RAM.
    pub memory: GuestMemory,
    mode: Mode,
    /// Links between blocks and entries of the jump cache are valid if they have this number. It changes whenever a
    /// linear address may lead elsewhere, or code may have changed.
    pub generation: u64,
    /// What to look out for.
    pub watchpoints: Vec<Watchpoint>,
    /// The first watched access of the current instruction.
    pub watched: Option<Watched>,
    /// No translation is cached: every access goes the slow way.
    pub is_traced: bool,
}

impl Mmu {
    pub fn new(memory: &GuestMemory) -> Self {
        let _ = memory.code_lines();
        Self {
            data: [EMPTY; ENTRIES],
            filled: [0; ENTRIES / 64],
            code: [(NONE, 0); CODE_ENTRIES],
            bounce: [0; BOUNCE],
            code_pages: Pages::default(),
            large_pages: Pages::default(),
            has_huge: false,
            host: memory.host_pointer(),
            start: memory.range().start,
            size: memory.size(),
            memory: memory.clone(),
            mode: Mode::default(),
            generation: 1,
            watchpoints: Vec::new(),
            watched: None,
            is_traced: false,
        }
    }

    /// Takes note of registers and drops all translations, whatever they were.
    pub fn set_mode_anew(&mut self, mode: Mode) {
        self.mode = mode;
        self.flush();
    }

    /// Takes note of registers that may have changed, and drops what depended on others.
    pub fn set_mode(&mut self, mode: Mode) {
        if mode != self.mode {
            self.mode = mode;
            self.flush();
        }
    }

    /// Drops all translations.
    pub fn flush(&mut self) {
        self.flush_data();
        self.code = [(NONE, 0); CODE_ENTRIES];
        (self.large_pages, self.has_huge) = (Pages::default(), false);
        self.next_generation();
    }

    /// Drops the translation of one page.
    pub fn flush_page(&mut self, address: u64) {
        if self.has_huge || self.large_pages.may_have(large(address)) {
            // Which entries are of the same page is not known.
            return self.flush();
        }
        self.data[index(address)] = EMPTY;
        if self.code_pages.may_have(address) {
            self.code[code_slot(address)] = (NONE, 0);
            self.next_generation();
        }
    }

    /// Drops data translations: a page has got code, or watchpoints have changed.
    pub fn flush_data(&mut self) {
        self.for_filled(|entry| *entry = EMPTY);
        self.filled = [0; ENTRIES / 64];
    }

    /// Does something with every entry that may hold a translation.
    fn for_filled(&mut self, act: impl Fn(&mut Entry)) {
        for (entries, bits) in self.data.chunks_exact_mut(64).zip(self.filled) {
            let mut left = bits;
            while left != 0 {
                act(&mut entries[left.trailing_zeros() as usize]);
                left &= left - 1;
            }
        }
    }

    /// Drops the write tag of a physical page, which has got code.
    pub fn forbid_writes(&mut self, physical: u64) {
        let page = physical & PAGE_MASK;
        self.for_filled(|entry| {
            if entry.physical == page {
                entry.write = NONE;
            }
        });
    }

    /// Notes that a translation is about to be cached.
    fn note_size(&mut self, address: u64, found: Found) {
        match found.level {
            1 => {}
            2 => self.large_pages.add(large(address)),
            _ => self.has_huge = true,
        }
    }

    /// Makes links and the jump cache invalid.
    pub fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1).max(1);
        self.code_pages = Pages::default();
    }

    /// Where `length` bytes of RAM lie in the host.
    pub fn host(&self, physical: u64, length: u64) -> Option<*mut u8> {
        let offset = physical.checked_sub(self.start)?;
        if length > self.size || offset > self.size - length {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: the offset is inside the mapping, which `memory` keeps alive.
        Some(unsafe { self.host.add(offset) })
    }

    /// Translates for the current privilege level.
    pub fn walk(&self, address: u64, access: Access) -> Result<Found, u32> {
        self.walk_as(address, access, self.mode.is_user)
    }

    /// Translates with the rights of ring 3 or of ring 0, and sets accessed and dirty bits. The error is the page
    /// fault's error code. The address is canonical.
    pub fn walk_as(&self, address: u64, access: Access, is_user: bool) -> Result<Found, u32> {
        let mode = &self.mode;
        if mode.cr0 & CR0_PG == 0 {
            return Ok(Found { physical: address & 0xffff_ffff, writable: true, level: 1 });
        }
        let code = self.error_code(access, is_user);
        let levels = if mode.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
        let mut table = mode.cr3 & ADDRESS;
        let mut rights = WRITABLE | USER;
        let mut visited: [Option<(&AtomicU64, u64)>; 5] = [None; 5];
        for level in (1..=levels).rev() {
            let shift = 3 + 9 * level;
            let slot = self.table_entry(table + (address >> shift & 0x1ff) * 8);
            let slot = slot.ok_or(code | FAULT_PRESENT | FAULT_RESERVED)?;
            let entry = slot.load(SeqCst);
            if entry & PRESENT == 0 {
                return Err(code);
            }
            let is_page = level == 1 || entry & LARGE != 0;
            if entry & self.reserved_bits(level, is_page) != 0 {
                return Err(code | FAULT_PRESENT | FAULT_RESERVED);
            }
            rights = (rights & entry) | ((rights | entry) & NO_EXECUTE);
            visited[level - 1] = Some((slot, entry));
            table = entry & ADDRESS;
            if is_page {
                self.check(rights, access, is_user).map_err(|()| code | FAULT_PRESENT)?;
                note_access(&visited, level, access == Access::Write);
                let offset = (1u64 << shift) - 1;
                let is_dirty = access == Access::Write || entry & DIRTY != 0;
                let writable = is_dirty && self.check(rights, Access::Write, is_user).is_ok();
                return Ok(Found { physical: table & !offset | address & offset, writable, level });
            }
        }
        unreachable!("every entry of level 1 maps a page")
    }

    /// A page-table entry as what it is for other CPUs too: a word that changes under our eyes.
    fn table_entry(&self, at: u64) -> Option<&AtomicU64> {
        let host = self.host(at, 8)?;
        // SAFETY: 8 aligned bytes of RAM, alive as long as `self`; all accesses to it are atomic or plain bytes.
        Some(unsafe { AtomicU64::from_ptr(host.cast()) })
    }

    fn error_code(&self, access: Access, is_user: bool) -> u32 {
        let has_fetch_bit = self.mode.efer & EFER_NXE != 0 || self.mode.cr4 & CR4_SMEP != 0;
        let kind = match access {
            Access::Read => 0,
            Access::Write => FAULT_WRITE,
            Access::Execute if has_fetch_bit => FAULT_FETCH,
            Access::Execute => 0,
        };
        kind | if is_user { FAULT_USER } else { 0 }
    }

    fn reserved_bits(&self, level: usize, is_page: bool) -> u64 {
        let execute = if self.mode.efer & EFER_NXE == 0 { NO_EXECUTE } else { 0 };
        let beyond = ADDRESS & !((1 << PHYSICAL_BITS) - 1);
        let size = match (level, is_page) {
            (1, _) | (2 | 3, false) => 0,
            // Above the PAT bit, a large page's address begins at its size.
            (2 | 3, true) => ((1 << (3 + 9 * level)) - 1) & ADDRESS & !(1 << 12),
            _ => LARGE,
        };
        execute | beyond | size
    }

    fn check(&self, rights: u64, access: Access, is_user: bool) -> Result<(), ()> {
        let mode = &self.mode;
        let is_user_page = rights & USER != 0;
        let allowed = if is_user {
            is_user_page
        } else if access == Access::Execute {
            !is_user_page || mode.cr4 & CR4_SMEP == 0
        } else {
            !is_user_page || mode.access_allowed
        };
        let allowed = allowed
            && match access {
                Access::Read => true,
                Access::Write => rights & WRITABLE != 0 || !is_user && mode.cr0 & CR0_WP == 0,
                Access::Execute => rights & NO_EXECUTE == 0,
            };
        if allowed { Ok(()) } else { Err(()) }
    }

    /// Guest-physical address for a data access, by the TLB or a walk. The access lies in one page.
    pub fn translate(&mut self, address: u64, is_write: bool) -> Result<u64, u32> {
        let page = address & PAGE_MASK;
        let entry = &self.data[index(address)];
        if page == if is_write { entry.write } else { entry.read } {
            return Ok(entry.physical | address & !PAGE_MASK);
        }
        self.fill(address, is_write)
    }

    /// Walks, and keeps what it finds.
    fn fill(&mut self, address: u64, is_write: bool) -> Result<u64, u32> {
        let found = self.walk(address, if is_write { Access::Write } else { Access::Read })?;
        let (page, physical) = (address & PAGE_MASK, found.physical & PAGE_MASK);
        self.note_size(address, found);
        if !self.is_traced
            && let Some(host) = self.host(physical, PAGE)
        {
            let watched = |silent| self.watchpoints.iter().any(|w| w.kind != silent && touches(w, page, PAGE));
            let (reads, writes) = (watched(WatchKind::Write), watched(WatchKind::Read));
            // The write tag stands for a read too, by an instruction that does both.
            let may_write = found.writable && !self.memory.code_lines().has_code(physical) && !reads && !writes;
            let index = index(address);
            self.filled[index / 64] |= 1 << (index % 64);
            self.data[index] = Entry {
                read: if reads { NONE } else { page },
                write: if may_write { page } else { NONE },
                addend: (host as u64).wrapping_sub(page),
                physical,
            };
        }
        Ok(found.physical)
    }

    /// Guest-physical address of code.
    pub fn translate_code(&mut self, address: u64) -> Result<u64, u32> {
        let page = address & PAGE_MASK;
        let slot = code_slot(address);
        self.code_pages.add(address);
        if self.code[slot].0 != page {
            let found = self.walk(address, Access::Execute)?;
            self.note_size(address, found);
            self.code[slot] = (page, found.physical & PAGE_MASK);
        }
        Ok(self.code[slot].1 | address & !PAGE_MASK)
    }

    /// The slow half of a fast access: fills the TLB and returns where the bytes are. Null if the access has to be made
    /// by the slow executor: it faults, reaches a device, changes code, is watched, or writes across a page.
    #[cold]
    #[inline(never)]
    pub fn miss(&mut self, address: u64, size: usize, is_write: bool) -> *mut u8 {
        self.try_miss(address, size as u64, is_write).unwrap_or(std::ptr::null_mut())
    }

    /// Whether the TLB has an entry for an access.
    pub fn knows(&self, address: u64, size: usize, is_write: bool) -> bool {
        let entry = &self.data[index(address)];
        let tag = if is_write { entry.write } else { entry.read };
        address.wrapping_add(size as u64 - 1) & PAGE_MASK == tag
    }

    /// Lets the TLB have an entry for one access, to bytes at `host`; returns what stood in its place.
    pub fn lend(&mut self, address: u64, size: usize, host: *mut u8) -> Entry {
        let page = address.wrapping_add(size as u64 - 1) & PAGE_MASK;
        let lent = Entry { read: page, write: page, addend: (host as u64).wrapping_sub(address), physical: NONE };
        std::mem::replace(&mut self.data[index(address)], lent)
    }

    /// Ends that.
    pub fn take_back(&mut self, address: u64, kept: Entry) {
        self.data[index(address)] = kept;
    }

    /// Where a run of bytes within one page is in the host, if a fast access may touch all of them.
    pub fn place(&mut self, address: u64, length: usize, is_write: bool) -> Option<*mut u8> {
        let entry = &self.data[index(address)];
        let last = address.wrapping_add(length as u64 - 1);
        if last & PAGE_MASK == if is_write { entry.write } else { entry.read } {
            return Some(address.wrapping_add(entry.addend) as *mut u8);
        }
        if address & PAGE_MASK == last & PAGE_MASK { self.try_miss(address, length as u64, is_write) } else { None }
    }

    fn try_miss(&mut self, address: u64, size: u64, is_write: bool) -> Option<*mut u8> {
        let last = address.wrapping_add(size - 1);
        if !self.is_canonical(address) || !self.is_canonical(last) || self.is_traced {
            return None;
        }
        if self.watches(address, size, false).is_some() || is_write && self.watches(address, size, true).is_some() {
            return None;
        }
        if address & PAGE_MASK == last & PAGE_MASK {
            let physical = self.translate(address, is_write).ok()?;
            if is_write && self.memory.code_lines().overlaps(physical, size) {
                return None;
            }
            return self.host(physical, size);
        }
        if is_write {
            return None;
        }
        let first = PAGE - address % PAGE;
        let low = self.translate(address, false).ok()?;
        let high = self.translate(last & PAGE_MASK, false).ok()?;
        let (from, to) = (self.host(low, first)?, self.host(high, size - first)?);
        let (first, rest) = (usize::try_from(first).ok()?, usize::try_from(size - first).ok()?);
        // SAFETY: both pieces are RAM; together they are at most 64 bytes, the length of the buffer.
        unsafe {
            std::ptr::copy_nonoverlapping(from, self.bounce.as_mut_ptr(), first);
            std::ptr::copy_nonoverlapping(to, self.bounce.as_mut_ptr().add(first), rest);
        }
        Some(self.bounce.as_mut_ptr())
    }

    /// Whether the paging mode has such an address.
    pub fn is_canonical(&self, address: u64) -> bool {
        let unused = if self.mode.cr4 & CR4_LA57 != 0 { 7 } else { 16 };
        (address << unused).cast_signed() >> unused == address.cast_signed()
    }

    /// The first watchpoint that reports such an access.
    pub fn watches(&self, address: u64, length: u64, is_write: bool) -> Option<usize> {
        let silent = if is_write { WatchKind::Read } else { WatchKind::Write };
        self.watchpoints.iter().position(|w| w.kind != silent && touches(w, address, length))
    }
}

/// A set of pages that may seem to have more than were added.
#[derive(Clone, Copy, Default)]
struct Pages([u64; 8]);

impl Pages {
    fn place(address: u64) -> (usize, u64) {
        let hash = (address / PAGE).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 55;
        (usize::try_from(hash / 64).expect("below 8"), 1 << (hash % 64))
    }

    fn add(&mut self, address: u64) {
        let (word, bit) = Self::place(address);
        self.0[word] |= bit;
    }

    fn may_have(&self, address: u64) -> bool {
        let (word, bit) = Self::place(address);
        self.0[word] & bit != 0
    }
}

/// What stands in [`Pages`] for a page of 2 MiB.
fn large(address: u64) -> u64 {
    address >> 9
}

/// The code entry for an address.
fn code_slot(address: u64) -> usize {
    usize::try_from(address / PAGE % CODE_ENTRIES as u64).expect("a small number")
}

/// The data entry for an address.
fn index(address: u64) -> usize {
    usize::try_from(address / PAGE % ENTRIES as u64).expect("a small number")
}

/// Whether a watchpoint and a range of bytes share one.
fn touches(watchpoint: &Watchpoint, address: u64, length: u64) -> bool {
    let after = address.wrapping_sub(watchpoint.address) < watchpoint.length;
    after || watchpoint.address.wrapping_sub(address) < length
}

/// Sets accessed bits on the way down, and the dirty bit of the page for a write.
fn note_access(visited: &[Option<(&AtomicU64, u64)>; 5], leaf: usize, is_write: bool) {
    for (i, (slot, entry)) in visited.iter().enumerate().filter_map(|(i, v)| v.map(|v| (i, v))) {
        let wanted = if is_write && i + 1 == leaf { ACCESSED | DIRTY } else { ACCESSED };
        if entry & wanted != wanted {
            slot.fetch_or(wanted, SeqCst);
        }
    }
}
