//! Memory and devices as the slow executor's instructions see them: through the TLB or a walk, byte-exact across pages,
//! atomic where the bus is locked, and with devices behind what is not RAM.
//!
//! An instruction that reads a device which only the VMM can answer is given up and executed again when the answer is
//! there; what it has read before stands in [`State::answers`](super::State::answers). Writes to devices wait in
//! [`Devices::writes`] until the instruction has retired, so that they happen once.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::SeqCst};

use super::mmu::{Mmu, PAGE, Watched};
use super::platform::{Platform, Reply};
use super::state::{DeviceAccess, DeviceAccesses};
use super::{Bus, BusError, MAX_LENGTH};

/// The most bytes that one device access has.
const DEVICE_WIDTH: usize = 8;

/// The device accesses of the instruction that is being executed.
#[derive(Debug, Default)]
pub(super) struct Devices {
    /// How many of the answers it has used.
    pub answered: usize,
    /// What it has written.
    pub writes: DeviceAccesses,
    /// The read that it waits for.
    pub blocked: Option<DeviceAccess>,
    /// The platform wants control when it is done.
    pub leave: bool,
}

/// What is behind memory.
pub(super) struct Outside<'a> {
    pub platform: &'a mut dyn Platform,
    pub devices: &'a mut Devices,
    pub answers: &'a mut DeviceAccesses,
    pub now: u64,
}

/// One instruction's view of memory.
pub(super) struct CoreBus<'a> {
    pub mmu: &'a mut Mmu,
    /// Devices, and permission to touch what is watched or traced; without it such an access is refused as
    /// [`BusError::NotRam`], and the caller executes the instruction again with it.
    pub outside: Option<Outside<'a>>,
    pub random: &'a mut u64,
    /// Accesses are logged here for hooks.
    pub trace: Option<&'a mut Vec<Watched>>,
    /// #AC is enabled.
    pub checks_alignment: bool,
    /// See [`Bus::one_iteration`].
    pub one_iteration: bool,
}

/// Bytes of an access from `address` up to the end of its page.
fn first_piece(address: u64, length: usize) -> usize {
    length.min(usize::try_from(PAGE - address % PAGE).expect("at most a page"))
}

impl CoreBus<'_> {
    /// The pieces of an access in up to two pages, translated: physical address and length of each.
    fn translate(&mut self, address: u64, length: usize, is_write: bool) -> Result<[(u64, usize); 2], BusError> {
        if self.checks_alignment && length <= 8 && !address.is_multiple_of(length as u64) {
            return Err(BusError::Unaligned);
        }
        self.watch(address, length, is_write)?;
        let first = first_piece(address, length);
        let physical = self.page(address, is_write)?;
        if first == length {
            return Ok([(physical, length), (0, 0)]);
        }
        let second = self.page(address.wrapping_add(first as u64), is_write)?;
        Ok([(physical, first), (second, length - first)])
    }

    fn page(&mut self, address: u64, is_write: bool) -> Result<u64, BusError> {
        self.mmu.translate(address, is_write).map_err(|error_code| BusError::PageFault { address, error_code })
    }

    /// Notes an access that is watched or traced.
    fn watch(&mut self, address: u64, length: usize, is_write: bool) -> Result<(), BusError> {
        let length = length as u64;
        if is_write
            && let Some(read) = &mut self.mmu.watched
            && (address.wrapping_sub(read.address) < read.length || read.address.wrapping_sub(address) < length)
        {
            // What was read is written: the two are one access.
            read.is_write = true;
        }
        if !self.mmu.watchpoints.is_empty()
            && let Some(index) = self.mmu.watches(address, length, is_write)
        {
            if self.outside.is_none() {
                return Err(BusError::NotRam);
            }
            self.mmu.watched.get_or_insert(Watched { index, address, length, is_write });
        }
        if let Some(trace) = &mut self.trace {
            trace.push(Watched { index: 0, address, length, is_write });
        }
        Ok(())
    }

    fn read_piece(&mut self, physical: u64, buffer: &mut [u8]) -> Result<(), BusError> {
        if let Some(host) = self.mmu.host(physical, buffer.len() as u64) {
            // SAFETY: `host` is valid for that many bytes of RAM, which nobody refers to.
            unsafe { copy_out(host, buffer) };
            return Ok(());
        }
        let outside = self.outside.as_mut().ok_or(BusError::NotRam)?;
        let mut at = physical;
        for piece in buffer.chunks_mut(DEVICE_WIDTH) {
            outside.read(at, false, piece)?;
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    fn write_piece(&mut self, physical: u64, data: &[u8]) -> Result<(), BusError> {
        if let Some(host) = self.mmu.host(physical, data.len() as u64) {
            // SAFETY: `host` is valid for that many bytes of RAM, which nobody refers to.
            unsafe { copy_in(host, data) };
            self.mmu.memory.code_lines().written(physical, data.len() as u64);
            return Ok(());
        }
        let outside = self.outside.as_mut().ok_or(BusError::NotRam)?;
        let mut at = physical;
        for piece in data.chunks(DEVICE_WIDTH) {
            if !outside.devices.writes.push(DeviceAccess::new(at, false, piece)) {
                return Err(BusError::NotRam);
            }
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Whether a write of that piece can't fail any more.
    fn can_write(&self, physical: u64, length: usize) -> bool {
        length == 0 || self.outside.is_some() || self.mmu.host(physical, length as u64).is_some()
    }
}

impl Outside<'_> {
    /// Reads a port or a memory-mapped register: from the answers that the instruction has got before, or from the
    /// platform.
    pub fn read(&mut self, address: u64, is_port: bool, data: &mut [u8]) -> Result<(), BusError> {
        if let Some(answer) = self.answers.as_slice().get(self.devices.answered)
            && (answer.address, answer.is_port, usize::from(answer.size)) == (address, is_port, data.len())
        {
            data.copy_from_slice(answer.bytes());
            self.devices.answered += 1;
            return Ok(());
        }
        let reply = if is_port {
            let port = u16::try_from(address).map_err(|_| BusError::NotRam)?;
            self.platform.port_read(port, data, self.now)
        } else {
            self.platform.mmio_read(address, data, self.now)
        };
        let access = DeviceAccess::new(address, is_port, data);
        if reply == Reply::Unknown {
            self.devices.blocked = Some(access);
            return Err(BusError::NotRam);
        }
        self.devices.leave |= reply == Reply::Leave;
        if !self.answers.push(access) {
            return Err(BusError::NotRam);
        }
        self.devices.answered += 1;
        Ok(())
    }
}

impl Bus for CoreBus<'_> {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), BusError> {
        let [(first, length), (second, _)] = self.translate(address, buffer.len(), false)?;
        let (low, high) = buffer.split_at_mut(length);
        self.read_piece(first, low)?;
        if high.is_empty() { Ok(()) } else { self.read_piece(second, high) }
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), BusError> {
        let [(first, length), (second, rest)] = self.translate(address, data.len(), true)?;
        if !self.can_write(first, length) || !self.can_write(second, rest) {
            return Err(BusError::NotRam);
        }
        let (low, high) = data.split_at(length);
        self.write_piece(first, low)?;
        if high.is_empty() { Ok(()) } else { self.write_piece(second, high) }
    }

    fn fetch(&mut self, address: u64, buffer: &mut [u8; MAX_LENGTH]) -> usize {
        fetch(self.mmu, address, buffer).unwrap_or(0)
    }

    fn one_iteration(&self) -> bool {
        self.one_iteration
    }

    fn read_tsc(&mut self) -> u64 {
        self.outside.as_mut().map_or(0, |outside| outside.platform.tsc(outside.now))
    }

    fn compare_exchange(&mut self, address: u64, size: usize, expected: u128, new: u128) -> Result<u128, BusError> {
        let [(physical, length), (_, rest)] = self.translate(address, size, true)?;
        let host = self.mmu.host(physical, size as u64).filter(|_| rest == 0 && physical.is_multiple_of(size as u64));
        let Some(host) = host else {
            if self.outside.is_none() {
                // A lent CPU's memory may be used by others at the same time.
                return Err(BusError::NotRam);
            }
            // A lock across cache lines, or on a device: one access after the other, as one thread runs all CPUs.
            let mut old = [0; 16];
            self.read(address, &mut old[..size])?;
            let old = u128::from_le_bytes(old);
            let value = if old == expected { new } else { old };
            self.write(address, &value.to_le_bytes()[..size])?;
            return Ok(old);
        };
        debug_assert_eq!(length, size);
        // SAFETY: `size` aligned bytes of RAM.
        let found = unsafe { exchange(host, size, expected, new) };
        self.mmu.memory.code_lines().written(physical, size as u64);
        Ok(found)
    }

    fn random(&mut self) -> Option<u64> {
        // SplitMix64.
        *self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Some(z ^ z >> 31)
    }
}

/// Fetches code up to the end of the mapped and executable bytes; an error is the page fault of the first byte.
pub(super) fn fetch(mmu: &mut Mmu, address: u64, buffer: &mut [u8; MAX_LENGTH]) -> Result<usize, u32> {
    let first = first_piece(address, MAX_LENGTH);
    let physical = mmu.translate_code(address)?;
    let Some(host) = mmu.host(physical, first as u64) else { return Ok(0) };
    // SAFETY: RAM of that length.
    unsafe { copy_out(host, &mut buffer[..first]) };
    if first == MAX_LENGTH {
        return Ok(first);
    }
    let Ok(next) = mmu.translate_code(address.wrapping_add(first as u64)) else { return Ok(first) };
    let Some(host) = mmu.host(next, (MAX_LENGTH - first) as u64) else { return Ok(first) };
    // SAFETY: as above.
    unsafe { copy_out(host, &mut buffer[first..]) };
    Ok(MAX_LENGTH)
}

/// Copies RAM, in whole words where that is possible, so that aligned integers don't tear.
///
/// # Safety
/// `host` is valid for `buffer.len()` bytes.
unsafe fn copy_out(host: *const u8, buffer: &mut [u8]) {
    // SAFETY: the caller's; an unaligned read of the same length.
    unsafe {
        match buffer.len() {
            8 => buffer.copy_from_slice(&host.cast::<[u8; 8]>().read_unaligned()),
            4 => buffer.copy_from_slice(&host.cast::<[u8; 4]>().read_unaligned()),
            length => std::ptr::copy_nonoverlapping(host, buffer.as_mut_ptr(), length),
        }
    }
}

/// The other way round.
///
/// # Safety
/// `host` is valid for `data.len()` bytes.
unsafe fn copy_in(host: *mut u8, data: &[u8]) {
    // SAFETY: the caller's; an unaligned write of the same length.
    unsafe {
        match *data {
            [a, b, c, d, e, f, g, h] => host.cast::<[u8; 8]>().write_unaligned([a, b, c, d, e, f, g, h]),
            [a, b, c, d] => host.cast::<[u8; 4]>().write_unaligned([a, b, c, d]),
            _ => std::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()),
        }
    }
}

/// Compares and exchanges `size` (1, 2, 4, 8 or 16) bytes; returns what was there.
///
/// # Safety
/// `host` is valid for `size` bytes and aligned to it.
#[allow(clippy::cast_possible_truncation)]
unsafe fn exchange(host: *mut u8, size: usize, expected: u128, new: u128) -> u128 {
    macro_rules! exchange {
        ($atomic:ty, $int:ty) => {{
            // SAFETY: the caller's.
            let word = unsafe { <$atomic>::from_ptr(host.cast()) };
            let result = word.compare_exchange(expected as $int, new as $int, SeqCst, SeqCst);
            u128::from(result.unwrap_or_else(|found| found))
        }};
    }
    match size {
        1 => exchange!(AtomicU8, u8),
        2 => exchange!(AtomicU16, u16),
        4 => exchange!(AtomicU32, u32),
        8 => exchange!(AtomicU64, u64),
        // SAFETY: the caller's.
        _ => unsafe { exchange_pair(host.cast(), expected, new) },
    }
}

/// # Safety
/// `host` is valid and aligned to 16 bytes.
#[allow(clippy::cast_possible_truncation)]
unsafe fn exchange_pair(host: *mut u128, expected: u128, new: u128) -> u128 {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: CMPXCHG16B, which every 64-bit processor of the last fifteen years has, on an aligned address; RBX, which
    // the compiler keeps for itself, is exchanged and given back.
    unsafe {
        std::arch::asm!(
            "xchg rbx, rsi",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            inout("rsi") new as u64 => _,
            in("rdi") host,
            inout("rax") low,
            inout("rdx") high,
            in("rcx") (new >> 64) as u64,
        );
    }
    u128::from(high) << 64 | u128::from(low)
}
