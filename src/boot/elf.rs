//! The kernel's ELF file: its header, segments, thread-local storage and entry, checked once so that everything after
//! can compute with them. `hermit_entry::elf::KernelObject` is not used for this because it panics on broken files,
//! looks at the first PT_NOTE only and knows no entry version but 4.

use std::ops::Range;

use object::LittleEndian as LE;
use object::elf::{self, FileHeader64, Machine, ProgramHeader64};
use object::pod::{Pod, slice_from_bytes};

use super::notes::Notes;
use super::relocations::{self, Relocation};
use crate::error::ImageError;

/// Kernels that span more are refused; every address computation on an accepted one is far from overflow.
const SPAN_LIMIT: u64 = 64 << 30;
/// The largest segment alignment that makes sense: the largest page.
const ALIGNMENT_LIMIT: u64 = 1 << 30;

pub(super) type Result<T, E = ImageError> = std::result::Result<T, E>;

/// A PT_LOAD segment.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    /// Linked addresses.
    pub(super) addresses: Range<u64>,
    /// Offset of the contents in the file.
    pub(super) file_start: u64,
    /// Length of the contents; the rest of the segment is zero.
    pub(super) file_size: u64,
    executable: bool,
}

/// The initial image of thread-local variables (PT_TLS).
#[derive(Debug, Clone, Copy)]
pub(super) struct ThreadLocal {
    /// Linked address of the initialised part.
    pub(super) address: u64,
    /// Bytes of the initialised part.
    pub(super) file_size: u64,
    /// Bytes for each thread.
    pub(super) memory_size: u64,
    /// A power of two.
    pub(super) alignment: u64,
}

/// A checked kernel. Addresses are those that it was linked at.
#[derive(Debug)]
pub(super) struct Elf {
    pub(super) entry: u64,
    pub(super) relocatable: bool,
    /// Ascending, disjoint, none empty, at least one.
    pub(super) segments: Vec<Segment>,
    /// From the start of the first segment to the end of the last.
    pub(super) span: Range<u64>,
    /// The difference of linked and loaded addresses must be a multiple of this power of two.
    pub(super) alignment: u64,
    pub(super) thread_local: Option<ThreadLocal>,
    pub(super) notes: Notes,
    pub(super) relocations: Vec<Relocation>,
}

impl Elf {
    /// Parses and checks a whole file.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let header = file_header(bytes)?;
        let programs = program_headers(bytes, header)?;
        let notes = Notes::find(bytes, header, programs)?;
        let segments = load_segments(bytes, programs)?;
        let (Some(first), Some(last)) = (segments.first(), segments.last()) else {
            return Err(malformed("the ELF file has no segment to load (PT_LOAD)"));
        };
        let span = first.addresses.start..last.addresses.end;
        if span.end - span.start > SPAN_LIMIT {
            return Err(malformed(format!(
                "the segments span {:#x} bytes, from {:#x} to {:#x}",
                span.end - span.start,
                span.start,
                span.end
            )));
        }
        let entry = header.e_entry.get(LE);
        if !segments.iter().any(|s| s.executable && s.addresses.contains(&entry)) {
            return Err(malformed(format!("the entry {entry:#x} lies in no executable segment")));
        }
        Ok(Self {
            entry,
            relocatable: header.e_type.get(LE) == elf::ET_DYN,
            alignment: alignment(programs)?,
            thread_local: thread_local(programs, &span)?,
            relocations: relocations::parse(bytes, programs, &segments, &span)?,
            notes,
            segments,
            span,
        })
    }
}

/// [`ImageError::Malformed`] with that text.
pub(super) fn malformed(what: impl Into<String>) -> ImageError {
    ImageError::Malformed { what: what.into() }
}

/// The bytes of a structure in the file.
pub(super) fn bytes_at<'a>(bytes: &'a [u8], what: &'static str, offset: u64, length: u64) -> Result<&'a [u8]> {
    let truncated =
        || ImageError::Truncated { what, needed: offset.saturating_add(length), available: bytes.len() as u64 };
    let start = usize::try_from(offset).map_err(|_| truncated())?;
    let length = usize::try_from(length).map_err(|_| truncated())?;
    start.checked_add(length).and_then(|end| bytes.get(start..end)).ok_or_else(truncated)
}

/// A table of `count` structures in the file.
pub(super) fn table_at<'a, T: Pod>(bytes: &'a [u8], what: &'static str, offset: u64, count: u64) -> Result<&'a [T]> {
    let table = bytes_at(bytes, what, offset, count.saturating_mul(size_of::<T>() as u64))?;
    let (table, _) = slice_from_bytes(table, table.len() / size_of::<T>())
        .map_err(|()| malformed(format!("{what} can't be read")))?;
    Ok(table)
}

fn file_header(bytes: &[u8]) -> Result<&FileHeader64<LE>> {
    if !bytes.starts_with(&elf::ELFMAG) {
        return Err(ImageError::UnknownFormat { start: bytes[..bytes.len().min(4)].to_vec() });
    }
    let header: &FileHeader64<LE> = &table_at(bytes, "the ELF header", 0, 1)?[0];
    let expect = |good: bool, what, found: String, expected| match good {
        true => Ok(()),
        false => Err(ImageError::WrongTarget { what, found, expected }),
    };
    let ident = &header.e_ident;
    expect(ident.class == elf::ELFCLASS64, "the ELF class", class_name(ident.class.0), "64-bit (2)")?;
    expect(ident.data == elf::ELFDATA2LSB, "the byte order", order_name(ident.data.0), "little endian (1)")?;
    let machine = header.e_machine.get(LE);
    expect(machine == elf::EM_X86_64, "the machine", machine_name(machine), "x86-64 (62)")?;
    let kind = header.e_type.get(LE);
    let is_program = kind == elf::ET_DYN || kind == elf::ET_EXEC;
    expect(is_program, "the ELF type", type_name(kind.0), "an executable, ET_EXEC (2) or ET_DYN (3)")?;
    if ident.os_abi != elf::ELFOSABI_STANDALONE {
        log::warn!("the OS ABI of the image is {}, not 255 (standalone) as Hermit's", ident.os_abi.0);
    }
    Ok(header)
}

fn class_name(class: u8) -> String {
    if class == 1 { "32-bit (1)".into() } else { format!("unknown ({class})") }
}

fn order_name(order: u8) -> String {
    if order == 2 { "big endian (2)".into() } else { format!("unknown ({order})") }
}

fn machine_name(machine: Machine) -> String {
    let name = match machine {
        elf::EM_386 => "i386",
        elf::EM_ARM => "ARM",
        elf::EM_AARCH64 => "AArch64",
        elf::EM_RISCV => "RISC-V",
        elf::EM_PPC64 => "PowerPC 64",
        elf::EM_S390 => "S/390",
        elf::EM_LOONGARCH => "LoongArch",
        _ => "unknown",
    };
    format!("{name} ({})", machine.0)
}

fn type_name(kind: u16) -> String {
    let name = match kind {
        1 => "a relocatable object, ET_REL",
        4 => "a core dump, ET_CORE",
        _ => "unknown",
    };
    format!("{name} ({kind})")
}

fn program_headers<'a>(bytes: &'a [u8], header: &FileHeader64<LE>) -> Result<&'a [ProgramHeader64<LE>]> {
    let (count, size) = (header.e_phnum.get(LE), usize::from(header.e_phentsize.get(LE)));
    if count > 0 && size != size_of::<ProgramHeader64<LE>>() {
        return Err(malformed(format!(
            "the program headers have {size} bytes each, not {}",
            size_of::<ProgramHeader64<LE>>()
        )));
    }
    table_at(bytes, "the table of program headers", header.e_phoff.get(LE), u64::from(count))
}

/// The headers of one type.
pub(super) fn of_type(
    programs: &[ProgramHeader64<LE>],
    kind: elf::ProgramType,
) -> impl Iterator<Item = &ProgramHeader64<LE>> {
    programs.iter().filter(move |program| program.p_type.get(LE) == kind)
}

fn load_segments(bytes: &[u8], programs: &[ProgramHeader64<LE>]) -> Result<Vec<Segment>> {
    let mut segments = Vec::new();
    for program in of_type(programs, elf::PT_LOAD).filter(|program| program.p_memsz.get(LE) > 0) {
        segments.push(load_segment(bytes, program)?);
    }
    segments.sort_by_key(|segment| segment.addresses.start);
    for pair in segments.windows(2) {
        if pair[0].addresses.end > pair[1].addresses.start {
            return Err(malformed(format!(
                "the segments {:#x?} and {:#x?} overlap",
                pair[0].addresses, pair[1].addresses
            )));
        }
    }
    Ok(segments)
}

fn load_segment(bytes: &[u8], program: &ProgramHeader64<LE>) -> Result<Segment> {
    let (address, size) = (program.p_vaddr.get(LE), program.p_memsz.get(LE));
    let (file_start, file_size) = (program.p_offset.get(LE), program.p_filesz.get(LE));
    if file_size > size {
        return Err(malformed(format!(
            "the segment at {address:#x} has {file_size:#x} bytes in the file, but {size:#x} in memory"
        )));
    }
    let end = address.checked_add(size).ok_or_else(|| {
        malformed(format!("the segment at {address:#x} with {size:#x} bytes ends past the address space"))
    })?;
    bytes_at(bytes, "a segment", file_start, file_size)?;
    let executable = program.p_flags.get(LE).contains(elf::PF_X);
    Ok(Segment { addresses: address..end, file_start, file_size, executable })
}

fn alignment(programs: &[ProgramHeader64<LE>]) -> Result<u64> {
    let mut largest = 0x1000;
    for program in of_type(programs, elf::PT_LOAD) {
        let alignment = program.p_align.get(LE).max(1);
        if !alignment.is_power_of_two() || alignment > ALIGNMENT_LIMIT {
            let address = program.p_vaddr.get(LE);
            return Err(malformed(format!(
                "the segment at {address:#x} has alignment {alignment:#x}, not a power of two up to 1 GiB"
            )));
        }
        largest = largest.max(alignment);
    }
    Ok(largest)
}

fn thread_local(programs: &[ProgramHeader64<LE>], span: &Range<u64>) -> Result<Option<ThreadLocal>> {
    let mut all = of_type(programs, elf::PT_TLS);
    let Some(program) = all.next() else { return Ok(None) };
    if all.next().is_some() {
        return Err(malformed("the ELF file has several thread-local storage segments (PT_TLS)"));
    }
    let (address, file_size) = (program.p_vaddr.get(LE), program.p_filesz.get(LE));
    let (memory_size, alignment) = (program.p_memsz.get(LE), program.p_align.get(LE).max(1));
    if file_size > memory_size {
        return Err(malformed(format!(
            "thread-local storage has {file_size:#x} bytes in the file, but {memory_size:#x} in memory"
        )));
    }
    if !alignment.is_power_of_two() || alignment > ALIGNMENT_LIMIT {
        return Err(malformed(format!(
            "thread-local storage has alignment {alignment:#x}, not a power of two up to 1 GiB"
        )));
    }
    let end = address.checked_add(file_size);
    if address < span.start || end.is_none_or(|end| end > span.end) || memory_size > SPAN_LIMIT {
        return Err(malformed(format!(
            "thread-local storage at {address:#x} ({file_size:#x} bytes, {memory_size:#x} a thread) lies outside of the image"
        )));
    }
    Ok(Some(ThreadLocal { address, file_size, memory_size, alignment }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{ElfBuilder, Program, patch};

    fn error(bytes: &[u8]) -> String {
        Elf::parse(bytes).unwrap_err().to_string()
    }

    #[track_caller]
    fn assert_refused(bytes: &[u8], expected: &str) {
        let found = error(bytes);
        assert!(found.contains(expected), "{found:?} lacks {expected:?}");
    }

    #[test]
    fn test_elf_valid_gives_its_facts() {
        let elf = Elf::parse(&ElfBuilder::hermit().build()).unwrap();
        assert!(elf.relocatable);
        assert_eq!((elf.entry, elf.span, elf.alignment), (0x10, 0..0x3000, 0x1000));
        assert_eq!(elf.segments.len(), 2);
        assert!(elf.thread_local.is_none() && elf.relocations.is_empty());
    }

    #[test]
    fn test_elf_too_short_or_no_magic_is_named() {
        let bytes = ElfBuilder::hermit().build();
        assert!(matches!(Elf::parse(&[]).unwrap_err(), ImageError::UnknownFormat { start } if start.is_empty()));
        assert!(matches!(Elf::parse(b"#!/b").unwrap_err(), ImageError::UnknownFormat { start } if start == b"#!/b"));
        assert!(matches!(
            Elf::parse(&bytes[..63]).unwrap_err(),
            ImageError::Truncated { needed: 64, available: 63, .. }
        ));
    }

    #[test]
    fn test_elf_for_another_target_says_which() {
        let good = ElfBuilder::hermit().build();
        for (offset, value, expected) in [
            (4, vec![1], "the ELF class is 32-bit (1)"),
            (5, vec![2], "the byte order is big endian (2)"),
            (18, vec![183, 0], "the machine is AArch64 (183), Hermit on x86-64 needs x86-64 (62)"),
            (18, vec![3, 0], "the machine is i386 (3)"),
            (16, vec![1, 0], "ET_REL (1)"),
            (16, vec![4, 0], "ET_CORE (4)"),
        ] {
            assert_refused(&patch(&good, offset, &value), expected);
        }
    }

    #[test]
    fn test_program_headers_broken_are_refused() {
        let good = ElfBuilder::hermit().build();
        assert_refused(&patch(&good, 32, &u64::MAX.to_le_bytes()), "the table of program headers needs");
        assert_refused(&patch(&good, 32, &(good.len() as u64).to_le_bytes()), "the table of program headers needs");
        assert_refused(&patch(&good, 54, &32u16.to_le_bytes()), "32 bytes each, not 56");
        assert_refused(&patch(&good, 56, &u16::MAX.to_le_bytes()), "the table of program headers needs");
        assert_refused(&patch(&good, 56, &0u16.to_le_bytes()), "no HERMIT");
    }

    #[test]
    fn test_segments_broken_are_refused() {
        let with = |program: Program| ElfBuilder::hermit().program(program).build();
        assert_refused(&ElfBuilder::hermit().without(elf::PT_LOAD).build(), "no segment to load");
        assert_refused(
            &with(Program::load(0x9000, vec![0; 32]).memory_size(16)),
            "0x20 bytes in the file, but 0x10 in memory",
        );
        assert_refused(&with(Program::load(0x2800, vec![0; 32])), "overlap");
        assert_refused(&with(Program::load(u64::MAX - 8, vec![0; 32])), "ends past the address space");
        assert_refused(&with(Program::load(1 << 40, vec![0; 32])), "the segments span");
        assert_refused(&with(Program::load(0x9000, vec![0; 32]).alignment(0x1800)), "alignment 0x1800");
        assert_refused(&with(Program::load(0x9000, vec![0; 32]).file_offset(1 << 50)), "a segment needs");
        assert_refused(&with(Program::load(0x9000, vec![0; 32]).file_offset(u64::MAX)), "a segment needs");
    }

    #[test]
    fn test_segments_in_any_order_are_sorted() {
        let builder = ElfBuilder::hermit()
            .program(Program::load(0x9000, vec![0; 32]))
            .program(Program::load(0x5000, vec![0; 32]));
        let starts: Vec<_> = Elf::parse(&builder.build()).unwrap().segments.iter().map(|s| s.addresses.start).collect();
        assert_eq!(starts, [0, 0x1000, 0x5000, 0x9000]);
    }

    #[test]
    fn test_entry_outside_of_code_is_refused() {
        for entry in [0x1000, 0x3000, u64::MAX] {
            assert_refused(&ElfBuilder::hermit().entry(entry).build(), "lies in no executable segment");
        }
    }

    #[test]
    fn test_thread_local_storage_is_found_and_checked() {
        let with = |address, size, memory, alignment| {
            let program = Program::new(elf::PT_TLS, address, vec![0; size]).memory_size(memory).alignment(alignment);
            ElfBuilder::hermit().program(program).build()
        };
        let found = Elf::parse(&with(0x1000, 0x20, 0x81, 16)).unwrap().thread_local.unwrap();
        assert_eq!((found.address, found.file_size, found.memory_size, found.alignment), (0x1000, 0x20, 0x81, 16));
        assert_eq!(Elf::parse(&with(0x1000, 0, 0, 0)).unwrap().thread_local.unwrap().alignment, 1);
        assert_refused(&with(0x1000, 0x20, 0x10, 16), "0x20 bytes in the file, but 0x10 in memory");
        assert_refused(&with(0x1000, 0x20, 0x20, 24), "alignment 0x18");
        assert_refused(&with(0x2ff0, 0x20, 0x20, 16), "lies outside of the image");
        assert_refused(&with(u64::MAX - 1, 0x20, 0x20, 16), "lies outside of the image");
        assert_refused(&with(0x1000, 0x20, u64::MAX, 16), "lies outside of the image");
        let twice = Program::new(elf::PT_TLS, 0x1000, vec![0; 8]);
        assert_refused(&ElfBuilder::hermit().program(twice.clone()).program(twice).build(), "several thread-local");
    }
}
