//! The ways in which a command fails, and the exit code of each.

use std::io;
use std::process::ExitCode;

use connectrpc::{ConnectError, ErrorCode};

/// Added to the number of a Connect code, because 1 and 2 have a meaning for shells and clap.
const FIRST_CODE: u8 = 10;
/// The exit code of a failure on this side that no Connect code describes.
const OWN_FAILURE: u8 = 1;

/// The reason for which a command did not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The server's answer, or the lack of one.
    #[error(transparent)]
    Api(Box<ConnectError>),
    /// An argument or a file that this program refuses, as the server would: `invalid_argument`.
    #[error("{message}")]
    Input {
        /// The fault, with its location.
        message: String,
        /// The advice, if the fault does not say it all.
        remedy: Option<String>,
    },
    /// A file, a setting or a stream on this side.
    #[error("{0}")]
    Local(String),
    /// The output could not be written.
    #[error("the output cannot be written: {0}")]
    Output(io::Error),
    /// The failure has been printed already, and only the exit code remains.
    #[error("exit code {0}")]
    Reported(u8),
}

impl Failure {
    /// Returns a refusal of an argument or a file.
    pub(crate) fn input(message: impl Into<String>) -> Self {
        Self::Input { message: message.into(), remedy: None }
    }

    /// Returns this refusal with an advice.
    pub(crate) fn with_remedy(self, advice: impl Into<String>) -> Self {
        match self {
            Self::Input { message, .. } => Self::Input { message, remedy: Some(advice.into()) },
            other => other,
        }
    }

    /// Returns the Connect code, if one describes this failure.
    pub(crate) fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Api(error) => Some(error.code),
            Self::Input { .. } => Some(ErrorCode::InvalidArgument),
            Self::Local(_) | Self::Output(_) | Self::Reported(_) => None,
        }
    }

    /// Returns the number of the exit code.
    pub(crate) fn exit_number(&self) -> u8 {
        match self {
            Self::Reported(number) => *number,
            // A reader that closes the pipe, such as `head`, needs no more output.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            other => other.code().map_or(OWN_FAILURE, number_of),
        }
    }

    /// Returns the exit code.
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit_number())
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        Self::Api(Box::new(error))
    }
}

/// Returns the exit code of a Connect code: its number in the protocol, plus ten.
pub(crate) fn number_of(code: ErrorCode) -> u8 {
    // The protocol has sixteen codes, so the number fits.
    FIRST_CODE + u8::try_from(code.grpc_code()).unwrap_or(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_the_connect_codes() {
        let code = |error: ConnectError| Failure::from(error).exit_number();
        assert_eq!(code(ConnectError::canceled("x")), 11);
        assert_eq!(code(ConnectError::invalid_argument("x")), 13);
        assert_eq!(code(ConnectError::not_found("x")), 15);
        assert_eq!(code(ConnectError::failed_precondition("x")), 19);
        assert_eq!(code(ConnectError::unavailable("x")), 24);
        assert_eq!(code(ConnectError::unauthenticated("x")), 26);
        assert_eq!(Failure::input("x").exit_number(), 13);
        assert_eq!(Failure::Local("x".into()).exit_number(), 1);
        assert_eq!(Failure::Reported(24).exit_number(), 24);
    }

    #[test]
    fn the_document_of_vmcp_lists_every_exit_code() {
        let page = include_str!("../../../docs/vmcp.md");
        for number in 1..=16 {
            let code = ErrorCode::from_grpc_code(number).unwrap();
            let row = format!("| {} | `{}` |", number_of(code), code.as_str());
            assert!(page.contains(&row), "{row}");
        }
    }

    #[test]
    fn a_closed_output_pipe_is_no_failure() {
        assert_eq!(Failure::Output(io::ErrorKind::BrokenPipe.into()).exit_number(), 0);
        assert_eq!(Failure::Output(io::ErrorKind::StorageFull.into()).exit_number(), 1);
    }
}
