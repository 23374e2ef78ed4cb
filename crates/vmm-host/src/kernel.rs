//! Telling kernels by how they begin.

/// The bytes of a file that [`kernel_kind`] wants to see. With more it finds more.
pub const HEAD_BYTES: usize = 4096;

/// What kind of kernel a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// An uncompressed ELF kernel for x86-64.
    ElfX86_64 {
        /// Whether it has the note with the PVH entry point, by which Cloud Hypervisor and QEMU start it. `None` where the
        /// notes are not in the part that was read.
        pvh: Option<bool>,
    },
    /// A compressed Linux image for x86.
    BzImage,
    /// Neither.
    Other,
}

/// Says what kind of kernel begins with `head`.
pub fn kernel_kind(head: &[u8]) -> KernelKind {
    if is_elf_x86_64(head) {
        KernelKind::ElfX86_64 { pvh: has_pvh_note(head) }
    } else if head.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && head.get(0x202..0x206) == Some(b"HdrS") {
        KernelKind::BzImage
    } else {
        KernelKind::Other
    }
}

/// 64 bits, little endian, machine 62.
fn is_elf_x86_64(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF\x02\x01") && head.get(18..20) == Some(&[62, 0])
}

/// Program headers of type PT_NOTE.
const PT_NOTE: u64 = 4;

/// `XEN_ELFNOTE_PHYS32_ENTRY`, owned by "Xen".
const PHYS32_ENTRY: u64 = 18;

fn has_pvh_note(head: &[u8]) -> Option<bool> {
    let headers = usize::try_from(number(head, 32, 8)?).ok()?;
    let size = usize::try_from(number(head, 54, 2)?).ok()?;
    let count = usize::try_from(number(head, 56, 2)?).ok()?;
    for index in 0..count {
        let header = headers.checked_add(index.checked_mul(size)?)?;
        if number(head, header, 4)? != PT_NOTE {
            continue;
        }
        let from = usize::try_from(number(head, header.checked_add(8)?, 8)?).ok()?;
        let length = usize::try_from(number(head, header.checked_add(32)?, 8)?).ok()?;
        let notes = head.get(from..from.checked_add(length)?)?;
        if notes_have_pvh(notes) {
            return Some(true);
        }
    }
    Some(false)
}

/// A note is three lengths of four bytes (owner, content, type), then owner and content, each padded to four.
fn notes_have_pvh(mut notes: &[u8]) -> bool {
    let step = |notes: &[u8]| -> Option<(bool, usize)> {
        let owner = usize::try_from(number(notes, 0, 4)?).ok()?;
        let content = usize::try_from(number(notes, 4, 4)?).ok()?;
        let name = notes.get(12..12_usize.checked_add(owner)?)?;
        let is_pvh = name == b"Xen\0" && number(notes, 8, 4)? == PHYS32_ENTRY;
        let next = owner.checked_next_multiple_of(4)?.checked_add(content.checked_next_multiple_of(4)?)?;
        Some((is_pvh, next.checked_add(12)?))
    };
    while let Some((is_pvh, length)) = step(notes) {
        if is_pvh {
            return true;
        }
        notes = notes.get(length..).unwrap_or_default();
    }
    false
}

/// Reads a little-endian number of `length` bytes, at most eight.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let mut padded = [0; 8];
    padded.get_mut(..length)?.copy_from_slice(bytes.get(at..at.checked_add(length)?)?);
    Some(u64::from_le_bytes(padded))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header with one program header of type `kind` behind it, and behind that `notes`.
    fn elf(kind: u8, notes: &[u8]) -> Vec<u8> {
        let mut elf = vec![0; 120];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (elf[18], elf[32], elf[54], elf[56]) = (62, 64, 56, 1);
        (elf[64], elf[72], elf[96]) = (kind, 120, u8::try_from(notes.len()).unwrap());
        elf.extend_from_slice(notes);
        elf
    }

    const OTHER_NOTE: &[u8] = b"\x04\0\0\0\x05\0\0\0\x03\0\0\0GNU\0abcde\0\0\0";
    const PVH_NOTE: &[u8] = b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0\0\0\x10\0";

    #[test]
    fn kernels_are_told_apart() {
        let mut image = vec![0; 0x210];
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(kernel_kind(&image), KernelKind::BzImage);
        assert_eq!(kernel_kind(&image[..0x204]), KernelKind::Other);
        assert_eq!(kernel_kind(b""), KernelKind::Other);
        assert_eq!(kernel_kind(b"#!/bin/sh"), KernelKind::Other);
        let mut for_arm = elf(4, PVH_NOTE);
        for_arm[18] = 183;
        assert_eq!(kernel_kind(&for_arm), KernelKind::Other);
    }

    #[test]
    fn the_pvh_note_is_found_behind_others() {
        let both = [OTHER_NOTE, PVH_NOTE].concat();
        assert_eq!(kernel_kind(&elf(4, &both)), KernelKind::ElfX86_64 { pvh: Some(true) });
        assert_eq!(kernel_kind(&elf(4, OTHER_NOTE)), KernelKind::ElfX86_64 { pvh: Some(false) });
        assert_eq!(kernel_kind(&elf(1, PVH_NOTE)), KernelKind::ElfX86_64 { pvh: Some(false) });
    }

    #[test]
    fn what_was_not_read_is_not_known() {
        let whole = elf(4, PVH_NOTE);
        for length in 20..whole.len() {
            assert_eq!(kernel_kind(&whole[..length]), KernelKind::ElfX86_64 { pvh: None }, "{length}");
        }
    }

    #[test]
    fn hostile_lengths_are_harmless() {
        let mut hostile = elf(4, &[0xff; 16]);
        assert_eq!(kernel_kind(&hostile), KernelKind::ElfX86_64 { pvh: Some(false) });
        hostile[32..40].fill(0xff);
        assert_eq!(kernel_kind(&hostile), KernelKind::ElfX86_64 { pvh: None });
    }
}
