//! The Linux host, as far as running VMs needs it.
//!
//! - A VM on the host: its [`process`] with the proof of identity, its [`run_dir`], its [`socket`],
//!   its [`net`] interfaces, and the [`files`] that a client names.
//! - The host itself: [`kvm`] and other [`device`] files, [`memory`], [`mounts`], the [`clock`],
//!   file [`descriptors`], and programs on the [`path`].
//! - The daemon's own order: the [`lock`] of a state directory, the [`survey`] of the program's
//!   traces, a runtime folder that is [`lasting`] or not, and the [`fault`] points of tests.
//! - Other programs: the [`endpoint`] that another program made, and the [`growth`] and the
//!   [`tail`] of a file that another process appends to, and the [`console_input`] that another
//!   process reads.
//!
//! No module knows a hypervisor. A function that reads files or `/proc` blocks for as long as the
//! kernel takes. Callers run functions that are not `async` in `spawn_blocking` wherever a client
//! chose the path.

mod accounts;
mod async_fd;
mod block;
pub mod clock;
pub mod console_input;
pub mod descriptors;
pub mod device;
pub mod endpoint;
pub mod fault;
pub mod file_watch;
pub mod files;
pub mod host_use;
pub mod kernel;
pub mod kvm;
pub mod lasting;
pub mod lock;
pub mod memory;
pub mod mounts;
pub mod net;
pub mod partitions;
pub mod path;
mod path_errors;
pub mod process;
pub mod qcow2;
pub mod run_dir;
pub mod socket;
pub mod survey;
pub mod tail;
