//! The demo guest that is part of the package: built by `build.rs` from `guests/`, so that the first run needs no download.

/// The image: relocatable, interface 1, with debug information.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/demo"));
