//! The GDB server: what a stock gdb or lldb sees of a VM.

pub mod filter;
