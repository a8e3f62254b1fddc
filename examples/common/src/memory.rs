//! Memory of this process in bytes, where the system tells (Linux).

/// Held now.
pub fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// The most that was ever held.
pub fn peak() -> Option<u64> {
    status("VmHWM:")
}

fn status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Lets glibc keep memory that is freed.  By default it gives the end of the heap back to the system when more than a hundred
/// kilobytes of it are free, and asks for them again at the next operation on a tensor, page by page.  The limit follows the
/// largest block that was freed, if that is below 32 MB; the block itself is never touched.
#[allow(dead_code)] // tests read this file, too, and leave the allocator alone
pub fn keep_freed() {
    const BLOCK: usize = 24 << 20;
    drop(std::hint::black_box(Vec::<u8>::with_capacity(BLOCK)));
}
