//! The memory of the host.

/// Returns the bytes of memory that the host has, swap not counted.
#[must_use]
pub fn total() -> u64 {
    let info = rustix::system::sysinfo();
    // The kernel counts in units, because a number of bytes may not fit into a narrow integer.
    info.totalram.saturating_mul(u64::from(info.mem_unit.max(1)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_total_memory_equals_the_kernels_number() {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find(|line| line.starts_with("MemTotal:")).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert_eq!(super::total() >> 10, kib);
    }
}
