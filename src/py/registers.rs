//! A vCPU's registers as attributes. Each is fetched when it is touched and written when it is set.

use pyo3::exceptions::{PyAttributeError, PyOverflowError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::errors::to_python;
use super::hit::Reach;
use crate::error::Result;
use crate::registers::{DescriptorTable, GENERAL_NAMES, RegisterId, Segment, SystemRegisters};
use crate::vcpu::Context;

const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;
const SEGMENTS: [&str; 8] = ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"];
const SEGMENT_FIELDS: [&str; 4] = ["", "_base", "_limit", "_attributes"];
const TABLES: [&str; 2] = ["gdt", "idt"];
const FPU: [&str; 8] = ["fcw", "fsw", "ftw", "fop", "fip", "fdp", "mxcsr", "kernel_gs_base"];

/// The registers of a vCPU.
#[pyclass(name = "Registers", frozen, module = "uhyve._core")]
pub struct PyRegisters {
    reach: Reach,
}

/// A register by its name.
#[derive(Clone, Copy)]
enum Named {
    Plain(RegisterId),
    Segment(usize, usize),
    Table(usize, bool),
    ApicBase,
    Xmm(usize),
    St(usize),
    Fpu(usize),
}

fn parse(name: &str) -> Option<Named> {
    if let Some(id) = RegisterId::from_name(name) {
        return Some(Named::Plain(id));
    }
    if name == "apic_base" {
        return Some(Named::ApicBase);
    }
    if let Some(i) = FPU.iter().position(|n| *n == name) {
        return Some(Named::Fpu(i));
    }
    let number = |prefix: &str, limit: usize| {
        let digits = name.strip_prefix(prefix)?;
        digits.parse::<usize>().ok().filter(|n| *n < limit && n.to_string() == digits)
    };
    if let Some(n) = number("xmm", 16) {
        return Some(Named::Xmm(n));
    }
    if let Some(n) = number("st", 8) {
        return Some(Named::St(n));
    }
    for (i, table) in TABLES.iter().enumerate() {
        if let Some(field) = name.strip_prefix(table).filter(|f| ["_base", "_limit"].contains(f)) {
            return Some(Named::Table(i, field == "_base"));
        }
    }
    SEGMENTS.iter().enumerate().find_map(|(i, segment)| {
        let field = name.strip_prefix(segment)?;
        SEGMENT_FIELDS.iter().position(|f| *f == field).map(|f| Named::Segment(i, f))
    })
}

fn names() -> Vec<String> {
    let mut names: Vec<String> = GENERAL_NAMES.iter().map(|n| (*n).to_owned()).collect();
    names.extend(["rip", "rflags", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"].map(str::to_owned));
    for segment in SEGMENTS {
        names.extend(SEGMENT_FIELDS.map(|field| format!("{segment}{field}")));
    }
    for table in TABLES {
        names.extend([format!("{table}_base"), format!("{table}_limit")]);
    }
    names.extend((0..16).map(|i| format!("xmm{i}")));
    names.extend((0..8).map(|i| format!("st{i}")));
    names.extend(FPU.map(str::to_owned));
    names
}

fn segment(system: &mut SystemRegisters, index: usize) -> &mut Segment {
    match index {
        0 => &mut system.cs,
        1 => &mut system.ds,
        2 => &mut system.es,
        3 => &mut system.fs,
        4 => &mut system.gs,
        5 => &mut system.ss,
        6 => &mut system.tr,
        _ => &mut system.ldt,
    }
}

fn table(system: &mut SystemRegisters, index: usize) -> &mut DescriptorTable {
    if index == 0 { &mut system.gdt } else { &mut system.idt }
}

fn st_value(bytes: &[u8; 16]) -> u128 {
    u128::from_le_bytes(*bytes) & ((1 << 80) - 1)
}

fn get(context: &mut Context, register: Named) -> Result<u128> {
    let cpu = &mut context.cpu;
    Ok(match register {
        Named::Plain(id) if id.is_general() => cpu.registers()?.get(id).expect("a general register").into(),
        Named::Plain(id) => cpu.system_registers()?.get(id).expect("a system register").into(),
        Named::ApicBase => cpu.system_registers()?.apic_base.into(),
        Named::Segment(i, field) => {
            let mut system = cpu.system_registers()?;
            let segment = segment(&mut system, i);
            match field {
                0 => segment.selector.into(),
                1 => segment.base.into(),
                2 => segment.limit.into(),
                _ => segment.attributes.into(),
            }
        }
        Named::Table(i, is_base) => {
            let mut system = cpu.system_registers()?;
            let table = table(&mut system, i);
            if is_base { table.base.into() } else { table.limit.into() }
        }
        Named::Xmm(n) => cpu.fpu()?.xmm[n],
        Named::St(n) => st_value(&cpu.fpu()?.st[n]),
        Named::Fpu(7) => cpu.msr(IA32_KERNEL_GS_BASE)?.into(),
        Named::Fpu(i) => {
            let fpu = cpu.fpu()?;
            [
                fpu.fcw.into(),
                fpu.fsw.into(),
                fpu.ftw.into(),
                fpu.fop.into(),
                fpu.fip.into(),
                fpu.fdp.into(),
                fpu.mxcsr.into(),
            ][i]
        }
    })
}

/// How many bits a register has.
fn width(register: Named) -> u32 {
    match register {
        Named::Plain(_) | Named::ApicBase | Named::Table(_, true) | Named::Segment(_, 1) | Named::Fpu(4 | 5 | 7) => 64,
        Named::Segment(_, 2) | Named::Fpu(6) => 32,
        Named::Segment(..) | Named::Table(_, false) | Named::Fpu(0 | 1 | 3) => 16,
        Named::Fpu(_) => 8,
        Named::Xmm(_) => 128,
        Named::St(_) => 80,
    }
}

/// Sets a register to a value that fits its width.
#[allow(clippy::cast_possible_truncation)]
fn set(context: &mut Context, register: Named, value: u128) -> Result<()> {
    let cpu = &mut context.cpu;
    match register {
        Named::Plain(id) if id.is_general() => {
            let mut registers = cpu.registers()?;
            registers.set(id, value as u64);
            cpu.set_registers(&registers)
        }
        Named::Plain(_) | Named::ApicBase | Named::Segment(..) | Named::Table(..) => {
            let mut system = cpu.system_registers()?;
            match register {
                Named::Plain(id) => drop(system.set(id, value as u64)),
                Named::ApicBase => system.apic_base = value as u64,
                Named::Table(i, true) => table(&mut system, i).base = value as u64,
                Named::Table(i, false) => table(&mut system, i).limit = value as u16,
                Named::Segment(i, 0) => segment(&mut system, i).selector = value as u16,
                Named::Segment(i, 1) => segment(&mut system, i).base = value as u64,
                Named::Segment(i, 2) => segment(&mut system, i).limit = value as u32,
                Named::Segment(i, _) => segment(&mut system, i).attributes = value as u16,
                _ => {}
            }
            cpu.set_system_registers(&system)
        }
        Named::Fpu(7) => cpu.set_msr(IA32_KERNEL_GS_BASE, value as u64),
        Named::Xmm(_) | Named::St(_) | Named::Fpu(_) => {
            let mut fpu = cpu.fpu()?;
            match register {
                Named::Xmm(n) => fpu.xmm[n] = value,
                Named::St(n) => fpu.st[n] = value.to_le_bytes(),
                Named::Fpu(0) => fpu.fcw = value as u16,
                Named::Fpu(1) => fpu.fsw = value as u16,
                Named::Fpu(2) => fpu.ftw = value as u8,
                Named::Fpu(3) => fpu.fop = value as u16,
                Named::Fpu(4) => fpu.fip = value as u64,
                Named::Fpu(5) => fpu.fdp = value as u64,
                _ => fpu.mxcsr = value as u32,
            }
            cpu.set_fpu(&fpu)
        }
    }
}

impl PyRegisters {
    /// The registers of `reach`'s vCPU.
    pub fn new(reach: Reach) -> Self {
        Self { reach }
    }

    fn parse(name: &str) -> PyResult<Named> {
        parse(name).ok_or_else(|| PyAttributeError::new_err(format!("there is no register {name:?}; dir() lists them")))
    }
}

#[pymethods]
impl PyRegisters {
    fn __getattr__(&self, py: Python<'_>, name: &str) -> PyResult<u128> {
        let register = Self::parse(name)?;
        self.reach.with(|context| get(context, register)).map_err(|e| to_python(py, e))
    }

    fn __setattr__(&self, py: Python<'_>, name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let register = Self::parse(name)?;
        let bits = width(register);
        let fits = |value: u128| bits == 128 || value < 1 << bits;
        let value = value.extract::<u128>().ok().filter(|v| fits(*v)).ok_or_else(|| {
            PyOverflowError::new_err(format!(
                "{name} takes an unsigned integer of {bits} bits; mask a negative one (value & {:#x})",
                (1u128 << (bits - 1) << 1).wrapping_sub(1)
            ))
        })?;
        self.reach.with(|context| set(context, register, value)).map_err(|e| to_python(py, e))
    }

    fn __dir__(&self) -> Vec<String> {
        let mut all = names();
        all.extend(["pc", "sp", "to_dict"].map(str::to_owned));
        all
    }

    /// All registers by name.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        let values = self.reach.with(|context| {
            names()
                .into_iter()
                .map(|name| Ok((parse(&name).map(|r| get(context, r)).transpose()?, name)))
                .collect::<Result<Vec<_>>>()
        });
        for (value, name) in values.map_err(|e| to_python(py, e))? {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    fn __repr__(&self) -> String {
        format!("<Registers of vCPU {}>", self.reach.vcpu())
    }

    fn __str__(&self, py: Python<'_>) -> PyResult<String> {
        self.reach.with(|context| Ok(context.cpu.registers()?.to_string())).map_err(|e| to_python(py, e))
    }
}
