//! A hypervisor that follows the script of a test.
//!
//! ```text
//!   FakeBackend ──► FakeWorld ◄─ the test: scripts, counts, machines
//!       │             │
//!       │ launch      │ outlives every backend, as processes outlive a daemon:
//!       ▼             │ a second backend on the same world adopts the machines of the first
//!    FakeVmm ──────► Machine (a process that holds a guest)
//! ```
//!
//! A [`FakeWorld`] is the host as one hypervisor sees it. The world keeps the living machines, and
//! notes as a fault every event that must never happen: two machines of one VM, or two writers of
//! one disk ([`FakeWorld::faults`]). A [`ScriptedResult`] makes a method of the ports fail, wait or
//! lose its answer. A [`MachineControl`] makes one machine reset, crash or stop answering. All
//! waiting uses tokio's clock, which a test can pause.
//!
//! [`qemu`] is a separate fake: a process of its own, for tests that kill the daemon.

mod backend;
mod control;
pub mod qemu;
mod script;
mod vmm;
mod world;

pub use backend::FakeBackend;
pub use control::MachineControl;
pub use script::{CallLatch, ScriptedMethod, ScriptedResult};
pub use world::FakeWorld;
