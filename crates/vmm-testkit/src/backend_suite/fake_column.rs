//! The column of the scripted fake: a hypervisor without processes. Its script plays the tiny guest
//! that the name of the kernel names.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendErrorKind, BackendHealth, Capabilities, Effect,
    ExitCause, GuestState, LaunchRequest, LaunchedVmm, SweepRequest,
};
use vmm_core::report::CheckReport;
use vmm_core::spec::{RestartMode, VmSpec};
use vmm_core::store::VmRecord;
use vmm_host::process::Signal;

use super::column::{Column, LinuxGuest, ObeyingGuest};
use crate::fake::{FakeBackend, FakeWorld, MachineControl};
use crate::guests::TinyGuest;

/// The number of resets that the script plays for a guest that only resets.
const RESETS: usize = 20;

/// The scripted fake as a column.
#[derive(Debug, Default)]
pub struct FakeColumn {
    world: FakeWorld,
}

impl FakeColumn {
    /// Returns a column in a new world.
    pub fn new() -> Self {
        Self::default()
    }

    fn machine(&self, record: &VmRecord) -> Option<MachineControl> {
        self.world.machine(record.vm_id.as_str()).filter(|machine| machine.uid() == Some(record.uid))
    }
}

#[async_trait]
impl Column for FakeColumn {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(ScriptedFake { fake: FakeBackend::in_world("fake", &self.world) })
    }

    fn obeying(&self) -> ObeyingGuest {
        ObeyingGuest::Tiny(TinyGuest::Button)
    }

    fn linux(&self) -> Result<LinuxGuest, String> {
        Err("the fake runs no real guest".to_owned())
    }

    async fn view(&self, _record: &VmRecord) -> String {
        String::new()
    }

    fn evidence(&self, _case: &str) -> &'static [&'static str] {
        &[]
    }

    fn is_real(&self) -> bool {
        // The script plays the guest's own actions. The guest does not notice a reset from outside,
        // and has no network.
        false
    }

    fn signal(&self, record: &VmRecord, signal: Signal) {
        let Some(machine) = self.machine(record) else { return };
        match signal {
            Signal::STOP => machine.stop(),
            Signal::CONT => machine.go_on(),
            _ => machine.end(ExitCause::VmmFailed),
        }
    }

    async fn stands_still(&self, record: &VmRecord) -> bool {
        self.machine(record).is_some_and(|machine| machine.guest() == Some(GuestState::Paused))
    }

    fn processes(&self, _runtime_dir: &Path) -> Vec<String> {
        let mut found: Vec<String> = self.world.living_uids().iter().map(ToString::to_string).collect();
        found.extend(self.world.faults());
        found
    }

    fn kill_all(&self, _runtime_dir: &Path) {
        self.world.host_dies();
    }
}

/// The fake with guests that behave like the tiny ones.
struct ScriptedFake {
    fake: FakeBackend,
}

impl ScriptedFake {
    fn play(&self, request: &LaunchRequest) {
        let Some(machine) = self.fake.world().machine(request.vm_id.as_str()) else { return };
        let stem = request.spec.boot.kernel.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let Some(guest) = TinyGuest::ALL.into_iter().find(|guest| stem == format!("tiny-{}", guest.name()))
        else {
            return;
        };
        print(request, guest);
        match guest {
            TinyGuest::Idle | TinyGuest::Echo => machine.ignore_shutdown(),
            TinyGuest::Obey | TinyGuest::Button | TinyGuest::Clock | TinyGuest::Flood => {}
            TinyGuest::PowerOff => machine.power_off(),
            TinyGuest::Panic => machine.fail_guest("the guest panicked"),
            TinyGuest::Reset | TinyGuest::TripleFault
                if request.spec.restart.mode == Some(RestartMode::Never) =>
            {
                machine.end(ExitCause::GuestReset);
            }
            // The service ends the loop by its restart limit, which is below the number of resets.
            TinyGuest::Reset | TinyGuest::TripleFault => {
                for _ in 0..RESETS {
                    machine.reset();
                    print(request, guest);
                }
            }
        }
    }
}

fn print(request: &LaunchRequest, guest: TinyGuest) {
    let Some(console) = &request.console else { return };
    let mut console = std::fs::OpenOptions::new().append(true).open(console).expect("the console is there");
    console.write_all(format!("{}\r\n", guest.banner()).as_bytes()).expect("the console can be written");
}

#[async_trait]
impl Backend for ScriptedFake {
    fn capabilities(&self) -> &Capabilities {
        self.fake.capabilities()
    }

    fn check(&self, spec: &VmSpec) -> CheckReport {
        self.fake.check(spec)
    }

    async fn launch(&self, request: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        let kernel =
            std::fs::metadata(&request.spec.boot.kernel).map(|facts| facts.len()).unwrap_or_default();
        // The broken kernel of the suite has 64 bytes. A whole one has more than 256.
        if kernel < 128 {
            let message = "the kernel has no code";
            return Err(BackendError::new(BackendErrorKind::Rejected, Effect::NotApplied, message));
        }
        let launched = self.fake.launch(request.clone()).await?;
        self.play(&request);
        Ok(launched)
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        self.fake.adopt(request).await
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        self.fake.sweep(request).await
    }

    async fn ping(&self) -> BackendHealth {
        self.fake.ping().await
    }
}
