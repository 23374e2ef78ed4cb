//! The VM that a name means: a `vm_id`, or a prefix of one `vm_id` or uid and of no other.

use connectrpc::{ConnectError, ErrorCode};
use vmm_proto::v1 as pb;

use super::Client;
use crate::failure::Failure;

/// The VMs in a page, the most that the server gives.
const PAGE_SIZE: i32 = 1000;
/// The number of matches that an error names.
const NAMED_MATCHES: usize = 5;

/// Returns the `vm_id` that `given` means.
///
/// An exact `vm_id` is asked for first and needs no list. Only where there is none, all VMs are
/// read, because a prefix can be one of any VM.
///
/// # Errors
///
/// No VM matches, several match, or the server does not answer.
pub(crate) async fn resolve(client: &Client, given: &str) -> Result<String, Failure> {
    Ok(read(client, given).await?.vm_id)
}

/// Returns the VM that `given` means, as GetVmInfo shows it.
///
/// # Errors
///
/// No VM matches, several match, or the server does not answer.
pub(crate) async fn read(client: &Client, given: &str) -> Result<pb::GetVmInfoResponse, Failure> {
    match get(client, given).await {
        Err(error) if error.code == ErrorCode::NotFound && !given.is_empty() => {
            let vms = all(client, pb::ListVmsRequest::default()).await?.vms;
            let vm_id = pick(given, &vms)?.ok_or(error)?;
            Ok(get(client, &vm_id).await?)
        }
        outcome => Ok(outcome?),
    }
}

async fn get(client: &Client, vm_id: &str) -> Result<pb::GetVmInfoResponse, ConnectError> {
    let request = pb::GetVmInfoRequest { vm_id: vm_id.to_owned(), ..Default::default() };
    Ok(client.get_vm_info(request).await?.into_owned())
}

/// Returns the one VM that a prefix means, or none where nothing matches.
fn pick(given: &str, vms: &[pb::VmInfo]) -> Result<Option<String>, Failure> {
    let bare = given.replace('-', "").to_ascii_lowercase();
    let matches: Vec<_> = vms
        .iter()
        .filter(|vm| {
            let uid = vm.uid.replace('-', "");
            vm.vm_id.starts_with(given) || (!bare.is_empty() && uid.starts_with(&bare))
        })
        .map(|vm| vm.vm_id.as_str())
        .collect();
    match matches[..] {
        [] => Ok(None),
        [only] => Ok(Some(only.to_owned())),
        _ => Err(ambiguous(given, &matches)),
    }
}

fn ambiguous(given: &str, matches: &[&str]) -> Failure {
    let mut named = matches[..matches.len().min(NAMED_MATCHES)].join(", ");
    if matches.len() > NAMED_MATCHES {
        named.push_str(", …");
    }
    Failure::input(format!("\"{given}\" is a prefix of {} VMs: {named}", matches.len()))
        .with_remedy("type more of the name, or of the uid that `vmcp get` shows")
}

/// Returns all pages of a list as one answer.
///
/// # Errors
///
/// The server refuses the request or does not answer.
pub(crate) async fn all(
    client: &Client,
    filter: pb::ListVmsRequest,
) -> Result<pb::ListVmsResponse, ConnectError> {
    let mut whole = pb::ListVmsResponse::default();
    let mut page_token = String::new();
    loop {
        let request = pb::ListVmsRequest { page_size: PAGE_SIZE, page_token, ..filter.clone() };
        let page = client.list_vms(request).await?.into_owned();
        whole.vms.extend(page.vms);
        whole.total_count = page.total_count;
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(vm_id: &str, uid: &str) -> pb::VmInfo {
        pb::VmInfo { vm_id: vm_id.into(), uid: uid.into(), ..Default::default() }
    }

    fn picked(given: &str) -> Result<Option<String>, Failure> {
        let vms = [
            vm("web-1", "01a2017a-e2ed-7448-9acf-8690c90583be"),
            vm("web-2", "01a2017a-ffff-7448-9acf-8690c90583be"),
            vm("db", "01b30000-0000-7448-9acf-8690c90583be"),
        ];
        pick(given, &vms)
    }

    #[test]
    fn a_unique_prefix_of_a_name_or_uid_selects_the_vm() {
        for (given, wanted) in [
            ("web-1", Some("web-1")),
            ("d", Some("db")),
            ("01a2017a-e", Some("web-1")),
            ("01A2017AE", Some("web-1")),
            ("01b", Some("db")),
            ("nothing", None),
            ("-", None),
        ] {
            assert_eq!(picked(given).unwrap().as_deref(), wanted, "{given}");
        }
    }

    #[test]
    fn an_ambiguous_prefix_is_refused_with_the_matching_names() {
        for given in ["web", "01a2017a"] {
            let error = picked(given).unwrap_err().to_string();
            assert_eq!(error, format!("\"{given}\" is a prefix of 2 VMs: web-1, web-2"));
        }
    }
}
