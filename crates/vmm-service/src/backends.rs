//! The backends of this daemon, and their health as far as it is known.
//!
//! ```text
//!   name ──► BackendFamily ──┬─ current: new VMs, discovery, health
//!                            └─ of(kind): the object for VMs of that kind, made on demand
//! ```
//!
//! The configuration chooses the current backend of each hypervisor. A VM on record keeps its kind,
//! so it may need another object of the same hypervisor than the current one.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_core::backend::{Backend, BackendHealth, Capabilities};
use vmm_core::id::BackendName;
use vmm_core::kind::VmKind;

use crate::unconfigured::UnconfiguredBackend;

/// The time that a backend may take to report its health.
const PING_TIMEOUT: Duration = Duration::from_secs(4);

/// All backends by name, one of them the default.
#[derive(Clone)]
pub struct Backends {
    entries: Arc<BTreeMap<BackendName, BackendEntry>>,
    default: BackendName,
}

/// A function that makes the backend object for VMs of a kind that the current one does not run.
/// Its error is the reason why there can be none.
pub type MakeBackend = dyn Fn(&VmKind) -> Result<Arc<dyn Backend>, String> + Send + Sync;

/// The backend objects of one hypervisor.
pub struct BackendFamily {
    current: Arc<dyn Backend>,
    make: Box<MakeBackend>,
    /// The objects of other kinds that VMs on record have needed.
    others: Mutex<Vec<Arc<dyn Backend>>>,
}

impl BackendFamily {
    /// Creates a family. `current` runs the VMs that are created from now on. `make` makes the
    /// object for any other kind of VM that is on record, and its error is the reason that such a
    /// VM shows.
    pub fn new(
        current: Arc<dyn Backend>,
        make: impl Fn(&VmKind) -> Result<Arc<dyn Backend>, String> + Send + Sync + 'static,
    ) -> Self {
        Self { current, make: Box::new(make), others: Mutex::default() }
    }

    /// Returns the object that runs VMs of `kind`. If there can be none, the returned object
    /// touches nothing.
    fn of(&self, kind: &VmKind) -> Arc<dyn Backend> {
        if self.current.serves(kind) {
            return Arc::clone(&self.current);
        }
        let mut others = lock(&self.others);
        if let Some(known) = others.iter().find(|backend| backend.serves(kind)) {
            return Arc::clone(known);
        }
        let made = (self.make)(kind).unwrap_or_else(|why| {
            let capabilities = self.current.capabilities().clone();
            Arc::new(UnconfiguredBackend::new(capabilities, kind.clone(), why))
        });
        others.push(Arc::clone(&made));
        made
    }
}

impl From<Arc<dyn Backend>> for BackendFamily {
    /// Makes a family with one object. VMs of every other kind are not touched.
    fn from(current: Arc<dyn Backend>) -> Self {
        let name = current.capabilities().name.clone();
        let make = move |kind: &VmKind| {
            Err(format!("the VM lives at {kind}, which is no longer among the endpoints of {name}"))
        };
        Self::new(current, make)
    }
}

impl fmt::Debug for BackendFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackendFamily")
            .field("name", &self.current.capabilities().name)
            .finish_non_exhaustive()
    }
}

struct BackendEntry {
    family: BackendFamily,
    health: Mutex<BackendHealth>,
}

/// One backend as clients see it.
#[derive(Clone, Debug)]
pub struct BackendStatus {
    /// The capabilities of the backend.
    pub capabilities: Capabilities,
    /// The health of the backend.
    pub health: BackendHealth,
}

impl Backends {
    /// Creates the set of backends. `default` serves VMs that name none. It need not be among
    /// `families`, and then such VMs are refused.
    pub fn new<F: Into<BackendFamily>>(default: BackendName, families: impl IntoIterator<Item = F>) -> Self {
        let unknown = BackendHealth::from(Err("the backend has not been asked yet".to_owned()));
        let entries = families
            .into_iter()
            .map(|family| {
                let family: BackendFamily = family.into();
                let name = family.current.capabilities().name.clone();
                (name, BackendEntry { family, health: Mutex::new(unknown.clone()) })
            })
            .collect();
        Self { entries: Arc::new(entries), default }
    }

    /// Returns the name of the backend of VMs that name none.
    pub fn default_name(&self) -> &BackendName {
        &self.default
    }

    /// Finds the backend of new VMs. An empty name means the default.
    ///
    /// # Errors
    ///
    /// Returns a text that lists the backends that exist.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Backend>, String> {
        self.family(name).map(|family| Arc::clone(&family.current))
    }

    /// Finds the backend of VMs of `kind`. If the configuration does not name a way to them, the
    /// returned backend touches nothing and reports the missing setting.
    ///
    /// # Errors
    ///
    /// Fails as [`Backends::get`] does.
    pub fn of_kind(&self, name: &str, kind: &VmKind) -> Result<Arc<dyn Backend>, String> {
        self.family(name).map(|family| family.of(kind))
    }

    /// Returns true if new VMs are created on `backend`.
    pub(crate) fn is_current(&self, backend: &Arc<dyn Backend>) -> bool {
        let entry = self.entries.get(&backend.capabilities().name);
        entry.is_some_and(|entry| Arc::ptr_eq(&entry.family.current, backend))
    }

    fn family(&self, name: &str) -> Result<&BackendFamily, String> {
        let name = if name.is_empty() { self.default.clone() } else { BackendName::new(name) };
        self.entries.get(&name).map(|entry| &entry.family).ok_or_else(|| {
            let known = self.entries.keys().map(BackendName::as_str).collect::<Vec<_>>().join(", ");
            format!("unsupported backend type: {name}; this daemon serves: {known}")
        })
    }

    /// Asks every backend for its health, all at the same time.
    pub async fn refresh(&self) {
        futures::future::join_all(self.entries.values().map(BackendEntry::refresh)).await;
    }

    /// Asks one backend for its health.
    pub(crate) async fn refresh_one(&self, name: &BackendName) {
        if let Some(entry) = self.entries.get(name) {
            entry.refresh().await;
        }
    }

    /// Returns every object in use: the current one of each hypervisor, and the objects that VMs on
    /// record have needed.
    pub(crate) fn objects(&self) -> Vec<Arc<dyn Backend>> {
        self.entries
            .values()
            .flat_map(|BackendEntry { family, .. }| {
                let others = lock(&family.others).clone();
                std::iter::once(Arc::clone(&family.current)).chain(others)
            })
            .collect()
    }

    /// Returns the capabilities and the last known health of every backend, by name.
    pub fn statuses(&self) -> Vec<BackendStatus> {
        self.entries.values().map(BackendEntry::status).collect()
    }

    /// Returns the capabilities and the last known health of one backend.
    pub fn status(&self, name: &BackendName) -> Option<BackendStatus> {
        self.entries.get(name).map(BackendEntry::status)
    }
}

impl BackendEntry {
    async fn refresh(&self) {
        let health =
            tokio::time::timeout(PING_TIMEOUT, self.family.current.ping()).await.unwrap_or_else(|_| {
                BackendHealth::from(Err(format!(
                    "the backend did not answer within {} s",
                    PING_TIMEOUT.as_secs()
                )))
            });
        *lock(&self.health) = health;
    }

    fn status(&self) -> BackendStatus {
        let mut capabilities = self.family.current.capabilities().clone();
        let health = lock(&self.health).clone();
        if health.accelerator.is_some() {
            capabilities.facts.accelerator = health.accelerator;
        }
        BackendStatus { capabilities, health }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
