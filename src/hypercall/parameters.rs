//! Parameter structs in guest RAM. They are read once, as bytes, and taken apart at the offsets that the interface
//! crate's types have: no reference into guest RAM exists, alignment and padding don't matter, and a guest's enum
//! discriminant is only ever an integer.

use uhyve_interface::v2::parameters::{FileAttr, GetdentResult, MkdirResult, StatResult};

use crate::error::GuestFault;
use crate::memory::GuestMemory;

/// The bytes of a struct of `N` bytes at a guest-physical address.
pub(super) struct Block<const N: usize> {
    pub address: u64,
    pub bytes: [u8; N],
}

impl<const N: usize> Block<N> {
    pub fn read(memory: &GuestMemory, address: u64) -> Result<Self, GuestFault> {
        let mut bytes = [0; N];
        memory.read(address, &mut bytes)?;
        Ok(Self { address, bytes })
    }

    /// The bytes of a field; [`field!`] takes its place from the type.
    pub fn take<const M: usize>(&self, at: usize) -> [u8; M] {
        self.bytes[at..at + M].try_into().expect("the slice has the array's length")
    }

    /// Writes a field. The whole struct was read, so it lies in RAM.
    pub fn put(&self, memory: &GuestMemory, at: usize, value: &[u8]) {
        memory.write(self.address + at as u64, value).expect("the struct around the field was read from RAM");
    }
}

/// Reads a struct of the interface: `block!(memory, address, v1::parameters::OpenParams)?`.
macro_rules! block {
    ($memory:expr, $address:expr, $struct:ty) => {
        $crate::hypercall::parameters::Block::<{ size_of::<$struct>() }>::read($memory, $address)
    };
}

/// The size of a field, for the macros' checks: the interface crate decides how wide it is.
pub(super) const fn field_size<S, F>(_: fn(&S) -> F) -> usize {
    size_of::<F>()
}

/// An integer field of a block: `field!(block, OpenParams, flags as i32)`.
macro_rules! field {
    ($block:expr, $struct:ty, $field:ident as $integer:ty) => {{
        const AT: usize = std::mem::offset_of!($struct, $field);
        const { assert!($crate::hypercall::parameters::field_size(|s: &$struct| s.$field) == size_of::<$integer>()) };
        <$integer>::from_le_bytes($block.take::<{ size_of::<$integer>() }>(AT))
    }};
}

/// Writes an integer field of a block: `answer!(block, memory, OpenParams, ret = value)`.
macro_rules! answer {
    ($block:expr, $memory:expr, $struct:ty, $field:ident = $value:expr) => {{
        const AT: usize = std::mem::offset_of!($struct, $field);
        let bytes = $value.to_le_bytes();
        assert_eq!(bytes.len(), const { $crate::hypercall::parameters::field_size(|s: &$struct| s.$field) });
        $block.put($memory, AT, &bytes)
    }};
}
pub(super) use {answer, block, field};

/// The bytes of one of the interface's result enums: `repr(C)`, so a 32-bit tag that counts the variants, then, at the
/// enum's own alignment, the variant's field.
pub(super) struct ResultBytes {
    pub tag: u32,
    pub payload_at: usize,
    pub payload: u64,
    pub payload_length: usize,
}

impl ResultBytes {
    /// A [`GetdentResult`].
    pub fn getdents(result: GetdentResult) -> Self {
        let (tag, payload, payload_length) = match result {
            GetdentResult::None => (0, 0, 0),
            GetdentResult::Success(length) => (1, length, 8),
            GetdentResult::EndOfDirectory => (2, 0, 0),
            GetdentResult::Error(errno) => (3, u64::from(errno.cast_unsigned()), 4),
        };
        Self { tag, payload_at: align_of::<GetdentResult>(), payload, payload_length }
    }

    fn unit(result: Option<Result<(), i32>>, payload_at: usize) -> Self {
        let (tag, payload, payload_length) = match result {
            None => (0, 0, 0),
            Some(Ok(())) => (1, 0, 0),
            Some(Err(errno)) => (2, u64::from(errno.cast_unsigned()), 4),
        };
        Self { tag, payload_at, payload, payload_length }
    }

    /// A [`StatResult`].
    pub fn stat(result: StatResult) -> Self {
        let result = match result {
            StatResult::None => None,
            StatResult::Success => Some(Ok(())),
            StatResult::Error(errno) => Some(Err(errno)),
        };
        Self::unit(result, align_of::<StatResult>())
    }

    /// A [`MkdirResult`].
    pub fn mkdir(result: MkdirResult) -> Self {
        let result = match result {
            MkdirResult::None => None,
            MkdirResult::Success => Some(Ok(())),
            MkdirResult::Error(errno) => Some(Err(errno)),
        };
        Self::unit(result, align_of::<MkdirResult>())
    }

    /// Writes it into the field of a block that starts at `at`.
    pub fn put<const N: usize>(&self, block: &Block<N>, memory: &GuestMemory, at: usize) {
        block.put(memory, at + self.payload_at, &self.payload.to_le_bytes()[..self.payload_length]);
        block.put(memory, at, &self.tag.to_le_bytes());
    }
}

/// The bytes of a [`FileAttr`], its padding zero.
pub(super) fn file_attr_bytes(attr: &FileAttr) -> [u8; size_of::<FileAttr>()] {
    use std::mem::offset_of;
    use uhyve_interface::v2::parameters::Timespec;
    let mut bytes = [0; size_of::<FileAttr>()];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(offset_of!(FileAttr, st_dev), &attr.st_dev.to_le_bytes());
    put(offset_of!(FileAttr, st_ino), &attr.st_ino.to_le_bytes());
    put(offset_of!(FileAttr, st_nlink), &attr.st_nlink.to_le_bytes());
    put(offset_of!(FileAttr, st_mode), &attr.st_mode.to_le_bytes());
    put(offset_of!(FileAttr, st_uid), &attr.st_uid.to_le_bytes());
    put(offset_of!(FileAttr, st_gid), &attr.st_gid.to_le_bytes());
    put(offset_of!(FileAttr, st_rdev), &attr.st_rdev.to_le_bytes());
    put(offset_of!(FileAttr, st_size), &attr.st_size.to_le_bytes());
    put(offset_of!(FileAttr, st_blksize), &attr.st_blksize.to_le_bytes());
    put(offset_of!(FileAttr, st_blocks), &attr.st_blocks.to_le_bytes());
    for (at, time) in [
        (offset_of!(FileAttr, st_atim), attr.st_atim),
        (offset_of!(FileAttr, st_mtim), attr.st_mtim),
        (offset_of!(FileAttr, st_ctim), attr.st_ctim),
    ] {
        put(at + offset_of!(Timespec, tv_sec), &time.tv_sec.to_le_bytes());
        put(at + offset_of!(Timespec, tv_nsec), &time.tv_nsec.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value that a guest sees in memory which held `None` before.
    fn as_guest<T: Copy>(result: &ResultBytes) -> T {
        let mut words = [0u64; 2];
        let mut bytes = [0u8; 16];
        bytes[..4].copy_from_slice(&result.tag.to_le_bytes());
        bytes[result.payload_at..result.payload_at + result.payload_length]
            .copy_from_slice(&result.payload.to_le_bytes()[..result.payload_length]);
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(chunk.try_into().unwrap());
        }
        assert!(size_of::<T>() <= 16);
        // SAFETY: 16 initialised, aligned bytes whose tag is one of the enum's; the field's type has no invalid bytes.
        unsafe { std::ptr::read(words.as_ptr().cast()) }
    }

    #[test]
    fn test_result_bytes_are_the_interface_crates_values() {
        let of = |r| as_guest::<GetdentResult>(&ResultBytes::getdents(r));
        assert!(matches!(of(GetdentResult::None), GetdentResult::None));
        assert!(matches!(of(GetdentResult::Success(1 << 40)), GetdentResult::Success(n) if n == 1 << 40));
        assert!(matches!(of(GetdentResult::EndOfDirectory), GetdentResult::EndOfDirectory));
        assert!(matches!(of(GetdentResult::Error(-7)), GetdentResult::Error(-7)));
        for result in [StatResult::None, StatResult::Success, StatResult::Error(9)] {
            assert_eq!(as_guest::<StatResult>(&ResultBytes::stat(result)), result);
        }
        assert!(matches!(as_guest::<MkdirResult>(&ResultBytes::mkdir(MkdirResult::Success)), MkdirResult::Success));
        assert!(matches!(as_guest::<MkdirResult>(&ResultBytes::mkdir(MkdirResult::Error(2))), MkdirResult::Error(2)));
    }
}
