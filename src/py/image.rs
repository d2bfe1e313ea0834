//! A Hermit image as Python sees it.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;

use super::errors::detached;
use crate::boot::Image;

/// A parsed image.
#[pyclass(name = "Image", frozen, module = "uhyve._core")]
pub struct PyImage {
    /// The image.
    pub inner: Arc<Image>,
}

#[pymethods]
impl PyImage {
    /// Reads an image file.
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        detached(py, || Image::open(&path)).map(|image| Self { inner: Arc::new(image) })
    }

    /// Parses an image in memory.
    #[staticmethod]
    fn from_bytes(py: Python<'_>, name: &str, data: Vec<u8>) -> PyResult<Self> {
        detached(py, || Image::from_bytes(name, data)).map(|image| Self { inner: Arc::new(image) })
    }

    /// The demo guest that is part of this package.
    #[staticmethod]
    fn demo(py: Python<'_>) -> PyResult<Self> {
        detached(py, || Image::from_bytes("demo", crate::demo::IMAGE.to_vec()))
            .map(|image| Self { inner: Arc::new(image) })
    }

    /// The guest of `uhyve bench`.
    #[staticmethod]
    fn bench(py: Python<'_>) -> PyResult<Self> {
        detached(py, || Image::from_bytes("bench", crate::demo::BENCH.to_vec()))
            .map(|image| Self { inner: Arc::new(image) })
    }

    #[getter]
    fn name(&self) -> &str {
        self.inner.name()
    }

    #[getter]
    fn interface(&self) -> u32 {
        self.inner.interface()
    }

    #[getter]
    fn entry_version(&self) -> u8 {
        self.inner.entry_version()
    }

    #[getter]
    fn hermit_version(&self) -> Option<String> {
        self.inner.hermit_version().map(|v| v.to_string())
    }

    #[getter]
    fn relocatable(&self) -> bool {
        self.inner.is_relocatable()
    }

    #[getter]
    fn files(&self) -> Vec<String> {
        self.inner.files().iter().map(|(path, _)| path.clone()).collect()
    }
}
