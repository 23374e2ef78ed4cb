//! The use cases: the methods of the API, for every hypervisor.
//!
//! ```text
//!   api ──► VmService ──► mailbox ► Actor (one per VM, writes its record) ──► Backend / Vmm
//!              │                      │  intent ► effect ► outcome
//!              │ reads                ▼
//!              └────────► Index ◄── Store
//! ```
//!
//! Reads come from the [`index`] and never pass an actor or a VMM. Changes go through the
//! [`mailbox`] of the VM's [`actor`], one at a time, and only `force` pre-empts the operation in
//! progress. Every commit goes through [`events`], which sends it to watches in the order of the
//! log. [`check`] checks the host's files before anything is touched, [`claims`] keeps two running
//! VMs off one disk or TAP, and [`tombstones`] keep the claims of processes that deleted VMs have
//! left. [`console`] streams and bounds the consoles, and takes input beside the actors.
//! [`calls`] carries out the calls that change something, and with an idempotency key once.
//! [`operation_log`] writes the log line of each operation and of each change without a
//! request.
//!
//! The modules depend on each other in one direction: [`service`], the use cases, [`shared`],
//! [`index`], [`mailbox`].

mod actor;
mod backends;
mod calls;
mod check;
mod claims;
mod clock;
mod console;
mod create;
mod error;
mod events;
mod failure;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod index;
mod keys;
mod kinds;
mod listing;
mod mailbox;
mod metrics;
mod names;
mod operation_count;
mod operation_log;
mod operations;
mod panics;
mod places;
mod resolve;
mod run_folders;
mod service;
mod settings;
mod shared;
mod sockets;
mod spare_pool;
mod spares;
mod tombstones;
mod unconfigured;
mod update;
mod validate;
mod wait;

pub use backends::{BackendFamily, BackendStatus, Backends, MakeBackend};
pub use calls::{Answered, Call, CallKind};
pub use console::{ConsoleChunk, ConsoleQuery, ConsoleStream};
pub use create::{CreateRequest, Created};
pub use error::{FailureAccount, ServiceError};
pub use events::{EventsPage, EventsQuery, PresentVm, RecordedEvent, Watch, WatchMessage, WatchQuery};
pub use index::VmView;
pub use keys::{IdempotencyKey, InvalidKey};
pub use listing::{ListQuery, VmPage};
pub use mailbox::OperationOutcome;
pub use metrics::Metrics;
pub use operations::{Operation, ShutdownOptions};
pub use service::VmService;
pub use settings::{DefaultBoot, Settings};
pub use update::ConfigUpdate;
