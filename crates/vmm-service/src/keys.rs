//! Idempotency keys: the digests of calls, and the calls in progress.
//!
//! ```text
//!   method, caller, key ─► id ──┬─ a call in progress ─► the duplicate waits for its end
//!                               └─ none ─► answer kept? ─► shown again
//!                                               └─ no ──► the call is carried out
//!   request ─► digest ── another one under the same id ─► refused
//! ```

use std::collections::HashMap;
use std::fmt::Write as _;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use vmm_core::caller::Caller;
use vmm_core::id::VmUid;
use vmm_core::idempotency::KeyedCall;
use vmm_core::store::VmRecord;

use crate::index::Index;

/// The time for which answers are kept.
pub(crate) const KEY_RETENTION: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest key.
const MAX_KEY_BYTES: usize = 255;

/// The key with which a client marks the repetitions of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey(String);

/// The refusal of a text that is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must have 1 to {MAX_KEY_BYTES} visible ASCII characters, such as those of a UUID")]
pub struct InvalidKey;

impl FromStr for IdempotencyKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        let is_legal =
            (1..=MAX_KEY_BYTES).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        if is_legal { Ok(Self(text.to_owned())) } else { Err(InvalidKey) }
    }
}

impl IdempotencyKey {
    /// Returns the id of this key for `method` and `caller`.
    pub(crate) fn id(&self, method: &str, caller: &Caller) -> String {
        // The text of a caller does not tell by which method its name was proven.
        let proof = format!("{:?}", caller.method);
        digest(&[method.as_bytes(), proof.as_bytes(), caller.to_string().as_bytes(), self.0.as_bytes()])
    }
}

/// Returns the digest of `parts` in hexadecimal. The length of each part is a part of the digest,
/// so that no two lists of parts read alike.
pub(crate) fn digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The keyed calls in progress, and those that an earlier daemon has left in progress.
#[derive(Clone, Default)]
pub(crate) struct KeysInProgress(Arc<Mutex<KeyTable>>);

#[derive(Default)]
struct KeyTable {
    calls: HashMap<String, CallInProgress>,
    /// The VMs whose records had a keyed call when the daemon started, by the id of the call.
    interrupted: HashMap<String, VmUid>,
}

struct CallInProgress {
    request: String,
    /// Never sent to. The receivers wake when the call ends, because the sender is dropped then.
    ended: watch::Sender<()>,
}

/// The result of the attempt to begin a keyed call.
pub(crate) enum Claimed {
    /// No such call is in progress, and none begins until this value is dropped.
    First(KeyClaim),
    /// A call with this key is in progress. The receiver fails when that call has ended.
    Duplicate(watch::Receiver<()>),
    /// Another request is in progress under the same key.
    OtherRequest,
}

/// A keyed call in progress, until this value is dropped.
pub(crate) struct KeyClaim {
    keys: KeysInProgress,
    id: String,
}

impl Drop for KeyClaim {
    fn drop(&mut self) {
        let ended = self.keys.table().calls.remove(&self.id);
        drop(ended);
    }
}

impl KeysInProgress {
    fn table(&self) -> MutexGuard<'_, KeyTable> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins `call`, unless one with the same id is in progress.
    pub(crate) fn claim(&self, call: &KeyedCall) -> Claimed {
        let mut table = self.table();
        if let Some(first) = table.calls.get(&call.id) {
            return if first.request == call.request {
                Claimed::Duplicate(first.ended.subscribe())
            } else {
                Claimed::OtherRequest
            };
        }
        let first = CallInProgress { request: call.request.clone(), ended: watch::Sender::new(()) };
        table.calls.insert(call.id.clone(), first);
        Claimed::First(KeyClaim { keys: self.clone(), id: call.id.clone() })
    }

    /// Notes the call that an earlier daemon has left in progress on the VM of `record`.
    pub(crate) fn note_interrupted(&self, record: &VmRecord) {
        if let Some(call) = &record.keyed {
            self.table().interrupted.insert(call.id.clone(), record.uid);
        }
    }

    /// Returns true if another request than that of `call` was in progress under the same key when
    /// the daemon started, and still is.
    pub(crate) fn other_is_interrupted(&self, call: &KeyedCall, index: &Index) -> bool {
        let Some(uid) = self.table().interrupted.get(&call.id).copied() else { return false };
        let record = index.record(uid);
        match record.as_ref().and_then(|record| record.keyed.as_deref()) {
            Some(first) if first.id == call.id => first.request != call.request,
            Some(_) | None => {
                self.table().interrupted.remove(&call.id);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn a_key_has_visible_ascii_characters_and_a_bounded_length() {
        let long = "x".repeat(MAX_KEY_BYTES);
        for legal in ["k", "8e03978e-40d5-43e8-bc93-6894a57f9324", "\"quoted\"", "a:b/c~!", &long] {
            assert!(legal.parse::<IdempotencyKey>().is_ok(), "{legal}");
        }
        for illegal in ["", "a b", "ü", "a\n", &format!("{long}x")] {
            assert_eq!(illegal.parse::<IdempotencyKey>(), Err(InvalidKey), "{illegal}");
        }
    }

    #[test]
    fn an_id_belongs_to_a_method_and_a_caller() {
        let key: IdempotencyKey = "k".parse().unwrap();
        let id = key.id("BootVm", &Caller::named("a"));
        assert_eq!(id, key.id("BootVm", &Caller::named("a")));
        let others = [
            key.id("PauseVm", &Caller::named("a")),
            key.id("BootVm", &Caller::named("b")),
            key.id("BootVm", &Caller::system()),
            "l".parse::<IdempotencyKey>().unwrap().id("BootVm", &Caller::named("a")),
        ];
        assert!(others.iter().all(|other| *other != id && other.len() == 64), "{others:?}");
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
    }

    #[test]
    fn a_duplicate_is_woken_when_the_first_call_ends() {
        let keys = KeysInProgress::default();
        let call = KeyedCall { id: "i".to_owned(), request: "r".to_owned() };
        let Claimed::First(first) = keys.claim(&call) else { panic!("nothing is in progress") };
        let Claimed::Duplicate(mut ended) = keys.claim(&call) else { panic!("it is in progress") };
        let other = KeyedCall { request: "s".to_owned(), ..call.clone() };
        assert!(matches!(keys.claim(&other), Claimed::OtherRequest));
        assert!(ended.changed().now_or_never().is_none());
        drop(first);
        assert!(ended.changed().now_or_never().unwrap().is_err());
        assert!(matches!(keys.claim(&other), Claimed::First(_)), "the key is free again");
    }
}
