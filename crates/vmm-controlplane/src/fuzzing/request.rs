//! The fuzz target for a request: from the body of a call to the core's types, and on to the input
//! of the hypervisors.
//!
//! The input's first line names the method and the codec, `CreateVm json` or `CreateVm proto`; the
//! rest is the body.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;
use std::sync::LazyLock;

use buffa::{DecodeOptions, HasMessageView, Message, MessageName, MessageView as _};
use bytes::Bytes;
use connectrpc::{CodecFormat, ConnectError, ErrorCode, Payload};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmm_backends::cloud_hypervisor::{self, CloudHypervisorBackend};
use vmm_backends::firecracker::{self, FirecrackerBackend};
use vmm_backends::qemu::convert::{Accelerator, ImageKind, QemuInputs, QemuMachine};
use vmm_backends::qemu::{self, KvmMode, QemuBackend, QemuOptions};
use vmm_core::backend::Backend as _;
use vmm_core::config::VmConfig;
use vmm_core::id::{VmId, VmUid};
use vmm_core::report::{CheckReport, FieldReport};
use vmm_core::spec::{MIB, VmSpec, too_many};
use vmm_proto::v1 as pb;

use crate::api::convert::{config_from_pb, config_to_pb, states_from_pb};
use crate::rpc::error::invalid_argument;
use crate::rpc::strict_json::JsonShapeInterceptor;

/// The longest message of an error, in bytes. gRPC's clients refuse trailers of more than 16 KiB.
const MAX_MESSAGE: usize = 8 << 10;

static STRICT_JSON: LazyLock<JsonShapeInterceptor> = LazyLock::new(|| {
    JsonShapeInterceptor::new(vmm_proto::FILE_DESCRIPTOR_SET).expect("the built-in description can be read")
});

static BACKENDS: LazyLock<(CloudHypervisorBackend, FirecrackerBackend, QemuBackend)> = LazyLock::new(|| {
    let qemu = QemuOptions { kvm: KvmMode::Off, ..QemuOptions::default() };
    (
        CloudHypervisorBackend::new("cloud-hypervisor"),
        FirecrackerBackend::new("firecracker"),
        QemuBackend::new(qemu),
    )
});

/// Runs one input.
///
/// # Panics
///
/// A broken guarantee panics, which is the finding.
pub fn request(input: &[u8]) {
    let Some(end) = input.iter().position(|byte| *byte == b'\n') else { return };
    let (line, body) = (&input[..end], Bytes::copy_from_slice(&input[end + 1..]));
    let Some((method, codec)) = std::str::from_utf8(line).ok().and_then(|line| line.split_once(' ')) else {
        return;
    };
    let call = match codec {
        "json" => FuzzCall { method, format: CodecFormat::Json, body },
        "proto" => FuzzCall { method, format: CodecFormat::Proto, body },
        _ => return,
    };
    match method {
        "CreateVm" => call.read(|request: pb::CreateVmRequest| config(request.config.into_option())),
        "ValidateVm" => call.read(|request: pb::ValidateVmRequest| config(request.config.into_option())),
        "ListVms" => call.read(|request: pb::ListVmsRequest| states(&request.state_filter)),
        "WaitVm" => call.read(|request: pb::WaitVmRequest| states(&request.states)),
        "WatchVms" => call.read(|_: pb::WatchVmsRequest| ()),
        "ListVmEvents" => call.read(|_: pb::ListVmEventsRequest| ()),
        "ShutdownVm" => call.read(|_: pb::ShutdownVmRequest| ()),
        "RebootVm" => call.read(|_: pb::RebootVmRequest| ()),
        "UpdateVm" => call.read(|request: pb::UpdateVmRequest| config(request.config.into_option())),
        "DeleteVm" => call.read(|_: pb::DeleteVmRequest| ()),
        "GetVmInfo" => call.read(|_: pb::GetVmInfoRequest| ()),
        "StreamConsole" => call.read(|_: pb::StreamConsoleRequest| ()),
        "WriteConsole" => call.read(|_: pb::WriteConsoleRequest| ()),
        _ => {}
    }
}

struct FuzzCall<'a> {
    method: &'a str,
    format: CodecFormat,
    body: Bytes,
}

impl FuzzCall<'_> {
    /// Decodes the body as the server does, and passes the message on.
    fn read<M>(self, next: impl FnOnce(M))
    where
        M: Message + MessageName + HasMessageView + Serialize + DeserializeOwned + Debug + PartialEq,
    {
        let procedure = format!("/vmm.v1.VmService/{}", self.method);
        let checked = |body: Bytes, format| STRICT_JSON.check(Some(&procedure), &Payload::new(body, format));
        let check = |json: Bytes| checked(json, CodecFormat::Json);
        let body = if self.format == CodecFormat::Json {
            let decoded = serde_json::from_slice::<M>(&self.body);
            if let Err(refused) = check(self.body) {
                check_error(&refused);
                // The decoder accepts a list as a message, a repeated key in a map, and any number
                // of entries.
                let text = refused.message.unwrap_or_default();
                let stricter = ["is a list where an object", "is given twice", "has too many entries"];
                let stricter = stricter.iter().any(|reason| text.contains(reason));
                assert!(decoded.is_err() || stricter, "the decoder would have taken it");
                return;
            }
            match decoded {
                Ok(message) => Bytes::from(message.encode_to_vec()),
                Err(error) => {
                    let text = error.to_string();
                    assert!(
                        !text.starts_with("unknown field"),
                        "the check for unknown fields missed one: {text}"
                    );
                    return;
                }
            }
        } else {
            if let Err(refused) = checked(self.body.clone(), CodecFormat::Proto) {
                return check_error(&refused);
            }
            self.body
        };
        let Ok(view) = DecodeOptions::new().decode_view::<M::View<'_>>(&body) else {
            assert!(M::decode_from_slice(&body).is_err(), "the two decoders disagree");
            return;
        };
        let message = view.to_owned_from_source(Some(&body)).expect("what was decoded can be owned");
        assert_eq!(M::decode_from_slice(&message.encode_to_vec()).ok().as_ref(), Some(&message));
        let json = serde_json::to_vec(&message).expect("a message can be written as JSON");
        assert!(check(Bytes::copy_from_slice(&json)).is_ok(), "we refuse our own JSON");
        // The JSON encoding drops unknown fields.
        let known: M = serde_json::from_slice(&json).expect("our own JSON can be read");
        assert_eq!(serde_json::to_vec(&known).ok(), Some(json));
        next(known);
    }
}

fn states(states: &[buffa::EnumValue<pb::VmState>]) {
    if let Err(refused) = states_from_pb("states", states) {
        check_error(&invalid_argument(refused.into_iter().map(|report| (report.field, report.message))));
    }
}

fn check_error(error: &ConnectError) {
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    let message = error.message.as_deref().unwrap_or_default();
    assert!(!message.is_empty() && message.len() <= MAX_MESSAGE, "{} bytes", message.len());
    assert!(!message.chars().any(char::is_control), "{message:?}");
    assert_eq!(error.details.len(), 1, "the fields at fault go along");
}

fn config(sent: Option<pb::VmConfig>) {
    let sent = sent.unwrap_or_default();
    let config = config_from_pb(sent.clone());
    assert_eq!(config_to_pb(&config), sent, "no field is lost on the way");
    if let Some(report) = too_many(&config) {
        return check_report(&report);
    }
    match VmSpec::parse(&config) {
        Ok(spec) => {
            check_spec(&config, &spec);
            hypervisors(&spec);
        }
        Err(report) => check_report(&report),
    }
}

/// Checks that a refusal names each wrong field by a path, and is short enough to be sent.
fn check_report(report: &CheckReport) {
    assert!(!report.is_ok(), "a refusal has a reason");
    let warnings = report.warnings.iter().cloned().map(FieldReport::from);
    for finding in report.violations.iter().cloned().chain(warnings) {
        assert!(finding.field.starts_with("config."), "{finding}");
        assert!(!finding.message.is_empty(), "{finding}");
    }
    let violations = report.violations.iter().map(|found| (found.field.as_str(), found.message.as_str()));
    check_error(&invalid_argument(violations));
}

fn check_spec(config: &VmConfig, spec: &VmSpec) {
    assert!(spec.cpu.count >= 1 && spec.cpu.max >= spec.cpu.count);
    if let Some(topology) = spec.cpu.topology {
        assert_eq!(topology.sockets * topology.cores * topology.threads, spec.cpu.max);
    }
    assert!(spec.memory.size_bytes > 0 && spec.memory.size_bytes.is_multiple_of(MIB));
    assert!(
        spec.memory
            .hotplug_max_bytes
            .is_none_or(|most| most >= spec.memory.size_bytes && most.is_multiple_of(MIB))
    );
    assert!(spec.boot.kernel.is_absolute() && spec.disks.iter().all(|disk| disk.path.is_absolute()));
    assert!(spec.disks.iter().skip(1).all(|disk| !disk.is_root), "the root device comes first");
    assert_eq!((spec.disks.len(), spec.nics.len()), (config.storage.len(), config.network.len()));
    for disk in &spec.disks {
        assert_eq!(config.storage[disk.index].path, disk.path.to_string_lossy());
    }
    assert!(
        spec.nics
            .iter()
            .all(|nic| nic.mac.0[0] & 1 == 0 && nic.tap.as_ref().is_none_or(|tap| tap.len() <= 15))
    );
    let args = spec.kernel_args();
    let given = kernel_words(&spec.boot.args);
    let in_force = kernel_words(&args);
    let roots = |words: &[String]| words.iter().filter(|word| word.starts_with("root=")).count();
    if spec.disks.first().is_some_and(|disk| disk.is_root) && roots(&given) == 0 {
        assert_eq!(roots(&in_force), 1, "{args:?}");
        let others: Vec<_> = in_force
            .into_iter()
            .filter(|word| !word.starts_with("root=") && word != "ro" && word != "rw")
            .collect();
        let given: Vec<_> = given.into_iter().filter(|word| word != "ro" && word != "rw").collect();
        assert_eq!(others, given, "{args:?}");
    } else {
        assert_eq!(args, spec.boot.args);
    }
}

/// Splits a kernel command line into words as Linux does: quotes hold a word together, and a lone
/// `--` ends the list.
fn kernel_words(args: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quoted) = (String::new(), false);
    for letter in args.chars().chain([' ']) {
        if letter == ' ' && !quoted {
            if word == "--" {
                return words;
            }
            if !word.is_empty() {
                words.push(std::mem::take(&mut word).trim_start_matches('"').to_owned());
            }
        } else {
            quoted ^= letter == '"';
            word.push(letter);
        }
    }
    if !word.is_empty() {
        words.push(word.trim_start_matches('"').to_owned());
    }
    words
}

/// Converts the request for each hypervisor that accepts it.
fn hypervisors(spec: &VmSpec) {
    let (ch, fc, qemu) = &*BACKENDS;
    let taps: Vec<String> = (0..spec.nics.len()).map(|index| format!("tap{index}")).collect();
    for report in [ch.check(spec), fc.check(spec), qemu.check(spec)] {
        if !report.is_ok() {
            check_report(&report);
        }
    }
    if ch.check(spec).is_ok() {
        let config = cloud_hypervisor::convert::CloudHypervisorConfig::of(spec, &taps);
        serde_json::to_string(&config).expect("it can be written as JSON");
    }
    if fc.check(spec).is_ok() {
        let args = firecracker::convert::kernel_args(spec);
        let reboots = kernel_words(&args).iter().filter(|word| word.starts_with("reboot=")).count();
        assert!(reboots >= 1, "a guest's reboot is seen: {args:?}");
        let config = firecracker::convert::FirecrackerConfig::of(spec, &taps);
        serde_json::to_string(&config.machine).expect("it can be written as JSON");
    }
    if qemu.check(spec).is_ok() {
        qemu_arguments(spec, &taps);
    }
}

/// Checks that no name from a client becomes an option of QEMU.
fn qemu_arguments(spec: &VmSpec, taps: &[String]) {
    let uid = VmUid::new(uuid::Uuid::from_u128(7));
    let images: Vec<_> = spec.disks.iter().map(|_| ImageKind::File).collect();
    let inputs = QemuInputs {
        uid,
        vm_id: &VmId::generated(uid),
        spec,
        machine: QemuMachine::of(spec).expect("the check passed"),
        accelerator: Accelerator::Tcg,
        dir: Path::new("/run/v"),
        console: Some(Path::new("/run/v/console")),
        taps,
        images: &images,
    };
    let arguments = qemu::convert::arguments(&inputs).expect("paths from JSON are UTF-8");
    let mut arguments = arguments.iter().map(|argument| argument.to_str().expect("it is UTF-8"));
    let mut counted: BTreeMap<&str, usize> = BTreeMap::new();
    while let Some(flag) = arguments.next() {
        *counted.entry(flag).or_default() += 1;
        assert!(flag.starts_with('-'), "{flag}");
        if matches!(flag, "-S" | "-nodefaults" | "-no-user-config") {
            continue;
        }
        let value = arguments.next().expect("an option has a value");
        match flag {
            "-blockdev" | "-device" | "-object" => {
                serde_json::from_str::<serde_json::Value>(value).map(drop).expect("a device is JSON");
            }
            "-append" => assert_eq!(value, spec.kernel_args()),
            _ => {}
        }
    }
    assert_eq!(counted.get("-netdev").copied().unwrap_or_default(), spec.nics.len());
    // q35 has a device by which a guest reports its panic, unless the guest resets itself on one.
    let own = usize::from(inputs.machine == QemuMachine::Q35 && !spec.resets_on_panic());
    assert_eq!(
        counted.get("-device").copied().unwrap_or_default(),
        spec.nics.len() + spec.disks.len() + own,
        "one device each"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_of_the_corpus_passes() {
        assert!(vmm_testkit::corpus::replay("request", request) > 0);
    }
}
