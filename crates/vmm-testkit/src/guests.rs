//! Tiny guests: ELF kernels of about 400 bytes that boot in milliseconds on all three hypervisors.
//!
//! Linux proves that real guests run, and takes seconds. Most tests ask a smaller question. Is a
//! guest running? Does its console output arrive? What happens when it powers off, resets or dies?
//! Each [`Guest`] answers one such question. A guest prints its [`banner`](Guest::banner) on the
//! first serial port once per boot, so that a console counts the boots, and then does its one
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
//! project must not need an assembler. The code needs no stack, no memory beyond its own, and no
//! interrupts.

use std::io;
use std::path::{Path, PathBuf};

/// The physical address at which the file is loaded, the lowest that all three hypervisors accept.
const LOAD_ADDRESS: u32 = 0x0010_0000;
/// The offset of the code in the file and from [`LOAD_ADDRESS`]. The headers and the note fit
/// before it.
const CODE_OFFSET: u32 = 0x100;
/// The data register of the first serial port, COM1.
const UART_DATA: u16 = 0x3f8;
/// The line status register of the first serial port. Bit 0: a byte was received. Bit 5: a byte can
/// be sent.
const UART_STATUS: u16 = 0x3fd;
/// The type of the ELF note with the 32-bit entry point of a PVH kernel
/// (`XEN_ELFNOTE_PHYS32_ENTRY`).
const NOTE_PHYS32_ENTRY: u32 = 18;

/// A guest that does one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
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
    /// Does the work of [`Guest::Echo`], and obeys `P` (powers off), `R` (resets), `F` (triple
    /// fault) and Ctrl+Alt+Del (resets).
    Obey,
    /// Powers off when the ACPI power button is pressed. QEMU q35 only. It polls, and so keeps one
    /// host CPU busy.
    Button,
}

impl Guest {
    /// Every guest, in the order of their documentation.
    pub const ALL: [Self; 8] = [
        Self::Idle,
        Self::PowerOff,
        Self::Reset,
        Self::TripleFault,
        Self::Panic,
        Self::Echo,
        Self::Obey,
        Self::Button,
    ];

    /// Returns the short name, which is also the stem of the file that [`Guest::write_to`] makes.
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
        let mut code = Code::default();
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
        }
        code.halt();
        let text = LOAD_ADDRESS + CODE_OFFSET + u32::try_from(code.0.len()).unwrap_or(u32::MAX);
        code.0[text_address..text_address + 4].copy_from_slice(&text.to_le_bytes());
        code.0.extend(format!("{}\r\n\0", self.banner()).bytes());
        code.0
    }
}

/// 32-bit x86 machine code under construction. Most jumps are short, because they span fewer than
/// 128 bytes.
#[derive(Default)]
struct Code(Vec<u8>);

/// The place of a short forward jump whose distance is not known yet.
struct Forward(usize);

impl Code {
    fn emit(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn here(&self) -> usize {
        self.0.len()
    }

    /// Emits a backward jump (`opcode` rel8) to `target`.
    fn back(&mut self, opcode: u8, target: usize) {
        let distance = self.here() + 2 - target;
        let rel8 = u8::try_from(distance).map_or(0, u8::wrapping_neg);
        debug_assert!(rel8 >= 0x80, "jump of {distance} bytes is too far for rel8");
        self.emit(&[opcode, rel8]);
    }

    /// Emits a forward jump (`opcode` rel8), whose target [`Code::land`] sets.
    fn forward(&mut self, opcode: u8) -> Forward {
        self.emit(&[opcode, 0]);
        Forward(self.here())
    }

    fn land(&mut self, jump: &Forward) {
        let distance = self.here() - jump.0;
        debug_assert!(distance < 0x80, "jump of {distance} bytes is too far for rel8");
        self.0[jump.0 - 1] = u8::try_from(distance).unwrap_or(0);
    }

    /// Emits `mov dx, port`.
    fn port(&mut self, port: u16) {
        let [low, high] = port.to_le_bytes();
        self.emit(&[0x66, 0xba, low, high]);
    }

    /// Waits until the serial port accepts a byte, then sends bl.
    fn send_bl(&mut self) {
        self.port(UART_STATUS); //        mov dx, status
        let wait = self.here();
        self.emit(&[0xec]); //      wait: in al, dx
        self.emit(&[0xa8, 0x20]); //      test al, 0x20      transmitter empty?
        self.back(JZ, wait); //           jz wait
        self.emit(&[0x88, 0xd8]); //      mov al, bl
        self.port(UART_DATA); //          mov dx, data
        self.emit(&[0xee]); //            out dx, al
    }

    /// Prints a zero-terminated text. Returns the offset of its 32-bit address, which the caller
    /// fills in.
    fn print(&mut self) -> usize {
        self.emit(&[0xfa, 0xfc]); //      cli; cld
        self.emit(&[0xbe]); //            mov esi, text
        let text_address = self.here();
        self.emit(&[0; 4]);
        let next = self.here();
        self.emit(&[0xac]); //      next: lodsb
        self.emit(&[0x84, 0xc0]); //      test al, al
        let done = self.forward(JZ); //   jz done
        self.emit(&[0x88, 0xc3]); //      mov bl, al
        self.send_bl();
        self.back(JMP, next); //          jmp next
        self.land(&done); //        done:
        text_address
    }

    /// Halts for ever. Interrupts are off, so only a reset ends the halt, or an NMI, after which
    /// the loop halts again.
    fn halt(&mut self) {
        let again = self.here();
        self.emit(&[0xfa, 0xf4]); // again: cli; hlt
        self.back(JMP, again); //           jmp again
    }

    /// Tries every way to power off. Each is without effect on the machines that it is not for.
    fn power_off(&mut self) {
        // Cloud Hypervisor: its shutdown port takes SLP_EN and sleep type 5. On q35 the write only
        // clears status bits.
        self.port(0x600); //                                  mov dx, 0x600
        self.emit(&[0xb0, 0x34]); //                          mov al, 0x34
        self.emit(&[0xee]); //                                out dx, al
        // QEMU q35: PM1a control at the address that the firmware chooses. SLP_EN with sleep type 0
        // is soft-off there.
        self.port(0x604); //                                  mov dx, 0x604
        self.emit(&[0x66, 0xb8, 0x00, 0x20]); //              mov ax, 0x2000
        self.emit(&[0x66, 0xef]); //                          out dx, ax
        // QEMU microvm: the sleep control register of its generic event device, in memory.
        self.emit(&[0xc6, 0x05, 0x00, 0x02, 0xa0, 0xfe, 0x34]); // mov byte [0xfea00200], 0x34
    }

    /// Tries every way to reset.
    fn reset(&mut self) {
        // The keyboard controller pulses the CPU's reset line: q35, Cloud Hypervisor, Firecracker.
        self.emit(&[0xb0, 0xfe]); //                          mov al, 0xfe
        self.emit(&[0xe6, 0x64]); //                          out 0x64, al
        // QEMU microvm without one: the reset register of its generic event device.
        self.emit(&[0xc6, 0x05, 0x02, 0x02, 0xa0, 0xfe, 0x42]); // mov byte [0xfea00202], 0x42
    }

    /// Raises an exception with an empty table of handlers. The CPU finds no handler for the
    /// exception, none for the double fault, and shuts down.
    fn triple_fault(&mut self) {
        let over = self.forward(JMP); //                      jmp over
        let table = LOAD_ADDRESS + CODE_OFFSET + u32::try_from(self.here()).unwrap_or(0);
        self.emit(&[0; 6]); //                         table: limit 0, base 0
        self.land(&over); //                            over:
        self.emit(&[0x0f, 0x01, 0x1d]); //                    lidt [table]
        self.emit(&table.to_le_bytes());
        self.emit(&[0x0f, 0x0b]); //                          ud2
    }

    /// Reports a panic to each kind of panic device.
    fn panic(&mut self) {
        // Cloud Hypervisor: the PCI device 1b36:0011. Its one register is at its first base
        // address.
        self.emit(&[0xb9, 0x00, 0x00, 0x00, 0x80]); //        mov ecx, 0x80000000   bus 0, device 0, register 0
        let next = self.here();
        self.emit(&[0x89, 0xc8]); //                    next: mov eax, ecx
        self.read_pci(); //
        self.emit(&[0x3d, 0x36, 0x1b, 0x11, 0x00]); //        cmp eax, 0x00111b36
        let found = self.forward(JZ); //                      jz found
        self.emit(&[0x81, 0xc1, 0x00, 0x08, 0x00, 0x00]); //  add ecx, 0x800        the next device
        self.emit(&[0x81, 0xf9, 0x00, 0x00, 0x01, 0x80]); //  cmp ecx, 0x80010000
        self.back(JNZ, next); //                              jnz next
        let none = self.forward(JMP); //                      jmp isa
        self.land(&found); //                          found:
        self.emit(&[0x8d, 0x41, 0x10]); //                    lea eax, [ecx+0x10]   its first base address
        self.read_pci();
        self.emit(&[0x24, 0xf0]); //                          and al, 0xf0
        self.emit(&[0x89, 0xc7]); //                          mov edi, eax
        self.emit(&[0x8d, 0x41, 0x04]); //                    lea eax, [ecx+4]      its command register
        self.read_pci();
        self.emit(&[0x0c, 0x02]); //                          or al, 2              answers in memory
        self.emit(&[0xef]); //                                out dx, eax
        self.emit(&[0xc6, 0x07, 0x01]); //                    mov byte [edi], 1
        self.land(&none); //                             isa:
        // QEMU: a port.
        self.port(0x505); //                                  mov dx, 0x505
        self.emit(&[0xb0, 0x01]); //                          mov al, 1
        self.emit(&[0xee]); //                                out dx, al
    }

    /// Reads the register of a PCI device that eax names into eax, and leaves the data port in dx.
    fn read_pci(&mut self) {
        self.port(0xcf8); //                                  mov dx, 0xcf8
        self.emit(&[0xef]); //                                out dx, eax
        self.port(0xcfc); //                                  mov dx, 0xcfc
        self.emit(&[0xed]); //                                in eax, dx
    }

    /// Sends back every received byte, for ever. With `obey`, obeys the letters and keys of
    /// [`Guest::Obey`].
    fn echo(&mut self, obey: bool) {
        let poll = self.here();
        if obey {
            // The loop is a pause between two polls. A guest that polls without one holds the locks
            // of these devices nearly all the time, and a Firecracker that shares a CPU with the
            // guest may not press the keys, or answer, for minutes.
            self.emit(&[0xb9, 0x00, 0x40, 0x00, 0x00]); // mov ecx, 0x4000
            let rest = self.here();
            self.emit(&[0xf3, 0x90]); //       rest: pause
            self.emit(&[0xff, 0xc9]); //             dec ecx
            self.back(JNZ, rest); //                 jnz rest
            // A key press is in the buffer of the keyboard controller. Delete is 0x53 in the first
            // code set and 0x71 in the second.
            self.emit(&[0xe4, 0x64]); //       poll: in al, 0x64
            self.emit(&[0x3c, 0xff]); //             cmp al, 0xff   no controller there
            let absent = self.forward(JZ); //        jz no_key
            self.emit(&[0xa8, 0x01]); //             test al, 1
            let no_key = self.forward(JZ); //        jz no_key
            self.emit(&[0xe4, 0x60]); //             in al, 0x60
            self.emit(&[0x3c, 0x53]); //             cmp al, 0x53
            let first = self.forward(JZ); //         jz delete
            self.emit(&[0x3c, 0x71]); //             cmp al, 0x71
            let other = self.forward(JNZ); //        jnz no_key
            self.land(&first); //            delete:
            self.reset();
            for jump in [absent, no_key, other] {
                self.land(&jump); //         no_key:
            }
        }
        self.port(UART_STATUS); //             poll: mov dx, status
        self.emit(&[0xec]); //                       in al, dx
        self.emit(&[0xa8, 0x01]); //                 test al, 1     a byte has come in?
        self.back(JZ, poll); //                      jz poll
        self.port(UART_DATA); //                     mov dx, data
        self.emit(&[0xec]); //                       in al, dx
        self.emit(&[0x88, 0xc3]); //                 mov bl, al
        self.send_bl();
        if obey {
            self.when_bl(b'R', Self::reset);
            self.when_bl(b'F', Self::triple_fault);
            self.when_bl(b'P', Self::power_off);
        }
        self.back_far(poll); //                      jmp poll
    }

    /// Emits `action` so that it runs only if bl is `letter`.
    fn when_bl(&mut self, letter: u8, action: fn(&mut Self)) {
        self.emit(&[0x80, 0xfb, letter]); //   cmp bl, letter
        let skip = self.forward(JNZ); //       jnz skip
        action(self);
        self.land(&skip); //             skip:
    }

    /// Emits a jump backwards of any distance.
    fn back_far(&mut self, target: usize) {
        let distance = u32::try_from(self.here() + 5 - target).unwrap_or(0);
        self.emit(&[0xe9]); //                 jmp rel32
        self.emit(&distance.wrapping_neg().to_le_bytes());
    }

    /// Enables the status bit of the power button, waits for it, and powers off.
    fn await_button(&mut self) {
        self.port(0x602); //                   mov dx, 0x602        PM1 enable
        self.emit(&[0x66, 0xb8, 0x00, 0x01]); //  mov ax, 0x100     power button
        self.emit(&[0x66, 0xef]); //           out dx, ax
        self.port(0x600); //                   mov dx, 0x600        PM1 status
        let wait = self.here();
        // QEMU reads each port under its global lock. The loop is a pause, because a guest that
        // only polls would keep QMP from the lock for seconds.
        self.emit(&[0xb9, 0x00, 0x80, 0x00, 0x00]); // wait: mov ecx, 0x8000
        self.emit(&[0xe2, 0xfe]); //           loop $
        self.emit(&[0x66, 0xed]); //           in ax, dx
        self.emit(&[0xf6, 0xc4, 0x01]); //     test ah, 1
        self.back(JZ, wait); //                jz wait
        self.power_off();
    }
}

const JZ: u8 = 0x74;
const JNZ: u8 = 0x75;
const JMP: u8 = 0xeb;

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
    fn elf_header_is_that_of_a_64_bit_executable() {
        for guest in Guest::ALL {
            let file = guest.elf();
            assert_eq!(&file[..7], b"\x7fELF\x02\x01\x01", "{guest:?}");
            assert_eq!((u16_at(&file, 16), u16_at(&file, 18)), (2, 62), "{guest:?}");
            assert_eq!(u64_at(&file, 24), 0x0010_0100, "{guest:?}");
            assert_eq!((u16_at(&file, 52), u16_at(&file, 54), u16_at(&file, 56)), (64, 56, 2), "{guest:?}");
        }
    }

    #[test]
    fn load_segment_covers_the_whole_file() {
        for guest in Guest::ALL {
            let file = guest.elf();
            assert_eq!(u32_at(&file, 64), 1, "{guest:?}");
            assert_eq!(u64_at(&file, 64 + 24), 0x0010_0000, "{guest:?}");
            assert_eq!(u64_at(&file, 64 + 32), file.len() as u64, "{guest:?}");
            assert_eq!(u64_at(&file, 64 + 40), file.len() as u64, "{guest:?}");
        }
    }

    #[test]
    fn note_names_the_entry_point() {
        for guest in Guest::ALL {
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
    fn code_points_at_its_banner() {
        for guest in Guest::ALL {
            let file = guest.elf();
            // cli; cld; mov esi, imm32 are the first bytes of every guest.
            assert_eq!(&file[0x100..0x103], &[0xfa, 0xfc, 0xbe], "{guest:?}");
            let text = (u32_at(&file, 0x103) - LOAD_ADDRESS) as usize;
            assert_eq!(&file[text..], format!("{}\r\n\0", guest.banner()).as_bytes(), "{guest:?}");
        }
    }

    #[test]
    fn written_file_has_the_bytes_and_a_name_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for guest in Guest::ALL {
            let path = guest.write_to(folder.path()).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), guest.elf());
            paths.push(path);
        }
        paths.sort();
        paths.dedup();
        assert_eq!(paths.len(), Guest::ALL.len());
    }
}
