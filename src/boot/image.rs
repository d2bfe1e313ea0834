//! An image: a Hermit kernel linked with its application, as an ELF file or in an archive with its files. Once one
//! exists, its structure is known to be sound.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::Arc;

use hermit_entry::HermitVersion;

use super::archive::{Archive, GZIP_MAGIC, ImageConfig, SIZE_LIMIT};
use super::elf::{self, Elf, malformed};
use crate::error::{Error, ImageError, Result};

/// A parsed and checked image.
pub struct Image {
    name: String,
    kernel: Arc<[u8]>,
    pub(super) elf: Elf,
    files: Vec<(String, Arc<[u8]>)>,
    config: Option<ImageConfig>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("name", &self.name).field("notes", &self.elf.notes).finish_non_exhaustive()
    }
}

impl Image {
    /// Reads an image file; it may be replaced or deleted afterwards.
    ///
    /// # Errors
    /// [`Error::Image`], with the path as the image's name.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        match read_file(path) {
            Ok(bytes) => Self::from_shared(&name, bytes),
            Err(source) => Err(Error::Image { image: name, source }),
        }
    }

    /// Parses an image: an ELF file, or a gzip'd tar archive with a `hermit.toml`.
    ///
    /// # Errors
    /// [`Error::Image`], with that name.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        Self::from_shared(name, bytes.into())
    }

    fn from_shared(name: &str, bytes: Arc<[u8]>) -> Result<Self> {
        Self::parse(name, bytes).map_err(|source| Error::Image { image: name.to_owned(), source })
    }

    fn parse(name: &str, bytes: Arc<[u8]>) -> elf::Result<Self> {
        let name = name.to_owned();
        if bytes.starts_with(&GZIP_MAGIC) {
            let Archive { files, config, kernel } = Archive::unpack(&bytes, SIZE_LIMIT)?;
            return Ok(Self { name, elf: Elf::parse(&kernel)?, kernel, files, config: Some(config) });
        }
        Ok(Self { name, elf: Elf::parse(&bytes)?, kernel: bytes, files: Vec::new(), config: None })
    }

    /// What the user called it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version of the hypercall interface: 1, 2 or 3.
    pub fn interface(&self) -> u32 {
        self.elf.notes.interface
    }

    /// The version of the entry: 3 or 4.
    pub fn entry_version(&self) -> u8 {
        self.elf.notes.entry_version
    }

    /// The version of Hermit, if the image says.
    pub fn hermit_version(&self) -> Option<HermitVersion> {
        self.elf.notes.hermit_version
    }

    /// Whether the kernel is one of Hermit 0.6 that passes its program an environment array without a terminating
    /// null, and so lets it read what lies behind. Their banner tells: later ones carry an ABI tag, earlier ones another.
    pub fn walks_past_its_environment(&self) -> bool {
        const BANNER: &[u8] = b"Welcome to Hermit 0.6.";
        self.interface() == 1
            && self.entry_version() == 4
            && self.hermit_version().is_none()
            && memchr::memmem::find(self.kernel(), BANNER).is_some()
    }

    /// Whether the kernel can be loaded at another address than it was linked at.
    pub fn is_relocatable(&self) -> bool {
        self.elf.relocatable
    }

    /// The lowest linked address.
    pub fn link_start(&self) -> u64 {
        self.elf.span.start
    }

    /// Bytes of memory from the lowest to the highest address of the kernel.
    pub fn loaded_size(&self) -> u64 {
        self.elf.span.end - self.elf.span.start
    }

    /// The linked address of the first instruction.
    pub fn entry(&self) -> u64 {
        self.elf.entry
    }

    /// The kernel's ELF file.
    pub fn kernel(&self) -> &Arc<[u8]> {
        &self.kernel
    }

    /// The regular files of the archive by absolute guest path, ascending; empty for an ELF file.
    pub fn files(&self) -> &[(String, Arc<[u8]>)] {
        &self.files
    }

    /// What the archive's `hermit.toml` asks for; `None` for an ELF file.
    pub fn config(&self) -> Option<&ImageConfig> {
        self.config.as_ref()
    }
}

/// Reads a regular file (a FIFO or a device could block or never end) to where it stays: images are large.
fn read_file(path: &Path) -> elf::Result<Arc<[u8]>> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(malformed("the image is not a regular file"));
    }
    if metadata.len() > SIZE_LIMIT {
        return Err(malformed(format!("the image has {} bytes, the limit is {SIZE_LIMIT}", metadata.len())));
    }
    let length = usize::try_from(metadata.len()).expect("below the limit");
    if length == 0 {
        return Err(ImageError::Truncated { what: "the ELF header", needed: 64, available: 0 });
    }
    let mut bytes = Arc::new_uninit_slice(length);
    fill(&File::open(path)?, Arc::get_mut(&mut bytes).expect("nobody else has it yet"))?;
    // SAFETY: all of it was filled.
    Ok(unsafe { bytes.assume_init() })
}

/// Reads until `place` is full. Its pages are taken at once: one at a time, they cost more than the reading.
fn fill(file: &File, place: &mut [MaybeUninit<u8>]) -> std::io::Result<()> {
    const PAGE: usize = 4096;
    let skipped = place.as_ptr().addr().wrapping_neg() % PAGE;
    let whole = place.len().saturating_sub(skipped) / PAGE * PAGE;
    // SAFETY: of whole pages that are ours alone, nothing but their presence changes. What can't do it leaves them.
    unsafe { libc::madvise(place.as_mut_ptr().wrapping_byte_add(skipped).cast(), whole, libc::MADV_POPULATE_WRITE) };
    let mut filled = 0;
    while filled < place.len() {
        let rest = &mut place[filled..];
        // SAFETY: the kernel writes at most so many bytes there.
        match unsafe { libc::read(file.as_raw_fd(), rest.as_mut_ptr().cast(), rest.len()) } {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read @ 1.. => filled += read.cast_unsigned(),
            _ => match std::io::Error::last_os_error() {
                error if error.kind() == std::io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::boot::testing::{ElfBuilder, Program, dynamic, gzip, rela, symbol, tar};

    const TOML: &[u8] = b"version = \"1\"\nkernel = \"k\"\n[input]\nkernel_args = []\napp_args = []\n";

    fn rich_elf() -> Vec<u8> {
        let tags = [(7, 0x9000), (8, 48), (9, 24), (6, 0x8000), (11, 24)];
        ElfBuilder::hermit()
            .interface(3)
            .abi_tag()
            .program(Program::load(0x8000, [symbol(0, 0, 0), symbol(0x10, 0x400, 1)].concat()))
            .program(Program::load(0x9000, [rela(0x1000, 8, 0, 0x20), rela(0x1008, 6, 1, 0)].concat()))
            .program(Program::new(object::elf::PT_DYNAMIC, 0, dynamic(&tags)))
            .program(Program::new(object::elf::PT_TLS, 0x1000, vec![0; 0x20]))
            .build()
    }

    #[test]
    fn test_image_from_elf_gives_its_facts() {
        let image = Image::from_bytes("rich", rich_elf()).unwrap();
        assert_eq!((image.name(), image.interface(), image.entry_version()), ("rich", 3, 4));
        assert_eq!(image.hermit_version(), Some(HermitVersion::new(0, 13, 2)));
        assert_eq!((image.link_start(), image.loaded_size(), image.entry()), (0, 0x9030, 0x10));
        assert!(image.is_relocatable() && image.files().is_empty() && image.config().is_none());
        assert_eq!(**image.kernel(), *rich_elf());
    }

    #[test]
    fn test_image_from_archive_has_kernel_files_and_config() {
        let image = Image::from_bytes("archive", gzip(&tar(&[("hermit.toml", TOML), ("k", &rich_elf())]))).unwrap();
        assert_eq!(**image.kernel(), *rich_elf());
        assert_eq!(image.files().len(), 2);
        assert_eq!(image.config(), Some(&ImageConfig::default()));
    }

    #[test]
    fn test_image_error_names_the_image() {
        let error = Image::from_bytes("x", b"PK\x03\x04".to_vec()).unwrap_err();
        assert!(matches!(&error, Error::Image { image, source: ImageError::UnknownFormat { .. } } if image == "x"));
        let error = Image::open(Path::new("/nonexistent/image")).unwrap_err();
        assert!(matches!(&error, Error::Image { image, source: ImageError::Read(_) } if image == "/nonexistent/image"));
        assert!(Image::open(Path::new("/")).unwrap_err().to_string().contains("not a regular file"));
        assert!(Image::open(Path::new("/dev/zero")).unwrap_err().to_string().contains("not a regular file"));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn test_image_mutated_or_truncated_never_panics(
            changes in prop::collection::vec((0usize..1400, prop_oneof![any::<u8>(), Just(0xff), Just(0)]), 0..6),
            wide in prop::collection::vec((0usize..170, prop_oneof![any::<u64>(), Just(u64::MAX), 0..0x1_0000u64]), 0..3),
            length in prop_oneof![3 => Just(usize::MAX), 1 => 0usize..1400],
        ) {
            let mut bytes = rich_elf();
            for (at, value) in wide {
                let at = at * 8;
                if let Some(place) = bytes.get_mut(at..at + 8) {
                    place.copy_from_slice(&value.to_le_bytes());
                }
            }
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(length);
            if let Ok(image) = Image::from_bytes("mutated", bytes) {
                super::super::testing::exercise(&image);
            }
        }

        #[test]
        fn test_archive_mutated_or_truncated_never_panics(
            changes in prop::collection::vec((0usize..6000, any::<u8>()), 1..8),
            length in prop_oneof![3 => Just(usize::MAX), 1 => 0usize..6000],
        ) {
            let mut bytes = tar(&[("hermit.toml", TOML), ("k", &rich_elf())]);
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(length);
            let _ = Image::from_bytes("mutated", gzip(&bytes));
        }
    }
}
