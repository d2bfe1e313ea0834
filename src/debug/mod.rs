//! The debugger: one engine that stops the world, and what decides when. Front ends (Python, later the GDB server) use
//! it at the same time.

pub mod agent;
pub mod breakpoints;
mod bus;
pub mod catch;
pub mod condition;
pub mod engine;
pub(crate) mod stepping;
pub mod stop;
pub mod symbols;
mod values;
pub mod view;
pub(crate) mod watching;
pub mod watchpoints;
