//! A VM on record that this program cannot run: its configuration or its backend is none that it knows, as after a step back to
//! an older release.
//!
//! ```text
//!   listed, inspected, its name and its disks taken ── force ShutdownVm ──► its VMM is ended
//!        │                                          └─ force DeleteVm ────► and everything of it removed
//!        └─ any other operation ──► UNAVAILABLE, with the reason
//! ```
//!
//! Its record is left as it is until force comes, for a program that knows more of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::oneshot;
use tracing::Instrument as _;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendErrorKind, BackendHealth, Capabilities, Effect,
    LaunchRequest, Launched, SweepRequest,
};
use vmm_core::event::EventSeq;
use vmm_core::report::Report;
use vmm_core::spec::{Boot, Console, Cpu, MIB, Memory, RestartMode, RestartPolicy, VmSpec};
use vmm_core::state::Phase;
use vmm_core::store::VmRecord;
use vmm_host::process::{Lookup, find_by_argument};

use super::deadlines::KILL_DEADLINE;
use super::{Actor, Flow};
use crate::error::ServiceError;
use crate::metrics::MetricsCell;
use crate::service::Shared;

/// The reason in the status of such a VM.
const REASON: &str = "not-taken-up";

/// Puts a VM that cannot be taken up into the index, with an actor that leaves it alone. `known` is its backend, where it is
/// only the configuration that is not understood. The receiver hears when that is done.
pub(crate) fn show(
    shared: Arc<Shared>,
    record: VmRecord,
    known: Option<Arc<dyn Backend>>,
    why: String,
) -> oneshot::Receiver<()> {
    let index_of = Arc::clone(&shared);
    let shown = Arc::new(record.clone());
    let metrics = MetricsCell::default();
    let backend = Arc::new(Nobody::new(&record, known, why.clone()));
    let (mut actor, handle) = Actor::new(shared, record, no_spec(), backend, metrics.clone());
    actor.untaken = Some(why);
    index_of.index.insert(shown, EventSeq::default(), metrics, handle);
    let (told, done) = oneshot::channel();
    let span = actor.span();
    let task = async move {
        let flow = actor.leave_alone().await;
        let _ = told.send(());
        match flow {
            Flow::GoOn => actor.run().await,
            Flow::End => {}
        }
    };
    tokio::spawn(task.instrument(span));
    done
}

impl Actor {
    /// Shows the VM as it was last proven, and why nothing can be done with it. Writes nothing.
    async fn leave_alone(&mut self) -> Flow {
        self.claim_what_is_on_record();
        let intent = self.record.intent.clone();
        if let Some(leaving) = intent.as_ref().filter(|intent| intent.is_deletion()) {
            return self.go_on_deleting(leaving.clone()).await;
        }
        self.stray = self.record.run.is_some() || intent.is_some();
        let why = self.untaken.clone().unwrap_or_default();
        self.record.status = self.plain(Phase::Unreachable).because(REASON, why);
        self.publish();
        Flow::GoOn
    }

    /// The refusal of all that is not forced, of a VM that cannot be taken up.
    pub(super) fn refuse_untaken(&self) -> Result<(), ServiceError> {
        match &self.untaken {
            Some(why) if !self.forcing() => Err(ServiceError::Unavailable(format!(
                "VM \"{}\" cannot be used by this program: {why}. Serve it by the program that made it, or end and delete it \
                 with force",
                self.record.vm_id
            ))),
            Some(_) | None => Ok(()),
        }
    }
}

/// Stands in for the backend of a VM that cannot be taken up: starts nothing, finds nothing, and ends what is proven the VM's.
struct Nobody {
    capabilities: Capabilities,
    known: Option<Arc<dyn Backend>>,
    why: String,
}

impl Nobody {
    fn new(record: &VmRecord, known: Option<Arc<dyn Backend>>, why: String) -> Self {
        let capabilities = Capabilities {
            name: record.backend.clone(),
            endpoint_mode: "managed",
            default_restart_mode: RestartMode::Never,
            kernel_formats: &[],
            facts: BTreeMap::new(),
            limits: BTreeMap::new(),
        };
        Self { capabilities, known, why }
    }
}

#[async_trait]
impl Backend for Nobody {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn check(&self, _: &VmSpec) -> Report {
        Report::default()
    }

    async fn launch(&self, _: LaunchRequest) -> Result<Launched, BackendError> {
        Err(BackendError::new(BackendErrorKind::NotInstalled, Effect::NotApplied, self.why.clone()))
    }

    async fn adopt(&self, _: AdoptRequest) -> Result<Adoption, BackendError> {
        Ok(Adoption::Unreachable { reason: REASON, message: self.why.clone(), launched: None })
    }

    /// Ends the process on record. Others that use the run folder may be somebody's who only looks: they are named.
    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        if let Some(known) = &self.known {
            return known.sweep(request).await;
        }
        let failed = |text: String| BackendError::new(BackendErrorKind::Host, Effect::Unknown, text);
        if let Some(run) = &request.run {
            match vmm_host::process::adopt(&run.process) {
                Lookup::Alive(process) => {
                    process.kill_and_wait(KILL_DEADLINE).await.map_err(|error| failed(error.to_string()))?;
                }
                Lookup::Gone => {}
                Lookup::Unprovable(why) => return Err(failed(why)),
            }
        }
        let dir = request.dir.clone();
        let users = tokio::task::spawn_blocking(move || find_by_argument(&dir)).await;
        match users.map_err(|error| failed(error.to_string()))? {
            Ok(users) if users.is_empty() => Ok(()),
            Ok(users) => {
                let pids: Vec<_> = users.iter().map(|user| user.identity.pid.to_string()).collect();
                Err(failed(format!(
                    "nothing proves whether process {}, which uses {}, is its VMM: end it by hand",
                    pids.join(", "),
                    request.dir.display()
                )))
            }
            Err(error) => Err(failed(format!("the users of its run folder cannot be listed: {error}"))),
        }
    }

    async fn ping(&self) -> BackendHealth {
        BackendHealth::from(Err(self.why.clone()))
    }
}

/// What an actor is given in place of a configuration that is not understood. Nothing is ever started from it.
fn no_spec() -> VmSpec {
    VmSpec {
        cpu: Cpu { count: 1, max: 1, topology: None, features: BTreeMap::new() },
        memory: Memory { size_bytes: MIB, hotplug_max_bytes: None, backing: BTreeMap::new() },
        boot: Boot { kernel: "/".into(), initrd: None, args: String::new(), options: BTreeMap::new() },
        disks: Vec::new(),
        nics: Vec::new(),
        console: Console::Off,
        restart: RestartPolicy { mode: Some(RestartMode::Never), max_restarts: 0 },
    }
}
