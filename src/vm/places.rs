//! Addresses and their names: symbols, source lines, frames.

use std::sync::Arc;

use super::Machine;
use crate::debug::backtrace::{self, Frame};
use crate::debug::breakpoints::{Breakpoint, BreakpointOptions, Condition};
use crate::debug::dwarf::{DebugInfo, SourceLine};
use crate::debug::symbols::SymbolTable;
use crate::error::{Error, Result};
use crate::paging::PagingMode;

impl Machine {
    /// The symbols of the image at their addresses in this VM.
    pub fn symbols(&self) -> &SymbolTable {
        self.symbols.get_or_init(|| SymbolTable::from_elf(self.image.kernel(), self.layout.load_bias()))
    }

    /// The debug information of the image. Its addresses are the image's, without the load bias.
    pub fn debug_info(&self) -> &DebugInfo {
        self.debug_info.get_or_init(|| DebugInfo::new(self.image.kernel()))
    }

    /// The source line of an address.
    pub fn source_line(&self, address: u64) -> Option<SourceLine> {
        self.debug_info().line(address.wrapping_sub(self.layout.load_bias()))
    }

    /// The addresses of a place: `file.c:123`, or what [`SymbolTable::resolve`] takes, which has one.
    pub fn resolve(&self, place: &str) -> Result<Vec<u64>> {
        let Some((file, line)) = source_place(place) else { return Ok(vec![self.symbols().resolve(place)?]) };
        let (found, addresses) = self.debug_info().addresses(file, line);
        if addresses.is_empty() {
            let text = if self.debug_info().is_empty() {
                format!("no code for {place}: the image has no debug information (build it with -g)")
            } else {
                format!("no code for {place}: the debug information knows no such file, or no line from there on")
            };
            return Err(Error::Breakpoint(text));
        }
        if found != line {
            log::info!("{place} has no code; the next line that has is {found}");
        }
        Ok(addresses.into_iter().map(|address| address.wrapping_add(self.layout.load_bias())).collect())
    }

    /// The frames of a stopped vCPU, the innermost first, at most `limit`.
    pub fn backtrace(&self, vcpu: u32, limit: usize) -> Result<Vec<Frame>> {
        self.with_vcpu(vcpu, |context| {
            let mode = PagingMode::from(&context.cpu.system_registers()?);
            Ok(backtrace::backtrace(self, &mode, &context.cpu.registers()?, limit))
        })
    }

    /// The canonical frame address of a stopped vCPU's innermost frame, and where it returns to.
    pub fn caller(&self, vcpu: u32) -> Result<Option<(u64, u64)>> {
        self.with_vcpu(vcpu, |context| {
            let mode = PagingMode::from(&context.cpu.system_registers()?);
            Ok(backtrace::caller(self, &mode, &context.cpu.registers()?))
        })
    }

    /// The addresses around one that belong to the same source line.
    pub fn line_range(&self, address: u64) -> Option<std::ops::Range<u64>> {
        let bias = self.layout.load_bias();
        let range = self.debug_info().line_range(address.wrapping_sub(bias))?;
        Some(range.start.wrapping_add(bias)..range.end.wrapping_add(bias))
    }

    /// Makes `vcpu` stop, as after a step, where it comes to one of these addresses with a stack pointer of at least
    /// `stack`: a frame that is returned to, and not one of a recursion below it. The caller deletes what it gets.
    pub fn stop_at(&self, vcpu: u32, addresses: &[u64], stack: u64) -> Result<Arc<Breakpoint>> {
        let Some((&address, also)) = addresses.split_first() else {
            return Err(Error::Breakpoint("there is no address to run to".into()));
        };
        let options = BreakpointOptions {
            also: also.to_vec(),
            internal: Some(stack),
            vcpu: Some(vcpu),
            location: format!("{address:#x}"),
            ..Default::default()
        };
        self.add_breakpoint(address, options, Condition::default())
    }

    /// `name+offset` of an address.
    pub fn symbol_at(&self, address: u64) -> Option<String> {
        let (symbol, offset) = self.symbols().symbolize(address)?;
        Some(if offset == 0 { symbol.name } else { format!("{}+{offset:#x}", symbol.name) })
    }
}

/// The file and the line of `file.c:123`; a path of Rust, `a::b`, is none.
fn source_place(place: &str) -> Option<(&str, u32)> {
    let (file, line) = place.trim().rsplit_once(':')?;
    let is_file = !file.is_empty() && !file.ends_with(':');
    line.parse().ok().filter(|line| is_file && *line > 0).map(|line| (file, line))
}
