//! Compiles the messages and the service of the Connect conformance suite into Rust.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use buffa_codegen::BytesRepr;
use connectrpc_build::CodeGenConfig;
use protox::prost::Message as _;

/// The files that a server needs. The suite's other files concern its clients and its own tests.
const SOURCES: [&str; 3] = [
    "connectrpc/conformance/v1/config.proto",
    "connectrpc/conformance/v1/server_compat.proto",
    "connectrpc/conformance/v1/service.proto",
];

fn main() -> Result<()> {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR is not set")?;
    let include = Path::new(&manifest).join("proto");
    let out =
        PathBuf::from(std::env::var_os("OUT_DIR").context("OUT_DIR is not set: run this through cargo")?);
    for source in SOURCES {
        println!("cargo:rerun-if-changed={}", include.join(source).display());
    }
    println!("cargo:rerun-if-changed=build.rs");

    let set = protox::compile(SOURCES, [&include]).context("compiling the .proto files")?;
    let described = out.join("conformance.binpb");
    std::fs::write(&described, set.encode_to_vec())
        .with_context(|| format!("writing {}", described.display()))?;

    let mut config = CodeGenConfig::default();
    config.bytes_fields.push((".".into(), BytesRepr::Bytes));
    connectrpc_build::Config::new()
        .descriptor_set(&described)
        .files(&SOURCES)
        .buffa_config(config)
        .generate_json(true)
        .include_file("_connectrpc.rs")
        .emit_rerun_directives(false)
        .compile()
        .context("generating Rust from the descriptor set")
}
