//! Copies between memory that other processes may change and private memory, with relaxed atomic
//! words, so that a race yields a mixture of old and new bytes but never undefined behaviour.
//! (Boehm, MSPC 2012; Rust has no atomic memcpy yet, RFC 3301.)

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// From this many bytes on, checking for wide registers is worth its cost.
const WIDE_BYTES_MIN: usize = 256;

/// Words copied per step of the loops below: enough for the compiler to keep the processor's load
/// and store units busy.
const STEP: usize = 8;

/// Copies shared bytes into private ones, with relaxed atomic loads.
///
/// # Safety
/// `from` must be valid for `length` bytes that are only ever accessed atomically or by other
/// processes, and `to` for `length` bytes that nobody else accesses.
pub(crate) unsafe fn copy_out(from: *mut u8, to: *mut u8, length: usize) {
    // SAFETY: the caller's promise.
    let mut at = unsafe { wide_copy(from, to, length) };
    while at < length && !from.wrapping_add(at).cast::<u64>().is_aligned() {
        // SAFETY: within `length`.
        unsafe { *to.add(at) = byte(from.add(at)).load(Ordering::Relaxed) };
        at += 1;
    }
    while length - at >= 8 * STEP {
        let mut words = [0; STEP];
        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: within `length`, aligned.
            *word = unsafe { self::word(from.add(at + 8 * i)) }.load(Ordering::Relaxed);
        }
        // SAFETY: within `length`; `to` need not be aligned.
        unsafe { to.add(at).cast::<[u64; STEP]>().write_unaligned(words) };
        at += 8 * STEP;
    }
    while length - at >= 8 {
        // SAFETY: within `length`, aligned; `to` need not be.
        unsafe {
            let word = word(from.add(at)).load(Ordering::Relaxed);
            to.add(at).cast::<u64>().write_unaligned(word);
        }
        at += 8;
    }
    while at < length {
        // SAFETY: within `length`.
        unsafe { *to.add(at) = byte(from.add(at)).load(Ordering::Relaxed) };
        at += 1;
    }
}

/// Copies private bytes into shared ones, with relaxed atomic stores.
///
/// # Safety
/// As [`copy_out`], with the sides exchanged.
pub(crate) unsafe fn copy_in(from: *const u8, to: *mut u8, length: usize) {
    // SAFETY: the caller's promise.
    let mut at = unsafe { wide_copy(from, to, length) };
    while at < length && !to.wrapping_add(at).cast::<u64>().is_aligned() {
        // SAFETY: within `length`.
        unsafe { byte(to.add(at)).store(*from.add(at), Ordering::Relaxed) };
        at += 1;
    }
    while length - at >= 8 * STEP {
        // SAFETY: within `length`; `from` need not be aligned.
        let words = unsafe { from.add(at).cast::<[u64; STEP]>().read_unaligned() };
        for (i, word) in words.iter().enumerate() {
            // SAFETY: within `length`, aligned.
            unsafe { self::word(to.add(at + 8 * i)) }.store(*word, Ordering::Relaxed);
        }
        at += 8 * STEP;
    }
    while length - at >= 8 {
        // SAFETY: within `length`; `to` is aligned, `from` need not be.
        unsafe {
            let word = from.add(at).cast::<u64>().read_unaligned();
            self::word(to.add(at)).store(word, Ordering::Relaxed);
        }
        at += 8;
    }
    while at < length {
        // SAFETY: within `length`.
        unsafe { byte(to.add(at)).store(*from.add(at), Ordering::Relaxed) };
        at += 1;
    }
}

/// Copies all whole pieces of 128 bytes through wide registers, if the processor has them; returns
/// how many bytes were copied.
///
/// The compiler cannot see into the assembly block, so it cannot exploit a race: these are plain
/// loads and stores of the processor, and each byte that is read was stored by somebody.
///
/// # Safety
/// Both must be valid for `length` bytes, which do not overlap; whichever is shared is only
/// accessed atomically elsewhere.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn wide_copy(from: *const u8, to: *mut u8, length: usize) -> usize {
    if length < WIDE_BYTES_MIN || !std::arch::is_x86_feature_detected!("avx") {
        return 0;
    }
    let whole = length & !127;
    // SAFETY: the loop touches `whole` bytes of both, which the caller says are valid, and at least
    // one piece of them; the instructions are there, as was just asked, and need no alignment; the
    // registers are named, the stack is not used; the upper halves are cleared again, as code
    // without AVX expects.
    unsafe {
        std::arch::asm!(
            "2:",
            "vmovdqu ymm0, [{from}]",
            "vmovdqu ymm1, [{from} + 32]",
            "vmovdqu ymm2, [{from} + 64]",
            "vmovdqu ymm3, [{from} + 96]",
            "vmovdqu [{to}], ymm0",
            "vmovdqu [{to} + 32], ymm1",
            "vmovdqu [{to} + 64], ymm2",
            "vmovdqu [{to} + 96], ymm3",
            "add {from}, 128",
            "add {to}, 128",
            "sub {left}, 128",
            "jnz 2b",
            "vzeroupper",
            from = inout(reg) from => _,
            to = inout(reg) to => _,
            left = inout(reg) whole => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack),
        );
    }
    whole
}

/// Without wide registers, copying by words is used.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
unsafe fn wide_copy(_from: *const u8, _to: *mut u8, _length: usize) -> usize {
    0
}

/// # Safety
/// `at` must be valid and aligned for eight bytes that are only accessed atomically, for as long as
/// the result is used.
unsafe fn word<'a>(at: *mut u8) -> &'a AtomicU64 {
    // SAFETY: the caller's promise.
    unsafe { AtomicU64::from_ptr(at.cast()) }
}

/// # Safety
/// As [`word`], for one byte.
unsafe fn byte<'a>(at: *mut u8) -> &'a AtomicU8 {
    // SAFETY: the caller's promise.
    unsafe { AtomicU8::from_ptr(at) }
}

#[cfg(test)]
mod tests {
    use super::{copy_in, copy_out};

    /// All alignments of both sides, lengths around every step of the loops, and nothing touched
    /// outside.
    #[test]
    fn every_byte_arrives_and_no_other() {
        let source: Vec<u8> = (0..6000).map(|i| (i * 7 % 251) as u8).collect();
        for length in [0, 1, 7, 8, 9, 63, 64, 65, 130, 2047, 2048, 2049, 4097] {
            for shift in 0..9 {
                for to_shift in 0..9 {
                    let mut from = source.clone();
                    let mut to = vec![0xee; 6000];
                    // SAFETY: both ranges lie within their vectors, which nobody else accesses.
                    unsafe {
                        copy_out(
                            from.as_mut_ptr().add(shift),
                            to.as_mut_ptr().add(to_shift),
                            length,
                        );
                    }
                    check(&source[shift..shift + length], &to, to_shift);
                    let mut to = vec![0xee; 6000];
                    // SAFETY: as above.
                    unsafe {
                        copy_in(
                            from.as_ptr().add(shift),
                            to.as_mut_ptr().add(to_shift),
                            length,
                        );
                    }
                    check(&source[shift..shift + length], &to, to_shift);
                }
            }
        }
    }

    fn check(expected: &[u8], to: &[u8], shift: usize) {
        assert_eq!(&to[shift..shift + expected.len()], expected);
        assert!(to[..shift].iter().all(|byte| *byte == 0xee));
        assert!(
            to[shift + expected.len()..]
                .iter()
                .all(|byte| *byte == 0xee)
        );
    }
}
