//! Small ELF images and archives for the tests of this room.

use object::elf::{self, ProgramType};

/// A program header and its contents.
#[derive(Clone)]
pub(crate) struct Program {
    kind: ProgramType,
    flags: u32,
    address: u64,
    data: Vec<u8>,
    memory_size: u64,
    alignment: u64,
    file_offset: Option<u64>,
}

impl Program {
    pub(crate) fn new(kind: ProgramType, address: u64, data: Vec<u8>) -> Self {
        let memory_size = data.len() as u64;
        Self { kind, flags: 6, address, data, memory_size, alignment: 8, file_offset: None }
    }

    pub(crate) fn load(address: u64, data: Vec<u8>) -> Self {
        Self::new(elf::PT_LOAD, address, data).alignment(0x1000)
    }

    pub(crate) fn executable(mut self) -> Self {
        self.flags = 5;
        self
    }

    pub(crate) fn memory_size(mut self, size: u64) -> Self {
        self.memory_size = size;
        self
    }

    pub(crate) fn alignment(mut self, alignment: u64) -> Self {
        self.alignment = alignment;
        self
    }

    pub(crate) fn file_offset(mut self, offset: u64) -> Self {
        self.file_offset = Some(offset);
        self
    }
}

/// Builds an ELF file from program headers.
pub(crate) struct ElfBuilder {
    kind: u16,
    entry: u64,
    programs: Vec<Program>,
    note_section: Option<Vec<u8>>,
}

impl ElfBuilder {
    /// A PIE with code at 0, data and BSS at 0x1000–0x3000, and a HERMIT note of version 4.
    pub(crate) fn hermit() -> Self {
        Self::linked_at(3, 0)
    }

    /// The same, with another ELF type, moved to `base`.
    pub(crate) fn linked_at(kind: u16, base: u64) -> Self {
        let programs = vec![
            Program::load(base, vec![0x90; 0x100]).executable(),
            Program::load(base + 0x1000, vec![0xdd; 0x80]).memory_size(0x2000),
            Program::new(elf::PT_NOTE, 0, note(b"HERMIT\0", 0x5a00, &[4])).alignment(4),
        ];
        Self { kind, entry: base + 0x10, programs, note_section: None }
    }

    pub(crate) fn interface(self, version: u8) -> Self {
        self.program(Program::new(elf::PT_NOTE, 0, note(b"UHYVEIF\0", 0x5b00, &[0, 0, 0, version])).alignment(4))
    }

    pub(crate) fn abi_tag(self) -> Self {
        let desc = [6u32, 0, 13, 2].map(u32::to_le_bytes).concat();
        self.program(Program::new(elf::PT_NOTE, 0, note(b"GNU\0", 1, &desc)).alignment(4))
    }

    pub(crate) fn entry(mut self, entry: u64) -> Self {
        self.entry = entry;
        self
    }

    pub(crate) fn program(mut self, program: Program) -> Self {
        self.programs.push(program);
        self
    }

    pub(crate) fn without(mut self, kind: ProgramType) -> Self {
        self.programs.retain(|program| program.kind != kind);
        self
    }

    pub(crate) fn note_section(mut self, data: Vec<u8>) -> Self {
        self.note_section = Some(data);
        self
    }

    pub(crate) fn build(&self) -> Vec<u8> {
        let mut data: Vec<u8> = Vec::new();
        let start = 64 + 56 * self.programs.len() as u64;
        let mut headers = Vec::new();
        for program in &self.programs {
            let offset = program.file_offset.unwrap_or(start + data.len() as u64);
            headers.extend(program.kind.0.to_le_bytes());
            headers.extend(program.flags.to_le_bytes());
            let sizes = [program.data.len() as u64, program.memory_size, program.alignment];
            headers.extend([offset, program.address, program.address].map(u64::to_le_bytes).concat());
            headers.extend(sizes.map(u64::to_le_bytes).concat());
            data.extend(&program.data);
            data.resize(data.len().next_multiple_of(16), 0);
        }
        let mut sections = (0, 0);
        if let Some(note) = &self.note_section {
            let at = start + data.len() as u64;
            data.extend(note);
            data.resize(data.len().next_multiple_of(16), 0);
            sections = (start + data.len() as u64, 1);
            data.extend([0u32, 7].map(u32::to_le_bytes).concat());
            data.extend([0, 0, at, note.len() as u64, 0, 4, 0].map(u64::to_le_bytes).concat());
        }
        [self.header(sections), headers, data].concat()
    }

    fn header(&self, (section_table, sections): (u64, u16)) -> Vec<u8> {
        let mut header = b"\x7fELF\x02\x01\x01\xff\0\0\0\0\0\0\0\0".to_vec();
        header.extend([self.kind, 62].map(u16::to_le_bytes).concat());
        header.extend(1u32.to_le_bytes());
        header.extend([self.entry, 64, section_table].map(u64::to_le_bytes).concat());
        header.extend(0u32.to_le_bytes());
        let programs = u16::try_from(self.programs.len()).unwrap();
        header.extend([64, 56, programs, 64, sections, 0].map(u16::to_le_bytes).concat());
        header
    }
}

/// A note with padding.
pub(crate) fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let sizes = [name.len(), desc.len()].map(|n| u32::try_from(n).unwrap());
    let mut note = [sizes[0], sizes[1], kind].map(u32::to_le_bytes).concat();
    for part in [name, desc] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// A dynamic segment, with its end mark.
pub(crate) fn dynamic(tags: &[(i64, u64)]) -> Vec<u8> {
    let entry = |(tag, value): &(i64, u64)| [tag.to_le_bytes(), value.to_le_bytes()].concat();
    tags.iter().chain([&(0, 0)]).flat_map(entry).collect()
}

/// A relocation with addend.
pub(crate) fn rela(offset: u64, kind: u32, symbol: u32, addend: i64) -> Vec<u8> {
    [offset, u64::from(symbol) << 32 | u64::from(kind), addend.cast_unsigned()].map(u64::to_le_bytes).concat()
}

/// A dynamic symbol.
pub(crate) fn symbol(info: u8, value: u64, section: u16) -> Vec<u8> {
    let mut symbol = vec![0, 0, 0, 0, info, 0];
    symbol.extend(section.to_le_bytes());
    symbol.extend([value, 0].map(u64::to_le_bytes).concat());
    symbol
}

/// A copy of `bytes` with some replaced.
pub(crate) fn patch(bytes: &[u8], offset: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[offset..offset + value.len()].copy_from_slice(value);
    bytes
}

/// A tar archive of regular files; names may be anything.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append(&header, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Compresses.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

/// The image of a builder.
pub(crate) fn image(builder: &ElfBuilder) -> super::Image {
    super::Image::from_bytes("test", builder.build()).unwrap()
}

/// Input that is empty, on one CPU.
pub(crate) const PLAIN: super::BootParameters<'static> = super::BootParameters {
    cpus: 1,
    tsc_khz: 0,
    boot_time_ns: 0,
    kernel_args: &[],
    app_args: &[],
    environment: &[],
    mounts: &[],
    has_pci: false,
};

/// Plans and loads an image that may be strange; any result but a panic is good.
pub(crate) fn exercise(image: &super::Image) {
    let size = 16 << 20;
    let Ok(layout) = super::Layout::plan(image, size, 0x1000, true, &mut || 77) else { return };
    let memory = crate::memory::GuestMemory::new(layout.guest_address, size, Default::default()).unwrap();
    super::load(image, &layout, &memory, &PLAIN).unwrap();
}
