//! Finds domains that another client of libvirt created, or started again.
//!
//! ```text
//!   at first, and after each gap: the list ──┐
//!   an event of a domain without a monitor ──┴─► look up ─┬─ marked, runs ─► found, by its uid
//!                                                         ├─ no mark ──────► found, if imported
//!                                                         └─ undefined ────► lost, if it was found
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tracing::{Instrument as _, debug, warn};
use uuid::Uuid;
use vmm_core::backend::{Backend as _, GuestState};
use vmm_core::discovery::{DiscoveredVm, Discoverer, Discovery, DiscoveryEvent};
use vmm_core::id::{VmId, VmUid};
use vmm_core::state::VmState;
use vmm_libvirt_wire::{Call, CallResult, Domain};

use super::LibvirtBackend;
use super::describe::{DomainDescription, describe};
use super::domain::{DomainOwner, QUICK_CALL_TIMEOUT, guest_state, is_active, owner};
use super::link::UnwatchedEvent;
use super::process::Sought;
use super::run::{DomainRunFacts, assemble};

/// The most findings that wait for the receiver.
const FINDINGS: usize = 64;

/// Returns the present domains, and starts a task that reports later ones.
async fn discover(backend: LibvirtBackend) -> Discovery {
    // The channel is created before the first lookup, because an event between the lookup and a
    // later channel would be lost.
    let unwatched = backend.link.unwatched_events();
    let mut seen = DomainScanner { backend, foreign_domains: BTreeSet::new() };
    let present = seen.examine_all().await.unwrap_or_default();
    let (sender, later) = mpsc::channel(FINDINGS);
    tokio::spawn(
        seen.follow_events(unwatched, sender)
            .instrument(tracing::info_span!(parent: None, "libvirt-discovery")),
    );
    Discovery { present, later }
}

/// Drops repeated news of a domain, because one lookup shows the outcome of all of them.
fn without_repeats(unwatched: impl Iterator<Item = UnwatchedEvent>) -> Vec<UnwatchedEvent> {
    let mut domains = BTreeSet::new();
    unwatched
        .filter(|event| match event {
            UnwatchedEvent::Changed(uuid) | UnwatchedEvent::Undefined(uuid) => domains.insert(*uuid),
            UnwatchedEvent::Connected | UnwatchedEvent::Lost => true,
        })
        .collect()
}

/// The domains that were seen so far.
struct DomainScanner {
    backend: LibvirtBackend,
    /// The reported domains of other clients.
    foreign_domains: BTreeSet<Uuid>,
}

impl DomainScanner {
    async fn follow_events(
        mut self,
        mut unwatched: mpsc::UnboundedReceiver<UnwatchedEvent>,
        sender: mpsc::Sender<DiscoveryEvent>,
    ) {
        loop {
            let first = tokio::select! {
                event = unwatched.recv() => event,
                () = sender.closed() => return,
            };
            let Some(first) = first else { return };
            // News that waits already is taken together, because a busy libvirt sends several
            // events for one change.
            let waiting = std::iter::from_fn(|| unwatched.try_recv().ok());
            for event in without_repeats(std::iter::once(first).chain(waiting)) {
                let findings = match event {
                    UnwatchedEvent::Changed(uuid) | UnwatchedEvent::Undefined(uuid) => {
                        self.examine_one(uuid).await
                    }
                    UnwatchedEvent::Connected => self.examine_after_gap().await,
                    UnwatchedEvent::Lost => vec![DiscoveryEvent::Health],
                };
                for finding in findings {
                    if sender.send(finding).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Returns the findings after a gap in the events: the health, the present domains, and those
    /// that were lost.
    async fn examine_after_gap(&mut self) -> Vec<DiscoveryEvent> {
        let before = self.foreign_domains.clone();
        let mut findings = vec![DiscoveryEvent::Health];
        let Some(found) = self.examine_all().await else { return findings };
        let lost = before
            .difference(&self.foreign_domains)
            .map(|uuid| DiscoveryEvent::Lost { place: self.backend.kind_of(*uuid) });
        findings.extend(lost);
        findings.extend(found.into_iter().map(|found| DiscoveryEvent::Found(Box::new(found))));
        findings
    }

    /// Returns all present domains, or `None` if libvirt does not answer.
    async fn examine_all(&mut self) -> Option<Vec<DiscoveredVm>> {
        let domains = match self.backend.link.call(Call::List, QUICK_CALL_TIMEOUT).await {
            Ok(CallResult::Domains { domains }) => domains,
            Ok(other) => {
                warn!(answer = ?other, "libvirt's answer is no list of domains");
                return None;
            }
            Err(error) => {
                debug!(%error, "libvirt does not list its domains");
                return None;
            }
        };
        self.foreign_domains.clear();
        let mut found = Vec::new();
        for domain in domains {
            found.extend(self.report_of(domain).await);
        }
        Some(found)
    }

    /// Returns the findings about one domain that has changed.
    async fn examine_one(&mut self, uuid: Uuid) -> Vec<DiscoveryEvent> {
        match self.backend.link.look_up(uuid, QUICK_CALL_TIMEOUT).await {
            Ok(Some(domain)) => self
                .report_of(domain)
                .await
                .into_iter()
                .map(|found| DiscoveryEvent::Found(Box::new(found)))
                .collect(),
            Ok(None) if self.foreign_domains.remove(&uuid) => {
                vec![DiscoveryEvent::Lost { place: self.backend.kind_of(uuid) }]
            }
            Ok(None) => Vec::new(),
            Err(error) => {
                debug!(%error, %uuid, "a changed domain cannot be read from libvirt");
                Vec::new()
            }
        }
    }

    /// Returns the domain in the form of a finding, or `None` if it needs no report.
    async fn report_of(&mut self, domain: Domain) -> Option<DiscoveredVm> {
        let uuid = domain.uuid;
        let ours = match owner(&domain) {
            DomainOwner::Instance(_) => true,
            DomainOwner::OtherClient if self.backend.options.import => {
                self.foreign_domains.insert(uuid);
                false
            }
            DomainOwner::OtherClient => return None,
        };
        let live = is_active(domain.state);
        // A watched domain has a handle. A stopped domain of this program has a record that says
        // so.
        if self.backend.link.has_monitor(uuid) || ours && !live {
            return None;
        }
        match self.examine(&domain, ours).await {
            Ok(found) => Some(found),
            Err(why) => {
                warn!(%uuid, name = domain.name, detail = why, "a domain of libvirt cannot be imported");
                None
            }
        }
    }

    async fn examine(&self, domain: &Domain, ours: bool) -> Result<DiscoveredVm, String> {
        let uuid = domain.uuid;
        let got = self
            .backend
            .link
            .call(Call::Xml { uuid }, QUICK_CALL_TIMEOUT)
            .await
            .map_err(|error| error.to_string())?;
        let CallResult::Xml { xml } = got else { return Err("libvirt's answer cannot be used".to_owned()) };
        let reported = describe(&xml)?;
        let state = match guest_state(domain.state) {
            GuestState::Running => VmState::Running,
            GuestState::Paused => VmState::Paused,
            GuestState::Ended => VmState::Shutdown,
        };
        let launched = match state {
            VmState::Running | VmState::Paused => Some(self.hold(domain, &reported, ours).await?),
            VmState::Created | VmState::Shutdown => None,
        };
        Ok(DiscoveredVm {
            place: self.backend.kind_of(uuid),
            uid: ours.then(|| VmUid::new(uuid)),
            names: names(domain),
            config: reported.config,
            unrepresented: reported.unrepresented,
            state,
            launched,
        })
    }

    async fn hold(
        &self,
        domain: &Domain,
        reported: &DomainDescription,
        ours: bool,
    ) -> Result<vmm_core::backend::LaunchedVmm, String> {
        let (backend, uuid) = (&self.backend, domain.uuid);
        let watched = backend.link.subscribe(uuid);
        let sought = Sought { domain: uuid, imported: !ours, recorded: None };
        let process = backend.find_qemu(sought, QUICK_CALL_TIMEOUT).await?;
        let process = process.ok_or("the domain runs, but this host shows no such process")?;
        let facts = DomainRunFacts {
            domain: uuid,
            socket: backend.socket.clone(),
            version: backend.hypervisor(),
            accelerator: reported.accelerator.clone(),
            machine: reported.machine.clone(),
            restarts: reported.restarts,
            imported: !ours,
            taps: reported.taps.clone(),
            console: None,
        };
        let run = facts.record(&process);
        let (_, launched) = assemble(&backend.link, watched, process, facts, run, domain.state);
        Ok(launched)
    }
}

/// Returns the names for a domain of another client: its own name if a VM may have it, and its
/// UUID.
fn names(domain: &Domain) -> Vec<VmId> {
    let fallback = format!("libvirt-{}", domain.uuid);
    [domain.name.clone(), fallback].into_iter().filter_map(|name| name.parse().ok()).collect()
}

/// The clone shares the link with the backend.
#[async_trait]
impl Discoverer for LibvirtBackend {
    async fn discover(&self) -> Discovery {
        let shared = Self { link: Arc::clone(&self.link), ..self.clone() };
        // The first lookup may take longer than the start of the daemon may wait.
        let _ = shared.link.ready(super::HEALTH_CONNECT_TIMEOUT).await;
        debug!(backend = %self.capabilities().name, "the daemon searches for domains");
        discover(shared).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_with_many_changes_is_examined_once() {
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let flood = std::iter::repeat_n(UnwatchedEvent::Changed(one), 1000);
        let rest = [
            UnwatchedEvent::Undefined(one),
            UnwatchedEvent::Lost,
            UnwatchedEvent::Changed(two),
            UnwatchedEvent::Connected,
        ];
        assert_eq!(
            without_repeats(flood.chain(rest)),
            [
                UnwatchedEvent::Changed(one),
                UnwatchedEvent::Lost,
                UnwatchedEvent::Changed(two),
                UnwatchedEvent::Connected
            ]
        );
    }
}
