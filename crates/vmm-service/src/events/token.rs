//! Tokens: places in the log that clients keep and bring back.
//!
//! ```text
//!   e 1f2e3d4c5b6a7988 00000000000004d2 0badcafe
//!   │ │                │                └ check: of what lies at that place
//!   │ │                └ the place
//!   │ └ whose log it is
//!   └ kind: e an event, s the marker "synced", p the last event of a page
//! ```
//!
//! A token outlives restarts, because instance and place do. The check tells when the log is no longer the one that the token
//! was made from: a backup that was put back gives the same places to other events.

use std::fmt;
use std::str::FromStr;

use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::id::{InstanceId, VmId};

/// What a token was given out with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An event.
    Event,
    /// The end of the present states.
    Synced,
    /// A page of the audit trail.
    Page,
}

/// A place in a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) kind: Kind,
    /// Whose log; see [`fingerprint`].
    pub(super) instance: u64,
    /// Everything up to here has been seen.
    pub(super) seq: EventSeq,
    /// Of the event at that place, or 0 where there is none; of a page, its filter.
    pub(super) check: u32,
}

/// Says why a text is not a [`Token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotAToken;

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Event => 'e',
            Kind::Synced => 's',
            Kind::Page => 'p',
        };
        write!(f, "{kind}{:016x}{:016x}{:08x}", self.instance, self.seq.0, self.check)
    }
}

impl FromStr for Token {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, NotAToken> {
        let (kind, digits) = text.split_at_checked(1).ok_or(NotAToken)?;
        let kind = match kind {
            "e" => Kind::Event,
            "s" => Kind::Synced,
            "p" => Kind::Page,
            _ => return Err(NotAToken),
        };
        let plain = digits.len() == 40 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let field = |range| digits.get(range).filter(|_| plain).ok_or(NotAToken);
        let number = |range| u64::from_str_radix(field(range)?, 16).map_err(|_| NotAToken);
        Ok(Self {
            kind,
            instance: number(0..16)?,
            seq: EventSeq(number(16..32)?),
            check: u32::from_str_radix(field(32..40)?, 16).map_err(|_| NotAToken)?,
        })
    }
}

/// Whose log a token is of.
pub(super) fn fingerprint(instance: InstanceId) -> u64 {
    fnv([instance.to_string().as_bytes()])
}

/// What tells an event from another one that a restored log has in its place. Never 0, which stands for no event.
pub(super) fn check_of(event: &VmEvent) -> u32 {
    let told = &event.event;
    short([told.uid.to_string().as_bytes(), told.kind.as_str().as_bytes(), &told.time_ms.to_be_bytes()])
}

/// What tells the filter of a page from others.
pub(super) fn check_of_filter(vm_id: Option<&VmId>) -> u32 {
    short([vm_id.map_or("", VmId::as_str).as_bytes()])
}

fn short<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    let hash = fnv(parts);
    u32::try_from((hash >> 32) ^ (hash & 0xffff_ffff)).unwrap_or_default().max(1)
}

/// FNV-1a, because a token must mean the same in the next release, which std's hashers do not promise.
fn fnv<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let bytes = parts.into_iter().flat_map(|part| part.iter().copied().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_token_is_read_as_it_was_written(kind in 0..3, instance: u64, seq: u64, check: u32) {
            let kind = [Kind::Event, Kind::Synced, Kind::Page][usize::try_from(kind).unwrap()];
            let token = Token { kind, instance, seq: EventSeq(seq), check };
            prop_assert_eq!(token.to_string().parse(), Ok(token));
        }

        #[test]
        fn no_text_is_too_odd_and_each_token_has_one_spelling(text in "[esp]?[0-9a-fA-F+ä]{38,41}|\\PC*") {
            if let Ok(token) = text.parse::<Token>() {
                prop_assert_eq!(token.to_string(), text);
            }
        }
    }
}
