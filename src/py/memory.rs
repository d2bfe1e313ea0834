//! Guest memory as Python sees it.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};

use super::errors::to_python;
use super::hit::Reach;
use crate::error::{Error, GuestFault, Result};
use crate::paging::PagingMode;

/// Memory through a vCPU's page tables, or by guest-physical address.
#[pyclass(name = "Memory", frozen, module = "uhyve._core")]
pub struct PyMemory {
    reach: Reach,
    is_physical: bool,
}

/// The bytes of whatever has a buffer: of an array of larger numbers all of each, not one a number.
fn bytes_of(data: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    match data.cast::<PyBytes>() {
        Ok(bytes) => Ok(bytes.as_bytes().to_vec()),
        Err(_) => PyMemoryView::from(data)?.call_method0("tobytes")?.extract(),
    }
}

impl PyMemory {
    /// Memory as `reach`'s vCPU sees it.
    pub fn new(reach: Reach, is_physical: bool) -> Self {
        Self { reach, is_physical }
    }

    fn get(&self, address: u64, buffer: &mut [u8]) -> Result<()> {
        self.reach.with(|context| {
            let view = self.reach.machine().view();
            if self.is_physical {
                return Ok(view.read_physical(address, buffer)?);
            }
            let mode = PagingMode::from(&context.cpu.system_registers()?);
            Ok(view.read(&mode, address, buffer)?)
        })
    }

    fn put(&self, address: u64, data: &[u8]) -> Result<()> {
        self.reach.with(|context| {
            let view = self.reach.machine().view();
            if self.is_physical {
                return Ok(view.write_physical(address, data)?);
            }
            let mode = PagingMode::from(&context.cpu.system_registers()?);
            Ok(view.write(&mode, address, data)?)
        })
    }

    fn cstring(&self, address: u64, limit: usize) -> Result<Vec<u8>> {
        let mut text = Vec::new();
        while text.len() < limit {
            let at = address.wrapping_add(text.len() as u64);
            // Up to the end of a page, so that a string at the end of what is mapped is read.
            let page = usize::try_from(0x1000 - (at & 0xfff)).unwrap_or(0x1000);
            let mut chunk = vec![0u8; page.min(256).min(limit - text.len())];
            self.get(at, &mut chunk)?;
            if let Some(nul) = chunk.iter().position(|b| *b == 0) {
                text.extend_from_slice(&chunk[..nul]);
                break;
            }
            text.extend_from_slice(&chunk);
        }
        Ok(text)
    }

    fn fault(&self, py: Python<'_>, error: Error) -> PyErr {
        let error = to_python(py, error);
        // A fault knows which vCPU's page tables were walked.
        let _ = error.value(py).setattr("vcpu", self.reach.vcpu());
        error
    }
}

macro_rules! integers {
    ($($read:ident $write:ident $type:ty),*) => {
        #[pymethods]
        impl PyMemory {
            $(
                fn $read(&self, py: Python<'_>, address: u64) -> PyResult<$type> {
                    let mut buffer = [0u8; size_of::<$type>()];
                    self.get(address, &mut buffer).map_err(|e| self.fault(py, e))?;
                    Ok(<$type>::from_le_bytes(buffer))
                }

                fn $write(&self, py: Python<'_>, address: u64, value: $type) -> PyResult<()> {
                    self.put(address, &value.to_le_bytes()).map_err(|e| self.fault(py, e))
                }
            )*

            #[getter]
            fn physical(&self) -> Self {
                Self { reach: self.reach.clone(), is_physical: true }
            }

            fn read<'py>(&self, py: Python<'py>, address: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
                if length as u64 > self.reach.machine().memory.size() {
                    let fault = GuestFault { address, length: length as u64, is_virtual: !self.is_physical };
                    return Err(self.fault(py, fault.into()));
                }
                PyBytes::new_with(py, length, |buffer| self.get(address, buffer).map_err(|e| self.fault(py, e)))
            }

            fn write(&self, py: Python<'_>, address: u64, data: &Bound<'_, PyAny>) -> PyResult<()> {
                self.put(address, &bytes_of(data)?).map_err(|e| self.fault(py, e))
            }

            #[pyo3(signature = (address, limit = 4096))]
            fn read_cstring<'py>(&self, py: Python<'py>, address: u64, limit: usize) -> PyResult<Bound<'py, PyBytes>> {
                let text = self.cstring(address, limit).map_err(|e| self.fault(py, e))?;
                Ok(PyBytes::new(py, &text))
            }

            /// The guest-physical address that a guest-virtual one is mapped to, or None.
            fn translate(&self, py: Python<'_>, address: u64) -> PyResult<Option<u64>> {
                let result = self.reach.with(|context| {
                    let mode = PagingMode::from(&context.cpu.system_registers()?);
                    Ok(crate::paging::translate(&self.reach.machine().memory, &mode, address).ok().map(|t| t.physical))
                });
                result.map_err(|e| to_python(py, e))
            }

            fn __repr__(&self) -> String {
                let kind = if self.is_physical { "physical" } else { "virtual" };
                format!("<Memory, {kind} addresses, of vCPU {}>", self.reach.vcpu())
            }
        }
    };
}

integers! {
    read_u8 write_u8 u8, read_u16 write_u16 u16, read_u32 write_u32 u32, read_u64 write_u64 u64,
    read_i8 write_i8 i8, read_i16 write_i16 i16, read_i32 write_i32 i32, read_i64 write_i64 i64
}
