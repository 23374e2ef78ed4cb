//! The operations on a VM that exists, which its actor carries out.

use std::time::Duration;

use serde::Serialize;
use vmm_core::caller::Caller;
use vmm_core::id::{VmId, VmUid};
use vmm_core::idempotency::KeyedCall;
use vmm_core::state::VmOperation;

use crate::error::ServiceError;
use crate::failure::Failure;
use crate::mailbox::{ActorHandle, OperationOutcome, OperationRequest};
use crate::service::VmService;
use crate::update::{ConfigUpdate, check_protection};

/// The time that a guest has to obey ShutdownVm if the client gives none.
pub(crate) use vmm_core::intent::DEFAULT_GUEST_TIMEOUT as DEFAULT_SHUTDOWN;
/// The longest time that a client may give a guest.
const MAX_SHUTDOWN_SECONDS: i32 = 3600;
/// The options of a shutdown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShutdownOptions {
    /// True to start at the last rung, and to pre-empt the operation in progress.
    pub force: bool,
    /// The seconds that the guest has to obey. 0 means 30.
    pub timeout_seconds: i32,
}

impl ShutdownOptions {
    /// Returns the time for which the guest is asked, or `None` if it is not asked.
    fn guest_timeout(self) -> Result<Option<Duration>, ServiceError> {
        let seconds = match self.timeout_seconds {
            0 => DEFAULT_SHUTDOWN,
            seconds @ 1..=MAX_SHUTDOWN_SECONDS => Duration::from_secs(u64::from(seconds.unsigned_abs())),
            other => {
                return Err(ServiceError::invalid(
                    "timeout_seconds",
                    format!("must be from 0 (the default, 30) to {MAX_SHUTDOWN_SECONDS}, not {other}"),
                ));
            }
        };
        Ok((!self.force).then_some(seconds))
    }
}

/// An operation on a VM that exists, as a client asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// BootVm.
    Boot,
    /// ShutdownVm.
    Shutdown(ShutdownOptions),
    /// PauseVm.
    Pause,
    /// ResumeVm.
    Resume,
    /// RebootVm.
    Reboot(ShutdownOptions),
    /// UpdateVm.
    Update(Box<ConfigUpdate>),
    /// DeleteVm.
    Delete {
        /// True to delete the VM in any state.
        force: bool,
    },
}

impl Operation {
    /// Returns the operation for the actor.
    pub(crate) const fn request(&self) -> VmOperation {
        match self {
            Self::Boot => VmOperation::Boot,
            Self::Shutdown(_) => VmOperation::Shutdown,
            Self::Pause => VmOperation::Pause,
            Self::Resume => VmOperation::Resume,
            Self::Reboot(_) => VmOperation::Reboot,
            Self::Update(_) => VmOperation::Update,
            Self::Delete { force: true } => VmOperation::ForceDelete,
            Self::Delete { force: false } => VmOperation::Delete,
        }
    }

    /// Returns true if the operation pre-empts the one in progress.
    pub(crate) const fn is_forced(&self) -> bool {
        match self {
            Self::Shutdown(options) => options.force,
            Self::Delete { force } => *force,
            Self::Boot | Self::Pause | Self::Resume | Self::Reboot(_) | Self::Update(_) => false,
        }
    }
}

impl VmService {
    /// Starts a VM.
    ///
    /// # Errors
    ///
    /// Returns an error if the state forbids it, a resource is taken or missing, or the backend
    /// failed.
    pub async fn boot(&self, vm_id: &str, caller: Caller) -> Result<OperationOutcome, ServiceError> {
        self.operate(vm_id, Operation::Boot, caller, None).await
    }

    /// Shuts a VM down. Success means that its VMM has gone.
    ///
    /// # Errors
    ///
    /// Returns an error if the state forbids it, or the VMM does not end.
    pub async fn shutdown(
        &self,
        vm_id: &str,
        options: ShutdownOptions,
        caller: Caller,
    ) -> Result<OperationOutcome, ServiceError> {
        self.operate(vm_id, Operation::Shutdown(options), caller, None).await
    }

    /// Stops a VM's CPUs.
    ///
    /// # Errors
    ///
    /// Returns an error if the state forbids it, or the VMM failed.
    pub async fn pause(&self, vm_id: &str, caller: Caller) -> Result<OperationOutcome, ServiceError> {
        self.operate(vm_id, Operation::Pause, caller, None).await
    }

    /// Lets a VM's CPUs continue.
    ///
    /// # Errors
    ///
    /// Returns an error if the state forbids it, or the VMM failed.
    pub async fn resume(&self, vm_id: &str, caller: Caller) -> Result<OperationOutcome, ServiceError> {
        self.operate(vm_id, Operation::Resume, caller, None).await
    }

    /// Shuts a VM down and boots it. With `force` the VM is reset at once.
    ///
    /// # Errors
    ///
    /// Returns an error if the state forbids it, or the VMM failed. If the second half failed, the
    /// VM is shut down, and the error states that.
    pub async fn reboot(
        &self,
        vm_id: &str,
        options: ShutdownOptions,
        caller: Caller,
    ) -> Result<OperationOutcome, ServiceError> {
        self.operate(vm_id, Operation::Reboot(options), caller, None).await
    }

    /// Removes a VM and everything that the program made for it.
    ///
    /// # Errors
    ///
    /// Returns an error without `force` if the state forbids it. With `force`, only an unknown name
    /// or a failure of the store is an error.
    pub async fn delete(
        &self,
        vm_id: &str,
        force: bool,
        caller: Caller,
    ) -> Result<OperationOutcome, ServiceError> {
        self.operate(vm_id, Operation::Delete { force }, caller, None).await
    }

    /// Replaces parts of a VM's configuration.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Invalid`] with every violation, [`ServiceError::Precondition`] if the
    /// VM's state or owner forbids the change of a part, [`ServiceError::Aborted`] if the VM has
    /// another generation than the caller requires, or the store's failure.
    pub async fn update(
        &self,
        vm_id: &str,
        update: ConfigUpdate,
        caller: Caller,
    ) -> Result<OperationOutcome, ServiceError> {
        self.operate(vm_id, Operation::Update(Box::new(update)), caller, None).await
    }

    /// Asks the actor of a VM for an operation, which keeps the answer for the call `key`.
    pub(crate) async fn operate(
        &self,
        vm_id: &str,
        operation: Operation,
        caller: Caller,
        key: Option<&KeyedCall>,
    ) -> Result<OperationOutcome, ServiceError> {
        let (request, force) = (operation.request(), operation.is_forced());
        let (mut guest_timeout, mut update) = (None, None);
        match operation {
            Operation::Boot | Operation::Pause | Operation::Resume => {}
            Operation::Shutdown(options) | Operation::Reboot(options) => {
                guest_timeout = options.guest_timeout()?;
            }
            Operation::Update(sent) => {
                sent.check_request()?;
                update = Some(sent);
            }
            Operation::Delete { .. } => {
                // A forced operation pre-empts the one in progress, which a refusal must not do. The
                // actor checks the protection again, because an UpdateVm may be waiting in its queue.
                if let Ok(view) = self.get(vm_id) {
                    check_protection(&view.record, &caller)?;
                }
            }
        }
        let key = key.cloned().map(Box::new);
        let message = OperationRequest { request, guest_timeout, caller, update, key };
        let handle = self.handle(vm_id)?;
        let counted = self.shared.under_way.begin();
        let answer =
            if force { handle.force(message, counted).await } else { handle.ask(message, counted).await };
        self.answer(vm_id, handle.uid, answer)
    }

    /// Returns the answer of an actor. An actor that ends without an answer has deleted its VM,
    /// unless the VM with the same uid still exists.
    fn answer(
        &self,
        vm_id: &str,
        uid: VmUid,
        answer: Option<Result<OperationOutcome, ServiceError>>,
    ) -> Result<OperationOutcome, ServiceError> {
        answer.unwrap_or_else(|| match self.get(vm_id) {
            Err(not_found) => Err(not_found),
            Ok(view) if view.record.uid != uid => Err(ServiceError::not_found(vm_id)),
            Ok(_) => Err(Failure::EndedAbnormally { vm_id: vm_id.to_owned() }.into()),
        })
    }

    fn handle(&self, vm_id: &str) -> Result<ActorHandle, ServiceError> {
        vm_id
            .parse::<VmId>()
            .ok()
            .and_then(|id| self.shared.index.actor(&id))
            .ok_or_else(|| ServiceError::not_found(vm_id))
    }
}
