//! The guests that are part of the package: built by `build.rs` from `guests/`, so that the first run needs no download.

/// The demo: relocatable, interface 1, with debug information.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/demo"));

/// What `uhyve bench` runs: loops of exits, one of which its arguments choose.
pub const BENCH: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bench"));
