//! Which parts of guest RAM hold code that a software CPU has decoded: a bit for each line of 64 bytes, and a version
//! for each page. Whoever writes to RAM (a guest's store, a device, a debugger) looks here, and raises the version of a
//! page whose code it has changed; a CPU that finds its blocks older than their page's version drops them.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Bytes that one bit stands for.
const LINE: u64 = 64;

/// The code in one range of RAM.
#[derive(Debug)]
pub struct CodeLines {
    start: u64,
    pages: Box<[Page]>,
    generation: AtomicU64,
}

#[derive(Debug, Default)]
struct Page {
    lines: AtomicU64,
    version: AtomicU32,
}

/// Pages without code, in memory that takes no room before it is used: most of RAM never holds code.
fn zeroed(count: usize) -> Box<[Page]> {
    let layout = std::alloc::Layout::array::<Page>(count).expect("far less than the RAM that it is about");
    if layout.size() == 0 {
        return Box::default();
    }
    // SAFETY: the layout is not empty.
    let first = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<Page>();
    if first.is_null() {
        std::alloc::handle_alloc_error(layout);
    }
    // SAFETY: allocated for so many pages, and zeros are what a page without code is made of.
    unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(first, count)) }
}

/// The bits of the lines that bytes `from` to `to` of a page (inclusive) lie in.
fn mask(from: u64, to: u64) -> u64 {
    let (first, last) = (from / LINE, to / LINE);
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

impl CodeLines {
    /// For `size` bytes at guest-physical `start`; no code yet.
    pub fn new(start: u64, size: u64) -> Self {
        let first = start / PAGE;
        let count = (start + size).div_ceil(PAGE) - first;
        let count = usize::try_from(count).expect("RAM is mapped, so its pages are countable");
        Self { start: first, pages: zeroed(count), generation: AtomicU64::new(0) }
    }

    fn page(&self, address: u64) -> Option<&Page> {
        let index = (address / PAGE).checked_sub(self.start)?;
        self.pages.get(usize::try_from(index).ok()?)
    }

    /// Rises with every change of code.
    pub fn generation(&self) -> u64 {
        self.generation.load(Relaxed)
    }

    /// The version of the page that `address` lies in; 0 outside of RAM.
    pub fn version(&self, address: u64) -> u32 {
        self.page(address).map_or(0, |page| page.version.load(Relaxed))
    }

    /// Whether the page that `address` lies in has code.
    pub fn has_code(&self, address: u64) -> bool {
        self.page(address).is_some_and(|page| page.lines.load(Relaxed) != 0)
    }

    /// Notes that `length` bytes (at least 1) at `address`, all in one page, hold code. True if the page had none.
    pub fn add(&self, address: u64, length: u64) -> bool {
        let Some(page) = self.page(address) else { return false };
        let from = address % PAGE;
        let bits = mask(from, (from + length - 1).min(PAGE - 1));
        // Most lines of code hold more than one block. To look is cheaper than to change.
        if page.lines.load(Relaxed) & bits == bits {
            return false;
        }
        let before = page.lines.fetch_or(bits, Relaxed);
        if before == 0 {
            self.generation.fetch_add(1, Relaxed);
        }
        before == 0
    }

    /// Whether `length` bytes at `address`, all in one page, touch a line with code.
    pub fn overlaps(&self, address: u64, length: u64) -> bool {
        let from = address % PAGE;
        let bits = mask(from, (from + length.max(1) - 1).min(PAGE - 1));
        self.page(address).is_some_and(|page| page.lines.load(Relaxed) & bits != 0)
    }

    /// Notes that `length` bytes at `address` were written; true if that changed code.
    pub fn written(&self, address: u64, length: u64) -> bool {
        let (mut at, end) = (address, address.saturating_add(length));
        let mut any = false;
        while at < end {
            let next = end.min((at | (PAGE - 1)).saturating_add(1));
            if self.overlaps(at, next - at)
                && let Some(page) = self.page(at)
            {
                page.lines.store(0, Relaxed);
                page.version.fetch_add(1, Relaxed);
                self.generation.fetch_add(1, Relaxed);
                any = true;
            }
            at = next;
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_write_to_a_line_of_code_raises_its_page_s_version_only() {
        let lines = CodeLines::new(0x1_0000, 0x4000);
        assert!(lines.add(0x1_1fc0, 0x40));
        assert!(!lines.written(0x1_1000, 0xfc0) && !lines.written(0x1_2000, 0x1000));
        assert_eq!(lines.version(0x1_1000), 0);
        assert!(lines.written(0x1_0000, 0x4000));
        assert_eq!((lines.version(0x1_1000), lines.version(0x1_2000)), (1, 0));
        assert!(!lines.has_code(0x1_1fc0) && !lines.written(0x1_1fc0, 1));
    }

    #[test]
    fn test_addresses_outside_of_ram_have_no_code() {
        let lines = CodeLines::new(0x1_0000, 0x1000);
        assert!(!lines.add(0xffff, 1) && !lines.add(u64::MAX, 1) && !lines.written(u64::MAX - 1, 8));
        assert!(!lines.written(0, 0x10_0000));
    }
}
