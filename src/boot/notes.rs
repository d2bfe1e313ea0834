//! The ELF notes by which a Hermit image says what it expects of its loader: the version of the entry, the version of
//! the hypercall interface, and the version of Hermit. They may lie in any note segment, or, in files without one, in
//! a note section.

use hermit_entry::HermitVersion;
use object::LittleEndian as LE;
use object::elf::{self, FileHeader64, ProgramHeader64, SectionHeader64};
use object::read::elf::{Note, NoteIterator};

use super::elf::{Result, bytes_at, malformed, of_type, table_at};
use crate::error::ImageError;

/// Type of the note `HERMIT`: the entry version, one byte.
const NT_HERMIT_ENTRY_VERSION: u32 = 0x5a00;
/// Type of the note `UHYVEIF`: the interface version, a big-endian 32-bit number.
const NT_UHYVE_INTERFACE_VERSION: u32 = 0x5b00;
/// The number of Hermit in a GNU ABI tag.
const ABI_TAG_OS_HERMIT: u32 = 6;
/// Bytes of the three words that a note starts with.
const HEADER_SIZE: usize = 12;

/// What the notes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Notes {
    /// 3 or 4. The boot information of both has the same bytes.
    pub(super) entry_version: u8,
    /// 1, 2 or 3; 1 if the image doesn't say.
    pub(super) interface: u32,
    /// From the GNU ABI tag, which kernels before 0.10 don't have.
    pub(super) hermit_version: Option<HermitVersion>,
}

/// The raw values, the first of each.
#[derive(Default)]
struct Found {
    entry_version: Option<u64>,
    interface: Option<u32>,
    hermit_version: Option<HermitVersion>,
}

impl Notes {
    /// Reads and checks all notes of a file.
    pub(super) fn find(bytes: &[u8], header: &FileHeader64<LE>, programs: &[ProgramHeader64<LE>]) -> Result<Self> {
        let mut found = Found::default();
        let mut has_segment = false;
        for program in of_type(programs, elf::PT_NOTE) {
            has_segment = true;
            let notes = bytes_at(bytes, "a note segment", program.p_offset.get(LE), program.p_filesz.get(LE))?;
            found.read(notes, program.p_align.get(LE))?;
        }
        if !has_segment {
            for section in note_sections(bytes, header) {
                let notes = bytes_at(bytes, "a note section", section.sh_offset.get(LE), section.sh_size.get(LE))?;
                found.read(notes, section.sh_addralign.get(LE))?;
            }
        }
        found.check()
    }
}

/// A broken table of sections counts as none: a kernel runs without it.
fn note_sections<'a>(bytes: &'a [u8], header: &FileHeader64<LE>) -> impl Iterator<Item = &'a SectionHeader64<LE>> {
    let has_size = usize::from(header.e_shentsize.get(LE)) == size_of::<SectionHeader64<LE>>();
    let count = if has_size { u64::from(header.e_shnum.get(LE)) } else { 0 };
    let sections: &[SectionHeader64<LE>] =
        table_at(bytes, "the table of sections", header.e_shoff.get(LE), count).unwrap_or_default();
    sections.iter().filter(|section| section.sh_type.get(LE) == elf::SHT_NOTE)
}

impl Found {
    fn read(&mut self, notes: &[u8], alignment: u64) -> Result<()> {
        let alignment: usize = if alignment == 8 { 8 } else { 4 };
        let broken = |_| malformed("a note reaches past the end of its segment");
        let mut iterator = NoteIterator::<FileHeader64<LE>>::new(LE, alignment as u64, notes).map_err(broken)?;
        let mut position: usize = 0;
        // What is shorter than a header at the end of a segment is padding.
        while notes.len().saturating_sub(position) >= HEADER_SIZE {
            let Some(note) = iterator.next().map_err(broken)? else { break };
            position += (HEADER_SIZE + note.name_bytes().len()).next_multiple_of(alignment);
            position += note.desc().len().next_multiple_of(alignment);
            self.take(&note)?;
        }
        Ok(())
    }

    fn take(&mut self, note: &Note<'_, FileHeader64<LE>>) -> Result<()> {
        let desc = note.desc();
        match (note.name(), note.n_type(LE).0) {
            (b"HERMIT", NT_HERMIT_ENTRY_VERSION) => {
                let version = little_endian(desc)
                    .ok_or_else(|| malformed(format!("the HERMIT note has {} bytes", desc.len())))?;
                self.entry_version.get_or_insert(version);
            }
            (b"UHYVEIF", NT_UHYVE_INTERFACE_VERSION) => {
                let version = desc
                    .try_into()
                    .map_err(|_| malformed(format!("the UHYVEIF note has {} bytes, not 4", desc.len())))?;
                self.interface.get_or_insert(u32::from_be_bytes(version));
            }
            (b"GNU", kind) if kind == elf::NT_GNU_ABI_TAG.0 => {
                self.hermit_version = self.hermit_version.or(hermit_version(desc));
            }
            _ => {}
        }
        Ok(())
    }

    fn check(self) -> Result<Notes> {
        let entry_version = match self.entry_version {
            None => return Err(ImageError::NoHermitNote),
            Some(3) => 3,
            Some(4) => 4,
            Some(found) => {
                let advice = if found < 3 { "newer" } else { "older" };
                return Err(ImageError::EntryVersion { found, advice });
            }
        };
        let interface = self.interface.unwrap_or(1);
        if !(1..=3).contains(&interface) {
            return Err(ImageError::InterfaceVersion { found: interface });
        }
        Ok(Notes { entry_version, interface, hermit_version: self.hermit_version })
    }
}

fn little_endian(desc: &[u8]) -> Option<u64> {
    let mut value = [0; 8];
    if desc.is_empty() {
        return None;
    }
    value.get_mut(..desc.len())?.copy_from_slice(desc);
    Some(u64::from_le_bytes(value))
}

fn hermit_version(desc: &[u8]) -> Option<HermitVersion> {
    let words: [u8; 16] = desc.try_into().ok()?;
    let word = |i: usize| u32::from_le_bytes([words[i], words[i + 1], words[i + 2], words[i + 3]]);
    (word(0) == ABI_TAG_OS_HERMIT).then(|| HermitVersion::new(word(4), word(8), word(12)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::elf::Elf;
    use crate::boot::testing::{ElfBuilder, Program, note};

    fn notes(builder: ElfBuilder) -> Result<Notes> {
        Elf::parse(&builder.build()).map(|elf| elf.notes)
    }

    fn with_notes(data: Vec<u8>) -> ElfBuilder {
        ElfBuilder::hermit().without(elf::PT_NOTE).program(Program::new(elf::PT_NOTE, 0, data).alignment(4))
    }

    #[test]
    fn test_notes_absent_are_no_hermit_image() {
        let none = ElfBuilder::hermit().without(elf::PT_NOTE);
        assert!(matches!(notes(none).unwrap_err(), ImageError::NoHermitNote));
        assert!(matches!(notes(with_notes(note(b"HERMIT\0", 1, &[4]))).unwrap_err(), ImageError::NoHermitNote));
        assert!(matches!(notes(with_notes(note(b"OTHER\0", 0x5a00, &[4]))).unwrap_err(), ImageError::NoHermitNote));
    }

    #[test]
    fn test_entry_version_3_and_4_are_accepted_and_others_named() {
        for version in [3, 4] {
            assert_eq!(notes(with_notes(note(b"HERMIT\0", 0x5a00, &[version]))).unwrap().entry_version, version);
        }
        for (version, advice) in [(0, "newer"), (2, "newer"), (5, "older"), (255, "older")] {
            let error = notes(with_notes(note(b"HERMIT\0", 0x5a00, &[version]))).unwrap_err();
            assert!(
                matches!(error, ImageError::EntryVersion { found, advice: a } if found == u64::from(version) && a == advice)
            );
        }
        assert!(notes(with_notes(note(b"HERMIT\0", 0x5a00, &[]))).is_err());
        assert!(notes(with_notes(note(b"HERMIT\0", 0x5a00, &[4; 9]))).is_err());
    }

    #[test]
    fn test_interface_version_is_big_endian_and_1_if_absent() {
        assert_eq!(notes(ElfBuilder::hermit()).unwrap().interface, 1);
        let with = |desc: &[u8]| {
            let program = Program::new(elf::PT_NOTE, 0, note(b"UHYVEIF\0", 0x5b00, desc)).alignment(4);
            notes(ElfBuilder::hermit().program(program))
        };
        for version in 1..=3u8 {
            assert_eq!(with(&[0, 0, 0, version]).unwrap().interface, u32::from(version));
        }
        assert!(matches!(with(&[0, 0, 0, 0]).unwrap_err(), ImageError::InterfaceVersion { found: 0 }));
        assert!(matches!(with(&[2, 0, 0, 0]).unwrap_err(), ImageError::InterfaceVersion { found: 0x0200_0000 }));
        assert!(with(&[2]).is_err());
    }

    #[test]
    fn test_notes_in_several_segments_are_all_read() {
        let abi = [6u32, 0, 13, 2].map(u32::to_le_bytes).concat();
        let builder = with_notes(note(b"GNU\0", 1, &abi))
            .program(Program::new(elf::PT_NOTE, 0, note(b"GNU\0", 5, &[1, 2, 3, 4, 5, 6, 7, 8])).alignment(8))
            .program(Program::new(elf::PT_NOTE, 0, note(b"HERMIT\0", 0x5a00, &[4])).alignment(0));
        assert_eq!(notes(builder).unwrap().hermit_version, Some(HermitVersion::new(0, 13, 2)));
        let linux = [0u32, 3, 2, 0].map(u32::to_le_bytes).concat();
        let builder = ElfBuilder::hermit().program(Program::new(elf::PT_NOTE, 0, note(b"GNU\0", 1, &linux)));
        assert_eq!(notes(builder).unwrap().hermit_version, None);
    }

    #[test]
    fn test_notes_in_a_section_are_read_if_there_is_no_segment() {
        let builder = ElfBuilder::hermit().without(elf::PT_NOTE).note_section(note(b"HERMIT\0", 0x5a00, &[3]));
        assert_eq!(notes(builder).unwrap().entry_version, 3);
    }

    #[test]
    fn test_notes_that_are_garbage_are_refused_not_followed() {
        let header = |name: u32, desc: u32| [name, desc, 1].map(u32::to_le_bytes).concat();
        for data in [header(u32::MAX, u32::MAX), header(0, u32::MAX), header(u32::MAX, 0), header(4, 4)] {
            assert!(matches!(notes(with_notes(data)).unwrap_err(), ImageError::Malformed { .. }));
        }
        let mut padded = note(b"HERMIT\0", 0x5a00, &[4]);
        padded.extend([0; 11]);
        assert_eq!(notes(with_notes(padded)).unwrap().entry_version, 4);
        let empty_first = [header(0, 0), note(b"HERMIT\0", 0x5a00, &[4])].concat();
        assert_eq!(notes(with_notes(empty_first)).unwrap().entry_version, 4);
    }
}
