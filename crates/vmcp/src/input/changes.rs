//! A change of a VM's configuration: the new values, and the names of the parts that have them.
//!
//! The daemon replaces a part as a whole. A flag that sets one value of a part therefore needs the
//! part as it is on record.

use serde::Deserialize;
use serde_json::{Map, Value};
use vmm_proto::v1 as pb;

use super::paths::absolute;
use super::{file, flags, read};
use crate::cli::Changes;
use crate::config::Server;
use crate::failure::Failure;

/// The parts to replace, with their new values.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct ConfigChange {
    /// The new values.
    pub(crate) config: pb::VmConfig,
    /// The names of the parts to replace.
    pub(crate) parts: Vec<String>,
    /// True if a new value was made from the part on record, so that a change of the VM in between
    /// would be lost.
    pub(crate) is_merged: bool,
}

/// A change as a file has it: an UpdateVmRequest, or the CreateVmRequest that the VM was made from.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ChangeFile {
    /// Not read: the command line names the VM.
    #[serde(alias = "vmId", rename = "vm_id")]
    _vm_id: String,
    /// The backend, if the file names one.
    pub(crate) backend: String,
    config: pb::VmConfig,
    fields: Vec<String>,
    /// The generation that the VM must have; 0: any.
    #[serde(alias = "ifGeneration", with = "buffa::json_helpers::int64")]
    pub(crate) if_generation: i64,
    /// The names of the parts in `config`, also of those with a default value.
    #[serde(skip)]
    named: Vec<String>,
}

impl ChangeFile {
    /// Reads a change from a file, or from the standard input.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or is no change; see [`Self::parse`].
    pub(crate) fn read(path: &str) -> Result<Self, Failure> {
        Self::parse(path, &read(path)?)
    }

    /// Returns the change that a text has. `path` names the text in errors.
    ///
    /// # Errors
    ///
    /// The text is not YAML or JSON, or has a field that the API does not know.
    pub(crate) fn parse(path: &str, text: &str) -> Result<Self, Failure> {
        let mut parsed: Self = file::parse(path, text)?;
        // The message has no trace of a part with a default value, and a file that names such a part
        // means to reset it.
        let tree: Value = file::parse(path, text)?;
        let config = tree.get("config").and_then(Value::as_object);
        parsed.named = config.into_iter().flat_map(Map::keys).map(|name| snake_case(name)).collect();
        Ok(parsed)
    }

    /// Returns the parts that the file replaces.
    pub(crate) fn into_change(self) -> ConfigChange {
        let parts = if self.fields.is_empty() { self.named } else { self.fields };
        ConfigChange { config: self.config, parts, is_merged: false }
    }

    /// Returns the configuration of the file.
    pub(crate) fn config(&self) -> &pb::VmConfig {
        &self.config
    }
}

/// Returns the change that flags describe, on top of the configuration on record.
///
/// # Errors
///
/// A path is relative, and the server is on another host.
pub(crate) fn by_flags(
    flags: &Changes,
    stored: &pb::VmConfig,
    server: &Server,
) -> Result<ConfigChange, Failure> {
    let mut change = ConfigChange::default();
    machine(flags, stored, server, &mut change)?;
    if !flags.disk.is_empty() {
        let disks = flags.disk.iter().map(|disk| flags::disk(disk, server));
        change.config.storage = disks.collect::<Result<_, _>>()?;
        change.replace("storage");
    }
    if !flags.net.is_empty() {
        change.config.network = flags.net.iter().map(|nic| nic.0.clone()).collect();
        change.replace("network");
    }
    if !flags.metadata.is_empty() || !flags.remove_metadata.is_empty() {
        change.config.metadata.clone_from(&stored.metadata);
        change.config.metadata.retain(|key, _| !flags.remove_metadata.contains(key));
        change.config.metadata.extend(flags::pairs(&flags.metadata));
        change.merge("metadata");
    }
    if let Some(mode) = flags.restart {
        change.config.restart_policy.clone_from(&stored.restart_policy);
        change.config.restart_policy.get_or_insert_default().mode = mode.into();
        change.merge("restart_policy");
    }
    if flags.delete_protection || flags.no_delete_protection {
        change.config.delete_protection = flags.delete_protection;
        change.replace("delete_protection");
    }
    for part in &flags.clear {
        if change.parts.contains(&part.0) {
            return Err(Failure::input(format!("--clear {}: another flag gives this part a value", part.0)));
        }
        change.replace(&part.0);
    }
    Ok(change)
}

/// Adds the changes of the parts that have one value for each flag: processors, memory, boot.
fn machine(
    flags: &Changes,
    stored: &pb::VmConfig,
    server: &Server,
    change: &mut ConfigChange,
) -> Result<(), Failure> {
    if let Some(cpus) = flags.cpus {
        change.config.cpu.clone_from(&stored.cpu);
        change.config.cpu.get_or_insert_default().vcpu_count = cpus;
        change.merge("cpu");
    }
    if let Some(memory) = flags.memory {
        change.config.memory.clone_from(&stored.memory);
        change.config.memory.get_or_insert_default().size_bytes = memory;
        change.merge("memory");
    }
    let mut boot = stored.boot.clone().into_option().unwrap_or_default();
    let has_texts = flags.kernel.is_some() || flags.initrd.is_some() || flags.kernel_args.is_some();
    if has_texts || !flags.boot_option.is_empty() {
        if let Some(path) = &flags.kernel {
            boot.kernel_path = absolute("--kernel", path, server)?;
        }
        if let Some(path) = &flags.initrd {
            boot.initrd_path = absolute("--initrd", path, server)?;
        }
        if let Some(text) = &flags.kernel_args {
            boot.kernel_args.clone_from(text);
        }
        boot.boot_options.extend(flags::pairs(&flags.boot_option));
        change.config.boot = boot.into();
        change.merge("boot");
    }
    Ok(())
}

impl ConfigChange {
    /// Names a part that is replaced by values of the command line alone.
    fn replace(&mut self, part: &str) {
        self.parts.push(part.to_owned());
    }

    /// Names a part that is made from the one on record.
    fn merge(&mut self, part: &str) {
        self.replace(part);
        self.is_merged = true;
    }
}

/// Returns the names of the parts in which two configurations differ.
///
/// # Errors
///
/// A configuration cannot be written as JSON.
pub(crate) fn changed_parts(before: &pb::VmConfig, after: &pb::VmConfig) -> Result<Vec<String>, Failure> {
    let parts = |config: &pb::VmConfig| match serde_json::to_value(config) {
        Ok(Value::Object(parts)) => Ok(parts),
        Ok(_) | Err(_) => Err(Failure::Local("the configuration cannot be written as JSON".to_owned())),
    };
    let (before, after) = (parts(before)?, parts(after)?);
    let mut names: Vec<_> = before.keys().chain(after.keys()).cloned().collect();
    names.sort_unstable();
    names.dedup();
    names.retain(|name| before.get(name) != after.get(name));
    Ok(names)
}

/// Returns a field's name in the spelling of the API: `restart_policy` for `restartPolicy`.
fn snake_case(name: &str) -> String {
    let mut spelled = String::with_capacity(name.len() + 1);
    for letter in name.chars() {
        if letter.is_ascii_uppercase() {
            spelled.push('_');
        }
        spelled.push(letter.to_ascii_lowercase());
    }
    spelled
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use serde_json::json;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::config::{DEFAULT_SERVER, TlsFiles};

    fn stored() -> pb::VmConfig {
        let stored = json!({
            "cpu": {"vcpu_count": 2, "features": {"nested": "off"}},
            "memory": {"size_bytes": "1073741824"},
            "boot": {"kernel_path": "/k", "kernel_args": "quiet", "boot_options": {"a": "1"}},
            "storage": [{"id": "disk0", "path": "/a"}],
            "metadata": {"team": "web", "tier": "1"},
            "restart_policy": {"mode": "RESTART_MODE_ALWAYS", "max_restarts": 9},
            "delete_protection": true
        });
        serde_json::from_value(stored).unwrap()
    }

    fn changed(arguments: &[&str]) -> Result<ConfigChange, Failure> {
        let cli = Cli::try_parse_from([&["vmcp", "update", "vm"], arguments].concat()).unwrap();
        let Command::Update(update) = cli.command else { panic!("another command") };
        by_flags(
            &update.changes,
            &stored(),
            &Server::parse(DEFAULT_SERVER, "--server", TlsFiles::default()).unwrap(),
        )
    }

    fn sent(change: &ConfigChange) -> Value {
        serde_json::to_value(&change.config).unwrap()
    }

    #[test]
    fn a_flag_changes_one_value_and_the_rest_of_its_part_stays() {
        for (arguments, part, wanted) in [
            (&["--cpus=4"][..], "cpu", json!({"vcpu_count": 4, "features": {"nested": "off"}})),
            (&["--memory=2GiB"], "memory", json!({"size_bytes": "2147483648"})),
            (
                &["--kernel-args=console=ttyS0", "--boot-option=b=2"],
                "boot",
                json!({"kernel_path": "/k", "kernel_args": "console=ttyS0", "boot_options": {"a": "1", "b": "2"}}),
            ),
            (
                &["--metadata=tier=2", "--metadata=x=y", "--remove-metadata=team"],
                "metadata",
                json!({"tier": "2", "x": "y"}),
            ),
            (
                &["--restart=never"],
                "restart_policy",
                json!({"mode": "RESTART_MODE_NEVER", "max_restarts": 9}),
            ),
        ] {
            let change = changed(arguments).unwrap();
            assert_eq!(change.parts, [part]);
            assert!(change.is_merged, "{part}");
            assert_eq!(sent(&change), json!({part: wanted}), "nothing of another part is sent");
        }
    }

    #[test]
    fn a_flag_for_a_whole_part_needs_nothing_of_the_part_on_record() {
        for (arguments, part, wanted) in [
            (&["--disk=/b,ro"][..], "storage", json!({"storage": [{"path": "/b", "read_only": true}]})),
            (&["--net=auto"], "network", json!({"network": [{}]})),
            (&["--delete-protection"], "delete_protection", json!({"delete_protection": true})),
            (&["--no-delete-protection"], "delete_protection", json!({})),
            (&["--clear=storage"], "storage", json!({})),
        ] {
            let change = changed(arguments).unwrap();
            assert_eq!((change.parts.as_slice(), change.is_merged), (&[part.to_owned()][..], false));
            assert_eq!(sent(&change), wanted);
        }
        assert!(changed(&["--clear=metadata", "--metadata=a=b"]).is_err());
        assert_eq!(changed(&[]).unwrap(), ConfigChange::default());
    }

    #[test]
    fn a_file_replaces_the_parts_that_it_names() {
        let file = ChangeFile::parse(
            "vm.yaml",
            "vm_id: a\nbackend: qemu\nconfig:\n  memory: {size_bytes: 1}\n  deleteProtection: false\n  network: null\n",
        )
        .unwrap();
        assert_eq!(file.backend, "qemu");
        let change = file.into_change();
        assert_eq!(change.parts, ["delete_protection", "memory", "network"]);
        assert_eq!(sent(&change), json!({"memory": {"size_bytes": "1"}}));
        let file = ChangeFile::parse(
            "-",
            r#"{"config": {"metadata": {"a": "b"}}, "fields": ["metadata", "console"], "ifGeneration": "7"}"#,
        )
        .unwrap();
        assert_eq!(file.if_generation, 7);
        assert_eq!(file.into_change().parts, ["metadata", "console"]);
    }

    #[test]
    fn an_unknown_field_of_a_change_is_reported_with_its_line() {
        for (text, wanted) in [
            (
                "config:\n  memory:\n    size: 1\n",
                "vm.yaml: line 3, column 5: config.memory.size: no such field",
            ),
            ("\nmemory: {}\n", "vm.yaml: line 2, column 1: memory: no such field"),
        ] {
            let error = ChangeFile::parse("vm.yaml", text).unwrap_err();
            assert_eq!(error.to_string(), wanted);
        }
    }

    #[test]
    fn changed_parts_are_those_with_another_value() {
        let mut after = stored();
        assert_eq!(changed_parts(&stored(), &after).unwrap(), Vec::<String>::new());
        after.delete_protection = false;
        after.metadata.insert("x".into(), "y".into());
        after.console = pb::ConsoleConfig::default().into();
        assert_eq!(changed_parts(&stored(), &after).unwrap(), ["console", "delete_protection", "metadata"]);
    }
}
