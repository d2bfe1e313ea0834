//! The relocations of a position-independent kernel, reduced to what has to be written where. Hermit kernels are linked
//! statically, so that only four of the psABI's relocation types can occur.

use std::ops::Range;

use object::LittleEndian as LE;
use object::elf::{self, Dyn64, DynamicTag, ProgramHeader64, Rela64, Sym64};

use super::elf::{Result, Segment, malformed, of_type, table_at};
use crate::error::ImageError;

/// Eight bytes to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Relocation {
    /// Linked address.
    pub(super) address: u64,
    /// What to write there, before the bias.
    pub(super) value: u64,
    /// Whether the difference of loaded and linked address is to be added.
    pub(super) is_biased: bool,
}

/// Reads the tables that the dynamic segment names. Every address returned has eight bytes in `span`.
pub(super) fn parse(
    bytes: &[u8],
    programs: &[ProgramHeader64<LE>],
    segments: &[Segment],
    span: &Range<u64>,
) -> Result<Vec<Relocation>> {
    let Some(program) = of_type(programs, elf::PT_DYNAMIC).next() else { return Ok(Vec::new()) };
    let dynamic = Dynamic::read(bytes, segments, program)?;
    dynamic.check()?;
    let mut relocations = Vec::new();
    for (address, size) in [(elf::DT_RELA, elf::DT_RELASZ), (elf::DT_JMPREL, elf::DT_PLTRELSZ)] {
        for (index, entry) in dynamic.table(address, size)?.iter().enumerate() {
            let refuse = |why| {
                let (kind, offset) = (entry.r_type(LE, false).0, entry.r_offset.get(LE));
                ImageError::Relocation { index, kind, offset, why }
            };
            if let Some(relocation) = dynamic.resolve(entry).map_err(refuse)? {
                let end = relocation.address.checked_add(8);
                if relocation.address < span.start || end.is_none_or(|end| end > span.end) {
                    return Err(refuse("it lies outside of the image"));
                }
                relocations.push(relocation);
            }
        }
    }
    Ok(relocations)
}

/// The dynamic segment, and what is needed to follow its addresses.
struct Dynamic<'a> {
    bytes: &'a [u8],
    segments: &'a [Segment],
    entries: &'a [Dyn64<LE>],
}

impl<'a> Dynamic<'a> {
    fn read(bytes: &'a [u8], segments: &'a [Segment], program: &ProgramHeader64<LE>) -> Result<Self> {
        let (offset, size) = (program.p_offset.get(LE), program.p_filesz.get(LE));
        let entries: &[Dyn64<LE>] =
            table_at(bytes, "the dynamic segment", offset, size / size_of::<Dyn64<LE>>() as u64)?;
        let end = entries.iter().position(|e| e.d_tag.get(LE) == elf::DT_NULL).unwrap_or(entries.len());
        Ok(Self { bytes, segments, entries: &entries[..end] })
    }

    fn get(&self, tag: DynamicTag) -> Option<u64> {
        self.entries.iter().find(|entry| entry.d_tag.get(LE) == tag).map(|entry| entry.d_val.get(LE))
    }

    fn check(&self) -> Result<()> {
        let is_rel = |value| DynamicTag(i64::try_from(value).unwrap_or(-1)) != elf::DT_RELA;
        if self.get(elf::DT_NEEDED).is_some() {
            return Err(malformed("the image needs shared libraries (DT_NEEDED): link it statically"));
        }
        if self.get(elf::DT_REL).is_some() || self.get(elf::DT_PLTREL).is_some_and(is_rel) {
            return Err(malformed("the image has relocations without addends (DT_REL), which x86-64 doesn't use"));
        }
        if self.get(elf::DT_RELR).is_some() {
            return Err(malformed(
                "the image has packed relocations (DT_RELR): link it with `-z nopack-relative-relocs`",
            ));
        }
        for (tag, name, size) in [(elf::DT_RELAENT, "DT_RELAENT", 24), (elf::DT_SYMENT, "DT_SYMENT", 24)] {
            if let Some(found) = self.get(tag).filter(|found| *found != size) {
                return Err(malformed(format!("{name} is {found}, not {size}")));
            }
        }
        Ok(())
    }

    /// The offset in the file of `length` bytes that are loaded at `address`.
    fn file_offset(&self, address: u64, length: u64) -> Option<u64> {
        let segment = self.segments.iter().find(|segment| segment.addresses.contains(&address))?;
        let offset = address - segment.addresses.start;
        (offset <= segment.file_size && length <= segment.file_size - offset).then(|| segment.file_start + offset)
    }

    fn table(&self, address: DynamicTag, size: DynamicTag) -> Result<&'a [Rela64<LE>]> {
        let (address, size) = match (self.get(address), self.get(size)) {
            (_, None | Some(0)) => return Ok(&[]),
            (None, Some(_)) => return Err(malformed("the relocations have a size, but no address")),
            (Some(address), Some(size)) => (address, size),
        };
        let entry = size_of::<Rela64<LE>>() as u64;
        if size % entry != 0 {
            return Err(malformed(format!("the relocations have {size} bytes, no multiple of {entry}")));
        }
        let offset = self.file_offset(address, size).ok_or_else(|| {
            malformed(format!("the relocations at {address:#x} ({size:#x} bytes) are not in the file"))
        })?;
        table_at(self.bytes, "the relocations", offset, size / entry)
    }

    /// What the relocation writes; `None` if nothing.
    fn resolve(&self, entry: &Rela64<LE>) -> Result<Option<Relocation>, &'static str> {
        let address = entry.r_offset.get(LE);
        let addend = entry.r_addend.get(LE).cast_unsigned();
        let (value, is_biased) = match entry.r_type(LE, false) {
            elf::R_X86_64_NONE => return Ok(None),
            elf::R_X86_64_RELATIVE => (addend, true),
            elf::R_X86_64_64 => {
                let (value, is_biased) = self.symbol(entry.r_sym(LE, false))?;
                (value.wrapping_add(addend), is_biased)
            }
            elf::R_X86_64_GLOB_DAT | elf::R_X86_64_JUMP_SLOT => self.symbol(entry.r_sym(LE, false))?,
            _ => return Err("only RELATIVE (8), GLOB_DAT (6), JUMP_SLOT (7) and 64 (1) are supported"),
        };
        Ok(Some(Relocation { address, value, is_biased }))
    }

    /// A symbol's value, and whether it moves with the image.
    fn symbol(&self, index: u32) -> Result<(u64, bool), &'static str> {
        if index == 0 {
            return Ok((0, false));
        }
        let table = self.get(elf::DT_SYMTAB).ok_or("the image has no dynamic symbols")?;
        let size = size_of::<Sym64<LE>>() as u64;
        let outside = "its symbol lies outside of the symbol table";
        let address = table.checked_add(u64::from(index) * size).ok_or(outside)?;
        let offset = self.file_offset(address, size).ok_or(outside)?;
        let symbols: &[Sym64<LE>] = table_at(self.bytes, "a symbol", offset, 1).map_err(|_| outside)?;
        let symbol = symbols.first().ok_or(outside)?;
        match symbol.st_shndx.get(LE) {
            elf::SHN_UNDEF if symbol.st_bind() == elf::STB_WEAK => Ok((0, false)),
            elf::SHN_UNDEF => Err("its symbol is undefined"),
            _ if symbol.st_type() == elf::STT_GNU_IFUNC => Err("its symbol is an indirect function"),
            section => Ok((symbol.st_value.get(LE), section != elf::SHN_ABS)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::elf::Elf;
    use crate::boot::testing::{ElfBuilder, Program, dynamic, rela, symbol};

    /// An image with symbols at 0x8000 and relocations at 0x9000.
    fn image(relocations: &[Vec<u8>], extra: &[(i64, u64)]) -> Vec<u8> {
        let table = relocations.concat();
        let mut tags = vec![(7, 0x9000), (8, table.len() as u64), (9, 24), (6, 0x8000), (11, 24)];
        tags.extend(extra);
        let symbols =
            [symbol(0, 0, 0), symbol(0x10, 0x400, 1), symbol(0x20, 0, 0), symbol(0x10, 0, 0), symbol(0x10, 7, 0xfff1)]
                .concat();
        ElfBuilder::hermit()
            .program(Program::load(0x8000, symbols))
            .program(Program::load(0x9000, table))
            .program(Program::new(elf::PT_DYNAMIC, 0, dynamic(&tags)))
            .build()
    }

    fn relocations(bytes: &[u8]) -> Result<Vec<Relocation>> {
        Elf::parse(bytes).map(|elf| elf.relocations)
    }

    #[test]
    fn test_relocations_of_each_type_are_resolved() {
        let table = [
            rela(0x1000, 8, 0, 0x20),
            rela(0x1008, 6, 1, 99),
            rela(0x1010, 1, 1, -16),
            rela(0x1018, 1, 2, 5),
            rela(0x1020, 7, 4, 0),
            rela(0x1028, 0, 0, 0),
        ];
        let found: Vec<_> =
            relocations(&image(&table, &[])).unwrap().iter().map(|r| (r.address, r.value, r.is_biased)).collect();
        let expected = [
            (0x1000, 0x20, true),
            (0x1008, 0x400, true),
            (0x1010, 0x3f0, true),
            (0x1018, 5, false),
            (0x1020, 7, false),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn test_relocations_that_cannot_be_applied_are_named() {
        for (entry, expected) in [
            (rela(0x1000, 37, 0, 0), "only RELATIVE"),
            (rela(0x1000, 6, 3, 0), "undefined"),
            (rela(0x1000, 6, 5, 0), "outside of the symbol table"),
            (rela(0x1000, 6, u32::MAX, 0), "outside of the symbol table"),
            (rela(0x9018, 8, 0, 0), "outside of the image"),
            (rela(u64::MAX - 3, 8, 0, 0), "outside of the image"),
        ] {
            let error = relocations(&image(&[entry], &[])).unwrap_err();
            assert!(
                matches!(&error, ImageError::Relocation { index: 0, why, .. } if why.contains(expected)),
                "{error}"
            );
        }
    }

    #[test]
    fn test_dynamic_segment_with_unsupported_content_is_refused() {
        for (tag, value, expected) in [
            (1, 1, "DT_NEEDED"),
            (17, 0x9000, "DT_REL"),
            (20, 17, "DT_REL"),
            (36, 0x9000, "DT_RELR"),
            (2, 23, "no address"),
        ] {
            let error = relocations(&image(&[], &[(tag, value)])).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn test_relocation_table_outside_of_the_file_is_refused() {
        for tags in [
            vec![(7, 0x2000), (8, 24)],
            vec![(7, u64::MAX), (8, 24)],
            vec![(7, 0x1000), (8, u64::MAX - 15)],
            vec![(7, 0x1000), (8, 23)],
            vec![(7, 0x1000), (8, 24), (9, 16)],
            vec![(8, 24)],
        ] {
            let builder = ElfBuilder::hermit().program(Program::new(elf::PT_DYNAMIC, 0, dynamic(&tags)));
            assert!(matches!(relocations(&builder.build()).unwrap_err(), ImageError::Malformed { .. }), "{tags:x?}");
        }
    }
}
