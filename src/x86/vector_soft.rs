//! Vector operations that are computed here, because processors of different vendors compute them differently: the
//! approximations of 1/x and 1/√x. The manuals only bound their relative error by 1.5 × 2⁻¹²; here the exact result is
//! rounded to 12 bits, so that a guest sees the same numbers on every host. They ignore MXCSR and raise no exceptions.

use super::vector::Control;

/// Fraction bits of a result.
const KEPT: u32 = 12;
/// Fraction bits of single precision.
const FRACTION: u32 = 23;
/// A result's sign.
const SIGN: u32 = 1 << 31;
/// Exponent of infinities and NaNs.
const INFINITY: u32 = 0xff << FRACTION;
/// The quiet NaN that an invalid operation makes.
const DEFAULT_NAN: u32 = SIGN | INFINITY | QUIET;
/// Makes a NaN quiet.
const QUIET: u32 = 1 << (FRACTION - 1);

/// RCPPS.
pub(super) unsafe fn reciprocal_packed(dst: *mut u128, src: *const u128, _control: *mut Control) {
    // SAFETY: the caller's contract is this function's.
    unsafe { packed(dst, src, reciprocal) }
}

/// RCPSS.
pub(super) unsafe fn reciprocal_scalar(dst: *mut u128, src: *const u128, _control: *mut Control) {
    // SAFETY: the caller's contract is this function's.
    unsafe { scalar(dst, src, reciprocal) }
}

/// RSQRTPS.
pub(super) unsafe fn reciprocal_root_packed(dst: *mut u128, src: *const u128, _control: *mut Control) {
    // SAFETY: the caller's contract is this function's.
    unsafe { packed(dst, src, reciprocal_root) }
}

/// RSQRTSS.
pub(super) unsafe fn reciprocal_root_scalar(dst: *mut u128, src: *const u128, _control: *mut Control) {
    // SAFETY: the caller's contract is this function's.
    unsafe { scalar(dst, src, reciprocal_root) }
}

/// Element `n` of a vector.
fn element(vector: u128, n: usize) -> u32 {
    let bytes = vector.to_le_bytes();
    u32::from_le_bytes(bytes[4 * n..4 * n + 4].try_into().expect("4 bytes"))
}

/// # Safety
/// `dst` and `src` are valid for 16 bytes.
unsafe fn packed(dst: *mut u128, src: *const u128, compute: fn(u32) -> u32) {
    // SAFETY: valid by contract, aligned or not.
    let source = unsafe { src.read_unaligned() };
    let result = (0..4).fold(0, |result, n| result | u128::from(compute(element(source, n))) << (32 * n));
    // SAFETY: as above.
    unsafe { dst.write_unaligned(result) }
}

/// # Safety
/// `dst` and `src` are valid for 16 bytes.
unsafe fn scalar(dst: *mut u128, src: *const u128, compute: fn(u32) -> u32) {
    // SAFETY: valid by contract, aligned or not.
    let (old, source) = unsafe { (dst.read_unaligned(), src.read_unaligned()) };
    let result = old & !u128::from(u32::MAX) | u128::from(compute(element(source, 0)));
    // SAFETY: as above.
    unsafe { dst.write_unaligned(result) }
}

/// Whether the number is zero or so small that it is treated as zero.
fn is_zero(bits: u32) -> bool {
    bits & INFINITY == 0
}

fn is_nan(bits: u32) -> bool {
    bits & !SIGN > INFINITY
}

/// A positive number that single precision can hold, rounded to [`KEPT`] fraction bits.
fn rounded(value: f64) -> u32 {
    let unused = f64::MANTISSA_DIGITS - 1 - KEPT;
    let kept = (value.to_bits() + (1 << (unused - 1))) >> unused;
    // Exponents of double precision are biased by 1023, those of single precision by 127.
    let rebiased = kept - ((1023 - 127) << KEPT);
    u32::try_from(rebiased << (FRACTION - KEPT)).expect("a positive number's bits")
}

/// 1/x; a result below the smallest normal number is zero.
fn reciprocal(bits: u32) -> u32 {
    let sign = bits & SIGN;
    if is_nan(bits) {
        return bits | QUIET;
    }
    if is_zero(bits) {
        return sign | INFINITY;
    }
    let exact = 1.0 / f64::from(f32::from_bits(bits & !SIGN));
    if exact < f64::from(f32::MIN_POSITIVE) { sign } else { sign | rounded(exact) }
}

/// 1/√x.
fn reciprocal_root(bits: u32) -> u32 {
    if is_nan(bits) {
        return bits | QUIET;
    }
    if is_zero(bits) {
        return bits & SIGN | INFINITY;
    }
    if bits & SIGN != 0 {
        return DEFAULT_NAN;
    }
    if bits == INFINITY {
        return 0;
    }
    rounded(1.0 / f64::from(f32::from_bits(bits)).sqrt())
}
