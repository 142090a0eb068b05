//! Makes the process's allocator return freed memory to the system.

/// Allocations from this many bytes on come directly from the system and are returned to it; they
/// do not stay in the heap.
#[cfg(target_env = "gnu")]
const LARGE_BYTES: libc::c_int = 512 * 1024;

/// How many bytes may be free at the heap's end before they are returned.
#[cfg(target_env = "gnu")]
const FREE_BYTES_MAX: libc::c_int = 8 * 1024 * 1024;

/// Makes the allocator return freed memory to the system, if it has such settings. After large
/// buffers were freed, the GNU allocator otherwise keeps up to 64 MiB of unused memory (mallopt(3),
/// `M_MMAP_THRESHOLD`).
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets two numbers of the allocator, under the allocator's own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, FREE_BYTES_MAX);
    }
}
