//! The Linux host, as far as running VMs needs it.
//!
//! Each module is one thing of the host: a [`process`] and the proof of which one it is, the [`run_dir`] of a VM, the
//! [`lock`] of a state directory, the [`ledger`] of what bears the program's mark, [`files`] that a client names, [`net`]
//! interfaces, [`kvm`], its [`memory`], file [`descriptors`], programs on the [`path`], the birth of a [`socket`], the [`clock`], the [`growth`]
//! and the [`tail`] of a file that another process appends to, the [`endpoint`] that somebody else made, and the [`fault`] points of
//! tests. No module knows a hypervisor. A function that reads files or `/proc` blocks for as long as
//! the kernel takes. Callers run functions that are not `async` in `spawn_blocking` wherever a client
//! chose the path.

mod block;
pub mod clock;
pub mod descriptors;
pub mod endpoint;
pub mod fault;
pub mod files;
pub mod growth;
pub mod host_use;
pub mod kernel;
pub mod kvm;
pub mod ledger;
pub mod lock;
pub mod memory;
pub mod mounts;
mod named;
pub mod net;
pub mod partitions;
pub mod path;
pub mod process;
pub mod qcow2;
mod ready;
pub mod run_dir;
pub mod socket;
pub mod tail;
