//! A vCPU's registers as attributes. Each is fetched when it is touched and written when it is set.

use pyo3::exceptions::{PyAttributeError, PyOverflowError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyInt};

use super::errors::to_python;
use super::hit::Reach;
use crate::error::Result;
use crate::registers::{DescriptorTable, Extensions, GENERAL_NAMES, RegisterId, Segment, SystemRegisters};
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
    Ymm(usize),
    Zmm(usize),
    Mask(usize),
    Pkru,
}

/// A register's value: 128 bits each, the lowest first.
type Value = [u128; 4];

impl Named {
    /// Whether a vCPU has the register.
    fn is_had(self, has: Extensions) -> bool {
        match self {
            Self::Ymm(n) if n < 16 => has.avx,
            Self::Ymm(_) | Self::Zmm(_) | Self::Mask(_) => has.avx512,
            Self::Xmm(n) if n >= 16 => has.avx512,
            Self::Pkru => has.pkru,
            _ => true,
        }
    }
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
    if let Some(n) = number("xmm", 32) {
        return Some(Named::Xmm(n));
    }
    if let Some(n) = number("ymm", 32) {
        return Some(Named::Ymm(n));
    }
    if let Some(n) = number("zmm", 32) {
        return Some(Named::Zmm(n));
    }
    if let Some(n) = number("k", 8) {
        return Some(Named::Mask(n));
    }
    if name == "pkru" {
        return Some(Named::Pkru);
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

/// The registers that a vCPU has.
fn names(has: Extensions) -> Vec<String> {
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
    if has.avx {
        names.extend((0..16).map(|i| format!("ymm{i}")));
    }
    if has.avx512 {
        names.extend((16..32).flat_map(|i| [format!("xmm{i}"), format!("ymm{i}")]));
        names.extend((0..32).map(|i| format!("zmm{i}")));
        names.extend((0..8).map(|i| format!("k{i}")));
    }
    if has.pkru {
        names.push("pkru".into());
    }
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

/// A register that the vCPU has.
fn get(context: &mut Context, register: Named) -> Result<Value> {
    if let Named::Xmm(n) | Named::Ymm(n) | Named::Zmm(n) = register {
        let quarters = width(register) as usize / 128;
        let mut value = vector(context, n)?;
        value[quarters..].fill(0);
        return Ok(value);
    }
    Ok([narrow(context, register)?, 0, 0, 0])
}

/// All of a vector register that there is.
fn vector(context: &mut Context, n: usize) -> Result<Value> {
    let cpu = &mut context.cpu;
    let has = cpu.extensions();
    if n >= 16 {
        return Ok(cpu.extended()?.zmm_upper[n - 16]);
    }
    let second = if has.avx { cpu.ymm_high()?[n] } else { 0 };
    let [third, fourth] = if has.avx512 { cpu.extended()?.zmm_high[n] } else { [0; 2] };
    Ok([cpu.fpu()?.xmm[n], second, third, fourth])
}

/// Sets as much of a vector register as its name stands for.
fn set_vector(context: &mut Context, register: Named, n: usize, value: &Value) -> Result<()> {
    let quarters = width(register) as usize / 128;
    let cpu = &mut context.cpu;
    if n >= 16 {
        let mut extended = cpu.extended()?;
        extended.zmm_upper[n - 16][..quarters].copy_from_slice(&value[..quarters]);
        return cpu.set_extended(&extended);
    }
    let mut fpu = cpu.fpu()?;
    fpu.xmm[n] = value[0];
    cpu.set_fpu(&fpu)?;
    if quarters > 1 {
        let mut high = cpu.ymm_high()?;
        high[n] = value[1];
        cpu.set_ymm_high(&high)?;
    }
    if quarters > 2 {
        let mut extended = cpu.extended()?;
        extended.zmm_high[n] = [value[2], value[3]];
        cpu.set_extended(&extended)?;
    }
    Ok(())
}

fn narrow(context: &mut Context, register: Named) -> Result<u128> {
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
        Named::Mask(n) => cpu.extended()?.masks[n].into(),
        Named::Pkru => cpu.extended()?.pkru.into(),
        Named::Xmm(_) | Named::Ymm(_) | Named::Zmm(_) => 0,
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
        Named::Mask(_) => 64,
        Named::Segment(_, 2) | Named::Fpu(6) | Named::Pkru => 32,
        Named::Segment(..) | Named::Table(_, false) | Named::Fpu(0 | 1 | 3) => 16,
        Named::Fpu(_) => 8,
        Named::Xmm(_) => 128,
        Named::Ymm(_) => 256,
        Named::Zmm(_) => 512,
        Named::St(_) => 80,
    }
}

/// Sets a register to a value that fits its width.
#[allow(clippy::cast_possible_truncation)]
fn set(context: &mut Context, register: Named, wide: &Value) -> Result<()> {
    if let Named::Xmm(n) | Named::Ymm(n) | Named::Zmm(n) = register {
        return set_vector(context, register, n, wide);
    }
    let value = wide[0];
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
        Named::Mask(_) | Named::Pkru => {
            let mut extended = cpu.extended()?;
            match register {
                Named::Mask(n) => extended.masks[n] = value as u64,
                _ => extended.pkru = value as u32,
            }
            cpu.set_extended(&extended)
        }
        Named::Xmm(_) | Named::Ymm(_) | Named::Zmm(_) => Ok(()),
        Named::St(_) | Named::Fpu(_) => {
            let mut fpu = cpu.fpu()?;
            match register {
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

/// A Python integer.
fn to_int<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyInt>> {
    if value[1..] == [0; 3] {
        return Ok(value[0].into_pyobject(py)?);
    }
    let bytes = PyBytes::new(py, value.map(u128::to_le_bytes).as_flattened());
    let int = py.get_type::<PyInt>().call_method1("from_bytes", (bytes, "little"))?;
    Ok(int.cast_into::<PyInt>()?)
}

/// The value of a Python integer that has no more than that many bits.
fn from_int(value: &Bound<'_, PyAny>, bits: u32) -> Option<Value> {
    if bits <= 128 {
        let value = value.extract::<u128>().ok()?;
        return (bits == 128 || value < 1 << bits).then_some([value, 0, 0, 0]);
    }
    let bytes = value.call_method1("to_bytes", (bits / 8, "little")).ok()?;
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.extract::<Vec<u8>>().ok()?.chunks_exact(16)) {
        *word = u128::from_le_bytes(bytes.try_into().expect("sixteen"));
    }
    Some(words)
}

impl PyRegisters {
    /// The registers of `reach`'s vCPU.
    pub fn new(reach: Reach) -> Self {
        Self { reach }
    }

    /// Does something with the register of that name.
    fn with_register<T>(
        &self,
        py: Python<'_>,
        name: &str,
        work: impl FnOnce(&mut Context, Named) -> Result<T>,
    ) -> PyResult<T> {
        let missing = || PyAttributeError::new_err(format!("there is no register {name:?}; dir() lists them"));
        let register = parse(name).ok_or_else(missing)?;
        let done = self.reach.with(|context| {
            let is_there = register.is_had(context.cpu.extensions());
            is_there.then(|| work(context, register)).transpose()
        });
        done.map_err(|e| to_python(py, e))?.ok_or_else(missing)
    }

    /// The names of those that there are, as far as can be told now.
    fn names(&self) -> Vec<String> {
        names(self.reach.with(|context| Ok(context.cpu.extensions())).unwrap_or_default())
    }
}

#[pymethods]
impl PyRegisters {
    fn __getattr__<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyInt>> {
        to_int(py, &self.with_register(py, name, get)?)
    }

    fn __setattr__(&self, py: Python<'_>, name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let bits = parse(name).map_or(0, width);
        let value = (bits == 0).then_some([0; 4]).or_else(|| from_int(value, bits)).ok_or_else(|| {
            let mask =
                if bits <= 128 { format!("{:#x}", u128::MAX >> (128 - bits)) } else { format!("(1 << {bits}) - 1") };
            PyOverflowError::new_err(format!(
                "{name} takes an unsigned integer of {bits} bits; mask a negative one (value & {mask})"
            ))
        })?;
        self.with_register(py, name, |context, register| set(context, register, &value))
    }

    fn __dir__(&self) -> Vec<String> {
        let mut all = self.names();
        all.extend(["pc", "sp", "to_dict"].map(str::to_owned));
        all
    }

    /// All registers by name.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        let values = self.reach.with(|context| {
            names(context.cpu.extensions())
                .into_iter()
                .map(|name| Ok((parse(&name).map(|r| get(context, r)).transpose()?, name)))
                .collect::<Result<Vec<_>>>()
        });
        for (value, name) in values.map_err(|e| to_python(py, e))? {
            dict.set_item(name, value.map(|value| to_int(py, &value)).transpose()?)?;
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
