//! Proves that a QEMU can start VMs: starts it with an empty machine of each model, whose guest
//! never runs.
//!
//! ```text
//!   ping ──► verdict ──┬─ the program has passed since its file changed ───────► Verdict
//!                      └─ a task: a start of each model ─┬─ all have ended ────► Verdict
//!                                                        ├─ after WAIT_LIMIT ──► not proven yet
//!                                                        └─ after START_LIMIT ─► killed, Verdict
//! ```
//!
//! `--version` works without the firmware, the modules of the accelerator and the sandbox, and then
//! every BootVm fails. A model that has passed is not started again until the program's file
//! changes or a launch fails. A model that has failed is started again at the next call, because
//! the missing part is installed by changing another file.

use std::path::Path;
use std::process::ExitStatus;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tracing::Instrument;

use super::convert::{self, Accelerator, QemuMachine};
use crate::output::{self, Output};
use crate::program::InstalledProgram;
use crate::sanitize;

/// The time that a call waits for a trial. The service gives a health check 4 s.
const WAIT_LIMIT: Duration = Duration::from_secs(3);
/// The time after which a trial start has failed. An ordinary start takes some 100 ms.
const START_LIMIT: Duration = Duration::from_secs(10);

/// The trials of one backend.
#[derive(Debug, Default)]
pub(super) struct Trials(Mutex<Option<Trial>>);

/// The last trial.
#[derive(Debug)]
struct Trial {
    program: InstalledProgram,
    accelerator: Accelerator,
    /// `None` until the starts have ended.
    verdict: watch::Receiver<Option<Verdict>>,
}

/// The outcome for each machine model. An error is the reason why a VM would not start, with the
/// remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) q35: Result<(), String>,
    pub(super) microvm: Result<(), String>,
}

impl Verdict {
    fn of(&self, machine: QemuMachine) -> &Result<(), String> {
        match machine {
            QemuMachine::Q35 => &self.q35,
            QemuMachine::Microvm => &self.microvm,
        }
    }
}

impl Trials {
    /// Returns the verdict on `program`, after a trial start where one is due.
    ///
    /// # Errors
    /// Returns the reason why there is no verdict yet.
    pub(super) async fn verdict(
        &self,
        program: &InstalledProgram,
        accelerator: Accelerator,
    ) -> Result<Verdict, String> {
        let mut verdict = self.due(program, accelerator);
        match tokio::time::timeout(WAIT_LIMIT, verdict.wait_for(Option::is_some)).await {
            Ok(Ok(known)) => match &*known {
                Some(verdict) => Ok(verdict.clone()),
                None => Err(unproven(program.path())),
            },
            // The task was dropped because the runtime shuts down, or the time is over.
            Ok(Err(_)) | Err(_) => Err(unproven(program.path())),
        }
    }

    /// Returns the reason why `machine` would not start, if the last trial found one.
    pub(super) fn failure(&self, machine: QemuMachine) -> Option<String> {
        let last = self.last();
        let verdict = last.as_ref()?.verdict.borrow();
        verdict.as_ref()?.of(machine).clone().err()
    }

    /// Forgets what was proven, because QEMU has refused a VM or ended while it started.
    pub(super) fn forget(&self) {
        *self.last() = None;
    }

    /// Returns the trial of `program`: the last one, if it goes on or has passed, or a new one.
    fn due(&self, program: &InstalledProgram, accelerator: Accelerator) -> watch::Receiver<Option<Verdict>> {
        let mut last = self.last();
        let same = last.as_ref().filter(|last| last.program == *program && last.accelerator == accelerator);
        let known = same.and_then(|last| last.verdict.borrow().clone());
        if let Some(same) = same {
            let goes_on = same.verdict.has_changed().is_ok();
            let passed = known.as_ref().is_some_and(|known| known.q35.is_ok() && known.microvm.is_ok());
            if passed || (known.is_none() && goes_on) {
                return same.verdict.clone();
            }
        }
        let (tell, verdict) = watch::channel(None);
        let of = program.clone();
        let trial = async move {
            let again = async |machine| match known.as_ref().map(|known| known.of(machine)) {
                Some(Ok(())) => Ok(()),
                Some(Err(_)) | None => start(of.path(), machine, accelerator).await,
            };
            let (q35, microvm) = tokio::join!(again(QemuMachine::Q35), again(QemuMachine::Microvm));
            tell.send_replace(Some(Verdict { q35, microvm }));
        };
        // The start goes on in a task of its own, because a call that is dropped would end it.
        tokio::spawn(trial.instrument(tracing::debug_span!(parent: None, "trial of QEMU")));
        *last = Some(Trial { program: program.clone(), accelerator, verdict: verdict.clone() });
        verdict
    }

    fn last(&self) -> MutexGuard<'_, Option<Trial>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts `program` with an empty `machine`, which then ends.
///
/// # Errors
/// Returns the reason why a VM would not start, and the remedy.
async fn start(program: &Path, machine: QemuMachine, accelerator: Accelerator) -> Result<(), String> {
    let words = convert::trial(machine, accelerator);
    let why = match output::run(program, &words, convert::MADE, START_LIMIT).await {
        Ok(Output { status, stdout, stderr: _ }) if status.success() && has_made(&stdout) => return Ok(()),
        Ok(Output { status, stdout, stderr }) => complaint(status, &stdout, &stderr),
        Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
            format!(
                "it had not made an empty machine after {START_LIMIT:?}, and was killed; look at the load of the host"
            )
        }
        Err(error) => format!("it could not be run: {error}"),
    };
    tracing::debug!(program = %program.display(), ?machine, detail = why, "a trial start of QEMU failed");
    Err(format!("{} starts no VM on the machine {}: {why}", program.display(), machine.as_str()))
}

/// Returns true if QEMU answered a command, which it does once its machine is made.
fn has_made(stdout: &str) -> bool {
    stdout
        .lines()
        .any(|line| serde_json::from_str::<Value>(line).is_ok_and(|message| message.get("return").is_some()))
}

/// Returns the remedy, QEMU's words and its exit status.
fn complaint(status: ExitStatus, stdout: &str, stderr: &str) -> String {
    let said = if stderr.trim().is_empty() { stdout } else { stderr };
    let said = said.trim();
    let quoted = if said.is_empty() { "nothing".to_owned() } else { sanitize::quote(said.as_bytes()) };
    format!("{}; it says: {quoted} ({status})", remedy(said))
}

/// Returns the remedy for a complaint of QEMU. The packages are those of Debian 12.
fn remedy(said: &str) -> &'static str {
    let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if has(&["sandbox", "seccomp"]) {
        "it cannot confine itself; install a QEMU that was built with seccomp (Debian: the package qemu-system-x86)"
    } else if has(&["bios-256k.bin", "bios.bin", "vgabios"]) {
        "its firmware is missing; install it (Debian and Ubuntu: the package seabios)"
    } else if has(&["efi-", "pxe-"]) {
        "the firmware of its network cards is missing; install it (Debian and Ubuntu: the package ipxe-qemu)"
    } else if has(&["BIOS", "firmware", ".rom", ".bin"]) {
        "its firmware is missing; install it (Debian and Ubuntu: the package qemu-system-data)"
    } else if has(&["KVM", "kvm"]) {
        "it cannot use /dev/kvm; see `vmm-controlplane doctor`, look for another hypervisor that runs, or set \
         UNKEY_VMCP_QEMU_KVM=false, with which QEMU emulates"
    } else if has(&["module", "accel"]) {
        "its modules are missing or of another build; install them (Debian: the package qemu-system-common, in the version of \
         qemu-system-x86), and let UNKEY_VMCP_QEMU_BINARY name the program at the place where its package put it"
    } else if has(&["machine type", "pvpanic"]) {
        "it was built without the machine or its devices; install another QEMU (Debian and Ubuntu: the package qemu-system-x86)"
    } else {
        "act on its words, or put its files back (Debian: apt-get install --reinstall qemu-system-x86 qemu-system-common \
         qemu-system-data)"
    }
}

fn unproven(program: &Path) -> String {
    format!(
        "{} has not proven within {WAIT_LIMIT:?} that it starts VMs: it hangs, or the host is very busy; the trial goes on",
        program.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_package_is_named() {
        for (said, package) in [
            ("qemu: could not load PC BIOS 'qboot.rom'", "qemu-system-data"),
            ("qemu: could not load PC BIOS 'bios-microvm.bin'", "qemu-system-data"),
            ("qemu: could not load PC BIOS 'bios-256k.bin'", "seabios"),
            ("failed to find romfile \"efi-virtio.rom\"", "ipxe-qemu"),
            ("fatal: could not load module for type 'tcg-accel-ops'", "qemu-system-common"),
            ("-sandbox support is not enabled in this QEMU binary", "seccomp"),
            ("failed to initialize kvm: Device or resource busy", "/dev/kvm"),
            ("Could not access KVM kernel module: No such file or directory", "/dev/kvm"),
            ("kvm.c:3183: kvm_buf_set_msrs: Assertion failed.", "UNKEY_VMCP_QEMU_KVM=false"),
            ("unsupported machine type", "qemu-system-x86"),
            ("the moon is in the wrong phase", "--reinstall"),
        ] {
            assert!(remedy(said).contains(package), "{said}: {}", remedy(said));
        }
    }

    #[test]
    fn a_trial_succeeds_with_the_first_answered_command() {
        let greeting = r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#;
        assert!(!has_made(greeting), "QEMU greets before it loads its firmware");
        assert!(!has_made("return\n{"));
        assert!(has_made(&format!("{greeting}\r\n{{\"return\": {{}}}}\r\n")));
    }
}
