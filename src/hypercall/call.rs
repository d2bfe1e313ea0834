//! Which hypercall a port stands for. Both versions of the interface are served whatever the image's note announces:
//! kernel 0.13.2 makes calls of version 1 while the code on top of it makes calls of version 2.

use uhyve_interface::{v1, v2};

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// What a hypercall does, in either version.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kind { $($(#[$doc])* $kind,)* }

        impl Kind {
            /// All of them, in the order of their discriminants.
            pub const ALL: &[Kind] = &[$(Kind::$kind,)*];

            /// Its name in snake case.
            pub const fn name(self) -> &'static str {
                match self { $(Kind::$kind => $name,)* }
            }
        }
    };
}

kinds! {
    /// Write to a descriptor.
    FileWrite = "file_write",
    /// Open a path.
    FileOpen = "file_open",
    /// Close a descriptor.
    FileClose = "file_close",
    /// Read from a descriptor.
    FileRead = "file_read",
    /// Move a descriptor's position.
    FileLseek = "file_lseek",
    /// Remove a file's name.
    FileUnlink = "file_unlink",
    /// List a directory.
    Getdents = "getdents",
    /// Metadata of a path.
    FileStat = "file_stat",
    /// Metadata of a descriptor.
    FileFstat = "file_fstat",
    /// Make a directory.
    Mkdir = "mkdir",
    /// End the VM.
    Exit = "exit",
    /// One byte to the console.
    SerialWriteByte = "serial_write_byte",
    /// Bytes to the console.
    SerialWriteBuffer = "serial_write_buffer",
    /// One byte from the console; the interface has no place for the answer.
    SerialReadByte = "serial_read_byte",
    /// Bytes from the console.
    SerialReadBuffer = "serial_read_buffer",
    /// Lengths of arguments and environment.
    Cmdsize = "cmdsize",
    /// Arguments and environment.
    Cmdval = "cmdval",
    /// Deprecated.
    Netwrite = "netwrite",
    /// Deprecated.
    Netread = "netread",
    /// Deprecated.
    Netstat = "netstat",
    /// Reserved.
    SharedMemOpen = "shared_mem_open",
    /// Reserved.
    SharedMemClose = "shared_mem_close",
}

/// A hypercall and the version whose parameters it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// EAX holds the guest-physical address of the parameters, or the byte.
    V1(Kind),
    /// RDI holds the guest-physical address of the parameters, or the value. Version 3 only adds calls.
    V2(Kind),
}

impl Call {
    /// Whether the answer depends on RDI, which costs a look at the registers.
    pub const fn needs_rdi(self) -> bool {
        matches!(self, Self::V2(_))
    }

    /// What it does.
    pub const fn kind(self) -> Kind {
        match self {
            Self::V1(kind) | Self::V2(kind) => kind,
        }
    }
}

/// The lowest port of a hypercall: a PC's own devices are below.
const LOWEST: u16 = 0x400;

/// The hypercall at an I/O port, if there is one.
#[inline]
pub fn identify(port: u16) -> Option<Call> {
    if port < LOWEST { None } else { identify_above(port) }
}

#[allow(deprecated)]
fn identify_above(port: u16) -> Option<Call> {
    use v1::HypercallAddress as V1;
    use v2::HypercallAddress as V2;
    if let Ok(address) = V2::try_from(u64::from(port)) {
        return Some(Call::V2(match address {
            V2::Exit => Kind::Exit,
            V2::SerialWriteByte => Kind::SerialWriteByte,
            V2::SerialWriteBuffer => Kind::SerialWriteBuffer,
            V2::SerialReadByte => Kind::SerialReadByte,
            V2::SerialReadBuffer => Kind::SerialReadBuffer,
            V2::FileWrite => Kind::FileWrite,
            V2::FileOpen => Kind::FileOpen,
            V2::FileClose => Kind::FileClose,
            V2::FileRead => Kind::FileRead,
            V2::FileLseek => Kind::FileLseek,
            V2::FileUnlink => Kind::FileUnlink,
            V2::Getdents => Kind::Getdents,
            V2::FileStat => Kind::FileStat,
            V2::FileFstat => Kind::FileFstat,
            V2::Mkdir => Kind::Mkdir,
            V2::SharedMemOpen => Kind::SharedMemOpen,
            V2::SharedMemClose => Kind::SharedMemClose,
            _ => return None,
        }));
    }
    Some(Call::V1(match V1::try_from(port).ok()? {
        V1::FileWrite => Kind::FileWrite,
        V1::FileOpen => Kind::FileOpen,
        V1::FileClose => Kind::FileClose,
        V1::FileRead => Kind::FileRead,
        V1::Exit => Kind::Exit,
        V1::FileLseek => Kind::FileLseek,
        V1::Netwrite => Kind::Netwrite,
        V1::Netread => Kind::Netread,
        V1::Netstat => Kind::Netstat,
        V1::Cmdsize => Kind::Cmdsize,
        V1::Cmdval => Kind::Cmdval,
        V1::Uart => Kind::SerialWriteByte,
        V1::FileUnlink => Kind::FileUnlink,
        V1::SerialBufferWrite => Kind::SerialWriteBuffer,
        _ => return None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_identify_knows_every_port_of_both_versions() {
        let found: Vec<_> = (0..=u16::MAX).filter_map(|port| identify(port).map(|call| (port, call))).collect();
        assert_eq!(found.len(), 14 + 17);
        assert_eq!(identify(0x800), Some(Call::V1(Kind::SerialWriteByte)));
        assert_eq!(identify(0x1030), Some(Call::V2(Kind::SerialWriteBuffer)));
        assert_eq!(identify(0xcf8), None);
        assert!(found.iter().all(|(port, call)| call.needs_rdi() == (*port >= 0x1000)));
        let names: std::collections::HashSet<_> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        assert_eq!(names.len(), Kind::ALL.len());
    }
}
