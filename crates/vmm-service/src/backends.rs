//! The backends of this daemon, and what is known of their health.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmm_core::backend::{Backend, BackendHealth, Capabilities};
use vmm_core::id::BackendName;

/// How long a backend may take to say how it is.
const PING_DEADLINE: Duration = Duration::from_secs(4);

/// All backends by name, one of them the default.
#[derive(Clone)]
pub struct Backends {
    entries: Arc<BTreeMap<BackendName, Entry>>,
    default: BackendName,
}

struct Entry {
    backend: Arc<dyn Backend>,
    health: Mutex<BackendHealth>,
}

/// One backend as clients see it.
#[derive(Clone, Debug)]
pub struct BackendStatus {
    /// What it can do.
    pub capabilities: Capabilities,
    /// How it is.
    pub health: BackendHealth,
}

impl Backends {
    /// Puts the backends together. `default` serves VMs that name none; it need not be among `backends`, and then such VMs
    /// are refused.
    pub fn new(default: BackendName, backends: impl IntoIterator<Item = Arc<dyn Backend>>) -> Self {
        let unknown = BackendHealth::from(Err("it has not been asked yet".to_owned()));
        let entries = backends
            .into_iter()
            .map(|backend| {
                let name = backend.capabilities().name.clone();
                (name, Entry { backend, health: Mutex::new(unknown.clone()) })
            })
            .collect();
        Self { entries: Arc::new(entries), default }
    }

    /// The backend of VMs that name none.
    pub fn default_name(&self) -> &BackendName {
        &self.default
    }

    /// Finds a backend; an empty name means the default.
    ///
    /// # Errors
    ///
    /// Text that lists the backends there are.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Backend>, String> {
        let name = if name.is_empty() { self.default.clone() } else { BackendName::new(name) };
        self.entries.get(&name).map(|entry| Arc::clone(&entry.backend)).ok_or_else(|| {
            let known = self.entries.keys().map(BackendName::as_str).collect::<Vec<_>>().join(", ");
            format!("unsupported backend type: {name}; this daemon serves: {known}")
        })
    }

    /// Asks every backend how it is, all at once.
    pub async fn refresh(&self) {
        futures::future::join_all(self.entries.values().map(Entry::refresh)).await;
    }

    /// Asks one backend how it is.
    pub(crate) async fn refresh_one(&self, name: &BackendName) {
        if let Some(entry) = self.entries.get(name) {
            entry.refresh().await;
        }
    }

    /// Every backend.
    pub(crate) fn all(&self) -> Vec<Arc<dyn Backend>> {
        self.entries.values().map(|entry| Arc::clone(&entry.backend)).collect()
    }

    /// What is known of every backend, by name.
    pub fn statuses(&self) -> Vec<BackendStatus> {
        self.entries.values().map(Entry::status).collect()
    }

    /// What is known of one backend.
    pub fn status(&self, name: &BackendName) -> Option<BackendStatus> {
        self.entries.get(name).map(Entry::status)
    }
}

impl Entry {
    async fn refresh(&self) {
        let health = tokio::time::timeout(PING_DEADLINE, self.backend.ping()).await.unwrap_or_else(|_| {
            BackendHealth::from(Err(format!("it did not answer within {} s", PING_DEADLINE.as_secs())))
        });
        *self.health.lock().unwrap_or_else(PoisonError::into_inner) = health;
    }

    fn status(&self) -> BackendStatus {
        BackendStatus {
            capabilities: self.backend.capabilities().clone(),
            health: self.health.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}
