//! Reads the header of a qcow2 image: the backing file, and whether the guest's data lies in this
//! file alone.
//!
//! ```text
//!   byte 0   magic "QFI\xfb"          8   offset of the backing file's name (0: none)
//!        4   version (2 or 3)        16   length of that name, at most 1023 bytes
//!       20   bits of a cluster's size
//!       32   encryption (0: none)    72   incompatible features   (version 3)
//!       36   entries of the L1 table 40   offset of the L1 table
//!                                   100   length of the header    (version 3; 72 in version 2)
//!   then extensions, each a type, a length and data, which fill up whole 8 bytes; type 0 ends them
//! ```
//!
//! A guest cannot write the header of its image, because the guest sees the image's contents only.
//! [`Head`] reads the first bytes of these contents.

mod head;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub use head::{Head, Tables};

/// The first bytes of every image.
pub const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Length of the header of version 2, in bytes.
const HEADER_V2: u64 = 72;
/// Length of the fixed part of the header of version 3, in bytes.
const HEADER_V3: u64 = 104;
/// The longest name of a backing file, in bytes.
const MAX_NAME: u32 = 1023;
/// The most extensions that are read. QEMU writes a handful.
const MAX_EXTENSIONS: usize = 64;
/// The bit of the incompatible features for an image that was not closed. Every backend opens such
/// an image.
const DIRTY: u64 = 1;
/// The bit for an image that contradicts itself. No backend opens such an image for writing.
const CORRUPT: u64 = 1 << 1;
/// The bit for data that lies in another file.
const EXTERNAL_DATA: u64 = 1 << 2;
/// The bit for clusters that are compressed by the method in the header.
const COMPRESSION: u64 = 1 << 3;
/// The bit for entries of the second table that are twice as long.
const EXTENDED_L2: u64 = 1 << 4;
/// The bits that this program knows.
const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2;
/// The number of the last method of compression that is known, zstd.
const ZSTD: u8 = 1;
/// The sizes of a cluster, as powers of two.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// The type of the extension that names the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// The facts of one image's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    /// The version of the format, 2 or 3.
    pub version: u32,
    /// The file that the image is based on.
    pub backing: Option<Backing>,
    /// True if the guest's data is encrypted.
    pub encrypted: bool,
    /// True if the guest's data lies in another file, which the header names.
    pub external_data: bool,
    /// True if the image is marked as one whose tables contradict themselves.
    pub corrupt: bool,
    /// True if the image has extended entries in its second table, which Cloud Hypervisor does not
    /// read.
    pub extended_l2: bool,
    /// The unknown features without which the image cannot be read, as bits.
    pub unknown_features: u64,
    /// The method of compression, where this program does not know it.
    pub unknown_compression: Option<u8>,
    /// The offsets of the tables. `None` if the size of a cluster is not valid.
    pub tables: Option<Tables>,
}

/// The file that an image is based on, as the header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name: a path, or another form that QEMU accepts.
    pub name: String,
    /// The format, where the header states it.
    pub format: Option<String>,
}

impl Backing {
    /// Returns the path of the backing file of the image at `image`. A relative name begins at the
    /// image's folder.
    ///
    /// Returns `None` for a name that is no path: a URL, or QEMU's `json:` and `driver:` forms.
    pub fn path(&self, image: &Path) -> Option<PathBuf> {
        let name = self.name.strip_prefix("file:").unwrap_or(&self.name);
        let protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
        if name.is_empty() || protocol || name.starts_with("//") {
            return None;
        }
        Some(image.parent().unwrap_or(Path::new("/")).join(name))
    }
}

/// Reads the header of an open file; `None` where the file is no qcow2 image.
///
/// # Errors
/// Returns the kernel's error, and `InvalidData` for a header that contradicts itself.
pub fn read_header(file: &File) -> io::Result<Option<Qcow2Header>> {
    let mut magic = [0; 4];
    if !read_fully(file, &mut magic, 0)? || magic != *MAGIC {
        return Ok(None);
    }
    let version = u32_at(file, 4)?;
    let (features, length) = match version {
        2 => (0, HEADER_V2),
        3 => {
            let length = u64::from(u32_at(file, 100)?);
            if length < HEADER_V3 || length % 8 != 0 {
                return Err(invalid(format!("its header says that it is {length} bytes long")));
            }
            (u64_at(file, 72)?, length)
        }
        other => return Err(invalid(format!("it has version {other} of the format; 2 and 3 are known"))),
    };
    let name_at = u64_at(file, 8)?;
    let backing = match name_at {
        0 => None,
        _ => Some(Backing { name: name(file, name_at)?, format: backing_format(file, length, name_at)? }),
    };
    let compression = compression(file, features)?;
    Ok(Some(Qcow2Header {
        version,
        backing,
        encrypted: u32_at(file, 32)? != 0,
        external_data: features & EXTERNAL_DATA != 0,
        corrupt: features & CORRUPT != 0,
        extended_l2: features & EXTENDED_L2 != 0,
        unknown_features: features & !KNOWN,
        unknown_compression: Some(compression).filter(|method| *method > ZSTD),
        tables: tables(file, compression)?,
    }))
}

/// Returns the method of compression that a header of version 3 names; 0, deflate, if it names
/// none.
fn compression(file: &File, features: u64) -> io::Result<u8> {
    if features & COMPRESSION == 0 {
        return Ok(0);
    }
    let mut method = [0];
    match read_fully(file, &mut method, HEADER_V3)? {
        true => Ok(method[0]),
        false => Err(invalid("its header is cut short".to_owned())),
    }
}

/// Returns the offsets of the tables, or `None` if the size of a cluster is not valid.
fn tables(file: &File, compression: u8) -> io::Result<Option<Tables>> {
    let tables = Tables {
        cluster_bits: u32_at(file, 20)?,
        l1_entries: u32_at(file, 36)?,
        l1_offset: u64_at(file, 40)?,
        other_compression: compression != 0,
    };
    Ok(Some(tables).filter(|tables| CLUSTER_BITS.contains(&tables.cluster_bits)))
}

fn name(file: &File, offset: u64) -> io::Result<String> {
    let length = u32_at(file, 16)?;
    if length > MAX_NAME {
        return Err(invalid(format!("the name of its backing file is {length} bytes long")));
    }
    text_at(file, offset, length)
}

/// Reads the extension that names the backing file's format. The extensions end where the backing
/// file's name begins.
fn backing_format(file: &File, header: u64, end: u64) -> io::Result<Option<String>> {
    let mut at = header;
    for _ in 0..MAX_EXTENSIONS {
        if at.saturating_add(8) > end {
            return Ok(None);
        }
        let (kind, length) = (u32_at(file, at)?, u32_at(file, at + 4)?);
        match kind {
            0 => return Ok(None),
            BACKING_FORMAT if length > MAX_NAME => {
                return Err(invalid(format!("the format of its backing file is {length} bytes long")));
            }
            BACKING_FORMAT => return text_at(file, at + 8, length).map(Some),
            _ => at = at.saturating_add(8).saturating_add(u64::from(length).next_multiple_of(8)),
        }
    }
    Err(invalid(format!("its header has more than {MAX_EXTENSIONS} extensions")))
}

fn text_at(file: &File, offset: u64, length: u32) -> io::Result<String> {
    let mut text = vec![0; length as usize];
    if !read_fully(file, &mut text, offset)? {
        return Err(invalid("its header is cut short".to_owned()));
    }
    String::from_utf8(text).map_err(|_| invalid("its header has a name that is not UTF-8".to_owned()))
}

fn u32_at(file: &File, offset: u64) -> io::Result<u32> {
    let mut bytes = [0; 4];
    match read_fully(file, &mut bytes, offset)? {
        true => Ok(u32::from_be_bytes(bytes)),
        false => Err(invalid("its header is cut short".to_owned())),
    }
}

fn u64_at(file: &File, offset: u64) -> io::Result<u64> {
    Ok(u64::from(u32_at(file, offset)?) << 32 | u64::from(u32_at(file, offset + 4)?))
}

/// Fills `buffer` from `offset`; false where the file is shorter.
fn read_fully(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
    // No file reaches beyond a signed offset, and the kernel reports such an offset as invalid.
    if i64::try_from(offset).is_err() {
        return Ok(false);
    }
    match file.read_exact_at(buffer, offset) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    pub(super) fn qemu_img(dir: &Path, arguments: &[&str]) {
        let ran = Command::new("qemu-img").args(arguments).current_dir(dir).output().expect("qemu-img runs");
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    }

    fn header(path: &Path) -> io::Result<Option<Qcow2Header>> {
        read_header(&File::open(path).unwrap())
    }

    #[test]
    fn headers_that_qemu_img_writes_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "alone", "1M"]);
        let alone = header(&at("alone")).unwrap().unwrap();
        let expected = Qcow2Header {
            version: 3,
            backing: None,
            encrypted: false,
            external_data: false,
            corrupt: false,
            extended_l2: false,
            unknown_features: 0,
            unknown_compression: None,
            tables: alone.tables,
        };
        assert_eq!(alone, expected);
        assert_eq!(alone.tables.unwrap().cluster_bits, 16);
        for (option, extended_l2) in [("extended_l2=on", true), ("compression_type=zstd", false)] {
            qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", option, "special", "1M"]);
            let special = header(&at("special")).unwrap().unwrap();
            let expected = Qcow2Header { extended_l2, tables: special.tables, ..expected.clone() };
            assert_eq!(special, expected, "{option}");
        }
        qemu_img(dir.path(), &["create", "-q", "-f", "raw", "base", "1M"]);
        for (compat, version) in [("0.10", 2), ("1.1", 3)] {
            let compat = format!("compat={compat}");
            let arguments =
                ["create", "-q", "-f", "qcow2", "-o", &compat, "-b", "base", "-F", "raw", "overlay"];
            qemu_img(dir.path(), &arguments);
            let overlay = header(&at("overlay")).unwrap().unwrap();
            let backing = Backing { name: "base".to_owned(), format: Some("raw".to_owned()) };
            assert_eq!((overlay.version, overlay.backing), (version, Some(backing)));
        }
        let data = "data_file=data,data_file_raw=on";
        qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", data, "outside", "1M"]);
        assert!(header(&at("outside")).unwrap().unwrap().external_data);
        let secret =
            ["--object", "secret,id=key,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=key"];
        qemu_img(dir.path(), &[&["create", "-q", "-f", "qcow2"], &secret[..], &["secret", "1M"]].concat());
        assert!(header(&at("secret")).unwrap().unwrap().encrypted);
        assert_eq!(header(&at("base")).unwrap(), None);
    }

    #[test]
    fn a_header_that_contradicts_itself_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut image = vec![0_u8; 4096];
        image[..4].copy_from_slice(MAGIC);
        image[7] = 3;
        image[103] = 104;
        let read = |image: &[u8]| {
            std::fs::write(file.path(), image).unwrap();
            header(file.path()).map_err(|error| error.to_string())
        };
        assert!(read(&image).unwrap().is_some());
        let with = |changes: &[(usize, u8)]| {
            let mut changed = image.clone();
            changes.iter().for_each(|(at, byte)| changed[*at] = *byte);
            changed
        };
        let features = |low: u8| read(&with(&[(79, low), (104, 7)])).unwrap().unwrap();
        assert!(features(2).corrupt && !features(1).corrupt);
        assert_eq!((features(0x60).unknown_features, features(0x1f).unknown_features), (0x60, 0));
        assert_eq!((features(8).unknown_compression, features(0).unknown_compression), (Some(7), None));
        assert!(read(&with(&[(7, 4)])).unwrap_err().contains("version 4"));
        assert!(read(&with(&[(103, 8)])).unwrap_err().contains("8 bytes long"));
        assert!(read(&with(&[(14, 16), (18, 255)])).unwrap_err().contains("backing file is"));
        assert!(read(&with(&[(8, 255), (19, 4)])).unwrap_err().contains("cut short"));
        assert!(read(&image[..50]).unwrap_err().contains("cut short"));
        assert_eq!(read(b"QF"), Ok(None));
    }

    #[test]
    fn a_relative_backing_file_is_resolved_from_the_images_folder() {
        let path = |name: &str| Backing { name: name.to_owned(), format: None }.path(Path::new("/a/b/image"));
        assert_eq!(path("base"), Some("/a/b/base".into()));
        assert_eq!(path("../base"), Some("/a/b/../base".into()));
        assert_eq!(path("/base:1"), Some("/base:1".into()));
        assert_eq!(path("file:base"), Some("/a/b/base".into()));
        for other in ["", "nbd://host/x", "json:{}", "http://x", "ssh:x"] {
            assert_eq!(path(other), None, "{other}");
        }
    }
}
