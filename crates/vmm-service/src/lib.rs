//! The use cases: what the nine methods mean, whatever hypervisor runs a VM.
//!
//! ```text
//!   api ──► VmService ──► inbox ──► Actor (one per VM, the only writer of its record) ──► Backend / Vmm
//!              │                      │  intent ► effect ► outcome
//!              │ reads                ▼
//!              └────────► Index ◄── Store
//! ```
//!
//! Reads come from the [`index`] and never pass an actor or a VMM. Changes go through the VM's [`actor`], one at a time; only
//! `force` has a channel of its own and pre-empts what is under way. Every commit goes through [`events`], which tells watchers
//! of it in the order of the log. [`check`] looks at the host before anything is touched,
//! and [`claims`] keeps two running VMs off one disk or TAP.

mod actor;
mod backends;
mod check;
mod claims;
mod clock;
mod create;
mod error;
mod events;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod index;
mod kinds;
mod listing;
mod metrics;
mod places;
mod run_folders;
mod service;
mod spares;
mod unserved;
mod wait;

pub use backends::{BackendFamily, BackendStatus, Backends, MakeBackend};
pub use create::{CreateRequest, Created};
pub use error::ServiceError;
pub use events::{EventsPage, EventsQuery, Notice, Present, Recorded, Watch, WatchQuery};
pub use index::VmView;
pub use listing::{ListQuery, Page};
pub use metrics::Metrics;
pub use service::{DefaultBoot, Outcome, Settings, ShutdownOptions, VmService};
