//! From an image file to a machine that is ready for its first instruction: what an image is ([`Image`]), where its
//! parts go ([`Layout`]), and the bytes that the Hermit kernel finds there ([`load`]: kernel, boot information, device
//! tree, GDT, page tables). Nothing here knows a back end; the result is RAM contents and registers.

mod archive;
mod boot_info;
mod elf;
mod fdt;
mod image;
mod layout;
mod load;
mod notes;
mod relocations;
#[cfg(test)]
pub(crate) mod testing;

pub use archive::ImageConfig;
pub use fdt::device_tree_size;
pub use hermit_entry::HermitVersion;
pub use image::Image;
pub use layout::Layout;
pub use load::{BootParameters, BootState, load};
