//! A message in a file, as YAML or JSON: a CreateVmRequest, or the change of a configuration.
//!
//! JSON is a form of YAML, so one parser reads both, and an error of either has a line and a path.

use buffa::Enumeration as _;
use serde::de::DeserializeOwned;
use serde_saphyr::Error;
use serde_saphyr::options::DuplicateKeyPolicy;
use vmm_proto::v1 as pb;

use super::shown;
use crate::failure::Failure;

/// The ends of the path of the restart mode, in the two spellings of the field.
const RESTART_MODE_FIELDS: [&str; 2] = ["restart_policy.mode", "restartPolicy.mode"];

/// Returns the message that a text has. `path` names the text in errors.
///
/// # Errors
///
/// The text is not YAML or JSON, has a field that the API does not know, has a key twice, or has a
/// value of the wrong type. The error has the file, the line, and the path of the field.
pub(super) fn parse<T: DeserializeOwned>(path: &str, text: &str) -> Result<T, Failure> {
    let file = shown(path);
    if text.trim().is_empty() {
        return Err(Failure::input(format!("{file}: is empty")));
    }
    let mut field = String::new();
    let options = serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::Error,
        // `yes` is a word, not true: a text is never taken for a truth value.
        strict_booleans: true,
        with_snippet: false,
    };
    serde_saphyr::with_deserializer_from_str_with_options(text, options, |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            field = error.path().to_string();
            error.into_inner()
        })
    })
    .map_err(|error| refusal(file, &field, &error))
}

fn refusal(file: &str, field: &str, error: &Error) -> Failure {
    let location = error.location().map(|at| format!("line {}, column {}: ", at.line(), at.column()));
    let location = location.unwrap_or_default();
    match error.without_snippet() {
        Error::SerdeUnknownField { field: unknown, expected, .. } => {
            let path = if field.ends_with(unknown.as_str()) { field } else { unknown };
            Failure::input(format!("{file}: {location}{path}: no such field")).with_remedy(known(expected))
        }
        other => {
            let fault = enum_fault(field, other).unwrap_or_else(|| message(other));
            let path = if field.is_empty() || field == "." { String::new() } else { format!("{field}: ") };
            Failure::input(format!("{file}: {location}{path}{fault}"))
        }
    }
}

/// Returns the message of an error about a restart mode, the one enum of a configuration. The message
/// has the words of the API.
fn enum_fault(field: &str, error: &Error) -> Option<String> {
    let Error::SerdeInvalidValue { unexpected, .. } = error else { return None };
    if !RESTART_MODE_FIELDS.iter().any(|end| field.ends_with(end)) {
        return None;
    }
    let given = unexpected.strip_prefix("string ").unwrap_or(unexpected);
    let names: Vec<_> = pb::RestartMode::values().iter().map(|mode| mode.proto_name()).collect();
    Some(format!("must be one of {}, not {given}", names.join(", ")))
}

/// Returns the message of an error without its location, which stands before it already.
fn message(error: &Error) -> String {
    let text = error.render_with_formatter(&serde_saphyr::UserMessageFormatter);
    let location = error.location().map(|at| format!(" at line {}, column {}", at.line(), at.column()));
    match location.and_then(|location| text.strip_suffix(&location).map(str::to_owned)) {
        Some(bare) => bare,
        None => text,
    }
}

/// Returns the advice of an unknown field. Each field has two spellings, and one is enough.
fn known(expected: &[&str]) -> String {
    let names: Vec<_> = expected
        .iter()
        .copied()
        .filter(|name| !name.contains(|letter: char| letter.is_uppercase()))
        .collect();
    format!("the fields known there are {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn request(text: &str) -> Result<pb::CreateVmRequest, Failure> {
        parse("vm.yaml", text)
    }

    fn parsed(text: &str) -> serde_json::Value {
        serde_json::to_value(request(text).unwrap()).unwrap()
    }

    fn refused(text: &str) -> (String, String) {
        match request(text).unwrap_err() {
            Failure::Input { message, remedy } => (message, remedy.unwrap_or_default()),
            other => panic!("{other:?}"),
        }
    }

    const YAML: &str = "\
vm_id: web-1
backend: qemu
config:
  cpu: {vcpu_count: 2}
  memory:
    size_bytes: 2147483648   # 2 GiB
  boot:
    kernel_path: /opt/kernels/vmlinux
    kernel_args: \"console=ttyS0\"
  storage:
    - path: /srv/web.img
      is_root_device: true
  metadata:
    team: web
    tier: \"1\"
    on: yes
  restart_policy:
    mode: RESTART_MODE_ALWAYS
";

    #[test]
    fn yaml_and_json_make_the_same_request() {
        let wanted = json!({
            "vm_id": "web-1",
            "backend": "qemu",
            "config": {
                "cpu": {"vcpu_count": 2},
                "memory": {"size_bytes": "2147483648"},
                "boot": {"kernel_path": "/opt/kernels/vmlinux", "kernel_args": "console=ttyS0"},
                "storage": [{"path": "/srv/web.img", "is_root_device": true}],
                "metadata": {"team": "web", "tier": "1", "on": "yes"},
                "restart_policy": {"mode": "RESTART_MODE_ALWAYS"}
            }
        });
        assert_eq!(parsed(YAML), wanted);
        assert_eq!(parsed(&serde_json::to_string_pretty(&wanted).unwrap()), wanted);
        assert_eq!(parsed(&wanted.to_string()), wanted);
    }

    #[test]
    fn json_with_tabs_camel_case_and_escapes_is_accepted() {
        let text = "{\n\t\"vmId\": \"a\",\n\t\"config\": {\n\t\t\"cpu\": {\"vcpuCount\": 1},\n\
                    \t\t\"metadata\": {\"a\\/b\": \"\\ud83d\\ude00\\u00e4\\n\"}\n\t}\n}\n";
        assert_eq!(
            parsed(text),
            json!({"vm_id": "a", "config": {"cpu": {"vcpu_count": 1}, "metadata": {"a/b": "😀ä\n"}}})
        );
    }

    #[test]
    fn an_unknown_field_is_reported_with_its_line_and_the_known_fields() {
        let (message, remedy) = refused("config:\n  cpu:\n    vcpus: 2\n");
        assert_eq!(message, "vm.yaml: line 3, column 5: config.cpu.vcpus: no such field");
        assert_eq!(remedy, "the fields known there are vcpu_count, max_vcpu_count, topology, features");
        let (message, _) =
            refused("{\n  \"config\": {\n    \"storage\": [{\"path\": \"/a\", \"root\": true}]\n  }\n}");
        assert!(message.contains("line 3, ") && message.contains("config.storage[0].root"), "{message}");
    }

    #[test]
    fn a_wrong_type_and_a_duplicate_key_are_refused_with_their_line() {
        for (text, line, wanted) in [
            ("config:\n  cpu:\n    vcpu_count: many\n", "line 3", "config.cpu.vcpu_count"),
            ("config:\n  storage: /a\n", "line 2", "config.storage"),
            ("config:\n  storage:\n  - read_only: yes\n", "line 3", "config.storage[0].read_only"),
            ("vm_id: a\nvm_id: b\n", "line 2", "vm_id"),
            ("config:\n  metadata:\n    a: b\n    a: c\n", "line 4", "a"),
            ("config:\n  restart_policy:\n    mode: SOMETIMES\n", "line 3", "SOMETIMES"),
            ("config: {", "line 1", ""),
            ("a: b: c\n", "line 1", ""),
        ] {
            let (message, _) = refused(text);
            assert!(message.starts_with("vm.yaml: ") && message.contains(line), "{text:?}: {message}");
            assert!(message.contains(wanted), "{text:?}: {message}");
            assert_eq!(message.matches("line ").count(), 1, "{message}");
        }
        assert_eq!(refused(" \n").0, "vm.yaml: is empty");
    }

    #[test]
    fn an_unknown_restart_mode_is_refused_with_the_known_modes() {
        for text in [
            "config:\n  restart_policy: {mode: on-failure}\n",
            "{\n\"config\": {\"restartPolicy\": {\"mode\": \"on-failure\"}}}",
        ] {
            let (message, _) = refused(text);
            assert!(message.contains("mode: must be one of RESTART_MODE_UNSPECIFIED, "), "{message}");
            assert!(message.contains(", RESTART_MODE_ON_FAILURE, RESTART_MODE_ALWAYS, not "), "{message}");
            assert!(message.contains("on-failure"), "{message}");
        }
    }

    #[test]
    fn yaml_that_expands_by_aliases_is_refused() {
        let mut text = "config:\n  metadata:\n    a: &a [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for (new, old) in [("b", "a"), ("c", "b"), ("d", "c"), ("e", "d"), ("f", "e"), ("g", "f")] {
            text.push_str(&format!(
                "    {new}: &{new} [*{old},*{old},*{old},*{old},*{old},*{old},*{old},*{old}]\n"
            ));
        }
        assert!(request(&text).is_err());
    }
}
