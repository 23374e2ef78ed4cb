//! Recognises partition tables by the first sectors of a disk.

/// The number of bytes of a disk that [`has_table`] needs. The header of a GPT begins in the second
/// sector, which has 512 or 4,096 bytes.
pub const HEAD_BYTES: usize = 4096 + 8;

/// The offset of the four entries of a DOS partition table.
const ENTRIES: usize = 446;

/// Returns true if the disk that begins with `head` has a partition table, GPT or DOS.
pub fn has_table(head: &[u8]) -> bool {
    let gpt = |at: usize| head.get(at..at + 8) == Some(b"EFI PART");
    gpt(512) || gpt(4096) || has_dos_table(head)
}

/// Returns true if the four entries are those of a DOS partition table. The boot sector of a FAT or
/// NTFS file system has the same signature, and code in the place of the entries.
fn has_dos_table(head: &[u8]) -> bool {
    if head.get(510..512) != Some(&[0x55, 0xaa]) {
        return false;
    }
    let entries: Vec<&[u8]> = head[ENTRIES..510].chunks(16).collect();
    let in_use = |entry: &&&[u8]| entry[4] != 0;
    let sane = |entry: &&[u8]| {
        let [begin, length] = [8, 12].map(|at| entry[at..at + 4] != [0; 4]);
        matches!(entry[0], 0 | 0x80) && (entry[4] == 0 || (begin && length))
    };
    entries.iter().all(sane) && entries.iter().any(|entry| in_use(&entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dos(entry: [u8; 16]) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        head[ENTRIES..ENTRIES + 16].copy_from_slice(&entry);
        head[510..512].copy_from_slice(&[0x55, 0xaa]);
        head
    }

    #[test]
    fn partition_tables_differ_from_file_systems() {
        let linux = [0x80, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 2, 0];
        assert!(has_table(&dos(linux)));
        for at in [512, 4096] {
            let mut gpt = vec![0; HEAD_BYTES];
            gpt[at..at + 8].copy_from_slice(b"EFI PART");
            assert!(has_table(&gpt), "{at}");
        }
        assert!(!has_table(&dos([0; 16])), "no entry is in use");
        assert!(!has_table(&dos([0xeb; 16])), "code");
        let mut unsigned = dos(linux);
        unsigned[511] = 0;
        assert!(!has_table(&unsigned));
        let mut ext4 = vec![0; HEAD_BYTES];
        ext4[1080..1082].copy_from_slice(&[0x53, 0xef]);
        assert!(!has_table(&ext4));
        assert!(!has_table(b""), "an empty disk");
    }
}
