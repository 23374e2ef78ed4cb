//! `vmcp create` and `vmcp validate`.

use connectrpc::ErrorCode;
use vmm_proto::v1 as pb;

use super::Session;
use crate::cli::{Config, Create, Validate};
use crate::failure::{Failure, number_of};
use crate::input;
use crate::output::{Format, escape, problem, remark, words};

pub(super) async fn create(session: &mut Session, arguments: &Create) -> Result<(), Failure> {
    let answer = record(session, arguments.name.as_deref(), &arguments.config).await?;
    if !session.output.format().is_message() {
        warn(&answer.warnings);
    }
    session.output.answer(&answer, &[&answer.vm_id], |_| {
        format!("{}: {}", escape::line(&answer.vm_id), words::state(&answer.state))
    })
}

/// Records a VM with the configuration that the arguments describe.
///
/// # Errors
///
/// The arguments or the server refuse the configuration.
pub(super) async fn record(
    session: &Session,
    name: Option<&str>,
    config: &Config,
) -> Result<pb::CreateVmResponse, Failure> {
    let request = input::request(name, config, &session.server)?;
    Ok(session.client.create_vm(request).await?.into_owned())
}

pub(super) async fn validate(session: &mut Session, arguments: &Validate) -> Result<(), Failure> {
    let pb::CreateVmRequest { config, backend, .. } =
        input::request(None, &arguments.config, &session.server)?;
    let request = pb::ValidateVmRequest { config, backend, ..Default::default() };
    let answer = session.client.validate_vm(request).await?.into_owned();
    match session.output.format() {
        Format::Json | Format::Yaml => session.output.answer(&answer, &[], |_| String::new())?,
        Format::Table | Format::Name => {
            warn(&answer.warnings);
            if answer.ok {
                session.output.text("the configuration is valid")?;
            } else {
                refuse(&answer.violations);
            }
        }
    }
    if answer.ok { Ok(()) } else { Err(Failure::Reported(number_of(ErrorCode::InvalidArgument))) }
}

/// Prints the warnings of an answer.
pub(super) fn warn(warnings: &[pb::FieldReport]) {
    for warning in warnings {
        remark(&format!("warning: {}: {}", escape::line(&warning.field), escape::line(&warning.message)));
    }
}

fn refuse(violations: &[pb::FieldReport]) {
    let fields = violations.iter().map(|it| (it.field.as_str(), it.message.as_str()));
    remark(&problem::fields("error: CreateVm would refuse this configuration", fields));
}
