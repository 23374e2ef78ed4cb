//! `vmcp wait`: until a VM is in a state, across losses of the server.

use std::time::{Duration, Instant};

use connectrpc::{ConnectError, ErrorCode};
use vmm_proto::v1 as pb;

use super::Session;
use crate::cli::Wait;
use crate::connect::retry::{Retry, is_passing};
use crate::connect::wait::{self, TURN_INTERVAL};
use crate::connect::{Client, names};
use crate::failure::Failure;
use crate::output::progress::Progress;
use crate::output::words;

pub(super) async fn run(session: &mut Session, arguments: &Wait) -> Result<(), Failure> {
    let deadline = arguments.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let vm_id = names::resolve(&session.client, &arguments.name).await?;
    let uid = uid_of(&session.client, &vm_id).await?;
    let progress = Progress::of_vm(&session.client, &vm_id);
    let waiter = Waiter { session, arguments, vm_id, uid, deadline };
    let outcome = progress.during(waiter.wait(&progress)).await;
    drop(progress);
    let answer = outcome??;
    session
        .output
        .answer(&answer, &[&answer.vm_id], |_| words::vm(&answer.vm_id, &answer.state, &answer.status))
}

/// A wait for one VM, which a later VM of the same name does not end.
struct Waiter<'a> {
    session: &'a Session,
    arguments: &'a Wait,
    vm_id: String,
    uid: String,
    deadline: Option<Instant>,
}

impl Waiter<'_> {
    async fn wait(&self, progress: &Progress) -> Result<pb::WaitVmResponse, ConnectError> {
        let server = self.session.server.to_string();
        let mut retry = Retry::default();
        loop {
            let outcome = self.turn().await;
            let (pause, remark) = match &outcome {
                Ok(_) => (Duration::ZERO, retry.found(&server)),
                // The server answered in time: the VM is in another state still.
                Err(error) if error.code == ErrorCode::DeadlineExceeded => {
                    (Duration::ZERO, retry.found(&server))
                }
                Err(error) if is_passing(error) => retry.lost(&server, error),
                Err(_) => (Duration::ZERO, None),
            };
            if let Some(text) = remark {
                progress.remark(&text);
            }
            match outcome {
                Err(error) if is_passing(&error) => match self.left() {
                    Some(Duration::ZERO) => return Err(late(error)),
                    left => tokio::time::sleep(left.map_or(pause, |left| pause.min(left))).await,
                },
                outcome => return outcome,
            }
        }
    }

    /// Makes one call of WaitVm. Fails if another VM has the name by now.
    async fn turn(&self) -> Result<pb::WaitVmResponse, ConnectError> {
        if uid_of(&self.session.client, &self.vm_id).await? != self.uid {
            let message = format!("VM \"{}\" was deleted, and another one has its name now", self.vm_id);
            return Err(ConnectError::not_found(message));
        }
        let turn = self.left().map_or(TURN_INTERVAL, |left| left.min(TURN_INTERVAL));
        wait::turn(&self.session.client, &self.vm_id, &self.arguments.states, turn).await
    }

    /// Returns the time until the deadline, or `None` without a deadline.
    fn left(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }
}

/// Returns the error of a wait that timed out. The server's own error names the state of the VM.
fn late(error: ConnectError) -> ConnectError {
    if error.code == ErrorCode::DeadlineExceeded {
        return error;
    }
    ConnectError::deadline_exceeded(format!("the time is over, and the server does not answer: {error}"))
}

async fn uid_of(client: &Client, vm_id: &str) -> Result<String, ConnectError> {
    let request = pb::GetVmInfoRequest { vm_id: vm_id.to_owned(), ..Default::default() };
    Ok(client.get_vm_info(request).await?.into_owned().uid)
}
