//! Guest RAM. This is the only place that holds a host pointer into it; everyone else reads and writes by
//! guest-physical address, and an address outside of RAM is an error, never a fault of the host.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, MmapRegion, ReadVolatile, VolatileMemory, VolatileMemoryError, VolatileSlice, WriteVolatile};

use crate::code_lines::CodeLines;
use crate::error::{Error, GuestFault, Result};

pub use vm_memory::ByteValued;

/// How the host backs guest RAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backing {
    /// Transparent huge pages, for guests that use much of their RAM. Without them, whatever the host's default is, a
    /// guest takes what it touches: a small one touches 2 MiB in seven places, which would be 14 MiB to clear and keep.
    pub huge_pages: bool,
    /// Let the kernel merge equal pages.
    pub merge_pages: bool,
}

/// The RAM of one VM: one range of guest-physical addresses, demand-zero. Cloning shares it.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    // Declared before `mapping`: it refers to it.
    region: Arc<MmapRegion>,
    mapping: Arc<Mapping>,
    code: Arc<OnceLock<CodeLines>>,
    start: u64,
    size: u64,
}

/// Huge pages of the host, and of the page tables that a hypervisor keeps for its guest, have this size and alignment.
const HUGE: usize = 2 << 20;

/// Anonymous memory of the host, aligned so that the kernel can back it with huge pages, and a hypervisor map them so.
#[derive(Debug)]
struct Mapping {
    address: *mut u8,
    length: usize,
}

// SAFETY: plain memory; who may access it, and how, is `GuestMemory`'s concern.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// A page on each side of RAM that nobody may touch: a bug that leaves RAM ends the process and harms nothing.
const GUARD: usize = 4096;

impl Mapping {
    fn new(length: usize) -> std::io::Result<Self> {
        let room = length.checked_add(2 * HUGE).ok_or(std::io::ErrorKind::InvalidInput)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let start: *mut u8 = start.cast();
        let before = GUARD + start.wrapping_add(GUARD).align_offset(HUGE);
        let mapping = Self { address: start.wrapping_add(before), length };
        let after = room - before - length;
        // SAFETY: what lies beyond the guards is whole pages of the mapping just made, and nobody's.
        unsafe {
            if before > GUARD {
                libc::munmap(start.cast(), before - GUARD);
            }
            if after > GUARD {
                libc::munmap(mapping.address.add(length + GUARD).cast(), after - GUARD);
            }
        }
        // SAFETY: pages of the mapping just made, which is dropped if that fails.
        match unsafe { libc::mprotect(mapping.address.cast(), length, libc::PROT_READ | libc::PROT_WRITE) } {
            0 => Ok(mapping),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    fn advise(&self, advice: libc::c_int) -> std::io::Result<()> {
        // SAFETY: the range is exactly this mapping, and no reference into it exists: all accesses are volatile copies.
        match unsafe { libc::madvise(self.address.cast(), self.length, advice) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with its guards, and whoever holds a pointer into it holds the mapping too.
        unsafe { libc::munmap(self.address.wrapping_sub(GUARD).cast(), self.length + 2 * GUARD) };
    }
}

impl GuestMemory {
    /// Maps `size` bytes of RAM at guest-physical `start`. Host pages are taken when they are touched.
    pub fn new(start: u64, size: u64, backing: Backing) -> Result<Self> {
        let length = usize::try_from(size).map_err(|_| too_big(size, std::io::ErrorKind::InvalidInput.into()))?;
        let mapping = Arc::new(Mapping::new(length).map_err(|e| too_big(size, e))?);
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: the range is the whole mapping, which lives as long as the region: `GuestMemory` holds both.
        let region = unsafe { MmapRegion::build_raw(mapping.address, length, protection, flags) }
            .map_err(|e| too_big(size, std::io::Error::other(e.to_string())))?;
        if start.checked_add(size).is_none() {
            return Err(too_big(size, std::io::ErrorKind::InvalidInput.into()));
        }
        let pages = if backing.huge_pages { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        if let Err(error) = mapping.advise(pages)
            && backing.huge_pages
        {
            log::warn!("transparent huge pages for guest RAM: {error}");
        }
        if backing.merge_pages
            && let Err(error) = mapping.advise(libc::MADV_MERGEABLE)
        {
            log::warn!("merging of equal pages for guest RAM: {error}");
        }
        Ok(Self { region: Arc::new(region), mapping, code: Arc::default(), start, size })
    }

    /// The guest-physical addresses of RAM.
    pub fn range(&self) -> Range<u64> {
        self.start..self.start + self.size
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where RAM lies in the host, for a back end that maps it into a guest.
    pub fn host_pointer(&self) -> *mut u8 {
        self.mapping.address
    }

    /// What a software CPU has decoded of this RAM. From the first call on, every write tells it.
    pub fn code_lines(&self) -> &CodeLines {
        self.code.get_or_init(|| CodeLines::new(self.start, self.size))
    }

    /// Has decoded code forgotten that a write of `length` bytes at `address` changes.
    fn written(&self, address: u64, length: usize) {
        if let Some(code) = self.code.get() {
            code.written(address, length as u64);
        }
    }

    /// Gives the pages back to the host; RAM reads as zeros from then on. For a VM whose CPUs run no more.
    pub fn release(&self) {
        if let Err(error) = self.mapping.advise(libc::MADV_DONTNEED) {
            log::warn!("guest RAM can't be given back: {error}");
        }
    }

    /// Whether all of `length` bytes at `address` are RAM.
    pub fn contains(&self, address: u64, length: u64) -> bool {
        address >= self.start && length <= self.size && address - self.start <= self.size - length
    }

    /// The bytes of RAM there.
    #[inline]
    fn slice(&self, address: u64, length: usize) -> Result<VolatileSlice<'_, impl BitmapSlice>, GuestFault> {
        let slice = if self.contains(address, length as u64) {
            usize::try_from(address - self.start).ok().and_then(|offset| self.region.get_slice(offset, length).ok())
        } else {
            None
        };
        slice.ok_or_else(|| fault(address, length))
    }

    /// Fills `buffer` from guest-physical `address`.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), GuestFault> {
        self.slice(address, buffer.len())?.copy_to(buffer);
        Ok(())
    }

    /// Writes `data` to guest-physical `address`.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), GuestFault> {
        let slice = self.slice(address, data.len())?;
        note_write(address, data.len());
        slice.copy_from(data);
        self.written(address, data.len());
        Ok(())
    }

    /// Reads a plain struct; its address need not be aligned.
    pub fn read_object<T: ByteValued>(&self, address: u64) -> Result<T, GuestFault> {
        self.slice(address, size_of::<T>())?.read_obj(0).map_err(|_| fault(address, size_of::<T>()))
    }

    /// Writes a plain struct; its address need not be aligned.
    pub fn write_object<T: ByteValued>(&self, address: u64, value: T) -> Result<(), GuestFault> {
        let slice = self.slice(address, size_of::<T>())?;
        note_write(address, size_of::<T>());
        slice.write_obj(value, 0).map_err(|_| fault(address, size_of::<T>()))?;
        self.written(address, size_of::<T>());
        Ok(())
    }

    /// Reads up to the first NUL (which is not returned), at most `limit` bytes and never past the end of RAM.
    /// `None` if there is no NUL within these.
    pub fn read_cstring(&self, address: u64, limit: usize) -> Result<Option<Vec<u8>>, GuestFault> {
        self.slice(address, 1)?;
        let mut text = Vec::new();
        let mut chunk = [0u8; 256];
        let end = self.range().end.min(address.saturating_add(limit as u64));
        let mut at = address;
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(chunk.len());
            self.read(at, &mut chunk[..length])?;
            if let Some(nul) = chunk[..length].iter().position(|b| *b == 0) {
                text.extend_from_slice(&chunk[..nul]);
                return Ok(Some(text));
            }
            text.extend_from_slice(&chunk[..length]);
            at += length as u64;
        }
        Ok(None)
    }

    /// Atomically replaces `size` (1, 2, 4 or 8) aligned bytes that equal `expected`, and returns what was there. `None`
    /// for another size, an unaligned address, or one outside of RAM.
    #[allow(clippy::cast_possible_truncation)]
    pub fn compare_exchange(&self, address: u64, size: usize, expected: u128, new: u128) -> Option<u128> {
        use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::SeqCst};
        if !self.contains(address, size as u64)
            || !matches!(size, 1 | 2 | 4 | 8)
            || !address.is_multiple_of(size as u64)
        {
            return None;
        }
        let offset = usize::try_from(address - self.start).ok()?;
        // SAFETY: `size` bytes from there lie in the mapping, aligned; guests and other threads use them as atomics do.
        unsafe {
            let at = self.host_pointer().add(offset);
            macro_rules! exchange {
                ($atomic:ty, $int:ty) => {
                    <$atomic>::from_ptr(at.cast())
                        .compare_exchange(expected as $int, new as $int, SeqCst, SeqCst)
                        .unwrap_or_else(|found| found)
                        .into()
                };
            }
            let found = match size {
                1 => exchange!(AtomicU8, u8),
                2 => exchange!(AtomicU16, u16),
                4 => exchange!(AtomicU32, u32),
                _ => exchange!(AtomicU64, u64),
            };
            self.written(address, size);
            Some(found)
        }
    }

    /// One `read(2)` from `source` straight into RAM; returns the bytes read.
    pub fn read_from(&self, address: u64, source: &mut impl ReadVolatile, length: usize) -> std::io::Result<usize> {
        let slice = self.slice(address, length).map_err(std::io::Error::other)?;
        note_write(address, length);
        let read = slice.read_volatile_from(0, source, length).map_err(into_io)?;
        self.written(address, read);
        Ok(read)
    }

    /// One `write(2)` straight from RAM to `sink`; returns the bytes written.
    pub fn write_to(&self, address: u64, sink: &mut impl WriteVolatile, length: usize) -> std::io::Result<usize> {
        let slice = self.slice(address, length).map_err(std::io::Error::other)?;
        slice.write_volatile_to(0, sink, length).map_err(into_io)
    }
}

thread_local! {
    /// What this thread writes into guest memory, while somebody wants to know.
    static WRITES: RefCell<Option<Vec<Range<u64>>>> = const { RefCell::new(None) };
}

fn note_write(address: u64, length: usize) {
    WRITES.with_borrow_mut(|writes| {
        if let Some(writes) = writes {
            writes.push(address..address.saturating_add(length as u64));
        }
    });
}

/// Runs `f`, and tells the guest-physical ranges that it wrote on this thread (or tried to).
pub fn record_writes<T>(f: impl FnOnce() -> T) -> (T, Vec<Range<u64>>) {
    let before = WRITES.replace(Some(Vec::new()));
    let result = f();
    let writes = WRITES.replace(before);
    (result, writes.unwrap_or_default())
}

fn into_io(error: VolatileMemoryError) -> std::io::Error {
    match error {
        VolatileMemoryError::IOError(e) => e,
        other => std::io::Error::other(other.to_string()),
    }
}

fn fault(address: u64, length: usize) -> GuestFault {
    GuestFault { address, length: length as u64, is_virtual: false }
}

fn too_big(size: u64, source: std::io::Error) -> Error {
    Error::Host { what: format!("can't map {} MiB of guest RAM", size >> 20), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_access_outside_of_ram_is_a_fault_with_its_address() {
        let memory = GuestMemory::new(0x20_0000, 0x1000, Backing::default()).unwrap();
        let mut buffer = [0u8; 16];
        for address in [0, 0x1f_ffff, 0x20_0ff1, 0x20_1000, u64::MAX, u64::MAX - 8] {
            let fault = memory.read(address, &mut buffer).unwrap_err();
            assert_eq!((fault.address, fault.length, fault.is_virtual), (address, 16, false));
            assert!(memory.write(address, &buffer).is_err());
        }
        memory.write(0x20_0ff0, &[7; 16]).unwrap();
        memory.read(0x20_0ff0, &mut buffer).unwrap();
        assert_eq!(buffer, [7; 16]);
    }

    #[test]
    fn test_cstring_without_nul_ends_at_the_limit_or_the_end_of_ram() {
        let memory = GuestMemory::new(0, 0x1000, Backing::default()).unwrap();
        memory.write(0xf00, &[b'x'; 0x100]).unwrap();
        assert_eq!(memory.read_cstring(0xf00, 4096).unwrap(), None);
        assert_eq!(memory.read_cstring(0xf00, 10).unwrap(), None);
        assert_eq!(memory.read_cstring(0xeff, 10).unwrap(), Some(vec![]));
        assert!(memory.read_cstring(0x1000, 10).is_err());
        memory.write(0xf05, &[0]).unwrap();
        assert_eq!(memory.read_cstring(0xf00, 10).unwrap(), Some(b"xxxxx".to_vec()));
    }
}
