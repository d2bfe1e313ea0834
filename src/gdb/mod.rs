//! The server for gdb and LLDB: gdbstub's protocol on the engine. A [`server::Server`] listens on a thread of its own; a
//! client may attach at any time, controls the guest while it is there, and may go and come back. `filter` owns the
//! wire, `stub` the state machine of gdbstub, `target` answers, `policy` is what a front end may decide.

pub mod address;
pub mod breakpoints;
#[doc(hidden)]
pub mod filter;
mod host_files;
mod monitor;
pub mod policy;
mod registers;
pub mod server;
mod session;
mod stub;
pub(crate) mod target;
