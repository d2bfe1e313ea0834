//! The condition language's border: the tables that the Python compiler must agree with, and an evaluator for tests
//! and for trying a condition without a VM.

use std::collections::HashMap;

use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::breakpoint::program;
use super::errors::to_python;
use crate::debug::condition::{Context, EvaluateError, OPCODES};
use crate::error::{Error, GuestFault};
use crate::registers::RegisterId;

/// Adds the tables and the evaluator to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let opcodes = PyDict::new(module.py());
    for (name, code) in OPCODES {
        opcodes.set_item(name, code)?;
    }
    let registers = PyDict::new(module.py());
    for (name, id) in RegisterId::NAMED {
        registers.set_item(name, id.index())?;
    }
    module.add("CONDITION_OPCODES", opcodes)?;
    module.add("CONDITION_REGISTERS", registers)?;
    module.add_function(wrap_pyfunction!(evaluate_condition, module)?)
}

/// A vCPU made of dictionaries.
struct Values {
    registers: HashMap<RegisterId, u64>,
    memory: HashMap<u64, Vec<u8>>,
    vcpu: u32,
    hits: u64,
    reached: u64,
}

impl Context for Values {
    fn register(&mut self, register: RegisterId) -> Result<u64, EvaluateError> {
        Ok(self.registers.get(&register).copied().unwrap_or(0))
    }

    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), GuestFault> {
        let fault = GuestFault { address, length: buffer.len() as u64, is_virtual: true };
        let piece = self.memory.iter().find_map(|(start, bytes)| {
            let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
            bytes.get(offset..offset.checked_add(buffer.len())?)
        });
        buffer.copy_from_slice(piece.ok_or(fault)?);
        Ok(())
    }

    fn vcpu(&self) -> u32 {
        self.vcpu
    }

    fn hits(&self) -> u64 {
        self.hits
    }

    fn reached(&self) -> u64 {
        self.reached
    }
}

/// Runs a compiled condition on given registers (0 where not given) and memory (pieces by address).
#[pyfunction]
#[pyo3(signature = (code, constants, registers, memory, *, vcpu = 0, hits = 0, reached = 0))]
#[allow(clippy::too_many_arguments)]
fn evaluate_condition(
    py: Python<'_>,
    code: Vec<u8>,
    constants: Vec<i128>,
    registers: HashMap<String, u64>,
    memory: HashMap<u64, Vec<u8>>,
    vcpu: u32,
    hits: u64,
    reached: u64,
) -> PyResult<bool> {
    let (_, program) = program((String::new(), code, constants)).map_err(|e| to_python(py, e))?;
    let registers = registers
        .into_iter()
        .map(|(name, value)| {
            RegisterId::from_name(&name).map(|id| (id, value)).ok_or_else(|| PyKeyError::new_err(name))
        })
        .collect::<PyResult<_>>()?;
    let mut values = Values { registers, memory, vcpu, hits, reached };
    program.evaluate(&mut values).map_err(|e| to_python(py, Error::Condition(e.to_string())))
}
