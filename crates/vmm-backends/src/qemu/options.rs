//! Reads the keys of a [`VmSpec`] that concern only QEMU.

use vmm_core::report::CheckReport;
use vmm_core::spec::{BackendOption, FreeMap, VmSpec};

use super::convert::QemuMachine;

/// The prefix of QEMU's keys.
const PREFIX: &str = "qemu.";
/// The key of `boot_options` that selects the machine.
pub(crate) const MACHINE_KEY: &str = "qemu.machine";
/// The key of `cpu.features` that selects the CPU model.
pub(crate) const MODEL_KEY: &str = "qemu.model";

/// QEMU's own settings of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VmOptions<'a> {
    /// The machine, or `None` if the client names an unknown one, which is in the report.
    pub(crate) machine: Option<QemuMachine>,
    /// The CPU model with its features, if the client names one.
    pub(crate) model: Option<CpuModelOption<'a>>,
}

/// A CPU model as the client wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuModelOption<'a> {
    /// The model in QEMU's syntax.
    pub(crate) text: &'a str,
    option: &'a BackendOption,
}

impl CpuModelOption<'_> {
    /// Returns the path of the key from the request's root.
    pub(crate) fn field(&self) -> String {
        self.option.field()
    }

    /// Returns the model's name, without its features.
    pub(crate) fn name(&self) -> &str {
        self.text.split(',').next().unwrap_or_default()
    }
}

impl<'a> VmOptions<'a> {
    /// Reads the settings of `spec`. Reports invalid ones and keys of other backends.
    pub(crate) fn read(spec: &'a VmSpec, report: &mut CheckReport) -> Self {
        let mut read = Self { machine: Some(QemuMachine::Q35), model: None };
        for option in spec.options.own(PREFIX, report) {
            match (option.map, option.key.as_str()) {
                (FreeMap::Boot, MACHINE_KEY) => {
                    read.machine = QemuMachine::named(&option.value);
                    if read.machine.is_none() {
                        report.reject(option.field(), "must be \"q35\" (the default) or \"microvm\"");
                    }
                }
                (FreeMap::Cpu, MODEL_KEY) => {
                    let model = CpuModelOption { text: &option.value, option };
                    check_model(report, model);
                    read.model = Some(model);
                }
                (FreeMap::Cpu, _) => reject_unknown(report, option, MODEL_KEY),
                (FreeMap::Boot, _) => reject_unknown(report, option, MACHINE_KEY),
                (FreeMap::Memory | FreeMap::Disk(_) | FreeMap::Nic(_), _) => {
                    reject_unknown(report, option, "there are none");
                }
            }
        }
        read
    }

    /// Reads the settings of a `spec` that has passed the check.
    pub(crate) fn of(spec: &'a VmSpec) -> Self {
        Self::read(spec, &mut CheckReport::default())
    }
}

fn reject_unknown(report: &mut CheckReport, option: &BackendOption, known: &str) {
    report.reject(option.field(), format!("unknown key of the qemu backend; known keys here: {known}"));
}

fn check_model(report: &mut CheckReport, model: CpuModelOption<'_>) {
    let (text, name) = (model.text, model.name());
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+,=".contains(&byte);
    if name.is_empty() || name == "help" || text.starts_with('-') || !text.bytes().all(legal) {
        report.reject(
            model.field(),
            "must be a CPU model of QEMU, with features after commas where needed, such as \"Skylake-Server\" or \"max,-avx512f\"",
        );
    }
}
