//! What `uhyve bench` measures beside real VMs: [`floor`] is what an exit costs without any VMM, [`stops`] times stops of the world.

pub mod floor;
pub mod stops;
