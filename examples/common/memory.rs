//! Memory of this process in bytes, where the system tells (Linux).

/// Held now.
pub(crate) fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// The most that was ever held.
pub(crate) fn peak() -> Option<u64> {
    status("VmHWM:")
}

fn status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
