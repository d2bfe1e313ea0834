//! Errors in the guest's numbers. The interface has ten of them.

use nix::errno::Errno;
use uhyve_interface::v2::parameters as abi;

/// What the calls with an integer result answer for any other error: upstream's −1, which is also `EPERM`.
pub(super) const OTHER: i32 = 1;
/// What the calls with an enum for a result answer for any other error.
pub(super) const OTHER_OF_ENUM: i32 = abi::EIO;

/// The guest's positive error number for a host error, `other` if the interface has none.
pub(super) fn guest_errno(error: Errno, other: i32) -> i32 {
    match error {
        Errno::EBADF => abi::EBADF,
        Errno::EEXIST => abi::EEXIST,
        Errno::EFAULT => abi::EFAULT,
        Errno::EINVAL => abi::EINVAL,
        Errno::EIO => abi::EIO,
        Errno::EISDIR => abi::EISDIR,
        Errno::EOVERFLOW => abi::EOVERFLOW,
        Errno::ENOENT => abi::ENOENT,
        Errno::EROFS => abi::EROFS,
        // EXDEV and ELOOP: the path leads out of what is mapped.
        Errno::EPERM | Errno::EACCES | Errno::EXDEV | Errno::ELOOP => abi::EPERM,
        _ => other,
    }
}
