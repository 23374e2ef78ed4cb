//! Reads the first bytes of a guest's disk through a chain of qcow2 images.
//!
//! ```text
//!   L1 entry 0 ─► L2 table ─► entry of the cluster ─┬─ a cluster in this file
//!                                                   ├─ compressed data in this file
//!                                                   ├─ zeros
//!                                                   └─ nothing: the backing file has the bytes
//! ```
//!
//! The file may be hostile. Every read has a fixed size, no table is read as a whole, and nothing
//! is followed in a loop.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use super::{Qcow2Header, invalid, read_fully, u64_at};

/// The number of bytes of a sector. Clusters are whole sectors.
const SECTOR: usize = 512;
/// The bits of a table's entry that are an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The bit of an L2 entry for a cluster that reads as zeros (version 3).
const ZEROS: u64 = 1;
/// The bit of an L2 entry for compressed data.
const COMPRESSED: u64 = 1 << 62;

/// The offsets of the tables in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    /// The size of a cluster, as a power of two: 9 to 21.
    pub(super) cluster_bits: u32,
    /// The number of entries of the first table.
    pub(super) l1_entries: u32,
    /// The offset of the first table.
    pub(super) l1_offset: u64,
    /// True if clusters are compressed by another method than deflate.
    pub(super) other_compression: bool,
}

/// The first bytes of a disk, as far as they are known.
#[derive(Debug)]
pub struct Head {
    bytes: Vec<u8>,
    /// The sectors that no file has given yet. In the end they read as zeros.
    missing: Vec<bool>,
}

impl Head {
    /// Creates the head of a disk of which nothing is known: `length` bytes, rounded up to whole
    /// sectors.
    pub fn new(length: usize) -> Self {
        let sectors = length.div_ceil(SECTOR);
        Self { bytes: vec![0; sectors * SECTOR], missing: vec![true; sectors] }
    }

    /// Returns the bytes. Bytes that no file has given are zeros.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes the bytes that are missing from `file`, a raw disk.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn fill_from_raw(&mut self, file: &File) -> io::Result<()> {
        for sector in 0..self.missing.len() {
            self.take(sector, file, (sector * SECTOR) as u64)?;
        }
        Ok(())
    }

    /// Takes the bytes that are missing from `file`, the image with `header`. Bytes that the image
    /// leaves to its backing file stay missing.
    ///
    /// # Errors
    /// Returns the kernel's error; `InvalidData` for tables that contradict themselves, and
    /// `Unsupported` for an image whose data this program cannot read: it is encrypted or in
    /// another file, it has extended entries in its second table, or it is compressed by another
    /// method than deflate.
    pub fn fill_from_qcow2(&mut self, file: &File, header: &Qcow2Header) -> io::Result<()> {
        let Qcow2Header { encrypted, external_data, extended_l2, unknown_features, version, .. } = header;
        if *encrypted || *external_data || *extended_l2 || *unknown_features != 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let tables = header.tables.ok_or_else(|| invalid("its clusters have no valid size".to_owned()))?;
        // One entry of the first table covers at least 32 KiB, so the head is in the first entry.
        let l2 = if tables.l1_entries == 0 { 0 } else { u64_at(file, tables.l1_offset)? & OFFSET };
        if l2 == 0 {
            return Ok(());
        }
        let cluster = 1_usize << tables.cluster_bits;
        for begin in (0..self.bytes.len()).step_by(cluster) {
            let number = (begin / cluster) as u64;
            let entry = u64_at(file, l2.saturating_add(number * 8))?;
            let sectors = begin / SECTOR..self.missing.len().min((begin + cluster) / SECTOR);
            let offset = entry & OFFSET;
            if entry & COMPRESSED != 0 {
                self.decompress(file, tables, entry, sectors)?;
            } else if entry & ZEROS != 0 && *version >= 3 {
                self.missing[sectors].fill(false);
            } else if offset != 0 {
                for sector in sectors {
                    self.take(sector, file, offset.saturating_add((sector * SECTOR - begin) as u64))?;
                }
            }
        }
        Ok(())
    }

    /// Takes one sector, if it is missing, from `file` at `offset`. Bytes behind the end of the
    /// file are zeros.
    fn take(&mut self, sector: usize, file: &File, offset: u64) -> io::Result<()> {
        if std::mem::take(&mut self.missing[sector]) {
            let bytes = &mut self.bytes[sector * SECTOR..][..SECTOR];
            if !read_fully(file, bytes, offset)? {
                bytes.fill(0);
            }
        }
        Ok(())
    }

    /// Takes the missing ones of `sectors`, which begin a cluster, from the compressed data that
    /// `entry` describes.
    fn decompress(
        &mut self,
        file: &File,
        tables: Tables,
        entry: u64,
        sectors: std::ops::Range<usize>,
    ) -> io::Result<()> {
        if tables.other_compression {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // The entry is an offset in bytes of 62 - (cluster_bits - 8) bits, and behind it the number
        // of further sectors that the data touches.
        let count_at = 70 - tables.cluster_bits;
        let offset = entry & ((1 << count_at) - 1);
        let touched = 1 + ((entry & (COMPRESSED - 1)) >> count_at);
        let length = (touched * SECTOR as u64).saturating_sub(offset % SECTOR as u64);
        let data = Region { file, at: offset, left: length };
        let mut plain = vec![0; sectors.len() * SECTOR];
        flate2::read::DeflateDecoder::new(data)
            .read_exact(&mut plain)
            .map_err(|error| invalid(format!("its compressed data cannot be read: {error}")))?;
        for (sector, bytes) in sectors.zip(plain.chunks(SECTOR)) {
            if std::mem::take(&mut self.missing[sector]) {
                self.bytes[sector * SECTOR..][..SECTOR].copy_from_slice(bytes);
            }
        }
        Ok(())
    }
}

/// A part of a file, from `at` on and at most `left` bytes.
struct Region<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Region<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        // The offset has at most 61 bits, so the kernel never sees one with a sign.
        let read = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at = self.at.saturating_add(read as u64);
        self.left = self.left.saturating_sub(read as u64);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::tests::qemu_img;
    use super::super::{MAGIC, read_header};
    use super::*;

    /// Returns the first bytes of the chain of `files`, the image first and a raw file last.
    fn head_of(files: &[&Path]) -> io::Result<Vec<u8>> {
        let mut head = Head::new(5000);
        for path in files {
            let file = File::open(path)?;
            match read_header(&file)? {
                Some(header) => head.fill_from_qcow2(&file, &header)?,
                None => head.fill_from_raw(&file)?,
            }
        }
        Ok(head.bytes().to_vec())
    }

    /// Returns 1 MiB without a pattern of a cluster's length.
    fn contents() -> Vec<u8> {
        (0..1_u32 << 20).map(|offset| (offset % 251) as u8).collect()
    }

    #[test]
    fn the_head_has_the_guests_bytes_in_every_image_layout() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("raw"), contents()).unwrap();
        let expected = &contents()[..10 * SECTOR];
        for options in [
            &["-o", "cluster_size=512"][..],
            &["-o", "cluster_size=4096"],
            &["-o", "cluster_size=2M"],
            &["-o", "compat=0.10"],
            &["-c"],
            &["-c", "-o", "cluster_size=512"],
            &["-c", "-o", "cluster_size=2M"],
        ] {
            let convert = ["convert", "-f", "raw", "-O", "qcow2"];
            qemu_img(dir.path(), &[&convert, options, &["raw", "image"]].concat());
            assert_eq!(head_of(&[&at("image")]).unwrap(), expected, "{options:?}");
        }
        for options in [["-o", "extended_l2=on"], ["-o", "compression_type=zstd"]] {
            let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2"];
            qemu_img(dir.path(), &[&convert[..], &options, &["raw", "image"]].concat());
            let error = head_of(&[&at("image")]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{options:?}");
        }
    }

    #[test]
    fn unallocated_bytes_are_read_from_the_backing_file() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("raw"), contents()).unwrap();
        let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"];
        qemu_img(dir.path(), &[&create[..], &["-b", "raw", "-F", "raw", "middle"]].concat());
        qemu_img(dir.path(), &[&create[..], &["-b", "middle", "-F", "qcow2", "top"]].concat());
        let chain = [at("top"), at("middle"), at("raw")];
        let chain: Vec<&Path> = chain.iter().map(std::path::PathBuf::as_path).collect();
        let mut expected = contents()[..10 * SECTOR].to_vec();
        assert_eq!(head_of(&chain).unwrap(), expected);
        let write = |image: &str, command: &str| {
            let ran = std::process::Command::new("qemu-io")
                .args(["-f", "qcow2", "-c", command, image])
                .current_dir(dir.path())
                .output()
                .expect("qemu-io runs");
            assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        };
        write("middle", "write -P 7 512 1024");
        write("top", "write -z 1024 512");
        expected[512..1024].fill(7);
        expected[1024..1536].fill(0);
        assert_eq!(head_of(&chain).unwrap(), expected);
        // Without its backing file the rest of the image reads as zeros.
        let alone = head_of(&chain[..1]).unwrap();
        assert!(alone.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn invalid_table_offsets_are_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut image = vec![0_u8; 4096];
        image[..4].copy_from_slice(MAGIC);
        image[7] = 3;
        image[23] = 9;
        image[39] = 1;
        image[46] = 4;
        image[103] = 104;
        let read = |l1: u64, l2: u64| {
            let mut image = image.clone();
            image[1024..1032].copy_from_slice(&l1.to_be_bytes());
            image[2048..2056].copy_from_slice(&l2.to_be_bytes());
            std::fs::write(file.path(), image).unwrap();
            head_of(&[file.path()]).map_err(|error| error.kind())
        };
        let zeros = Ok(vec![0; 10 * SECTOR]);
        assert_eq!(read(0, 0), zeros, "no second table");
        assert_eq!(read(2048, 0), zeros, "no cluster");
        assert_eq!(read(2048, OFFSET), zeros, "a cluster behind the end");
        assert_eq!(read(OFFSET, 0), Err(io::ErrorKind::InvalidData), "a table behind the end");
        for compressed in [COMPRESSED, COMPRESSED | 2048, COMPRESSED | (COMPRESSED - 1), u64::MAX] {
            assert_eq!(read(2048, compressed), Err(io::ErrorKind::InvalidData), "{compressed:x}");
        }
        for cluster_bits in [0, 8, 22, 255] {
            image[23] = cluster_bits;
            std::fs::write(file.path(), &image).unwrap();
            let error = head_of(&[file.path()]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{cluster_bits}");
        }
    }
}
