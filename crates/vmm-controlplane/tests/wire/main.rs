//! The wire, from outside: a server on a loopback port, spoken to in raw HTTP and with the generated clients.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, which clippy does not take for tests"
)]

mod connection_limits;
mod connections;
mod http_client;
mod json;
mod protocols;
mod refusals;
mod server;
mod tls;
mod unix_socket;
