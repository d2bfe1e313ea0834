//! The back end that needs no hypervisor: the software CPU of [`crate::x86`], with the interrupt controllers, timers and
//! clock of a PC around it.

pub mod apic_command;
pub mod apic_timer;
pub mod board;
pub mod clock;
pub mod cmos;
pub mod io_apic;
pub mod local_apic;
pub mod machine;
pub mod pic;
pub mod pit;
pub mod schedule;
pub mod vectors;
