//! Tests of the messages and of their classification.

use super::*;

const UUID: Uuid = Uuid::from_u128(0x0193_f0de_0000_7000_8000_0000_0000_0001);

fn there_and_back<T: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug>(
    value: T,
    json: &str,
) {
    assert_eq!(serde_json::to_string(&value).unwrap(), json);
    assert_eq!(serde_json::from_str::<T>(json).unwrap(), value);
}

#[test]
fn lines_have_the_documented_form() {
    there_and_back(
        CallRequest { id: 7, within_ms: None, call: Call::Suspend { uuid: UUID } },
        r#"{"id":7,"call":"suspend","uuid":"0193f0de-0000-7000-8000-000000000001"}"#,
    );
    there_and_back(
        CallRequest { id: 8, within_ms: Some(9), call: Call::List },
        r#"{"id":8,"within_ms":9,"call":"list"}"#,
    );
    there_and_back(
        HelperMessage::Answer { id: 7, ok: Some(CallResult::Done), failed: None },
        r#"{"says":"answer","id":7,"ok":{"got":"done"}}"#,
    );
    let failure = CallFailure { kind: CallFailureKind::NoDomain, message: "no".to_owned() };
    there_and_back(
        HelperMessage::Answer { id: 7, ok: None, failed: Some(failure) },
        r#"{"says":"answer","id":7,"failed":{"kind":"no-domain","message":"no"}}"#,
    );
    there_and_back(
        HelperMessage::Lifecycle { uuid: UUID, event: Lifecycle::Destroyed },
        r#"{"says":"lifecycle","uuid":"0193f0de-0000-7000-8000-000000000001","event":"destroyed"}"#,
    );
}

#[test]
fn calls_that_need_qemu_wait_for_their_turn_per_domain() {
    let named = |waits_for| match waits_for {
        WaitsFor::Nothing => "nothing",
        WaitsFor::Host => "the host",
        WaitsFor::Qemu(uuid) => {
            assert_eq!(uuid, UUID);
            "QEMU"
        }
    };
    for (call, waits_for, waits_its_turn) in [
        (Call::List, "nothing", false),
        (Call::LookUp { uuid: UUID }, "nothing", false),
        (Call::LookUpByName { name: "vm".to_owned() }, "nothing", false),
        (Call::Xml { uuid: UUID }, "nothing", false),
        (Call::Define { xml: String::new() }, "the host", false),
        (Call::Start { uuid: UUID }, "QEMU", true),
        (Call::Suspend { uuid: UUID }, "QEMU", true),
        (Call::Resume { uuid: UUID }, "QEMU", true),
        (Call::Shutdown { uuid: UUID }, "QEMU", false),
        (Call::Reset { uuid: UUID }, "QEMU", true),
        (Call::OnReboot { uuid: UUID, restart: true }, "QEMU", true),
        (Call::Destroy { uuid: UUID }, "QEMU", false),
        (Call::Undefine { uuid: UUID, everything: true }, "QEMU", false),
        (Call::BlockStats { uuid: UUID }, "QEMU", true),
    ] {
        let rank = call.rank();
        assert_eq!(named(call.waits_for()), waits_for, "{call:?}");
        assert_eq!(rank != CallRank::Free, waits_its_turn, "{call:?}");
        if let CallRank::Orders(uuid) | CallRank::Samples(uuid) = rank {
            assert!(call.needs_qemu() && uuid == UUID, "{call:?}");
        }
    }
}

#[test]
fn unknown_messages_are_an_error() {
    for line in [
        r#"{"says":"hello"}"#,
        r#"{"says":"closed","why":"x","more":1}"#,
        r#"{"says":"answer","id":-1}"#,
        r#"{"says":"lifecycle","uuid":"x","event":"stopped"}"#,
        "[]",
        "",
    ] {
        assert!(serde_json::from_str::<HelperMessage>(line).is_err(), "{line}");
    }
}

#[test]
fn an_unfinished_or_overlong_line_is_an_error() {
    let mut line = Vec::new();
    let mut two: &[u8] = b"one\ntwo";
    assert_eq!(read_line(&mut two, &mut line).unwrap(), Some(()));
    assert_eq!(line, b"one");
    assert!(read_line(&mut two, &mut line).is_err());
    assert_eq!(read_line(&mut &b""[..], &mut line).unwrap(), None);
    let long = vec![b'x'; MAX_LINE + 1];
    assert!(read_line(&mut &long[..], &mut line).is_err());
}
