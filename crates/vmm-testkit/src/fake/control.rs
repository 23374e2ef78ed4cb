//! The actions of a test on one machine of the fake hypervisor.

use vmm_core::backend::{Exit, ExitCause, GuestState, VmmEvent};
use vmm_core::id::VmUid;
use vmm_core::spec::VmSpec;

use super::world::{FakeMachine, FakeWorld};

/// The control of one machine. Its actions do nothing after the machine has ended.
#[derive(Clone, Debug)]
pub struct MachineControl {
    world: FakeWorld,
    pid: u32,
}

impl MachineControl {
    pub(super) fn new(world: FakeWorld, pid: u32) -> Self {
        Self { world, pid }
    }

    /// Returns the process id, which no process of the host has.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns true if the machine has not ended.
    pub fn lives(&self) -> bool {
        self.world.lock().machines.contains_key(&self.pid)
    }

    /// Returns the uid of the VM. `None` after the machine has ended.
    pub fn uid(&self) -> Option<VmUid> {
        self.with_machine(|machine| machine.uid)
    }

    /// Returns the state of the guest. `None` after the machine has ended.
    pub fn guest(&self) -> Option<GuestState> {
        self.with_machine(|machine| machine.guest)
    }

    /// Returns the specification that the machine was launched with. `None` after the machine has
    /// ended.
    pub fn spec(&self) -> Option<VmSpec> {
        self.with_machine(|machine| machine.spec.clone())
    }

    /// Returns the number of resets by the daemon.
    pub fn resets(&self) -> usize {
        self.with_machine(|machine| machine.resets).unwrap_or_default()
    }

    /// Returns the input of the console so far.
    pub fn typed(&self) -> Vec<u8> {
        self.with_machine(|machine| machine.typed.clone()).unwrap_or_default()
    }

    /// Makes the guest reset itself. The machine continues.
    pub fn reset(&self) {
        self.emit(VmmEvent::GuestReset);
    }

    /// Resets the guest like another client of the VMM. The machine continues.
    pub fn reset_from_outside(&self) {
        self.emit(VmmEvent::ResetFromOutside);
    }

    /// Pauses the guest like another client of the VMM.
    pub fn pause(&self) {
        self.with_machine(|machine| machine.guest = GuestState::Paused);
        self.emit(VmmEvent::Paused);
    }

    /// Resumes the guest like another client of the VMM.
    pub fn resume(&self) {
        self.with_machine(|machine| machine.guest = GuestState::Running);
        self.emit(VmmEvent::Resumed);
    }

    /// Makes the guest fail. The machine stays.
    pub fn fail_guest(&self, why: &str) {
        self.with_machine(|machine| machine.guest = GuestState::Ended);
        self.emit(VmmEvent::GuestFailed(why.to_owned()));
    }

    /// Makes the guest power off, which ends the machine.
    pub fn power_off(&self) {
        self.end(ExitCause::GuestPowerOff);
    }

    /// Ends the machine for `cause`.
    pub fn end(&self, cause: ExitCause) {
        let message = format!("ended by the script: {}", cause.reason());
        self.world.lock().end(self.pid, Exit { cause, message });
    }

    /// Makes the machine stop answering, like a process that gets SIGSTOP. It can be killed all the
    /// same.
    pub fn stop(&self) {
        self.with_machine(|machine| machine.silent = true);
    }

    /// Makes the machine answer again.
    pub fn go_on(&self) {
        self.with_machine(|machine| machine.silent = false);
    }

    /// Sets whether the machine cannot be proven to be the recorded one.
    pub fn set_unprovable(&self, unprovable: bool) {
        self.with_machine(|machine| machine.unprovable = unprovable);
    }

    /// Sets whether the machine outlives SIGKILL, like a process that waits for a broken device.
    pub fn set_unkillable(&self, unkillable: bool) {
        self.with_machine(|machine| machine.unkillable = unkillable);
    }

    /// Makes the guest ignore its power button.
    pub fn ignore_shutdown(&self) {
        self.with_machine(|machine| machine.obeys = false);
    }

    /// Sets the state of the guest without an event.
    pub fn set_guest(&self, guest: GuestState) {
        self.with_machine(|machine| machine.guest = guest);
    }

    fn emit(&self, event: VmmEvent) {
        self.with_machine(|machine| {
            // The send fails while no daemon runs.
            let _ = machine.events.try_send(event);
        });
    }

    fn with_machine<T>(&self, access: impl FnOnce(&mut FakeMachine) -> T) -> Option<T> {
        self.world.lock().machines.get_mut(&self.pid).map(access)
    }
}
