//! The Python module `uhyve._core`. Nothing outside of this folder knows Python. Classes are few, frozen and `Sync`; the
//! package's Python half gives them their public shape.

mod bench;
mod breakpoint;
mod callbacks;
mod condition;
mod errors;
mod gdb;
mod hit;
mod image;
mod machine;
mod memory;
mod probe;
mod registers;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // To standard error, never through Python: a message may come while its thread holds a lock. RUST_LOG chooses.
    let _ = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(crate::DEFAULT_LOG)).try_init();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<machine::PyMachine>()?;
    module.add_class::<image::PyImage>()?;
    module.add_class::<breakpoint::PyBreakpoint>()?;
    module.add_class::<hit::PyHit>()?;
    module.add_class::<registers::PyRegisters>()?;
    module.add_class::<memory::PyMemory>()?;
    module.add_class::<gdb::PyGdbServer>()?;
    module.add_function(wrap_pyfunction!(bench::bench_clock, module)?)?;
    module.add_function(wrap_pyfunction!(bench::bench_crowd, module)?)?;
    module.add_function(wrap_pyfunction!(bench::bench_floor, module)?)?;
    module.add_function(wrap_pyfunction!(probe::choose_backend, module)?)?;
    module.add_function(wrap_pyfunction!(probe::probe_kvm, module)?)?;
    module.add_function(wrap_pyfunction!(probe::probe_soft, module)?)?;
    condition::register(module)
}
