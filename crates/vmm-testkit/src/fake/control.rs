//! What a test does to one machine.

use vmm_core::backend::{Exit, ExitCause, GuestState, VmmEvent};
use vmm_core::id::VmUid;

use super::world::{Machine, World};

/// The strings of one machine. Pulling them after it has ended does nothing.
#[derive(Clone, Debug)]
pub struct MachineControl {
    world: World,
    pid: u32,
}

impl MachineControl {
    pub(super) fn new(world: World, pid: u32) -> Self {
        Self { world, pid }
    }

    /// Its process id, which no process of the host has.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it lives.
    pub fn lives(&self) -> bool {
        self.world.lock().machines.contains_key(&self.pid)
    }

    /// The VM that it runs; `None` once it has ended.
    pub fn uid(&self) -> Option<VmUid> {
        self.look(|machine| machine.uid)
    }

    /// What its guest does; `None` once it has ended.
    pub fn guest(&self) -> Option<GuestState> {
        self.look(|machine| machine.guest)
    }

    /// How often it was reset from outside.
    pub fn resets(&self) -> usize {
        self.look(|machine| machine.resets).unwrap_or_default()
    }

    /// Its guest resets itself and goes on.
    pub fn reset(&self) {
        self.emit(VmmEvent::GuestReset);
    }

    /// Its guest is reset by somebody else, and goes on.
    pub fn reset_from_outside(&self) {
        self.emit(VmmEvent::ResetFromOutside);
    }

    /// Its guest is paused by somebody else.
    pub fn pause(&self) {
        self.look(|machine| machine.guest = GuestState::Paused);
        self.emit(VmmEvent::Paused);
    }

    /// Its guest is let go on by somebody else.
    pub fn resume(&self) {
        self.look(|machine| machine.guest = GuestState::Running);
        self.emit(VmmEvent::Resumed);
    }

    /// Its guest cannot go on; the machine stays.
    pub fn fail_guest(&self, why: &str) {
        self.look(|machine| machine.guest = GuestState::Ended);
        self.emit(VmmEvent::GuestFailed(why.to_owned()));
    }

    /// Its guest powers off, and the machine ends with it.
    pub fn power_off(&self) {
        self.end(ExitCause::GuestPowerOff);
    }

    /// It ends for `cause`.
    pub fn end(&self, cause: ExitCause) {
        let message = format!("ended by the script: {}", cause.reason());
        self.world.lock().end(self.pid, Exit { cause, message });
    }

    /// It falls silent, as a process does that gets SIGSTOP. It can be killed all the same.
    pub fn stop(&self) {
        self.look(|machine| machine.silent = true);
    }

    /// It answers again.
    pub fn go_on(&self) {
        self.look(|machine| machine.silent = false);
    }

    /// Nobody can prove any more that it is the one on record, or the opposite.
    pub fn set_unprovable(&self, unprovable: bool) {
        self.look(|machine| machine.unprovable = unprovable);
    }

    /// It outlives SIGKILL, as a process does that waits for a broken device; or no longer does.
    pub fn set_unkillable(&self, unkillable: bool) {
        self.look(|machine| machine.unkillable = unkillable);
    }

    /// Its guest ignores its power button.
    pub fn ignore_shutdown(&self) {
        self.look(|machine| machine.obeys = false);
    }

    /// Its guest is in `guest`, and no event tells of it.
    pub fn set_guest(&self, guest: GuestState) {
        self.look(|machine| machine.guest = guest);
    }

    fn emit(&self, event: VmmEvent) {
        self.look(|machine| {
            // Nobody may listen, as while no daemon runs.
            let _ = machine.events.try_send(event);
        });
    }

    fn look<T>(&self, look: impl FnOnce(&mut Machine) -> T) -> Option<T> {
        self.world.lock().machines.get_mut(&self.pid).map(look)
    }
}
