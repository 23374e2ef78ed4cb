//! Derives VM names from socket paths.

use std::path::Path;

use vmm_core::id::VmId;

/// Returns the names for a VM that is found at `socket`, the preferred one first. The first is the
/// path with dashes for slashes, `tmp-ch.sock` for `/tmp/ch.sock`, if no other path can give the
/// same name. The second has a hash of the whole path at its end, for a first name that is taken.
pub(super) fn names(socket: &Path) -> Vec<VmId> {
    let path = socket.to_string_lossy();
    let plain = path.trim_start_matches('/').replace('/', "-");
    // A dash in the path, or a character that a name cannot hold, would give two paths the same
    // name.
    let is_told = path.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'_'));
    let numbered = numbered(&plain, path.as_bytes());
    is_told.then(|| plain.parse().ok()).flatten().into_iter().chain(numbered).collect()
}

fn numbered(plain: &str, path: &[u8]) -> Option<VmId> {
    let legal = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '_' | '-');
    let suffix = format!("-{:08x}", fnv1a(path));
    let room = VmId::MAX_LEN - suffix.len() - 2;
    // The end of a path is kept, because it differs more often than the beginning.
    let kept: Vec<char> = plain.chars().map(|letter| if legal(letter) { letter } else { '_' }).collect();
    let tail: String = kept[kept.len().saturating_sub(room)..].iter().collect();
    format!(
        "vm{}{suffix}",
        if tail.is_empty() { String::new() } else { format!("-{}", tail.trim_start_matches('-')) }
    )
    .chars()
    .take(VmId::MAX_LEN)
    .collect::<String>()
    .parse()
    .ok()
}

/// Returns the FNV-1a hash of `bytes`, 32 bits. The hash is equal in every version of this program
/// and of its compiler, which the hashes of `std` are not.
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    fn texts(path: &str) -> Vec<String> {
        names(Path::new(path)).into_iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn a_plain_path_becomes_its_vm_name() {
        let names = texts("/tmp/ch.sock");
        assert_eq!(names[0], "tmp-ch.sock");
        assert_eq!(names.len(), 2);
        assert!(names[1].starts_with("vm-tmp-ch.sock-"), "{names:?}");
    }

    #[test]
    fn different_paths_have_different_vm_names() {
        let long = format!("/{}", "x/".repeat(50));
        let paths = ["/tmp/a-b", "/tmp/a/b", "/tmp/ä", "/tmp/ö", "/.hidden", "/_x", long.as_str(), "/a b"];
        let firsts: std::collections::BTreeSet<_> = paths.iter().map(|path| texts(path)[0].clone()).collect();
        assert_eq!(firsts.len(), paths.len(), "{firsts:?}");
    }
}
