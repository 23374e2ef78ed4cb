//! The slots of connections. A connection gets a slot, or is served as a last resort.
//!
//! ```text
//!   accepted ── a slot is free, and the peer has its share ──► a regular connection
//!      │
//!      ├─────── else a connection is idle: it closes and gives its slot away
//!      │                 └─────────────────────────────────────► a regular connection
//!      │
//!      └─────── else ──► a connection of last resort: one answer, soon, to health and force alone
//! ```
//!
//! A client is an IPv4 address, a /64 network of IPv6, because one host usually has a whole /64, or
//! a user on the unix socket. TCP connections from this host have no limit per client, because all
//! local clients share one address. Between them only the eviction of idle connections and the last
//! resort make room. Root and the daemon's own user have no limit either, because they need no
//! connection to harm the daemon.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::activity::ConnectionActivity;
use super::peer::Peer;

/// The most connections that may be closing at the same time to make room for others.
const MOST_LEAVING: usize = 32;

/// The slots of one server.
pub(super) struct ConnectionSlots {
    slots: usize,
    slots_per_peer: usize,
    state: Mutex<AdmissionState>,
}

#[derive(Default)]
struct AdmissionState {
    last: u64,
    open: HashMap<u64, OpenConnection>,
    clients: HashMap<Client, usize>,
    leaving: usize,
}

struct OpenConnection {
    client: Client,
    activity: Arc<ConnectionActivity>,
    /// True once the slot belongs to another connection and this one is closing.
    leaving: bool,
}

/// The identity under which connections count as those of one client.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Client {
    /// Clients that cannot be told apart or need no limit.
    Unlimited,
    V4([u8; 4]),
    V6Network([u8; 8]),
    User(u32),
}

impl Client {
    fn of(peer: Peer) -> Self {
        let address = match peer {
            Peer::Network { address, .. } => address,
            Peer::LocalUser { uid, .. } if is_trusted(uid) => return Self::Unlimited,
            Peer::LocalUser { uid, .. } => return Self::User(uid),
        };
        match address.ip().to_canonical() {
            ip if ip.is_loopback() => Self::Unlimited,
            IpAddr::V4(ip) => Self::V4(ip.octets()),
            IpAddr::V6(ip) => {
                let [a, b, c, d, e, f, g, h, ..] = ip.octets();
                Self::V6Network([a, b, c, d, e, f, g, h])
            }
        }
    }
}

/// Returns true for root and the daemon's own user.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

impl ConnectionSlots {
    pub(super) fn new(slots: usize, slots_per_peer: usize) -> Arc<Self> {
        Arc::new(Self { slots, slots_per_peer, state: Mutex::default() })
    }

    /// Gives a connection a slot, if necessary by closing an idle connection. Returns `None` if
    /// there is no free slot and no idle connection.
    pub(super) fn admit(
        self: &Arc<Self>,
        peer: Peer,
        activity: &Arc<ConnectionActivity>,
    ) -> Option<ConnectionSlot> {
        let client = Client::of(peer);
        let mut state = self.state();
        // The client's share is checked before the slots of the server. A client that has used up its
        // share may replace only an idle connection of its own, so one client cannot evict the idle
        // connections of others. A client within its share takes a free slot, or replaces the
        // connection that has been idle longest, whoever owns it. A connection that is leaving has
        // given its slot away already and is not counted. All of this happens under one lock, so
        // two new connections cannot take the same slot.
        let of_client = state.clients.get(&client).copied().unwrap_or(0);
        if client != Client::Unlimited && of_client >= self.slots_per_peer {
            state.evict(|open| open.client == client)?;
        } else if state.open.len() - state.leaving >= self.slots {
            state.evict(|_| true)?;
        }
        state.last += 1;
        let number = state.last;
        state.open.insert(number, OpenConnection { client, activity: Arc::clone(activity), leaving: false });
        *state.clients.entry(client).or_default() += 1;
        Some(ConnectionSlot { slots: Arc::clone(self), number })
    }

    fn state(&self) -> MutexGuard<'_, AdmissionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AdmissionState {
    /// Asks the connection that has been idle longest, of those for which `may` is true, to close.
    /// Returns `None` if there is none.
    fn evict(&mut self, may: impl Fn(&OpenConnection) -> bool) -> Option<()> {
        // A leaving connection keeps its socket for up to a second after its slot was given away.
        // This bound keeps the number of open sockets from growing far beyond the number of slots.
        if self.leaving >= MOST_LEAVING {
            return None;
        }
        let idle = self.open.values_mut().filter(|open| !open.leaving && may(open)).filter_map(|open| {
            let since = open.activity.idle_since()?;
            Some((since, open))
        });
        let (_, open) = idle.min_by_key(|(since, _)| *since)?;
        // The slot and the share of the peer are given away now and not when the connection is
        // closed, because the new connection must not wait for the old one. `ConnectionSlot::drop`
        // sees `leaving` and does not release the share a second time.
        open.leaving = true;
        open.activity.evict();
        let client = open.client;
        self.leaving += 1;
        self.release(client);
        Some(())
    }

    fn release(&mut self, client: Client) {
        if let Some(count) = self.clients.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                self.clients.remove(&client);
            }
        }
    }
}

/// The slot of one connection. Dropping it frees the slot.
pub(super) struct ConnectionSlot {
    slots: Arc<ConnectionSlots>,
    number: u64,
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let mut state = self.slots.state();
        let Some(open) = state.open.remove(&self.number) else { return };
        if open.leaving {
            state.leaving -= 1;
        } else {
            state.release(open.client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens a connection. Returns its activity, and its slot if it got one.
    fn connect(
        slots: &Arc<ConnectionSlots>,
        address: &str,
    ) -> (Arc<ConnectionActivity>, Option<ConnectionSlot>) {
        let activity = ConnectionActivity::new();
        let peer = Peer::Network { address: address.parse().unwrap(), has_certificate: false };
        let slot = slots.admit(peer, &activity);
        (activity, slot)
    }

    async fn is_evicted(activity: &ConnectionActivity) -> bool {
        tokio::time::timeout(std::time::Duration::ZERO, activity.evicted()).await.is_ok()
    }

    #[tokio::test]
    async fn the_longest_idle_connection_is_closed_first() {
        let slots = ConnectionSlots::new(2, 2);
        let (busy, _busy_slot) = connect(&slots, "127.0.0.1:1");
        let _request = busy.begin(None);
        let (idle, idle_slot) = connect(&slots, "127.0.0.1:2");
        assert!(idle_slot.is_some());
        let (next, next_slot) = connect(&slots, "127.0.0.1:3");
        assert!(next_slot.is_some() && is_evicted(&idle).await && !is_evicted(&busy).await);

        // The slot was handed over, so the end of the evicted connection frees no slot.
        let _next_request = next.begin(None);
        drop(idle_slot);
        assert!(connect(&slots, "127.0.0.1:4").1.is_none(), "both slots are in use");
        drop(next_slot);
        assert!(connect(&slots, "127.0.0.1:5").1.is_some());
    }

    #[tokio::test]
    async fn a_peer_beyond_its_share_closes_its_own_connections() {
        let slots = ConnectionSlots::new(10, 1);
        let (first, _first_slot) = connect(&slots, "10.0.0.1:1");
        let (second, _second_slot) = connect(&slots, "10.0.0.1:2");
        assert!(is_evicted(&first).await);
        let _request = second.begin(None);
        assert!(connect(&slots, "10.0.0.1:3").1.is_none());
        assert!(connect(&slots, "[::ffff:10.0.0.1]:3").1.is_none(), "the same peer in other words");
        assert!(connect(&slots, "10.0.0.2:3").1.is_some());
    }

    #[tokio::test]
    async fn an_ipv6_network_is_one_peer_and_the_host_itself_is_unlimited() {
        let slots = ConnectionSlots::new(10, 1);
        let (first, _first_slot) = connect(&slots, "[2001:db8::1]:1");
        let _request = first.begin(None);
        assert!(connect(&slots, "[2001:db8::2]:1").1.is_none());
        assert!(connect(&slots, "[2001:db8:0:1::1]:1").1.is_some());
        let here: Vec<_> = (0..5).map(|_| connect(&slots, "127.0.0.1:1")).collect();
        let _requests: Vec<_> = here.iter().map(|(activity, _)| activity.begin(None)).collect();
        assert!(here.iter().all(|(_, slot)| slot.is_some()));
    }

    #[tokio::test]
    async fn closing_connections_are_limited() {
        let slots = ConnectionSlots::new(MOST_LEAVING + 8, 1);
        let crowd: Vec<_> = (0..MOST_LEAVING + 8).map(|_| connect(&slots, "127.0.0.1:1")).collect();
        assert!(crowd.iter().all(|(_, slot)| slot.is_some()));
        let flood: Vec<_> = (0..100).map(|_| connect(&slots, "127.0.0.1:2")).collect();
        assert_eq!(flood.iter().filter(|(_, slot)| slot.is_some()).count(), MOST_LEAVING);
    }

    #[tokio::test]
    async fn a_local_user_has_a_share_and_root_has_none() {
        let slots = ConnectionSlots::new(10, 1);
        let connect = |uid| {
            let activity = ConnectionActivity::new();
            let request = activity.begin(None);
            (slots.admit(Peer::LocalUser { uid, pid: None }, &activity), request)
        };
        let other = rustix::process::geteuid().as_raw() + 1;
        let _first = connect(other);
        assert!(connect(other).0.is_none(), "the second connection of one user");
        assert!(connect(other + 1).0.is_some());
        let roots: Vec<_> = (0..5).map(|_| connect(0)).collect();
        assert!(roots.iter().all(|(slot, _)| slot.is_some()));
    }
}
