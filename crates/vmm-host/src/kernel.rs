//! Recognises kernels by their headers, which may lie anywhere in the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::files;

/// The most program headers that are examined. Linux has about five.
const MAX_HEADERS: u64 = 512;
/// The most bytes of one note segment that are read. Linux has some hundred.
const MAX_NOTES: u64 = 1 << 20;
/// The length of an ELF header, in bytes. The header states the length of a program header.
const ELF_HEADER: usize = 64;
/// The length of a program header of a 64-bit ELF file, in bytes.
const PROGRAM_HEADER: usize = 56;
/// The length of the part of a bzImage that distinguishes it from other files, in bytes.
const BZ_IMAGE: usize = 0x206;

/// The kind of kernel that a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// An uncompressed ELF kernel for x86-64.
    ElfX86_64 {
        /// True if the kernel has the note with the PVH entry point, by which Cloud Hypervisor and
        /// QEMU start it.
        pvh: bool,
    },
    /// A compressed Linux image for x86.
    BzImage,
    /// A file of another format.
    Other,
}

/// Returns the kind of kernel in the regular file or block device at `path`. Blocks.
///
/// # Errors
/// Returns the kernel's error; `InvalidInput` for any other kind of file.
pub fn read_kind(path: &Path) -> io::Result<KernelKind> {
    kind_of(&files::open_regular_or_block(path)?)
}

fn kind_of(file: &File) -> io::Result<KernelKind> {
    let head = read(file, 0, BZ_IMAGE)?;
    Ok(if is_elf_x86_64(&head) {
        KernelKind::ElfX86_64 { pvh: has_pvh_note(file, &head)? }
    } else if head.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && head.get(0x202..0x206) == Some(b"HdrS") {
        KernelKind::BzImage
    } else {
        KernelKind::Other
    })
}

/// Reads `length` bytes from `offset`, or fewer where the file is shorter.
fn read(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut filled = 0;
    while filled < length {
        let at = offset.saturating_add(filled as u64);
        // No file reaches beyond a signed offset, and the kernel reports such an offset as invalid.
        if i64::try_from(at).is_err() {
            break;
        }
        match file.read_at(&mut bytes[filled..], at) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// Returns true for an ELF header with 64 bits, little endian, and machine 62 (x86-64).
fn is_elf_x86_64(head: &[u8]) -> bool {
    head.len() >= ELF_HEADER && head.starts_with(b"\x7fELF\x02\x01") && head.get(18..20) == Some(&[62, 0])
}

/// The type of the program headers of note segments.
const PT_NOTE: u64 = 4;

/// `XEN_ELFNOTE_PHYS32_ENTRY`, owned by "Xen".
const PHYS32_ENTRY: u64 = 18;

/// Searches the note segments for the PVH entry point. Program headers state the offset of the
/// segments.
fn has_pvh_note(file: &File, head: &[u8]) -> io::Result<bool> {
    let field = |at, length| number(head, at, length).unwrap_or_default();
    let (headers, size, count) = (field(32, 8), field(54, 2), field(56, 2));
    for index in 0..count.min(MAX_HEADERS) {
        let header = read(file, headers.saturating_add(index * size), PROGRAM_HEADER)?;
        if header.len() < PROGRAM_HEADER {
            break;
        }
        let field = |at| number(&header, at, 8).unwrap_or_default();
        if number(&header, 0, 4) != Some(PT_NOTE) {
            continue;
        }
        let length = usize::try_from(field(32).min(MAX_NOTES)).unwrap_or_default();
        if notes_have_pvh(&read(file, field(8), length)?) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Searches notes for the PVH entry point. A note has three numbers of four bytes (length of the
/// owner, length of the content, type), and then owner and content, each padded to four bytes.
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

    /// An ELF file with one program header of type `kind` at `header`, and `notes` at `at`.
    fn elf_with(kind: u8, notes: &[u8], header: usize, at: usize) -> Vec<u8> {
        let mut elf = vec![0; (header + 56).max(at + notes.len())];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (elf[18], elf[54], elf[56]) = (62, 56, 1);
        elf[32..40].copy_from_slice(&(header as u64).to_le_bytes());
        elf[header] = kind;
        elf[header + 8..header + 16].copy_from_slice(&(at as u64).to_le_bytes());
        elf[header + 32] = u8::try_from(notes.len()).unwrap();
        elf[at..at + notes.len()].copy_from_slice(notes);
        elf
    }

    fn elf(kind: u8, notes: &[u8]) -> Vec<u8> {
        elf_with(kind, notes, 64, 120)
    }

    fn kind(bytes: &[u8]) -> KernelKind {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        read_kind(file.path()).unwrap()
    }

    const OTHER_NOTE: &[u8] = b"\x04\0\0\0\x05\0\0\0\x03\0\0\0GNU\0abcde\0\0\0";
    const PVH_NOTE: &[u8] = b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0\0\0\x10\0";
    const PVH: KernelKind = KernelKind::ElfX86_64 { pvh: true };
    const PLAIN: KernelKind = KernelKind::ElfX86_64 { pvh: false };

    #[test]
    fn kernel_formats_are_recognised() {
        let mut image = vec![0; 0x210];
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(kind(&image), KernelKind::BzImage);
        assert_eq!(kind(&image[..0x204]), KernelKind::Other);
        assert_eq!(kind(b""), KernelKind::Other);
        assert_eq!(kind(b"#!/bin/sh"), KernelKind::Other);
        let mut for_arm = elf(4, PVH_NOTE);
        for_arm[18] = 183;
        assert_eq!(kind(&for_arm), KernelKind::Other);
    }

    #[test]
    fn the_pvh_note_is_found_after_other_notes() {
        let both = [OTHER_NOTE, PVH_NOTE].concat();
        assert_eq!(kind(&elf(4, &both)), PVH);
        assert_eq!(kind(&elf(4, OTHER_NOTE)), PLAIN);
        assert_eq!(kind(&elf(1, PVH_NOTE)), PLAIN);
    }

    #[test]
    fn the_pvh_note_is_found_at_every_file_offset() {
        for (header, at) in [(64, 5_000), (64, 40_000_000), (9_000, 64), (30_000_000, 20_000_000)] {
            assert_eq!(kind(&elf_with(4, PVH_NOTE, header, at)), PVH, "{header} {at}");
            assert_eq!(kind(&elf_with(4, OTHER_NOTE, header, at)), PLAIN, "{header} {at}");
        }
    }

    #[test]
    fn a_truncated_kernel_has_no_pvh_note() {
        let whole = elf(4, PVH_NOTE);
        // The owner's name is the last part of a note that counts.
        for length in ELF_HEADER..120 + 12 + 4 {
            assert_eq!(kind(&whole[..length]), PLAIN, "{length}");
        }
        assert_eq!(kind(&whole[..ELF_HEADER - 1]), KernelKind::Other);
    }

    #[test]
    fn huge_lengths_in_a_kernel_file_are_harmless() {
        let mut hostile = elf(4, &[0xff; 16]);
        assert_eq!(kind(&hostile), PLAIN);
        for at in [96, 72, 56, 54, 32] {
            hostile[at..at + 2].fill(0xff);
            assert_eq!(kind(&hostile), PLAIN, "{at}");
        }
        hostile[32..40].fill(0xff);
        assert_eq!(kind(&hostile), PLAIN);
    }
}
