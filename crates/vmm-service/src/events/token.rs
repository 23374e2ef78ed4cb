//! Tokens: positions in the log that clients keep and send back.
//!
//! ```text
//!   e 1f2e3d4c5b6a7988 00000000000004d2 0badcafe
//!   │ │                │                └ check: of the event at that position
//!   │ │                └ the position
//!   │ └ the instance whose log it is
//!   └ kind: e an event, s the marker "synced", p the last event of a page
//! ```
//!
//! A token outlives restarts, because instance and position do. The check reveals that the log is
//! not the one from which the token was made: after a backup is restored, the same positions hold
//! other events.

use std::fmt;
use std::str::FromStr;

use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::id::{InstanceId, VmId};

/// The kind of the message that carried a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// An event.
    Event,
    /// The end of the present states.
    Synced,
    /// A page of the audit trail.
    Page,
}

/// A position in a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) kind: TokenKind,
    /// The instance of the log, see [`fingerprint`].
    pub(super) instance: u64,
    /// The last position that the client has seen.
    pub(super) seq: EventSeq,
    /// The check of the event at that position, or 0 if there is none. The token of a page has the
    /// check of its filter.
    pub(super) check: u32,
}

/// The error for a text that is not a [`Token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InvalidToken;

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            TokenKind::Event => 'e',
            TokenKind::Synced => 's',
            TokenKind::Page => 'p',
        };
        write!(f, "{kind}{:016x}{:016x}{:08x}", self.instance, self.seq.0, self.check)
    }
}

impl FromStr for Token {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let (kind, digits) = text.split_at_checked(1).ok_or(InvalidToken)?;
        let kind = match kind {
            "e" => TokenKind::Event,
            "s" => TokenKind::Synced,
            "p" => TokenKind::Page,
            _ => return Err(InvalidToken),
        };
        let plain = digits.len() == 40 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let field = |range| digits.get(range).filter(|_| plain).ok_or(InvalidToken);
        let number = |range| u64::from_str_radix(field(range)?, 16).map_err(|_| InvalidToken);
        Ok(Self {
            kind,
            instance: number(0..16)?,
            seq: EventSeq(number(16..32)?),
            check: u32::from_str_radix(field(32..40)?, 16).map_err(|_| InvalidToken)?,
        })
    }
}

/// Returns the mark of an instance in tokens.
pub(super) fn fingerprint(instance: InstanceId) -> u64 {
    fnv([instance.to_string().as_bytes()])
}

/// Returns a number that distinguishes an event from another one at the same position of a restored
/// log. The number is never 0, which stands for no event.
pub(super) fn check_of(event: &VmEvent) -> u32 {
    let change = &event.event;
    short_hash([
        change.uid.to_string().as_bytes(),
        change.kind.as_str().as_bytes(),
        &change.time_ms.to_be_bytes(),
    ])
}

/// Returns a number that distinguishes the filter of a page from others.
pub(super) fn check_of_filter(vm_id: Option<&VmId>) -> u32 {
    short_hash([vm_id.map_or("", VmId::as_str).as_bytes()])
}

fn short_hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    let hash = fnv(parts);
    u32::try_from((hash >> 32) ^ (hash & 0xffff_ffff)).unwrap_or_default().max(1)
}

/// Returns the FNV-1a hash. The hashers of std do not promise the same value in the next release,
/// and a token must stay valid.
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
        fn every_token_is_read_back(kind in 0..3, instance: u64, seq: u64, check: u32) {
            let kind = [TokenKind::Event, TokenKind::Synced, TokenKind::Page][usize::try_from(kind).unwrap()];
            let token = Token { kind, instance, seq: EventSeq(seq), check };
            prop_assert_eq!(token.to_string().parse(), Ok(token));
        }

        #[test]
        fn every_text_is_parsed_and_each_token_has_one_spelling(text in "[esp]?[0-9a-fA-F+ä]{38,41}|\\PC*") {
            if let Ok(token) = text.parse::<Token>() {
                prop_assert_eq!(token.to_string(), text);
            }
        }
    }
}
