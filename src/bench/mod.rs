//! What `uhyve bench` measures beside real VMs: [`floor`] is what an exit costs without any VMM, [`stops`] times stops of
//! the world, and [`crowd`] is the floor under those.

pub mod crowd;
pub mod floor;
pub mod stops;
