//! Tiny guests: ELF kernels of about 400 bytes that boot in milliseconds on all three hypervisors.
//!
//! Linux proves that real guests run, and takes seconds. Most tests ask a smaller question. Is a
//! guest running? Does its console output arrive? What happens when it powers off, resets or dies?
//! Each [`TinyGuest`] answers one such question. A guest prints its [`banner`](Guest::banner) on
//! the first serial port once per boot, so that a console counts the boots, and then does its one
//! thing.
//!
//! ```text
//!   file = memory at 1 MiB                     started by
//!   ┌──────────────────────────┐ 0x100000      QEMU: -kernel, the PVH option ROM
//!   │ ELF64 header             │               Cloud Hypervisor, Firecracker: their own ELF loader
//!   │ program headers: load, note              │
//!   │ note "Xen", type 18 ─────┼──► entry      │
//!   ├──────────────────────────┤ 0x100100 ◄────┘ 32-bit protected mode, flat segments,
//!   │ code, then the banner    │                 paging and interrupts off
//!   └──────────────────────────┘
//! ```
//!
//! The code is assembled here by hand, with its source beside the bytes, because building the
//! project must not need an assembler. The code needs no stack and no interrupts, and only
//! [`TinyGuest::Clock`] uses memory behind its own.

mod code;

use std::io;
use std::path::{Path, PathBuf};

use self::code::MachineCode;

/// The physical address at which the file is loaded, the lowest that all three hypervisors accept.
const LOAD_ADDRESS: u32 = 0x0010_0000;
/// The offset of the code in the file and from [`LOAD_ADDRESS`]. The headers and the note fit
/// before it.
const CODE_OFFSET: u32 = 0x100;
/// The type of the ELF note with the 32-bit entry point of a PVH kernel
/// (`XEN_ELFNOTE_PHYS32_ENTRY`).
const NOTE_PHYS32_ENTRY: u32 = 18;

/// A guest that does one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TinyGuest {
    /// Halts for ever without CPU use. Only its VMM can end it, because it ignores the power
    /// button.
    Idle,
    /// Powers off by ACPI (QEMU q35 and microvm, Cloud Hypervisor). Halts on Firecracker, which has
    /// no power-off.
    PowerOff,
    /// Resets through the keyboard controller, like Linux with `reboot=k`. It resets again after
    /// each start.
    Reset,
    /// Ends with a triple fault.
    TripleFault,
    /// Reports a panic to its panic device (`pvpanic`, on the ISA bus or PCI) if the machine has
    /// one, and halts for ever.
    Panic,
    /// Sends back every byte that it receives on the serial port. It polls, and so keeps one host
    /// CPU busy.
    Echo,
    /// Does the work of [`TinyGuest::Echo`], and obeys `P` (powers off), `R` (resets), `F` (triple
    /// fault) and Ctrl+Alt+Del (resets).
    Obey,
    /// Powers off when the ACPI power button is pressed. QEMU q35 only. It polls, and so keeps one
    /// host CPU busy.
    Button,
    /// Prints kvm-clock and the processor's counter for ever; [`clocks`] reads a line. Needs KVM.
    Clock,
    /// Prints the lines 0, 1, 2 and so on for ever, as fast as it can; [`flood_byte`] tells each
    /// byte. It keeps one host CPU busy.
    Flood,
}

impl TinyGuest {
    /// Every guest, in the order of their documentation.
    pub const ALL: [Self; 10] = [
        Self::Idle,
        Self::PowerOff,
        Self::Reset,
        Self::TripleFault,
        Self::Panic,
        Self::Echo,
        Self::Obey,
        Self::Button,
        Self::Clock,
        Self::Flood,
    ];

    /// Returns the short name, which is also the stem of the file that [`TinyGuest::write_to`]
    /// makes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::PowerOff => "poweroff",
            Self::Reset => "reset",
            Self::TripleFault => "triplefault",
            Self::Panic => "panic",
            Self::Echo => "echo",
            Self::Obey => "obey",
            Self::Button => "button",
            Self::Clock => "clock",
            Self::Flood => "flood",
        }
    }

    /// Returns the line that this guest prints at each boot, without its line end.
    #[must_use]
    pub fn banner(self) -> String {
        format!("vmcp-tiny: up kind={}", self.name())
    }

    /// Returns the bytes of the kernel, a statically linked x86-64 ELF file with a PVH entry note.
    #[must_use]
    pub fn elf(self) -> Vec<u8> {
        let body = self.code();
        let mut file = headers(body.len());
        file.resize(CODE_OFFSET as usize, 0);
        file.extend(body);
        file
    }

    /// Writes the kernel to `<folder>/tiny-<name>.elf` and returns that path.
    ///
    /// # Errors
    ///
    /// The folder does not exist, or cannot be written to.
    pub fn write_to(self, folder: &Path) -> io::Result<PathBuf> {
        let path = folder.join(format!("tiny-{}.elf", self.name()));
        std::fs::write(&path, self.elf())?;
        Ok(path)
    }

    /// Assembles everything after the headers: the banner loop, the guest's own part, and the text
    /// of the banner.
    fn code(self) -> Vec<u8> {
        let mut code = MachineCode::default();
        let text_address = code.print();
        match self {
            Self::Idle => {}
            Self::PowerOff => code.power_off(),
            Self::Reset => code.reset(),
            Self::TripleFault => code.triple_fault(),
            Self::Panic => code.panic(),
            Self::Echo => code.echo(false),
            Self::Obey => code.echo(true),
            Self::Button => code.await_button(),
            Self::Clock => code.clock(),
            Self::Flood => code.flood(),
        }
        code.halt();
        let text = LOAD_ADDRESS + CODE_OFFSET + u32::try_from(code.0.len()).unwrap_or(u32::MAX);
        code.0[text_address..text_address + 4].copy_from_slice(&text.to_le_bytes());
        code.0.extend(format!("{}\r\n\0", self.banner()).bytes());
        code.0
    }
}

/// The two clocks on a line of [`TinyGuest::Clock`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clocks {
    /// The time on kvm-clock in nanoseconds.
    pub kvm_clock: u64,
    /// The processor's counter, in the same unit: scaled as kvm-clock scales it.
    pub counter: u64,
}

/// Reads a line of [`TinyGuest::Clock`]; `None` for another line.
#[must_use]
pub fn clocks(line: &str) -> Option<Clocks> {
    let digits = line.trim();
    if digits.len() != 80 || !digits.is_ascii() {
        return None;
    }
    let byte = |at: usize| u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok();
    let number = |at: usize, size: usize| {
        (at..at + size).rev().try_fold(0_u64, |number, at| Some((number << 8) | u64::from(byte(at)?)))
    };
    // The layout of pvclock_vcpu_time_info: version, padding, the counter at the last update, the
    // time then, and the scale from the counter to nanoseconds. The counter of now follows.
    let (then, time, scale, now) = (number(8, 8)?, number(16, 8)?, number(24, 4)?, number(32, 8)?);
    let shift = byte(28)?.cast_signed();
    let scaled = |ticks: u64| {
        let ticks = u128::from(ticks);
        let amount = u32::from(shift.unsigned_abs());
        let shifted = if shift < 0 { ticks >> amount } else { ticks << amount };
        u64::try_from((shifted * u128::from(scale)) >> 32).ok()
    };
    Some(Clocks { kvm_clock: time + scaled(now.checked_sub(then)?)?, counter: scaled(now)? })
}

/// Returns the byte at `position` of the lines of [`TinyGuest::Flood`], counted from the end of the
/// banner's line. A line has 8 hexadecimal digits and a line end.
#[must_use]
pub fn flood_byte(position: u64) -> u8 {
    const LINE: u64 = 9;
    let place = u32::try_from(position % LINE).unwrap_or(0);
    if place == 8 {
        return b'\n';
    }
    let digit = (position / LINE) >> (4 * (7 - place)) & 15;
    char::from_digit(u32::try_from(digit).unwrap_or(0), 16).map_or(b'?', |digit| digit as u8)
}

/// Returns the ELF header, both program headers and the note, for a file with `code_size` bytes of
/// code.
fn headers(code_size: usize) -> Vec<u8> {
    const HEADER_SIZE: u16 = 64;
    const PROGRAM_HEADER_SIZE: u16 = 56;
    const NOTE_OFFSET: u64 = HEADER_SIZE as u64 + 2 * PROGRAM_HEADER_SIZE as u64;
    const NOTE_SIZE: u64 = 24;
    let entry = LOAD_ADDRESS + CODE_OFFSET;
    let size = u64::from(CODE_OFFSET) + code_size as u64;
    let mut out = Vec::new();

    out.extend(b"\x7fELF"); // magic
    out.extend([2, 1, 1, 0]); // 64 bit, little endian, version 1, System V
    out.extend([0; 8]);
    out.extend(2_u16.to_le_bytes()); // type: executable
    out.extend(62_u16.to_le_bytes()); // machine: x86-64, the only one that all three take
    out.extend(1_u32.to_le_bytes()); // version
    out.extend(u64::from(entry).to_le_bytes());
    out.extend(u64::from(HEADER_SIZE).to_le_bytes()); // offset of the program headers
    out.extend(0_u64.to_le_bytes()); // no section headers
    out.extend(0_u32.to_le_bytes()); // flags
    for half in [HEADER_SIZE, PROGRAM_HEADER_SIZE, 2, 0, 0, 0] {
        out.extend(half.to_le_bytes()); // sizes and counts: header, program headers (2), sections (0)
    }

    let address = u64::from(LOAD_ADDRESS);
    let load = [0, address, address, size, size, 0x1000];
    let note = [NOTE_OFFSET, address + NOTE_OFFSET, address + NOTE_OFFSET, NOTE_SIZE, NOTE_SIZE, 4];
    for (kind, flags, fields) in [(1_u32, 7_u32, load), (4, 4, note)] {
        out.extend(kind.to_le_bytes()); // 1 load, 4 note
        out.extend(flags.to_le_bytes()); // 7 read, write, execute; 4 read
        for field in fields {
            out.extend(field.to_le_bytes()); // offset, virtual and physical address, size in file and memory, alignment
        }
    }

    out.extend(4_u32.to_le_bytes()); // size of the name
    out.extend(8_u32.to_le_bytes()); // size of the value: QEMU reads eight bytes, the others four or more
    out.extend(NOTE_PHYS32_ENTRY.to_le_bytes());
    out.extend(b"Xen\0");
    out.extend(u64::from(entry).to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u16_at(bytes: &[u8], at: usize) -> u16 {
        u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_bytes_of_a_flood_are_its_numbers() {
        let all: Vec<u8> = (0..9 * 300).map(flood_byte).collect();
        let lines: String = (0..300).map(|number| format!("{number:08x}\n")).collect();
        assert_eq!(String::from_utf8(all).unwrap(), lines);
    }

    #[test]
    fn a_line_of_clocks_is_parsed() {
        let line = |shift: &str, now: u64| {
            let now: String = now.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            // Version 2, the counter was 1000, the time 5000, the scale a half.
            format!("0200000000000000e8030000000000008813000000000000{}{shift}010000{now}", "00000080")
        };
        let read = |shift, now| clocks(&line(shift, now)).unwrap();
        assert_eq!(read("00", 1000), Clocks { kvm_clock: 5000, counter: 500 });
        assert_eq!(read("00", 3000), Clocks { kvm_clock: 6000, counter: 1500 });
        assert_eq!(read("ff", 3000), Clocks { kvm_clock: 5500, counter: 750 });
        assert_eq!(read("01", 3000), Clocks { kvm_clock: 7000, counter: 3000 });
        for other in ["", "vmcp-tiny: up kind=clock", &"x".repeat(80), &"ä".repeat(40)] {
            assert_eq!(clocks(other), None, "{other}");
        }
    }

    #[test]
    fn the_elf_header_is_that_of_a_64_bit_executable() {
        for guest in TinyGuest::ALL {
            let file = guest.elf();
            assert_eq!(&file[..7], b"\x7fELF\x02\x01\x01", "{guest:?}");
            assert_eq!((u16_at(&file, 16), u16_at(&file, 18)), (2, 62), "{guest:?}");
            assert_eq!(u64_at(&file, 24), 0x0010_0100, "{guest:?}");
            assert_eq!((u16_at(&file, 52), u16_at(&file, 54), u16_at(&file, 56)), (64, 56, 2), "{guest:?}");
        }
    }

    #[test]
    fn the_load_segment_covers_the_whole_file() {
        for guest in TinyGuest::ALL {
            let file = guest.elf();
            assert_eq!(u32_at(&file, 64), 1, "{guest:?}");
            assert_eq!(u64_at(&file, 64 + 24), 0x0010_0000, "{guest:?}");
            assert_eq!(u64_at(&file, 64 + 32), file.len() as u64, "{guest:?}");
            assert_eq!(u64_at(&file, 64 + 40), file.len() as u64, "{guest:?}");
        }
    }

    #[test]
    fn the_note_names_the_entry_point() {
        for guest in TinyGuest::ALL {
            let file = guest.elf();
            assert_eq!(u32_at(&file, 120), 4, "{guest:?}");
            let note = usize::try_from(u64_at(&file, 120 + 8)).unwrap();
            assert_eq!((u32_at(&file, note), u32_at(&file, note + 8)), (4, 18), "{guest:?}");
            assert_eq!(&file[note + 12..note + 16], b"Xen\0", "{guest:?}");
            assert_eq!(u64_at(&file, note + 16), u64_at(&file, 24), "{guest:?}");
            assert!(note + 24 <= CODE_OFFSET as usize, "{guest:?}");
        }
    }

    #[test]
    fn the_code_points_at_its_banner() {
        for guest in TinyGuest::ALL {
            let file = guest.elf();
            // cli; cld; mov esi, imm32 are the first bytes of every guest.
            assert_eq!(&file[0x100..0x103], &[0xfa, 0xfc, 0xbe], "{guest:?}");
            let text = (u32_at(&file, 0x103) - LOAD_ADDRESS) as usize;
            assert_eq!(&file[text..], format!("{}\r\n\0", guest.banner()).as_bytes(), "{guest:?}");
        }
    }

    #[test]
    fn a_written_guest_has_its_bytes_and_a_unique_name() {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for guest in TinyGuest::ALL {
            let path = guest.write_to(folder.path()).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), guest.elf());
            paths.push(path);
        }
        paths.sort();
        paths.dedup();
        assert_eq!(paths.len(), TinyGuest::ALL.len());
    }
}
