//! The pauses before a connection that was lost is tried again, and the remarks about it.

use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};

use super::reason;
use crate::output::escape;

/// The first pause. It is doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause, because a person waits for the server to come back.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Returns true if the server may answer the same call at another time.
///
/// The codes that are left out are answers about the call itself. A stream that was cut is
/// `internal` in this client, so that code is tried again, too.
pub(crate) fn is_passing(error: &ConnectError) -> bool {
    matches!(
        error.code,
        ErrorCode::Unavailable
            | ErrorCode::Internal
            | ErrorCode::Unknown
            | ErrorCode::Canceled
            | ErrorCode::ResourceExhausted
            | ErrorCode::DeadlineExceeded
            | ErrorCode::DataLoss
    )
}

/// The state of a connection that is retried until it succeeds.
#[derive(Debug, Default)]
pub(crate) struct Retry {
    /// The number of attempts that failed in a row.
    failed: u32,
}

impl Retry {
    /// Notes that the connection was lost. Returns the pause before the next attempt, and once for
    /// each loss a remark for people.
    pub(crate) fn lost(&mut self, server: &str, error: &ConnectError) -> (Duration, Option<String>) {
        let remark = (self.failed == 0)
            .then(|| format!("vmcp: lost {server} ({}); connecting again", escape::line(&reason(error))));
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failed.min(10)).min(LONGEST_PAUSE);
        self.failed = self.failed.saturating_add(1);
        (pause, remark)
    }

    /// Notes that the server answered. Returns a remark for people if the server was lost.
    pub(crate) fn found(&mut self, server: &str) -> Option<String> {
        let was_lost = std::mem::take(&mut self.failed) > 0;
        was_lost.then(|| format!("vmcp: connected to {server} again"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_delays_grow_to_a_limit_and_a_lost_connection_is_reported_once() {
        let error = ConnectError::unavailable("x");
        let mut retry = Retry::default();
        let reported: Vec<_> = (0..20).map(|_| retry.lost("http://a", &error)).collect();
        let pauses: Vec<_> = reported.iter().map(|(pause, _)| *pause).collect();
        assert_eq!(pauses[..3], [250, 500, 1000].map(Duration::from_millis));
        assert_eq!(pauses[19], LONGEST_PAUSE);
        assert_eq!(reported[0].1.as_deref(), Some("vmcp: lost http://a (x); connecting again"));
        assert!(reported[1..].iter().all(|(_, remark)| remark.is_none()));
        assert_eq!(retry.found("http://a").as_deref(), Some("vmcp: connected to http://a again"));
        assert_eq!(retry.found("http://a"), None);
        assert_eq!(retry.lost("http://a", &error).0, FIRST_PAUSE);
    }

    #[test]
    fn an_error_about_the_request_is_not_retried() {
        for error in [
            ConnectError::not_found("x"),
            ConnectError::invalid_argument("x"),
            ConnectError::out_of_range("x"),
            ConnectError::unimplemented("x"),
            ConnectError::unauthenticated("x"),
            ConnectError::permission_denied("x"),
        ] {
            assert!(!is_passing(&error), "{error}");
        }
        assert!(is_passing(&ConnectError::unavailable("x")));
    }
}
