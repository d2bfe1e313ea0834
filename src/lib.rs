//! The Rust core of `uhyve`, a scriptable hypervisor and debugger for the Hermit unikernel.
//!
//! The rooms: [`vm`] builds a machine and runs it to its end, [`vcpu`] is what its threads do. Below them are [`memory`],
//! [`paging`], [`registers`] and the back ends in [`backend`], with the instruction emulator [`x86`]. [`boot`] loads images;
//! [`hypercall`], [`isolation`] and [`devices`] are what the guest talks to; [`stats`] counts. [`debug`] stops the world, and [`gdb`]
//! shows it to gdb and LLDB.
//! The Python module is in `py`, behind the feature `python`; nothing else knows Python. [`error`] is everybody's.

pub mod backend;
pub mod bench;
pub mod boot;
mod burst;
pub mod code_lines;
pub mod debug;
pub mod demo;
pub mod devices;
pub mod error;
pub mod gdb;
pub mod hypercall;
pub mod isolation;
pub mod memory;
pub mod paging;
#[cfg(feature = "python")]
mod py;
pub mod registers;
pub mod stats;
pub mod vcpu;
pub mod vm;
pub mod x86;

/// What is logged unless RUST_LOG says otherwise: failures, and what the user should know of the VM; not what guests do wrong.
pub const DEFAULT_LOG: &str = "error,uhyve_core::debug=warn,uhyve_core::vm=warn,uhyve_core::memory=warn";
