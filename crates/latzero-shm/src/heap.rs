//! What the process's allocator does with memory that is given back to it.

/// From this many bytes on, memory comes from the system and goes back to it; it does not stay in
/// the heap.
#[cfg(target_env = "gnu")]
const LARGE_BYTES: libc::c_int = 512 * 1024;

/// This much may be free at the heap's end before it goes back.
#[cfg(target_env = "gnu")]
const FREE_BYTES_MAX: libc::c_int = 8 * 1024 * 1024;

/// Returns freed memory to the system, as far as the allocator can be told so. The GNU allocator
/// learns from large buffers that are freed to keep up to 64 MiB that nobody holds (mallopt(3),
/// `M_MMAP_THRESHOLD`).
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets two numbers of the allocator, under the allocator's own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, FREE_BYTES_MAX);
    }
}
