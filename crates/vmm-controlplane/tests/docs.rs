//! Compares the documents with the program: the program's own parsers read the examples, and the
//! names that the documents must have come from the code.
//!
//! The words after the language of a fenced block, which readers do not see, say what the block is:
//!
//! ```text
//!   ```json CreateVmResponse      a message of the API, parsed strictly
//!   ```rust crates/x/src/y.rs     an excerpt of that file
//!   ```bash                       the body of each curl call is the request of its method
//! ```

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers are tests too; clippy.toml only sees #[test] functions"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use buffa_descriptor::{DescriptorPool, FieldKind, MessageDescriptor, SingularKind};
use serde_json::Value;
use vmm_backends::cloud_hypervisor::CloudHypervisorBackend;
use vmm_backends::firecracker::FirecrackerBackend;
use vmm_backends::qemu::{KvmMode, QemuBackend, QemuOptions};
use vmm_core::backend::Backend;
use vmm_core::config::VmConfig;
use vmm_core::spec::{BACKING_KEYS, BOOT_KEYS, CPU_KEYS, DISK_KEYS, NIC_KEYS, VmSpec};
use vmm_proto::v1 as pb;

const CONFIGURATION: &str = "docs/deploy-vm-instance-configuration.md";
const REFERENCE: &str = "docs/api-reference.md";
const NEW_BACKEND: &str = "docs/adding-a-backend.md";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn files(folder: &Path, ending: &str, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, ending, into);
        } else if path.extension().is_some_and(|found| found == ending) {
            into.push(path);
        }
    }
}

/// Returns every page with its path from the repository.
fn pages() -> Vec<(String, String)> {
    let root = repository();
    let mut paths = Vec::new();
    files(&root.join("docs"), "md", &mut paths);
    let at_the_root =
        ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md"].map(|name| root.join(name));
    paths.extend(at_the_root.into_iter().filter(|path| path.exists()));
    let page = |path: PathBuf| {
        let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        (name, std::fs::read_to_string(path).unwrap())
    };
    paths.into_iter().map(page).collect()
}

/// A fenced block of a page.
struct Block {
    location: String,
    language: String,
    about: String,
    text: String,
    /// The columns of the fence, by which a block in a list is indented.
    indent: usize,
}

fn blocks(page: &str, text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (number, line) in text.lines().enumerate() {
        match (line.trim_start().strip_prefix("```"), open.take()) {
            (Some(info), None) => {
                let (language, about) = info.trim().split_once(' ').unwrap_or((info.trim(), ""));
                open = Some(Block {
                    location: format!("{page}:{}", number + 1),
                    language: language.to_owned(),
                    about: about.to_owned(),
                    text: String::new(),
                    indent: line.len() - line.trim_start().len(),
                });
            }
            (Some(_), Some(done)) => blocks.push(done),
            (None, Some(mut block)) => {
                let margin = line.bytes().take(block.indent).take_while(|byte| *byte == b' ').count();
                block.text.push_str(&line[margin..]);
                block.text.push('\n');
                open = Some(block);
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "{page}: a block is not closed");
    blocks
}

/// Returns the page without its blocks.
fn prose(text: &str) -> String {
    let mut inside = false;
    let mut kept = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            inside = !inside;
        } else if !inside {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

/// Returns the anchors that forges make of the headings of a page.
fn anchors(text: &str) -> BTreeSet<String> {
    let slug = |heading: &str| {
        let letters = heading.trim().to_lowercase();
        let kept = letters.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    let headings = prose(text);
    headings
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| slug(line.trim_start_matches('#')))
        .collect()
}

/// Parses `json` as the message `name`, as strictly as the daemon does. `None` if there is no such
/// message.
fn parse_message(name: &str, json: &str) -> Option<Result<(), serde_json::Error>> {
    macro_rules! among {
        ($($message:ident)+) => {
            match name {
                $(stringify!($message) => serde_json::from_str::<pb::$message>(json).map(|_| ()),)+
                _ => return None,
            }
        };
    }
    Some(among! {
        CreateVmRequest CreateVmResponse DeleteVmRequest DeleteVmResponse BootVmRequest BootVmResponse
        ShutdownVmRequest ShutdownVmResponse PauseVmRequest PauseVmResponse ResumeVmRequest ResumeVmResponse
        RebootVmRequest RebootVmResponse UpdateVmRequest UpdateVmResponse GetVmInfoRequest GetVmInfoResponse ListVmsRequest ListVmsResponse
        ValidateVmRequest ValidateVmResponse ListBackendsRequest ListBackendsResponse WaitVmRequest WatchVmsRequest
        ListVmEventsRequest StreamConsoleRequest WriteConsoleRequest
    })
}

fn pool() -> DescriptorPool {
    DescriptorPool::decode(vmm_proto::FILE_DESCRIPTOR_SET).unwrap()
}

/// Collects the names of a message's fields and of the fields of the messages in it.
fn fields_below(pool: &DescriptorPool, message: &MessageDescriptor, into: &mut BTreeSet<String>) {
    for field in message.fields() {
        into.insert(field.name().to_owned());
        if let FieldKind::Singular(SingularKind::Message(index))
        | FieldKind::List(SingularKind::Message(index)) = field.kind()
        {
            fields_below(pool, pool.message(index), into);
        }
    }
}

fn backends() -> Vec<Box<dyn Backend>> {
    vec![
        Box::new(CloudHypervisorBackend::new("cloud-hypervisor")),
        Box::new(FirecrackerBackend::new("firecracker")),
        Box::new(QemuBackend::new(QemuOptions { kvm: KvmMode::Off, ..QemuOptions::default() })),
    ]
}

#[test]
fn every_json_block_parses_as_its_message() {
    for (page, text) in pages() {
        for block in blocks(&page, &text).iter().filter(|block| block.language == "json") {
            let _: Value = serde_json::from_str(&block.text)
                .unwrap_or_else(|error| panic!("{}: {error}", block.location));
            let name = block.about.split(' ').next().unwrap();
            if let Some(Err(error)) = parse_message(name, &block.text) {
                panic!("{}: not a {name}: {error}", block.location);
            }
            let ours = [CONFIGURATION, REFERENCE].contains(&page.as_str());
            assert!(!ours || !name.is_empty(), "{}: say which message this is", block.location);
        }
    }
}

/// Returns the text in a shell's single quotes. `'$PWD'` or `'"$PWD"'` inside is kept as it is,
/// because only the shell knows its value.
fn single_quoted(text: &str) -> String {
    let (mut body, mut rest) = text.split_once('\'').unwrap_or((text, ""));
    let mut whole = body.to_owned();
    while rest.starts_with(['"', '$'])
        && let Some((spliced, after)) = rest.split_once('\'')
    {
        whole.push_str(spliced.trim_matches('"'));
        (body, rest) = after.split_once('\'').unwrap_or((after, ""));
        whole.push_str(body);
    }
    whole
}

#[test]
fn the_body_of_every_curl_call_is_a_request_of_its_method() {
    let mut calls = 0;
    for (page, text) in pages() {
        for block in blocks(&page, &text).iter().filter(|block| block.language == "bash") {
            for call in block.text.split("curl ").skip(1) {
                let Some((_, rest)) = call.split_once("/vmm.v1.VmService/") else { continue };
                let method: String = rest.chars().take_while(char::is_ascii_alphanumeric).collect();
                let body = rest.split_once("-d '").or_else(|| rest.split_once("'message="));
                let Some(body) = body.map(|(_, body)| single_quoted(body)) else { continue };
                let parsed = parse_message(&format!("{method}Request"), &body);
                let parsed = parsed.unwrap_or_else(|| panic!("{}: there is no {method}", block.location));
                parsed.unwrap_or_else(|error| panic!("{}: {method}: {error}", block.location));
                calls += 1;
            }
        }
    }
    assert!(calls > 10, "only {calls} calls were found: the search has gone blind");
}

/// Returns the configuration of an example in the form of the domain, with the values that the
/// service fills in.
fn domain_config(block: &Block) -> (String, VmConfig) {
    let request: pb::CreateVmRequest = serde_json::from_str(&block.text).unwrap();
    let mode =
        request.config.as_option().unwrap().restart_policy.as_option().map(|policy| policy.mode.to_i32());
    let mut json: Value = serde_json::from_str(&block.text).unwrap();
    let config = &mut json["config"];
    if let Some(mode) = mode {
        config["restart_policy"]["mode"] = mode.into();
    }
    let mut config: VmConfig =
        serde_json::from_value(config.take()).unwrap_or_else(|error| panic!("{}: {error}", block.location));
    for (index, nic) in config.network.iter_mut().enumerate().filter(|(_, nic)| nic.mac_address.is_empty()) {
        nic.mac_address = format!("02:00:00:00:ff:{index:02x}");
    }
    if block.about.ends_with(" no-kernel") {
        config.boot.get_or_insert_default().kernel_path = "/default/kernel".to_owned();
    }
    (request.backend, config)
}

#[test]
fn every_example_of_a_configuration_is_accepted_by_its_backend() {
    let text = read(CONFIGURATION);
    let examples = blocks(CONFIGURATION, &text);
    let examples = examples.iter().filter(|block| block.about.starts_with("CreateVmRequest"));
    let mut named = BTreeSet::new();
    for block in examples {
        let (name, config) = domain_config(block);
        let spec = VmSpec::parse(&config).unwrap_or_else(|report| panic!("{}: {report:?}", block.location));
        for backend in backends() {
            let its_name = backend.capabilities().name.as_str().to_owned();
            if name.is_empty() || name == its_name {
                let violations = backend.check(&spec).violations;
                assert!(violations.is_empty(), "{}: {its_name}: {violations:?}", block.location);
            }
        }
        named.insert(name);
    }
    let expected = ["", "cloudhypervisor", "firecracker", "qemu"].map(str::to_owned);
    assert_eq!(named, BTreeSet::from(expected), "an example without a backend, and one for each");
}

/// Returns the keys with a prefix that the backends' code names outside its tests.
fn prefixed_keys() -> BTreeSet<String> {
    let mut paths = Vec::new();
    files(&repository().join("crates/vmm-backends/src"), "rs", &mut paths);
    let mut keys = BTreeSet::new();
    for path in paths {
        let code = std::fs::read_to_string(path).unwrap();
        let code = code.split("#[cfg(test)]").next().unwrap();
        for word in code.split('"') {
            let rest = ["qemu.", "ch.", "fc."].iter().find_map(|prefix| word.strip_prefix(prefix));
            let is_file = [".sock", ".pid", ".log"].iter().any(|ending| word.ends_with(ending))
                || ["pid", "log", "sock"].iter().any(|name| rest == Some(*name));
            let is_key = rest.is_some_and(|rest| {
                !rest.is_empty()
                    && rest.bytes().all(|byte| byte.is_ascii_lowercase() || matches!(byte, b'_' | b'.'))
            });
            if is_key && !is_file {
                keys.insert(word.to_owned());
            }
        }
    }
    keys
}

#[test]
fn every_key_and_every_field_of_a_configuration_is_documented() {
    let text = prose(&read(CONFIGURATION));
    let prefixed = prefixed_keys();
    assert!(prefixed.contains("qemu.machine"), "the search has gone blind: {prefixed:?}");
    let plain = [CPU_KEYS, BACKING_KEYS, BOOT_KEYS, DISK_KEYS, NIC_KEYS].concat();
    let keys = plain.into_iter().map(str::to_owned).chain(prefixed);
    // The key must have a row of a table, because a row has its values and the behaviour of each backend.
    let missing: Vec<_> = keys.filter(|key| !text.contains(&format!("\n| `{key}` |"))).collect();
    assert!(missing.is_empty(), "{CONFIGURATION} has no row for {missing:?}");

    let pool = pool();
    let mut fields = BTreeSet::new();
    fields_below(&pool, pool.message_by_name("vmm.v1.VmConfig").unwrap(), &mut fields);
    let missing: Vec<_> = fields.iter().filter(|field| !text.contains(&format!("`{field}`"))).collect();
    assert!(missing.is_empty(), "{CONFIGURATION} does not name {missing:?}");
    for mode in ["NEVER", "GUEST_REBOOT", "ON_FAILURE", "ALWAYS"] {
        assert!(text.contains(&format!("| `RESTART_MODE_{mode}` |")), "{mode}");
    }
}

#[test]
fn every_method_has_a_chapter_with_its_fields() {
    let text = read(REFERENCE);
    let pool = pool();
    let service = pool.services().iter().find(|service| service.full_name() == "vmm.v1.VmService").unwrap();
    assert!(service.methods().len() >= 16);
    for method in service.methods() {
        let chapter = text
            .split_once(&format!("## {}\n", method.name()))
            .unwrap_or_else(|| panic!("{REFERENCE} has no chapter for {}", method.name()));
        let chapter = chapter.1.split("\n#").next().unwrap();
        for message in [method.input(), method.output()].map(|index| pool.message(index)) {
            if message.full_name() == "vmm.v1.VmEvent" {
                continue;
            }
            for field in message.fields() {
                let name = format!("`{}`", field.name());
                assert!(chapter.contains(&name), "{}: {name} of {}", method.name(), message.full_name());
            }
        }
    }
}

#[test]
fn the_limits_in_the_documents_are_those_of_the_code() {
    let text = read(REFERENCE);
    let block =
        blocks(REFERENCE, &text).into_iter().find(|block| block.about == "ListBackendsResponse").unwrap();
    let shown: pb::ListBackendsResponse = serde_json::from_str(&block.text).unwrap();
    let backends = backends();
    for shown in &shown.backends {
        let real = backends.iter().find(|it| it.capabilities().name.as_str() == shown.name).unwrap();
        let limits = real.capabilities().limits.iter().map(|(name, limit)| ((*name).to_owned(), *limit));
        assert_eq!(shown.limits, limits.collect(), "{}", shown.name);
    }
    let limit = |backend: usize, name: &str| backends[backend].capabilities().limits[name];
    let configuration = read(CONFIGURATION);
    let rows = [
        format!(
            "| most disks | {} with interfaces | {} with interfaces | {} | {} with interfaces |",
            limit(0, "max-devices"),
            limit(1, "max-devices"),
            limit(2, "max-disks"),
            limit(2, "max-microvm-devices"),
        ),
        format!(
            "| `vcpu_count`, most | {} | {} | {} | {} |",
            limit(0, "max-vcpus"),
            limit(1, "max-vcpus"),
            limit(2, "max-vcpus"),
            limit(2, "max-vcpus"),
        ),
    ];
    for row in rows {
        assert!(configuration.contains(&row), "{CONFIGURATION} should say {row}");
    }
}

#[test]
fn every_relative_link_has_a_target() {
    let root = repository();
    let mut broken = Vec::new();
    for (page, text) in pages() {
        let folder = root.join(&page).parent().unwrap().to_owned();
        for link in
            prose(&text).split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link)
        {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { root.join(&page) } else { folder.join(path) };
            let found = target.exists()
                && (anchor.is_empty()
                    || std::fs::read_to_string(&target).is_ok_and(|text| anchors(&text).contains(anchor)));
            if !found {
                broken.push(format!("{page}: {link}"));
            }
        }
    }
    assert!(broken.is_empty(), "links that lead nowhere: {broken:#?}");
}

#[test]
fn every_excerpt_is_in_the_file_named_above_it() {
    for (page, text) in pages() {
        let blocks = blocks(&page, &text);
        let excerpts: Vec<_> =
            blocks.iter().filter(|block| block.language == "rust" && !block.about.is_empty()).collect();
        for block in &excerpts {
            let code = read(&block.about);
            assert!(code.contains(&block.text), "{}: {} no longer has this", block.location, block.about);
        }
        let developers = page == NEW_BACKEND;
        assert!(!developers || excerpts.len() > 5, "{page}: the search has gone blind");
    }
}

/// Returns the paths that a page cites in code marks: those that begin with a folder of the repository.
fn cited(text: &str) -> Vec<String> {
    let folders = ["clients/", "crates/", "docs/", "fuzz/", "guests/", "packaging/", "proto/", "scripts/"];
    let words = prose(text);
    let cited = words.split('`').skip(1).step_by(2).map(|word| word.split("::").next().unwrap());
    // A crate is also cited without the folder `crates`.
    let cited =
        cited.map(|word| if word.starts_with("vmm-") { format!("crates/{word}") } else { word.into() });
    cited
        .filter(|word: &String| folders.iter().any(|folder| word.starts_with(folder)))
        .filter(|word| word.matches('/').count() > 1 || !word.starts_with("crates/"))
        // Placeholders, and the packages of generated Go code, which are not in the repository.
        .filter(|word| !word.contains([' ', '<', '*', '…', '=']) && !word.contains("/gen/"))
        .collect()
}

#[test]
fn every_path_that_a_page_cites_exists() {
    let mut count = 0;
    let mut missing = Vec::new();
    for (page, text) in pages() {
        for path in cited(&text) {
            count += 1;
            if !repository().join(&path).exists() {
                missing.push(format!("{page}: {path}"));
            }
        }
    }
    assert!(count > 300, "only {count} paths were found: the search has gone blind");
    assert!(missing.is_empty(), "pages cite what does not exist: {missing:#?}");
}

/// Returns the crate, the target and the filter of a call of `cargo test` in code marks.
fn cargo_test(code: &str) -> Option<(&str, &str, &str)> {
    let (crate_name, rest) = code.split_once("cargo test -p ")?.1.split_once(" --test ")?;
    let mut words = rest.split(' ').filter(|word| !word.starts_with('-'));
    Some((crate_name, words.next()?, words.next().unwrap_or_default().trim_matches('"')))
}

#[test]
fn every_cargo_test_command_names_an_existing_target_and_test() {
    let mut code = String::new();
    let mut paths = Vec::new();
    files(&repository().join("crates"), "rs", &mut paths);
    for path in paths {
        code.push_str(&std::fs::read_to_string(path).unwrap());
    }
    let mut calls = 0;
    for (page, text) in pages() {
        let words = prose(&text);
        for (crate_name, target, filter) in words.split('`').skip(1).step_by(2).filter_map(cargo_test) {
            let tests = repository().join("crates").join(crate_name).join("tests");
            let exists =
                tests.join(format!("{target}.rs")).exists() || tests.join(target).join("main.rs").exists();
            assert!(exists, "{page}: {crate_name} has no test target {target}");
            for name in filter.split("::").filter(|name| !name.is_empty()) {
                assert!(code.contains(name), "{page}: there is no test {name} in {crate_name}");
            }
            calls += 1;
        }
    }
    assert!(calls >= 5, "only {calls} calls were found: the search has gone blind");
}

#[test]
fn every_page_begins_with_its_readers() {
    for (page, text) in pages() {
        let exempt = page.starts_with("docs/adr/") || page == "README.md";
        let first = text.split("\n\n").nth(1).unwrap_or_default();
        assert!(exempt || first.starts_with("For "), "{page}: the first paragraph says for whom the page is");
    }
}
