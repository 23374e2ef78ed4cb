//! `vmcp health`: the page `/_/health`, with an exit code.

use connectrpc::{ConnectError, ErrorCode};
use http::StatusCode;
use serde_json::Value;

use super::Session;
use crate::connect::raw;
use crate::failure::{Failure, number_of};
use crate::output::{Format, Table, units};

pub(super) async fn run(session: &mut Session) -> Result<(), Failure> {
    let answer = raw::get(&session.server, "/_/health").await?;
    let page: Value = serde_json::from_slice(&answer.body)
        .map_err(|_| ConnectError::unknown(format!("no health page: HTTP {}", answer.status)))?;
    if !matches!(answer.status, StatusCode::OK | StatusCode::SERVICE_UNAVAILABLE) || page["status"].is_null()
    {
        return Err(ConnectError::unknown(format!("no health page: HTTP {}", answer.status)).into());
    }
    if session.output.format() == Format::Name {
        session.output.text(text(&page["status"]))?;
    } else {
        session.output.answer(&page, &[], |width| facts(&page, width))?;
    }
    match answer.status {
        StatusCode::OK => Ok(()),
        // The page has the reason. The exit code is that of a call to an unavailable backend.
        _ => Err(Failure::Reported(number_of(ErrorCode::Unavailable))),
    }
}

fn facts(page: &Value, width: Option<u16>) -> String {
    let mut table = Table::facts(width);
    for name in ["status", "reason", "backend", "version"] {
        if let Some(value) = page[name].as_str() {
            table.row([name.into(), value.to_owned()]);
        }
    }
    table.row(["up".into(), units::span(page["uptime_seconds"].as_u64().unwrap_or_default())]);
    for backend in page["backends"].as_array().into_iter().flatten() {
        let says = if backend["available"] == true { &backend["version"] } else { &backend["reason"] };
        table.row([text(&backend["name"]).to_owned(), text(says).to_owned()]);
    }
    for warning in page["warnings"].as_array().into_iter().flatten() {
        table.row(["warning".into(), text(warning).to_owned()]);
    }
    table.render()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn health_shows_every_backend_and_warning() {
        let page = json!({
            "status": "healthy", "backend": "qemu", "version": "0.1.0", "uptime_seconds": 300,
            "backends": [
                {"name": "qemu", "available": true, "version": "7.2.22"},
                {"name": "firecracker", "available": false, "reason": "is not on the PATH"}
            ],
            "warnings": ["open to everybody"]
        });
        assert_eq!(
            facts(&page, None),
            "status       healthy\n\
             backend      qemu\n\
             version      0.1.0\n\
             up           5m\n\
             qemu         7.2.22\n\
             firecracker  is not on the PATH\n\
             warning      open to everybody"
        );
    }
}
