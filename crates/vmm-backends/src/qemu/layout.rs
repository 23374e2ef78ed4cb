//! The layout of QEMU's q35 machine, whether the daemon or libvirt starts it: a guest finds its devices in the same places.

/// Functions of one PCI slot.
pub(crate) const FUNCTIONS: usize = 8;
/// The first PCI slot of the disks.
pub(crate) const DISK_SLOT: usize = 0x02;
/// The first PCI slot of the network interfaces.
pub(crate) const NIC_SLOT: usize = 0x10;
/// Modules of memory that may be plugged.
pub(crate) const MEMORY_SLOTS: u32 = 16;
/// Bytes of a virtio disk's serial number; a longer id is cut.
pub(crate) const SERIAL_LEN: usize = 20;
