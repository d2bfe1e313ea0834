//! What the guest sees besides RAM and CPUs.

pub mod pci;
pub mod pump;
pub mod serial;
