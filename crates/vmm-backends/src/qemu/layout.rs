//! The layout of QEMU's q35 machine, equal under the daemon and under libvirt, so that a guest
//! finds its devices in the same slots.

/// The functions of one PCI slot.
pub(crate) const FUNCTIONS: usize = 8;
/// The first PCI slot of the disks.
pub(crate) const DISK_SLOT: usize = 0x02;
/// The first PCI slot of the network interfaces.
pub(crate) const NIC_SLOT: usize = 0x10;
/// The modules of memory that may be plugged.
pub(crate) const MEMORY_SLOTS: u32 = 16;
/// The bytes of a virtio disk's serial number. A longer id is cut.
pub(crate) const SERIAL_LEN: usize = 20;
