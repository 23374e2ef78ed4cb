//! `vmcp backends`.

use vmm_proto::v1 as pb;

use super::Session;
use crate::cli::Backends;
use crate::failure::Failure;
use crate::output::Table;

pub(super) async fn run(session: &mut Session, arguments: &Backends) -> Result<(), Failure> {
    let mut answer = session.client.list_backends(pb::ListBackendsRequest::default()).await?.into_owned();
    let Some(name) = &arguments.name else {
        let names: Vec<_> = answer.backends.iter().map(|backend| backend.name.as_str()).collect();
        return session.output.answer(&answer, &names, |width| table(&answer.backends, width));
    };
    answer.backends.retain(|backend| backend.name == *name);
    match answer.backends.first() {
        Some(backend) => session.output.answer(backend, &[&backend.name], |width| facts(backend, width)),
        None => Err(Failure::input(format!("the daemon does not know the backend {name}"))),
    }
}

fn table(backends: &[pb::Backend], width: Option<u16>) -> String {
    let mut table = Table::new(width, ["NAME", "AVAILABLE", "VERSION", "MODE", "REASON"]);
    for backend in backends {
        table.row([
            backend.name.clone(),
            yes_or_no(backend.available),
            backend.version.clone(),
            backend.endpoint_mode.clone(),
            backend.reason.clone(),
        ]);
    }
    table.render()
}

fn facts(backend: &pb::Backend, width: Option<u16>) -> String {
    let mut table = Table::facts(width);
    table.row(["name".into(), backend.name.clone()]);
    table.row(["available".into(), yes_or_no(backend.available)]);
    for (name, value) in
        [("version", &backend.version), ("mode", &backend.endpoint_mode), ("reason", &backend.reason)]
    {
        if !value.is_empty() {
            table.row([name.into(), value.clone()]);
        }
    }
    for (name, value) in &backend.capabilities {
        table.row([name.clone(), value.clone()]);
    }
    for (name, value) in &backend.limits {
        table.row([name.clone(), value.to_string()]);
    }
    table.render()
}

fn yes_or_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unavailable_backend_is_shown_with_the_reason() {
        let backend = pb::Backend {
            name: "qemu".into(),
            reason: "qemu-system-x86_64 is not on the PATH".into(),
            endpoint_mode: "managed".into(),
            limits: [("max-vcpus".to_owned(), 255)].into(),
            ..Default::default()
        };
        let text = table(std::slice::from_ref(&backend), None);
        assert!(
            text.ends_with("qemu  no                  managed  qemu-system-x86_64 is not on the PATH"),
            "{text}"
        );
        let text = facts(&backend, None);
        assert!(text.contains("max-vcpus  255") && !text.contains("version"), "{text}");
    }
}
