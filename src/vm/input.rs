//! What a guest is told, merged from its image's archive and its user: arguments, environment, files. The device tree
//! and the hypercalls of interface 1 are both made from it, so that they agree.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::boot::{BootParameters, Image};
use crate::error::Result;
use crate::hypercall::CommandLine;
use crate::isolation::{FileMap, Source};

/// Entries of the environment with which kernels that forget its terminating null find one behind it: four are enough
/// on all images of Hermit 0.6.9, by trying 0 to 12.
const QUIRK_ENVIRONMENT: usize = 8;

/// What the guest is told: by its device tree, and by hypercalls that agree with it.
pub(super) struct GuestInput {
    kernel_args: Vec<String>,
    args: Vec<String>,
    environment: Vec<(String, String)>,
    pub(super) files: FileMap,
    mounts: Vec<String>,
    boot_time_ns: i128,
}

impl GuestInput {
    /// Merges what the image's archive wishes with what the user wants.
    pub(super) fn new(
        image: &Image,
        kernel_args: Option<Vec<String>>,
        args: Option<Vec<String>>,
        environment: Vec<(String, String)>,
        own_files: Vec<(String, Source)>,
    ) -> Result<Self> {
        let wish = image.config();
        let mut files: Vec<(String, Source)> =
            image.files().iter().map(|(path, data)| (path.clone(), Source::Bytes(data.clone()))).collect();
        files.retain(|(path, _)| !own_files.iter().any(|(own, _)| own == path));
        files.extend(own_files);
        let files = FileMap::new(files)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            kernel_args: kernel_args.unwrap_or_else(|| wish.map(|w| w.kernel_args.clone()).unwrap_or_default()),
            args: args.unwrap_or_else(|| wish.map(|w| w.app_args.clone()).unwrap_or_default()),
            environment: merge_environment(wish.map_or(&[][..], |w| &w.env_vars), environment),
            mounts: files.mounts(),
            files,
            boot_time_ns: i128::try_from(now.as_nanos()).unwrap_or(0),
        })
    }

    /// The guest boots at that time, in seconds since 1970, whatever the host's clock says.
    pub(super) fn boot_at(&mut self, seconds: u64) {
        self.boot_time_ns = i128::from(seconds) * 1_000_000_000;
    }

    /// What the hypercalls of interface 1 tell; newer kernels read the device tree.
    pub(super) fn command_line(&self, image: &Image) -> Result<CommandLine> {
        if image.interface() == 1 {
            let mut command_line = CommandLine::new(Path::new(image.name()), &self.args, &self.environment)?;
            if image.walks_past_its_environment() {
                command_line.pad_environment(QUIRK_ENVIRONMENT);
            }
            Ok(command_line)
        } else {
            Ok(CommandLine::default())
        }
    }

    pub(super) fn parameters(&self, cpus: u32) -> BootParameters<'_> {
        BootParameters {
            cpus,
            tsc_khz: 0,
            boot_time_ns: self.boot_time_ns,
            kernel_args: &self.kernel_args,
            app_args: &self.args,
            environment: &self.environment,
            mounts: &self.mounts,
            has_pci: true,
        }
    }
}

fn merge_environment(image: &[(String, String)], own: Vec<(String, String)>) -> Vec<(String, String)> {
    let kept = image.iter().filter(|(key, _)| !own.iter().any(|(k, _)| k == key)).cloned();
    let mut merged: Vec<_> = kept.collect();
    merged.extend(own);
    merged
}
