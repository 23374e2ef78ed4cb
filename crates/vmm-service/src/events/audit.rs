//! ListVmEvents: the log, page by page.
//!
//! A token names the last event of its page and the filter of the listing. Positions in the log
//! never change, so a token stays valid whatever happens later. Events that have expired meanwhile
//! are skipped.

use std::sync::Arc;

use vmm_core::event::EventSeq;
use vmm_core::store::EventQuery;

use super::token::{Token, TokenKind, check_of_filter};
use super::{Events, RecordedEvent, parse_vm_id, unreadable};
use crate::error::ServiceError;

/// The page size if the client gives none.
const DEFAULT_PAGE: usize = 100;
/// The largest page size.
const MAX_PAGE: usize = 1000;

/// The selection of the events to list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventsQuery {
    /// The VM whose events are listed. The VM may be deleted. Empty means all VMs.
    pub vm_id: String,
    /// The largest number of events: 0 means 100, and more than 1,000 means 1,000.
    pub page_size: i32,
    /// The token of the page before. Empty begins with the oldest event that is kept.
    pub page_token: String,
}

/// One page.
#[derive(Clone, Debug)]
pub struct EventsPage {
    /// The events, oldest first.
    pub events: Vec<RecordedEvent>,
    /// The token of the next page. Empty on the last page.
    pub next_page_token: String,
}

impl Events {
    /// Lists the events that match `query`. Every change that was answered before the call is
    /// included.
    pub(crate) async fn list(&self, query: &EventsQuery) -> Result<EventsPage, ServiceError> {
        let vm_id = parse_vm_id(&query.vm_id)?;
        let size = match usize::try_from(query.page_size) {
            Ok(0) => DEFAULT_PAGE,
            Ok(size) => size.min(MAX_PAGE),
            Err(_) => return Err(ServiceError::invalid("page_size", "must be 0 (the default, 100) or more")),
        };
        let filter = check_of_filter(vm_id.as_ref());
        let after = match query.page_token.as_str() {
            "" => EventSeq::default(),
            token => self.read_page_token(token, filter)?,
        };
        let found = self.store.events(EventQuery { after, vm_id, limit: size + 1 }).await;
        let mut found = found.map_err(unreadable)?;
        let more = found.len() > size;
        found.truncate(size);
        let next_page_token = match found.last() {
            Some(last) if more => self.token(TokenKind::Page, last.seq, filter),
            Some(_) | None => String::new(),
        };
        let events = found.into_iter().map(|event| self.recorded(Arc::new(event))).collect();
        Ok(EventsPage { events, next_page_token })
    }

    fn read_page_token(&self, text: &str, filter: u32) -> Result<EventSeq, ServiceError> {
        let bad = |why: &str| {
            ServiceError::invalid(
                "page_token",
                format!("{why}; use next_page_token of the page before, or none to start over"),
            )
        };
        match text.parse::<Token>() {
            Ok(Token { kind: TokenKind::Page, instance, .. }) if instance != self.instance => {
                Err(bad("belongs to another daemon, or to another state directory"))
            }
            Ok(Token { kind: TokenKind::Page, check, .. }) if check != filter => {
                Err(bad("belongs to a listing with another vm_id"))
            }
            Ok(Token { kind: TokenKind::Page, seq, .. }) => Ok(seq),
            Ok(Token { kind: TokenKind::Event | TokenKind::Synced, .. }) => {
                Err(bad("is a resume_token of WatchVms"))
            }
            Err(_) => Err(bad("is not a token of this service")),
        }
    }
}
