//! Idempotency keys: the calls that clients may repeat, and the answers that are kept for them.
//!
//! ```text
//!   key unknown ─► intent, with the key in the record ─► outcome, with the answer ─► answer kept
//!                       │ the daemon dies: the next one finishes or undoes the operation
//!                       ├─ finished ─► outcome, with the answer
//!                       └─ undone ──► key unknown
//! ```
//!
//! [`crate::store::Store::commit_keyed`] commits the answer in the transaction of the outcome.

use serde::{Deserialize, Serialize};

use crate::id::{VmId, VmUid};
use crate::report::FieldReport;
use crate::state::{EndedBy, VmState};
use crate::store::VmRecord;

/// A call with an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KeyedCall {
    /// The digest of the method, the caller and the key, in hexadecimal.
    pub id: String,
    /// The digest of the request, in hexadecimal. Equal requests have equal digests in every
    /// encoding.
    pub request: String,
}

/// The answer that is kept for a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptAnswer {
    /// The call.
    #[serde(flatten)]
    pub call: KeyedCall,
    /// The time of the answer in Unix milliseconds.
    pub time_ms: i64,
    /// The answer.
    pub answer: CallAnswer,
}

/// The answer to a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CallAnswer {
    /// The call succeeded.
    Done(Box<VmAnswer>),
    /// The call failed for a reason that another attempt does not remove.
    Failed(FailedCall),
}

/// The answer to a call that succeeded: the parts of the VM that a response shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmAnswer {
    /// The name of the VM.
    pub vm_id: VmId,
    /// The creation of the VM.
    pub uid: VmUid,
    /// The state after the call.
    pub state: VmState,
    /// The generation after the call.
    pub generation: u64,
    /// The rung that ended the run, if the call ended one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_by: Option<EndedBy>,
    /// The parts of the configuration that the backend ignores or emulates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<FieldReport>,
    /// The things on the host that could not be freed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_behind: Vec<FieldReport>,
}

impl VmAnswer {
    /// Returns the answer that shows `record`.
    pub fn of(record: &VmRecord) -> Self {
        Self {
            vm_id: record.vm_id.clone(),
            uid: record.uid,
            state: record.state,
            generation: record.generation,
            ended_by: None,
            warnings: Vec::new(),
            left_behind: Vec::new(),
        }
    }
}

/// A failure that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedCall {
    /// The code.
    pub code: FailureCode,
    /// The text for the client.
    pub message: String,
    /// The violations, of a request that cannot be served as it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub violations: Vec<FieldReport>,
}

/// The codes of the failures that are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The request cannot be served as it is.
    InvalidArgument,
    /// No VM has the name.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// The state of the VM or of the host forbids the operation.
    FailedPrecondition,
    /// The backend does not support the request.
    Unimplemented,
    /// The position of the request does not exist.
    OutOfRange,
    /// The daemon ended in the middle of an operation that must not be repeated.
    Aborted,
}

impl FailureCode {
    /// Returns the word of the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid_argument",
            Self::NotFound => "not_found",
            Self::AlreadyExists => "already_exists",
            Self::FailedPrecondition => "failed_precondition",
            Self::Unimplemented => "unimplemented",
            Self::OutOfRange => "out_of_range",
            Self::Aborted => "aborted",
        }
    }
}

/// A change of the kept answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyChange {
    /// Keeps an answer, in the place of an earlier one with the same id.
    Keep(Box<KeptAnswer>),
    /// Removes the answer with this id. May be repeated.
    Forget(String),
}

/// The result of a search for a kept answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerLookup {
    /// The answer, if one is kept.
    pub kept: Option<KeptAnswer>,
    /// False if so many answers are kept that no further call with a key may begin.
    pub has_room: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_answer_is_read_back() {
        let call = KeyedCall { id: "0a".to_owned(), request: "0b".to_owned() };
        let done = VmAnswer {
            vm_id: "vm".parse().unwrap(),
            uid: "0192f7a0-0000-7000-8000-000000000001".parse().unwrap(),
            state: VmState::Shutdown,
            generation: 7,
            ended_by: Some(EndedBy::Guest),
            warnings: vec![FieldReport::new("config.cpu", "ignored")],
            left_behind: vec![FieldReport::new("process", "lives")],
        };
        let failed = FailedCall {
            code: FailureCode::FailedPrecondition,
            message: "not now".to_owned(),
            violations: vec![FieldReport::new("a", "b")],
        };
        for answer in [CallAnswer::Done(Box::new(done)), CallAnswer::Failed(failed)] {
            let kept = KeptAnswer { call: call.clone(), time_ms: 5, answer };
            let json = serde_json::to_string(&kept).unwrap();
            assert_eq!(serde_json::from_str::<KeptAnswer>(&json).unwrap(), kept, "{json}");
        }
    }
}
