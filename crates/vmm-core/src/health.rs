//! The health of a backend.

use crate::capabilities::AcceleratorFact;

/// The ability of a hypervisor to start a VM, with the reasons and remedies where it cannot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendHealth {
    /// `Ok` with the version, or the reason why the hypervisor cannot serve.
    pub version: Result<String, String>,
    /// The parts that cannot serve, each with the reason, where the rest can; one of several
    /// sockets, for example.
    pub problems: Vec<String>,
    /// The accelerator of a VM that starts now, where the backend decides at each start. It stands
    /// in for the accelerator among the capabilities, which are constant.
    pub accelerator: Option<AcceleratorFact>,
}

impl From<Result<String, String>> for BackendHealth {
    fn from(version: Result<String, String>) -> Self {
        Self { version, problems: Vec::new(), accelerator: None }
    }
}
