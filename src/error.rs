//! Everything that can go wrong, as values with fields. Text is built only where an error leaves the crate.

use crate::registers::Registers;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request to the hypervisor failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A parameter of the VM is out of range or contradicts another.
    #[error("{0}")]
    Config(String),
    /// The image can't be loaded.
    #[error("{image}: {source}")]
    Image {
        /// What the user called the image.
        image: String,
        /// What is wrong with it.
        source: ImageError,
    },
    /// There is no usable hypervisor on this machine.
    #[error("{0}")]
    HypervisorUnavailable(String),
    /// A system call of the hypervisor failed.
    #[error("{call} failed: {source}")]
    Hypervisor {
        /// The ioctl or system call.
        call: &'static str,
        /// Its errno.
        source: std::io::Error,
    },
    /// A guest address that isn't there.
    #[error("{0}")]
    GuestFault(#[from] GuestFault),
    /// The guest did something that no machine survives.
    #[error("{0}")]
    GuestCrash(Box<Crash>),
    /// The call doesn't fit the state that the VM is in.
    #[error("{0}")]
    VmState(String),
    /// A breakpoint can't be set, or doesn't exist.
    #[error("{0}")]
    Breakpoint(String),
    /// A condition isn't valid.
    #[error("{0}")]
    Condition(String),
    /// The time that the caller gave is over; what was asked is not done.
    #[error("no stop and no exit within {seconds} s")]
    Timeout {
        /// The limit given.
        seconds: f64,
    },
    /// The host's operating system refused something.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// An address range that guest memory, or the guest's own page tables, don't have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{} address {address:#x} (+{length} bytes) is not {}",
    if *.is_virtual { "guest virtual" } else { "guest physical" }, if *.is_virtual { "mapped" } else { "in guest RAM" })]
pub struct GuestFault {
    /// The first address that failed.
    pub address: u64,
    /// How many bytes were asked for from there.
    pub length: u64,
    /// Guest virtual (paging was walked) or guest physical.
    pub is_virtual: bool,
}

/// Which rule of the Hermit image format an image breaks.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file can't be read.
    #[error("can't read the image: {0}")]
    Read(#[from] std::io::Error),
    /// The bytes aren't an ELF file or a gzip'd Hermit image.
    #[error("not an ELF file and not a gzip'd Hermit image (starts with {start:02x?})")]
    UnknownFormat {
        /// The first bytes.
        start: Vec<u8>,
    },
    /// A structure reaches past the end of the file.
    #[error("truncated: {what} needs {needed} bytes, the file has {available}")]
    Truncated {
        /// The structure.
        what: &'static str,
        /// Where it would end.
        needed: u64,
        /// The length of the file.
        available: u64,
    },
    /// The ELF header asks for a machine that this isn't.
    #[error("{what} is {found}, Hermit on x86-64 needs {expected}")]
    WrongTarget {
        /// The header field.
        what: &'static str,
        /// Its value.
        found: String,
        /// The value that works.
        expected: &'static str,
    },
    /// No HERMIT note: a program for another system.
    #[error("no HERMIT entry-version note: this is not a Hermit image (build it for a *-unknown-hermit target)")]
    NoHermitNote,
    /// An entry version whose boot information has another layout.
    #[error("Hermit entry version {found} is not supported (3 and 4 are): rebuild the image with a {advice} kernel")]
    EntryVersion {
        /// The version in the note.
        found: u64,
        /// Which kernel fits.
        advice: &'static str,
    },
    /// An unknown hypercall interface.
    #[error("uhyve interface version {found} is not supported (1, 2 and 3 are)")]
    InterfaceVersion {
        /// The version in the note.
        found: u32,
    },
    /// A segment or table that contradicts itself or another.
    #[error("{what}")]
    Malformed {
        /// What was found.
        what: String,
    },
    /// A relocation that can't be applied.
    #[error("relocation {index} (type {kind}) at {offset:#x}: {why}")]
    Relocation {
        /// Its index in the table.
        index: usize,
        /// The ELF relocation type.
        kind: u32,
        /// Where it writes.
        offset: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// The archive around the kernel is broken.
    #[error("image archive: {what}")]
    Archive {
        /// What is wrong.
        what: String,
    },
    /// The image doesn't fit the memory or the address range that it may use.
    #[error("{what}")]
    DoesNotFit {
        /// What was needed and what there was.
        what: String,
    },
}

/// Why a vCPU can't go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CrashReason {
    /// An exception in the handler of an exception of an exception; a shutdown cycle.
    #[error("triple fault{}", if *.registers_lost { " (the registers are those after the CPU's reset: this CPU does not keep them at a shutdown)" } else { "" })]
    TripleFault {
        /// The CPU has reset the vCPU, so that its registers tell nothing (AMD APM 2, 15.14.3).
        registers_lost: bool,
    },
    /// Nothing answers at a physical address.
    #[error("{} of {size} bytes at guest physical address {address:#x}, where there is neither RAM nor a device", if *.write { "write" } else { "read" })]
    UnknownMmio {
        /// Guest physical address.
        address: u64,
        /// Access size in bytes.
        size: usize,
        /// A write, or a read.
        write: bool,
    },
    /// An instruction that neither this KVM nor the instruction emulator executes.
    #[error("instruction `{disassembly}` (bytes {}) can't be executed: this KVM emulates guest kernel code and does not know it, and neither does the fallback of this version", hex(.bytes))]
    Unemulated {
        /// The instruction bytes at RIP, as far as they could be read.
        bytes: Vec<u8>,
        /// Intel syntax.
        disassembly: String,
    },
    /// An instruction needs what the software CPU has not got.
    #[error("the software CPU has no {what}: instruction `{disassembly}` (bytes {}) needs it", hex(.bytes))]
    Missing {
        /// What.
        what: crate::x86::Missing,
        /// The instruction bytes at RIP, as far as they could be read.
        bytes: Vec<u8>,
        /// Intel syntax, as 64-bit mode reads them.
        disassembly: String,
    },
    /// The hypervisor gave up on the vCPU.
    #[error("the hypervisor reports {what}")]
    Hypervisor {
        /// In KVM's words.
        what: String,
    },
    /// The guest passed an exit code by a pointer outside of its RAM.
    #[error("{what}")]
    Hypercall {
        /// Which hypercall, and what is wrong with it.
        what: String,
    },
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

/// A crashed guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crash {
    /// The vCPU that crashed.
    pub vcpu: u32,
    /// Why.
    pub reason: CrashReason,
    /// Its registers then.
    pub registers: Registers,
    /// The symbol at its program counter (`name+offset`), if known.
    pub symbol: Option<String>,
}

impl std::fmt::Display for Crash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "vCPU {}: {} at {:#x}", self.vcpu, self.reason, self.registers.rip)?;
        if let Some(symbol) = &self.symbol {
            write!(f, " ({symbol})")?;
        }
        write!(f, "\n{}", self.registers)
    }
}
