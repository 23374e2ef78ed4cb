//! A hypervisor that does what a test tells it to.
//!
//! ```text
//!   FakeBackend ──► World ◄── the test: scripts, counts, machines
//!       │             │
//!       │ launch      │ outlives every backend, as processes outlive a daemon:
//!       ▼             │ a second backend on the same world adopts what the first one left
//!    FakeVmm ──────► Machine (a process that holds a guest)
//! ```
//!
//! A [`World`] is the host as one hypervisor sees it. It keeps the machines that live, and notes as a fault whatever must never
//! happen: two machines of one VM, or two writers of one disk ([`World::faults`]). Each method of the ports can be told by an
//! [`Act`] to fail, to wait or to lose its answer; a [`MachineControl`] makes one machine reset, crash or fall silent. All
//! waiting is on tokio's clock, which tests can pause.
//!
//! [`qemu`] is another kind: a process of its own, for tests that kill the daemon.

mod backend;
mod control;
pub mod qemu;
mod script;
mod vmm;
mod world;

pub use backend::FakeBackend;
pub use control::MachineControl;
pub use script::{Act, Gate, Method};
pub use world::World;
