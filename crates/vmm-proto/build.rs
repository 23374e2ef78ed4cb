//! Compiles the `.proto` files into Rust, with no compiler but Cargo's own.
//!
//! ```text
//!  *.proto ──protox──► descriptor set  ──as it is──► reflection.binpb   (what reflection tells clients)
//!                             │
//!                             └──names swapped──► codegen.binpb ──connectrpc-build──► messages, trait, client
//! ```
//!
//! Why the names are swapped: the generator writes JSON under a field's `json_name` (lowerCamelCase) and reads it
//! under `name` too, with no switch. The API promises answers under the proto names and takes both spellings, so
//! the generator is shown a set in which `name` and `json_name` have changed places. Neither the binary
//! encoding (numbers) nor the Rust field names (made snake_case again below) notice.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use buffa_codegen::{BytesRepr, MapRepr};
use connectrpc_build::CodeGenConfig;
use protox::prost::Message as _;
use protox::prost_reflect::prost_types::DescriptorProto;

/// Where the names are swapped: our own API. What others defined keeps its JSON as they defined it.
const OURS: &str = "vmm.v1";

/// What Rust is generated for, relative to the include folder.
const GENERATED: [&str; 2] = ["vmm/v1/vm.proto", "google/rpc/error_details.proto"];

/// What reflection alone describes: a library brings the Rust.
const DESCRIBED: [&str; 1] = ["grpc/health/v1/health.proto"];

fn main() -> Result<()> {
    // Read now: a build script that was copied with a target folder still has the path of another checkout inside.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR is not set")?;
    let include = Path::new(&manifest).join("../../proto");
    let out =
        PathBuf::from(std::env::var_os("OUT_DIR").context("OUT_DIR is not set: run this through cargo")?);
    let sources = GENERATED.iter().chain(&DESCRIBED);
    for source in sources.clone() {
        println!("cargo:rerun-if-changed={}", include.join(source).display());
    }
    println!("cargo:rerun-if-changed=build.rs");

    let mut set = protox::compile(sources, [&include]).context("compiling the .proto files")?;
    write(&out.join("reflection.binpb"), &set.encode_to_vec())?;

    for file in set.file.iter_mut().filter(|file| file.package() == OURS) {
        file.message_type.iter_mut().for_each(swap_names);
    }
    let swapped = out.join("codegen.binpb");
    write(&swapped, &set.encode_to_vec())?;

    connectrpc_build::Config::new()
        .descriptor_set(&swapped)
        .files(&GENERATED)
        .buffa_config(generator())
        // buffa_config() replaces every earlier choice, this default of connectrpc-build's included.
        .generate_json(true)
        .include_file("_connectrpc.rs")
        // It would name codegen.binpb, which this script has just written: rebuilt at every call.
        .emit_rerun_directives(false)
        .compile()
        .context("generating Rust from the descriptor set")
}

/// Says how the messages are generated.
fn generator() -> CodeGenConfig {
    let mut config = CodeGenConfig::default();
    // Undoes the swap where Rust can see it.
    config.idiomatic_field_names = true;
    // The same message has the same bytes every time: requests are compared, answers are tested.
    config.map_fields.push((".".into(), MapRepr::BTreeMap));
    // Console output travels from the file to the socket without a copy per message.
    config.bytes_fields.push((".".into(), BytesRepr::Bytes));
    // A typo in a request must not be dropped in silence. It works for messages whose Deserialize is derived: all
    // that have no oneof (the one behind a proto3 `optional` is not a real one, and does not count).
    config.message_attributes.push((format!(".{OURS}"), "#[serde(deny_unknown_fields)]".into()));
    config
}

/// Exchanges `name` and `json_name` of a message's fields, nested messages included.
///
/// Map entries keep theirs: the generator recognises them by the names `key` and `value`.
fn swap_names(message: &mut DescriptorProto) {
    if message.options.as_ref().is_some_and(|options| options.map_entry()) {
        return;
    }
    for field in &mut message.field {
        std::mem::swap(&mut field.name, &mut field.json_name);
    }
    message.nested_type.iter_mut().for_each(swap_names);
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}
