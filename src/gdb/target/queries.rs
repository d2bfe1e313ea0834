//! What a client asks about the target: its registers' description, its memory map, where the image is and was loaded.

use std::convert::Infallible;

use gdbstub::common::{Endianness, Pid};
use gdbstub::target::TargetResult;
use gdbstub::target::ext::auxv::Auxv;
use gdbstub::target::ext::exec_file::ExecFile;
use gdbstub::target::ext::host_info::{HostInfo, HostInfoResponse};
use gdbstub::target::ext::host_io::{
    FsKind, HostIo, HostIoClose, HostIoCloseOps, HostIoError, HostIoFstat, HostIoFstatOps, HostIoOpen, HostIoOpenFlags,
    HostIoOpenMode, HostIoOpenOps, HostIoPread, HostIoPreadOps, HostIoResult, HostIoSetfs, HostIoSetfsOps, HostIoStat,
};
use gdbstub::target::ext::memory_map::MemoryMap;
use gdbstub::target::ext::process_info::{ProcessInfo, ProcessInfoResponse};
use gdbstub::target::ext::section_offsets::{Offsets, SectionOffsets};
use gdbstub::target::ext::target_description_xml_override::TargetDescriptionXmlOverride;

use super::GdbTarget;
use crate::gdb::host_files::copy_from;

/// Any virtual address may be memory; which are, the guest's page tables say. In quarters, since gdb takes the bytes from
/// an address to its region's end for a signed number when a graphical front end asks it for memory, and ends if that is
/// negative.
const MEMORY_MAP: &str = "<?xml version=\"1.0\"?><!DOCTYPE memory-map PUBLIC \"+//IDN gnu.org//DTD GDB Memory Map V1.0//EN\" \
    \"http://sourceware.org/gdb/gdb-memory-map.dtd\"><memory-map>\
    <memory type=\"ram\" start=\"0x0\" length=\"0x4000000000000000\"/>\
    <memory type=\"ram\" start=\"0x4000000000000000\" length=\"0x4000000000000000\"/>\
    <memory type=\"ram\" start=\"0x8000000000000000\" length=\"0x4000000000000000\"/>\
    <memory type=\"ram\" start=\"0xc000000000000000\" length=\"0x3fffffffffffffff\"/></memory-map>";
/// LLDB's name for the guest. It unwinds nothing and shows no variable of an operating system whose calling convention
/// it does not know, and Hermit's it does not; of an unknown one it takes System V's, which is Hermit's.
const TRIPLE: &str = "x86_64-unknown-unknown";
/// Types of the auxiliary vector (System V ABI, AMD64 supplement, 3.4.3).
const AT_PAGESZ: u64 = 6;
const AT_ENTRY: u64 = 9;

impl TargetDescriptionXmlOverride for GdbTarget {
    fn target_description_xml(
        &self,
        annex: &[u8],
        offset: u64,
        length: usize,
        buf: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let text = if annex == b"target.xml" { self.description.as_bytes() } else { &[] };
        Ok(copy_from(text, offset, length, buf))
    }
}

impl MemoryMap for GdbTarget {
    fn memory_map_xml(&self, offset: u64, length: usize, buf: &mut [u8]) -> TargetResult<usize, Self> {
        Ok(copy_from(MEMORY_MAP.as_bytes(), offset, length, buf))
    }
}

impl ExecFile for GdbTarget {
    fn get_exec_file(
        &self,
        _pid: Option<Pid>,
        offset: u64,
        length: usize,
        buf: &mut [u8],
    ) -> TargetResult<usize, Self> {
        Ok(copy_from(self.files.path().as_bytes(), offset, length, buf))
    }
}

impl Auxv for GdbTarget {
    fn get_auxv(&self, offset: u64, length: usize, buf: &mut [u8]) -> TargetResult<usize, Self> {
        let entry = self.machine.image.entry().wrapping_add(self.machine.layout.load_bias());
        let words = [AT_ENTRY, entry, AT_PAGESZ, 0x1000, 0, 0];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok(copy_from(&bytes, offset, length, buf))
    }
}

impl SectionOffsets for GdbTarget {
    /// By sections gdb would move `.text`, `.data` and `.bss` alone; where the first segment lies, all the others follow.
    ///
    /// Zero for an image at fixed addresses: LLDB takes an image without offsets for one that is not loaded, and a
    /// segment's address for an offset.
    fn get_section_offsets(&mut self) -> Result<Offsets<u64>, Infallible> {
        let image = &self.machine.image;
        if !image.is_relocatable() {
            return Ok(Offsets::Sections { text: 0, data: 0, bss: Some(0) });
        }
        let first = image.link_start().wrapping_add(self.machine.layout.load_bias());
        Ok(Offsets::Segments { text_seg: first, data_seg: None })
    }
}

impl HostInfo for GdbTarget {
    fn host_info(&self, write_item: &mut dyn FnMut(&HostInfoResponse<'_>)) -> Result<(), Infallible> {
        write_item(&HostInfoResponse::Triple(TRIPLE));
        write_item(&HostInfoResponse::Endianness(Endianness::Little));
        write_item(&HostInfoResponse::PointerSize(8));
        Ok(())
    }
}

impl ProcessInfo for GdbTarget {
    fn process_info(&self, write_item: &mut dyn FnMut(&ProcessInfoResponse<'_>)) -> Result<(), Infallible> {
        write_item(&ProcessInfoResponse::Pid(Pid::MIN));
        write_item(&ProcessInfoResponse::Triple(TRIPLE));
        write_item(&ProcessInfoResponse::Endianness(Endianness::Little));
        write_item(&ProcessInfoResponse::PointerSize(8));
        Ok(())
    }
}

impl HostIo for GdbTarget {
    fn support_open(&mut self) -> Option<HostIoOpenOps<'_, Self>> {
        Some(self)
    }

    fn support_close(&mut self) -> Option<HostIoCloseOps<'_, Self>> {
        Some(self)
    }

    fn support_pread(&mut self) -> Option<HostIoPreadOps<'_, Self>> {
        Some(self)
    }

    fn support_fstat(&mut self) -> Option<HostIoFstatOps<'_, Self>> {
        Some(self)
    }

    fn support_setfs(&mut self) -> Option<HostIoSetfsOps<'_, Self>> {
        Some(self)
    }
}

impl HostIoOpen for GdbTarget {
    fn open(&mut self, filename: &[u8], flags: HostIoOpenFlags, _mode: HostIoOpenMode) -> HostIoResult<u32, Self> {
        let writes = HostIoOpenFlags::O_WRONLY
            | HostIoOpenFlags::O_RDWR
            | HostIoOpenFlags::O_APPEND
            | HostIoOpenFlags::O_CREAT
            | HostIoOpenFlags::O_TRUNC;
        self.files.open(filename, flags.intersects(writes)).map_err(HostIoError::Errno)
    }
}

impl HostIoClose for GdbTarget {
    fn close(&mut self, fd: u32) -> HostIoResult<(), Self> {
        self.files.close(fd).map_err(HostIoError::Errno)
    }
}

impl HostIoPread for GdbTarget {
    fn pread(&mut self, fd: u32, count: usize, offset: u64, buf: &mut [u8]) -> HostIoResult<usize, Self> {
        let size = count.min(buf.len());
        self.files.read(fd, offset, &mut buf[..size]).map_err(HostIoError::Errno)
    }
}

impl HostIoFstat for GdbTarget {
    fn fstat(&mut self, fd: u32) -> HostIoResult<HostIoStat, Self> {
        self.files.stat(fd).map_err(HostIoError::Errno)
    }
}

impl HostIoSetfs for GdbTarget {
    fn setfs(&mut self, _fs: FsKind) -> HostIoResult<(), Self> {
        Ok(())
    }
}
