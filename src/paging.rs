//! Page tables of the guest: those that it boots with, and walks through whatever it has made of them since. A walk
//! follows Intel's SDM volume 3, chapter 5, for 4-level and 5-level paging; it changes nothing, not even accessed bits.

use std::ops::Range;

use crate::error::{GuestFault, Result};
use crate::memory::GuestMemory;
use crate::registers::{CR0_PG, CR4_LA57, CR4_PAE, EFER_LMA, EFER_NXE, SystemRegisters};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// In an entry above the lowest level: it maps a page, not a table.
const PAGE_SIZE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// The physical address in an entry and in CR3: bits 51 to 12.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// In an entry that maps a large page, the address starts above the PAT bit.
const PAT_OF_LARGE_PAGE: u64 = 1 << 12;

const PAGE: u64 = 0x1000;
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
const PML4_ENTRY: u64 = 512 << 30;

/// Bits of a virtual address below the level's index: the page, then nine bits a level.
const fn shift(level: u32) -> u32 {
    3 + 9 * level
}

/// Where a virtual address leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address. It need not be RAM.
    pub physical: u64,
    /// Bytes of the page: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// Whether all levels allow writes.
    pub writable: bool,
    /// Whether all levels allow ring 3.
    pub user: bool,
    /// Whether no level forbids execution.
    pub executable: bool,
    /// Bytes from the address to the end of the page.
    pub remaining: u64,
}

/// Why a virtual address leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TranslateError {
    /// An entry on the way is not present.
    #[error("not mapped")]
    NotPresent,
    /// The upper bits of the address are not copies of the highest that counts.
    #[error("not canonical")]
    NonCanonical,
    /// The entry at this guest-physical address has a reserved bit set.
    #[error("the page-table entry at {0:#x} has a reserved bit set")]
    Reserved(u64),
    /// The page-table entry at this guest-physical address is not in RAM.
    #[error("the page-table entry at {0:#x} is not in RAM")]
    OutsideRam(u64),
    /// Paging of 32-bit or PAE mode, which no Hermit kernel uses.
    #[error("paging without long mode is not supported")]
    UnsupportedMode,
}

/// The registers that say how addresses are translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagingMode {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

impl From<&SystemRegisters> for PagingMode {
    fn from(registers: &SystemRegisters) -> Self {
        Self { cr0: registers.cr0, cr3: registers.cr3, cr4: registers.cr4, efer: registers.efer }
    }
}

/// Finds the guest-physical address that a vCPU in that mode uses for `virtual_address`. Without paging it is the same.
///
/// # Errors
/// What stopped the walk.
pub fn translate(memory: &GuestMemory, mode: &PagingMode, virtual_address: u64) -> Result<Translation, TranslateError> {
    if mode.cr0 & CR0_PG == 0 {
        return Ok(translation(virtual_address, virtual_address, PAGE, WRITABLE | USER));
    }
    if mode.cr4 & CR4_PAE == 0 || mode.efer & EFER_LMA == 0 {
        return Err(TranslateError::UnsupportedMode);
    }
    let levels = if mode.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
    if !is_canonical(virtual_address, shift(levels + 1)) {
        return Err(TranslateError::NonCanonical);
    }
    let mut table = mode.cr3 & ADDRESS;
    let mut rights = WRITABLE | USER;
    for level in (1..=levels).rev() {
        let at = table + (virtual_address >> shift(level) & 0x1ff) * 8;
        let entry: u64 = memory.read_object(at).map_err(|_| TranslateError::OutsideRam(at))?;
        if entry & PRESENT == 0 {
            return Err(TranslateError::NotPresent);
        }
        let is_page = level == 1 || entry & PAGE_SIZE != 0;
        if entry & reserved_bits(mode, level, is_page) != 0 {
            return Err(TranslateError::Reserved(at));
        }
        rights = (rights & entry) | ((rights | entry) & NO_EXECUTE);
        table = entry & ADDRESS;
        if is_page {
            let size = 1 << shift(level);
            let offset = virtual_address & (size - 1);
            return Ok(translation(virtual_address, table & !(size - 1) | offset, size, rights));
        }
    }
    unreachable!("every entry of level 1 maps a page")
}

fn translation(virtual_address: u64, physical: u64, page_size: u64, rights: u64) -> Translation {
    Translation {
        physical,
        page_size,
        writable: rights & WRITABLE != 0,
        user: rights & USER != 0,
        executable: rights & NO_EXECUTE == 0,
        remaining: page_size - (virtual_address & (page_size - 1)),
    }
}

fn is_canonical(address: u64, bits: u32) -> bool {
    let unused = 64 - bits;
    (address.cast_signed() << unused >> unused).cast_unsigned() == address
}

/// The bits that must be zero in a present entry. Those above the CPU's physical address width are not known here.
fn reserved_bits(mode: &PagingMode, level: u32, is_page: bool) -> u64 {
    let execute = if mode.efer & EFER_NXE == 0 { NO_EXECUTE } else { 0 };
    let size = match (level, is_page) {
        (1, _) | (_, false) => 0,
        (2 | 3, true) => ((1 << shift(level)) - 1) & ADDRESS & !PAT_OF_LARGE_PAGE,
        _ => PAGE_SIZE,
    };
    execute | size
}

/// Fills `buffer` from guest-virtual `address`, page by page.
///
/// # Errors
/// The first byte that could not be read; those before it are in the buffer.
pub fn read_virtual(
    memory: &GuestMemory,
    mode: &PagingMode,
    address: u64,
    buffer: &mut [u8],
) -> Result<(), GuestFault> {
    for_each_piece(memory, mode, address, buffer.len(), |physical, piece| memory.read(physical, &mut buffer[piece]))
}

/// Writes `data` to guest-virtual `address`, page by page. Like a debugger it does not care whether pages are writable.
///
/// # Errors
/// The first byte that could not be written; those before it are.
pub fn write_virtual(memory: &GuestMemory, mode: &PagingMode, address: u64, data: &[u8]) -> Result<(), GuestFault> {
    for_each_piece(memory, mode, address, data.len(), |physical, piece| memory.write(physical, &data[piece]))
}

/// Calls `access` with the physical address and the part of the buffer for each piece that lies in one page and in RAM.
fn for_each_piece(
    memory: &GuestMemory,
    mode: &PagingMode,
    address: u64,
    length: usize,
    mut access: impl FnMut(u64, Range<usize>) -> Result<(), GuestFault>,
) -> Result<(), GuestFault> {
    let mut done = 0;
    while done < length {
        let at = address.wrapping_add(done as u64);
        let fault = GuestFault { address: at, length: (length - done) as u64, is_virtual: true };
        let found = translate(memory, mode, at).map_err(|_| fault)?;
        let in_ram = if memory.contains(found.physical, 1) { memory.range().end - found.physical } else { 0 };
        let piece = usize::try_from(found.remaining.min(in_ram)).unwrap_or(usize::MAX).min(length - done);
        if piece == 0 {
            return Err(fault);
        }
        access(found.physical, done..done + piece).map_err(|_| fault)?;
        done += piece;
    }
    Ok(())
}

/// How many page tables below the root [`write_boot_tables`] needs.
pub fn boot_table_count(mapped: &Range<u64>) -> u64 {
    let touched = |size: u64| mapped.end.div_ceil(size).saturating_sub(mapped.start / size);
    touched(GIB) + touched(PML4_ENTRY)
}

/// Writes 4-level page tables that map `mapped` to itself in present, writable 2 MiB pages. The root's last entry
/// points to itself: old kernels reach their tables by it, and new ones know by it to leave alone what is below them.
///
/// # Errors
/// A [`GuestFault`] if the root or a page of `pool` is not in RAM, or `pool` is too small.
pub fn write_boot_tables(
    memory: &GuestMemory,
    root: u64,
    pool: Range<u64>,
    mapped: Range<u64>,
) -> Result<(), GuestFault> {
    let clear = |table| memory.write(table, &[0; 0x1000]);
    let mut free = pool;
    let mut child = |entry: u64| {
        let found: u64 = memory.read_object(entry)?;
        if found & PRESENT != 0 {
            return Ok(found & ADDRESS);
        }
        let table = free.start;
        if table >= free.end {
            return Err(GuestFault { address: table, length: PAGE, is_virtual: false });
        }
        free.start += PAGE;
        clear(table)?;
        memory.write_object(entry, table | PRESENT | WRITABLE)?;
        Ok(table)
    };
    clear(root)?;
    memory.write_object(root + 511 * 8, root | PRESENT | WRITABLE)?;
    let mut address = mapped.start & !(LARGE_PAGE - 1);
    while address < mapped.end {
        let pointers = child(root + (address >> shift(4) & 0x1ff) * 8)?;
        let directory = child(pointers + (address >> shift(3) & 0x1ff) * 8)?;
        let end = mapped.end.min((address / GIB + 1) * GIB);
        while address < end {
            let entry = directory + (address >> shift(2) & 0x1ff) * 8;
            memory.write_object(entry, address | PRESENT | WRITABLE | PAGE_SIZE)?;
            address += LARGE_PAGE;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;

    const MODE: PagingMode = PagingMode { cr0: CR0_PG | 1, cr3: 0x1000, cr4: CR4_PAE, efer: EFER_LMA | EFER_NXE };
    const ALL: u64 = PRESENT | WRITABLE | USER;

    /// 4 MiB of RAM at 0, with tables at 0x1000 (PML4), 0x2000, 0x3000 and 0x4000 for the addresses from 0.
    fn memory(entries: &[(u64, u64)]) -> GuestMemory {
        let memory = GuestMemory::new(0, 4 << 20, Backing::default()).unwrap();
        let chain = [(0x1000, 0x2000 | ALL), (0x2000, 0x3000 | ALL), (0x3000, 0x4000 | ALL)];
        for (at, entry) in chain.iter().chain(entries) {
            memory.write_object(*at, *entry).unwrap();
        }
        memory
    }

    #[test]
    fn test_translate_small_page_gives_address_and_rights() {
        let memory = memory(&[(0x4000, 0x5000 | ALL), (0x4008, 0x6000 | PRESENT | NO_EXECUTE), (0x4010, 0x7000)]);
        let expected = Translation {
            physical: 0x5123,
            page_size: 0x1000,
            writable: true,
            user: true,
            executable: true,
            remaining: 0xedd,
        };
        assert_eq!(translate(&memory, &MODE, 0x123), Ok(expected));
        let protected = translate(&memory, &MODE, 0x1fff).unwrap();
        assert!(!protected.writable && !protected.user && !protected.executable);
        assert_eq!((protected.physical, protected.remaining), (0x6fff, 1));
        assert_eq!(translate(&memory, &MODE, 0x2000), Err(TranslateError::NotPresent));
    }

    #[test]
    fn test_translate_rights_are_those_of_all_levels() {
        let memory = memory(&[(0x4000, 0x5000 | ALL), (0x2000, 0x3000 | PRESENT | NO_EXECUTE)]);
        let found = translate(&memory, &MODE, 0).unwrap();
        assert!(!found.writable && !found.user && !found.executable);
    }

    #[test]
    fn test_translate_large_page_leaves_the_pat_bit_out_of_the_address() {
        let large = 0x20_0000 | ALL | PAGE_SIZE | PAT_OF_LARGE_PAGE;
        let huge = 0x4000_0000 | ALL | PAGE_SIZE | PAT_OF_LARGE_PAGE;
        let memory = memory(&[(0x3008, large), (0x2008, huge), (0x4000, 0x5000 | ALL | PAGE_SIZE)]);
        let found = translate(&memory, &MODE, 0x20_0000 + 0x1_2345).unwrap();
        assert_eq!((found.physical, found.page_size, found.remaining), (0x21_2345, 2 << 20, 0x1e_dcbb));
        let found = translate(&memory, &MODE, 0x4000_0000 + 0x1234_5678).unwrap();
        assert_eq!((found.physical, found.page_size, found.remaining), (0x5234_5678, 1 << 30, 0x2dcb_a988));
        // In an entry of the lowest level the same bit is PAT.
        assert_eq!(translate(&memory, &MODE, 0).unwrap().page_size, 0x1000);
    }

    #[test]
    fn test_translate_ignores_bits_that_are_no_address() {
        let memory = memory(&[(0x4000, 0x5000 | ALL | 0x7ff << 52 | 0xf60)]);
        assert_eq!(translate(&memory, &PagingMode { cr3: 0x1000 | 0xfff, ..MODE }, 0x42).unwrap().physical, 0x5042);
    }

    #[test]
    fn test_translate_reserved_bits_are_an_error() {
        let broken = [
            (0x3008, 0x20_0000 | ALL | PAGE_SIZE | 0x2000),
            (0x2008, 0x4000_0000 | ALL | PAGE_SIZE | 0x20_0000),
            (0x1008, 0x2000 | ALL | PAGE_SIZE),
        ];
        let memory = memory(&broken);
        for (address, entry) in [(0x20_0000, 0x3008), (0x4000_0000, 0x2008), (1 << 39, 0x1008)] {
            assert_eq!(translate(&memory, &MODE, address), Err(TranslateError::Reserved(entry)));
        }
        memory.write_object(0x4000, 0x5000 | ALL | NO_EXECUTE).unwrap();
        assert!(translate(&memory, &MODE, 0).is_ok());
        assert_eq!(
            translate(&memory, &PagingMode { efer: EFER_LMA, ..MODE }, 0),
            Err(TranslateError::Reserved(0x4000))
        );
    }

    #[test]
    fn test_translate_non_canonical_depends_on_the_levels() {
        let memory = memory(&[(0x4000, 0x5000 | ALL), (0x8000, 0x1000 | ALL)]);
        for address in [0x0000_8000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63] {
            assert_eq!(translate(&memory, &MODE, address), Err(TranslateError::NonCanonical));
        }
        assert_eq!(translate(&memory, &MODE, 0xffff_8000_0000_0000), Err(TranslateError::NotPresent));
        let five = PagingMode { cr4: CR4_PAE | CR4_LA57, cr3: 0x8000, ..MODE };
        assert_eq!(translate(&memory, &five, 0x123).unwrap().physical, 0x5123);
        assert_eq!(translate(&memory, &five, 0x0000_8000_0000_0000), Err(TranslateError::NotPresent));
        assert_eq!(translate(&memory, &five, 0x0100_0000_0000_0000), Err(TranslateError::NonCanonical));
    }

    #[test]
    fn test_translate_table_outside_of_ram_names_the_entry() {
        let memory = memory(&[(0x3008, 0x4000_0000 | ALL)]);
        assert_eq!(translate(&memory, &MODE, 0x20_1000), Err(TranslateError::OutsideRam(0x4000_0008)));
        let mode = PagingMode { cr3: ADDRESS, ..MODE };
        assert_eq!(translate(&memory, &mode, 0), Err(TranslateError::OutsideRam(ADDRESS)));
    }

    #[test]
    fn test_translate_without_paging_is_identity_and_without_long_mode_an_error() {
        let memory = memory(&[]);
        let found = translate(&memory, &PagingMode { cr0: 1, ..MODE }, 0x1234_5678).unwrap();
        assert_eq!((found.physical, found.remaining, found.executable), (0x1234_5678, 0x988, true));
        for mode in [PagingMode { efer: 0, ..MODE }, PagingMode { cr4: 0, efer: 0, ..MODE }] {
            assert_eq!(translate(&memory, &mode, 0), Err(TranslateError::UnsupportedMode));
        }
    }

    #[test]
    fn test_virtual_access_crosses_pages_that_are_not_neighbours() {
        let memory = memory(&[(0x4000, 0x9000 | PRESENT), (0x4008, 0x7000 | PRESENT)]);
        write_virtual(&memory, &MODE, 0xffe, b"abcd").unwrap();
        let mut low = [0; 2];
        memory.read(0x9ffe, &mut low).unwrap();
        assert_eq!(&low, b"ab");
        memory.read(0x7000, &mut low).unwrap();
        assert_eq!(&low, b"cd");
        let mut all = [0; 4];
        read_virtual(&memory, &MODE, 0xffe, &mut all).unwrap();
        assert_eq!(&all, b"abcd");
        read_virtual(&memory, &MODE, 0x5000, &mut []).unwrap();
    }

    #[test]
    fn test_virtual_access_fault_is_at_the_first_byte_that_fails() {
        let memory = memory(&[
            (0x4000, 0x9000 | ALL),
            (0x3008, ALL | PAGE_SIZE | 0x40_0000),
            (0x3010, ALL | PAGE_SIZE | 0x20_0000),
        ]);
        let fault = |address, length: usize| read_virtual(&memory, &MODE, address, &mut vec![0; length]).unwrap_err();
        assert_eq!(fault(0xff0, 0x20), GuestFault { address: 0x1000, length: 0x10, is_virtual: true });
        assert_eq!(fault(0x20_0000, 8), GuestFault { address: 0x20_0000, length: 8, is_virtual: true });
        assert_eq!(fault(1 << 50, 8).address, 1 << 50);
        assert_eq!(write_virtual(&memory, &MODE, 0x5f_fffc, &[1; 8]).unwrap_err().address, 0x60_0000);
    }

    #[test]
    fn test_virtual_access_in_a_page_that_leaves_ram_stops_at_its_end() {
        let memory = GuestMemory::new(0, (2 << 20) + 0x1000, Backing::default()).unwrap();
        for (at, entry) in [(0x1000, 0x2000 | ALL), (0x2000, 0x3000 | ALL), (0x3008, 0x20_0000 | ALL | PAGE_SIZE)] {
            memory.write_object(at, entry).unwrap();
        }
        write_virtual(&memory, &MODE, 0x20_0ff8, &[7; 8]).unwrap();
        let fault = write_virtual(&memory, &MODE, 0x20_0ffc, &[9; 8]).unwrap_err();
        assert_eq!((fault.address, fault.length), (0x20_1000, 4));
        assert_eq!(memory.read_object::<u32>(0x20_0ffc).unwrap(), 0x0909_0909);
    }

    #[test]
    fn test_boot_tables_map_exactly_the_range_and_themselves() {
        let start = (512 << 30) - (1 << 30) - (4 << 20);
        let memory = GuestMemory::new(start, 16 << 20, Backing::default()).unwrap();
        let (root, mapped) = (start + 0x1_0000, start..(512 << 30) + (2 << 20));
        let pool = root + 0x1000..root + 0x1000 * (1 + boot_table_count(&mapped));
        assert_eq!(boot_table_count(&mapped), 5);
        write_boot_tables(&memory, root, pool.clone(), mapped.clone()).unwrap();
        let mode = PagingMode { cr3: root, ..MODE };
        for address in [start, start + (4 << 20), (512 << 30) - 1, 512 << 30, mapped.end - 1] {
            let found = translate(&memory, &mode, address).unwrap();
            assert!(found.physical == address && found.page_size == 2 << 20 && found.writable && !found.user);
        }
        for address in [start - 1, mapped.end, 0] {
            assert_eq!(translate(&memory, &mode, address), Err(TranslateError::NotPresent));
        }
        assert_eq!(translate(&memory, &mode, 0xffff_ffff_ffff_f000).unwrap().physical, root);
        let small = pool.start..pool.end - 0x1000;
        assert_eq!(write_boot_tables(&memory, root, small.clone(), mapped).unwrap_err().address, small.end);
    }

    #[test]
    fn test_boot_tables_replace_what_was_there() {
        let memory = GuestMemory::new(0, 4 << 20, Backing::default()).unwrap();
        memory.write(0x1_0000, &[0xff; 0x5000]).unwrap();
        write_boot_tables(&memory, 0x1_0000, 0x1_1000..0x1_5000, 0..2 << 20).unwrap();
        let mode = PagingMode { cr3: 0x1_0000, ..MODE };
        assert!(translate(&memory, &mode, 0x1f_ffff).is_ok());
        for address in [2 << 20, 1 << 30, 1 << 39] {
            assert_eq!(translate(&memory, &mode, address), Err(TranslateError::NotPresent));
        }
    }
}
