//! The machine code of the tiny guests.

use super::{CODE_OFFSET, LOAD_ADDRESS};

/// The data register of the first serial port, COM1.
const UART_DATA: u16 = 0x3f8;
/// The line status register of the first serial port. Bit 0: a byte was received. Bit 5: a byte can
/// be sent.
const UART_STATUS: u16 = 0x3fd;

/// 32-bit x86 machine code under construction. Most jumps are short, because they span fewer than
/// 128 bytes.
#[derive(Default)]
pub(super) struct MachineCode(pub(super) Vec<u8>);

/// The offset of a short forward jump whose distance is not known yet.
struct ForwardJump(usize);

impl MachineCode {
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

    /// Emits a forward jump (`opcode` rel8), whose target [`MachineCode::land`] sets.
    fn forward(&mut self, opcode: u8) -> ForwardJump {
        self.emit(&[opcode, 0]);
        ForwardJump(self.here())
    }

    fn land(&mut self, jump: &ForwardJump) {
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
    pub(super) fn print(&mut self) -> usize {
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
    pub(super) fn halt(&mut self) {
        let again = self.here();
        self.emit(&[0xfa, 0xf4]); // again: cli; hlt
        self.back(JMP, again); //           jmp again
    }

    /// Tries every way to power off. Each is without effect on the machines that it is not for.
    pub(super) fn power_off(&mut self) {
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
    pub(super) fn reset(&mut self) {
        // The keyboard controller pulses the CPU's reset line: q35, Cloud Hypervisor, Firecracker.
        self.emit(&[0xb0, 0xfe]); //                          mov al, 0xfe
        self.emit(&[0xe6, 0x64]); //                          out 0x64, al
        // A QEMU microvm without a keyboard controller: the reset register of its generic event
        // device.
        self.emit(&[0xc6, 0x05, 0x02, 0x02, 0xa0, 0xfe, 0x42]); // mov byte [0xfea00202], 0x42
    }

    /// Raises an exception with an empty table of handlers. The CPU finds no handler for the
    /// exception, none for the double fault, and shuts down.
    pub(super) fn triple_fault(&mut self) {
        let over = self.forward(JMP); //                      jmp over
        let table = LOAD_ADDRESS + CODE_OFFSET + u32::try_from(self.here()).unwrap_or(0);
        self.emit(&[0; 6]); //                         table: limit 0, base 0
        self.land(&over); //                            over:
        self.emit(&[0x0f, 0x01, 0x1d]); //                    lidt [table]
        self.emit(&table.to_le_bytes());
        self.emit(&[0x0f, 0x0b]); //                          ud2
    }

    /// Reports a panic to each kind of panic device.
    pub(super) fn panic(&mut self) {
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
    /// [`TinyGuest::Obey`].
    pub(super) fn echo(&mut self, obey: bool) {
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

    /// Prints kvm-clock and the processor's counter, again and again: the 32 bytes of kvm-clock's
    /// page and the counter's 8, as 80 hexadecimal digits on a line. Needs KVM.
    pub(super) fn clock(&mut self) {
        // The page that KVM fills, and the copy that is printed. Both lie behind the code.
        let (page, copy) = (LOAD_ADDRESS + 0x1000, LOAD_ADDRESS + 0x1100);
        self.emit(&[0xb9, 0x01, 0x4d, 0x56, 0x4b]); // mov ecx, 0x4b564d01  MSR_KVM_SYSTEM_TIME_NEW
        self.emit(&[0xb8]); //                         mov eax, page|1      enabled
        self.emit(&(page | 1).to_le_bytes());
        self.emit(&[0x31, 0xd2]); //                   xor edx, edx
        self.emit(&[0x0f, 0x30]); //                   wrmsr
        let line = self.here();
        self.emit(&[0xbe]); //                   line: mov esi, page
        self.emit(&page.to_le_bytes());
        self.emit(&[0xbf]); //                         mov edi, copy
        self.emit(&copy.to_le_bytes());
        self.emit(&[0xb9, 0x08, 0x00, 0x00, 0x00]); // mov ecx, 8
        self.emit(&[0xf3, 0xa5]); //                   rep movsd
        self.emit(&[0x0f, 0x31]); //                   rdtsc
        self.emit(&[0x89, 0x07]); //                   mov [edi], eax
        self.emit(&[0x89, 0x57, 0x04]); //             mov [edi+4], edx
        // The version tells that KVM has changed the page meanwhile.
        self.emit(&[0xa1]); //                         mov eax, [page]
        self.emit(&page.to_le_bytes());
        self.emit(&[0x3b, 0x05]); //                   cmp eax, [copy]
        self.emit(&copy.to_le_bytes());
        self.back(JNZ, line); //                       jnz line
        self.emit(&[0xbe]); //                         mov esi, copy
        self.emit(&copy.to_le_bytes());
        self.emit(&[0xbf, 0x28, 0x00, 0x00, 0x00]); // mov edi, 40
        let next = self.here();
        self.emit(&[0xac]); //                   next: lodsb
        self.emit(&[0x88, 0xc7]); //                   mov bh, al
        self.emit(&[0x88, 0xc3]); //                   mov bl, al
        self.emit(&[0xc0, 0xeb, 0x04]); //             shr bl, 4
        self.send_digit();
        self.emit(&[0x88, 0xfb]); //                   mov bl, bh
        self.emit(&[0x80, 0xe3, 0x0f]); //             and bl, 15
        self.send_digit();
        self.emit(&[0x4f]); //                         dec edi
        self.back(JNZ, next); //                       jnz next
        for end in *b"\r\n" {
            self.emit(&[0xb3, end]); //                mov bl, end
            self.send_bl();
        }
        self.emit(&[0xb9, 0x00, 0x00, 0x40, 0x00]); // mov ecx, 0x400000
        self.emit(&[0xe2, 0xfe]); //                   loop $
        self.back_far(line); //                        jmp line
    }

    /// Prints the numbers from 0 on, for ever: 8 hexadecimal digits and a line end each.
    pub(super) fn flood(&mut self) {
        self.emit(&[0x31, 0xff]); //                   xor edi, edi
        let line = self.here();
        self.emit(&[0x89, 0xfe]); //             line: mov esi, edi
        self.emit(&[0xb9, 0x08, 0x00, 0x00, 0x00]); // mov ecx, 8
        let next = self.here();
        self.emit(&[0xc1, 0xc6, 0x04]); //       next: rol esi, 4
        self.emit(&[0x89, 0xf3]); //                   mov ebx, esi
        self.emit(&[0x80, 0xe3, 0x0f]); //             and bl, 15
        self.send_digit();
        self.emit(&[0x49]); //                         dec ecx
        self.back(JNZ, next); //                       jnz next
        self.emit(&[0xb3, b'\n']); //                  mov bl, '\n'
        self.send_bl();
        self.emit(&[0x47]); //                         inc edi
        self.back_far(line); //                        jmp line
    }

    /// Sends the hexadecimal digit of the number in bl.
    fn send_digit(&mut self) {
        self.emit(&[0x80, 0xc3, b'0']); //             add bl, '0'
        self.emit(&[0x80, 0xfb, b'9']); //             cmp bl, '9'
        let decimal = self.forward(JBE); //            jbe send
        self.emit(&[0x80, 0xc3, b'a' - b'9' - 1]); //  add bl, 'a' - '9' - 1
        self.land(&decimal); //                  send:
        self.send_bl();
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
    pub(super) fn await_button(&mut self) {
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
const JBE: u8 = 0x76;
const JMP: u8 = 0xeb;
