//! The contract holds: clients generated from these names and numbers exist, so none may ever change.

use buffa_descriptor::{DescriptorPool, FieldKind, SingularKind};
use vmm_proto::v1 as pb;

fn kind(pool: &DescriptorPool, kind: SingularKind) -> String {
    match kind {
        SingularKind::Scalar(scalar) => format!("{scalar:?}").to_lowercase(),
        SingularKind::Enum(index) => pool.enumeration(index).full_name().to_owned(),
        SingularKind::Message(index) => pool.message(index).full_name().to_owned(),
    }
}

/// Writes down everything that clients depend on, a line for each thing.
fn render(pool: &DescriptorPool) -> Vec<String> {
    let ours = |name: &str| name.starts_with("vmm.v1.");
    let mut lines = Vec::new();
    for message in pool.messages().iter().filter(|message| ours(message.full_name())) {
        if message.full_name().ends_with("Entry") {
            continue;
        }
        lines.push(message.full_name().to_owned());
        for field in message.fields() {
            let optional = if field.oneof_index().is_some() { "optional " } else { "" };
            let kind = match field.kind() {
                FieldKind::Singular(one) => kind(pool, one),
                FieldKind::List(one) => format!("repeated {}", kind(pool, one)),
                FieldKind::Map { key, value } => format!("map<{key:?},{}>", kind(pool, value)).to_lowercase(),
            };
            lines.push(format!("  {}={}: {optional}{kind}", field.name(), field.number()));
        }
    }
    for enumeration in pool.enums().iter().filter(|enumeration| ours(enumeration.full_name())) {
        lines.push(enumeration.full_name().to_owned());
        lines.extend(
            enumeration.values().iter().map(|value| format!("  {}={}", value.name(), value.number())),
        );
    }
    for service in pool.services().iter().filter(|service| ours(service.full_name())) {
        for method in service.methods() {
            let stream = if method.is_server_streaming() { "stream " } else { "" };
            lines.push(format!(
                "{}/{}({}) -> {stream}{}",
                service.full_name(),
                method.name(),
                pool.message(method.input()).full_name(),
                pool.message(method.output()).full_name()
            ));
        }
    }
    lines
}

#[test]
fn the_schema_equals_the_published_contract() {
    let pool = DescriptorPool::decode(vmm_proto::FILE_DESCRIPTOR_SET).unwrap();
    let published: Vec<&str> = include_str!("contract.txt").lines().collect();
    let compiled = render(&pool);
    // Adding is allowed, and is written down in contract.txt in the same change.
    assert_eq!(compiled, published, "left: what vm.proto says; right: tests/contract.txt");
}

#[test]
fn json_is_written_with_proto_names_and_read_with_either_spelling() {
    let request = pb::StreamConsoleRequest {
        vm_id: "a".into(),
        offset: Some(0),
        tail_bytes: 1 << 40,
        ..Default::default()
    };
    let json = serde_json::to_string(&request).unwrap();
    assert_eq!(json, r#"{"vm_id":"a","offset":"0","tail_bytes":"1099511627776"}"#);
    let read: pb::StreamConsoleRequest =
        serde_json::from_str(r#"{"vmId":"a","offset":0,"tailBytes":1099511627776}"#).unwrap();
    assert_eq!(read, request);
    assert!(serde_json::from_str::<pb::StreamConsoleRequest>(r#"{"vmid":"a"}"#).is_err());
}
