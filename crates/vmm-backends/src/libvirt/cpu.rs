//! Converts a CPU model from QEMU's syntax, which `cpu.features["qemu.model"]` takes, into
//! libvirt's.

use super::xml::Xml;
use crate::qemu::convert::Accelerator;

/// A CPU model with features.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CpuModel {
    name: String,
    /// The features, each with true if the guest has it.
    features: Vec<(String, bool)>,
}

impl CpuModel {
    /// Returns the model if the client names none, which has all features of the accelerator.
    pub(super) fn of(accelerator: Accelerator) -> Self {
        let name = match accelerator {
            Accelerator::Kvm => "host",
            Accelerator::Tcg => "max",
        };
        Self { name: name.to_owned(), features: Vec::new() }
    }

    /// Parses `name,+feature,-feature,feature=on,feature=off`.
    ///
    /// # Errors
    /// Returns the part that libvirt cannot express.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        if !is_word(name) {
            return Err(name.to_owned());
        }
        let features = parts.map(|part| {
            let (feature, wanted) =
                match (part.strip_prefix('-'), part.strip_prefix('+'), part.split_once('=')) {
                    (Some(feature), _, _) => (feature, false),
                    (_, Some(feature), _) => (feature, true),
                    (_, _, Some((feature, "on"))) => (feature, true),
                    (_, _, Some((feature, "off"))) => (feature, false),
                    (None, None, None) => (part, true),
                    (None, None, Some(_)) => return Err(part.to_owned()),
                };
            if is_word(feature) { Ok((feature.to_owned(), wanted)) } else { Err(part.to_owned()) }
        });
        Ok(Self { name: name.to_owned(), features: features.collect::<Result<_, _>>()? })
    }

    /// Writes the element, with the content that `inside` writes.
    pub(super) fn write(&self, xml: &mut Xml, inside: impl FnOnce(&mut Xml)) {
        let mode = match self.name.as_str() {
            "max" => "maximum",
            "host" => "host-passthrough",
            _ => "custom",
        };
        let custom = [("mode", mode), ("match", "exact"), ("check", "none")];
        let attributes = if mode == "custom" { &custom[..] } else { &custom[..1] };
        xml.element("cpu", attributes, |xml| {
            if mode == "custom" {
                xml.text("model", &[("fallback", "forbid")], &self.name);
            }
            inside(xml);
            for (feature, wanted) in &self.features {
                let policy = if *wanted { "require" } else { "disable" };
                xml.empty("feature", &[("policy", policy), ("name", feature)]);
            }
        });
    }
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> String {
        let mut xml = Xml::default();
        CpuModel::parse(text).unwrap().write(&mut xml, |_| {});
        xml.finish().split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn cpu_models_are_rewritten_for_libvirt() {
        assert_eq!(written("max"), "<cpu mode='maximum'> </cpu>");
        assert_eq!(
            written("host,-avx2,+aes,sse4a=off,pcid=on,x2apic"),
            "<cpu mode='host-passthrough'> <feature policy='disable' name='avx2'/> <feature policy='require' name='aes'/> \
             <feature policy='disable' name='sse4a'/> <feature policy='require' name='pcid'/> \
             <feature policy='require' name='x2apic'/> </cpu>"
        );
        assert_eq!(
            written("Skylake-Server"),
            "<cpu mode='custom' match='exact' check='none'> <model fallback='forbid'>Skylake-Server</model> </cpu>"
        );
        assert_eq!(CpuModel::parse("max,level=5").unwrap_err(), "level=5");
        assert_eq!(CpuModel::parse("").unwrap_err(), "");
    }
}
