//! The debugger: one engine that stops the world, and what decides when. Front ends (Python, the GDB server) use
//! it at the same time.

pub mod agent;
pub mod backtrace;
pub mod breakpoints;
pub(crate) mod burst;
mod bus;
pub mod catch;
pub mod condition;
pub mod dwarf;
pub mod engine;
mod functions;
mod landing;
mod lines;
pub(crate) mod stepping;
pub mod stop;
pub mod symbols;
mod unwind;
mod values;
pub mod view;
pub(crate) mod watching;
pub mod watchpoints;
mod whole;
