//! `vmcp api`: a call as it is typed.

use super::Session;
use crate::cli::Api;
use crate::connect::raw;
use crate::failure::Failure;
use crate::input;
use crate::output::escape;

pub(super) async fn run(session: &mut Session, arguments: &Api) -> Result<(), Failure> {
    let method = &arguments.method;
    if method.is_empty() || !method.chars().all(|letter| letter.is_ascii_alphanumeric()) {
        return Err(Failure::input(format!("\"{}\" is no method", escape::line(method)))
            .with_remedy("write its bare name, as ListVms; docs/api-reference.md lists them"));
    }
    let json = match arguments.request.strip_prefix('@') {
        Some(path) => input::read(path)?,
        None if arguments.request == "-" => input::read("-")?,
        None => arguments.request.clone(),
    };
    let output = &session.output;
    raw::call(&session.server, method, json, |message| output.text(&escape::json(message))).await
}
