//! Reads `RUST_LOG`. A directive that cannot have been meant is ignored and reported, because
//! [`EnvFilter`] takes each unknown word for the name of a module, so that one typing error would
//! silence the whole log.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::Directive;

/// The level if `RUST_LOG` is unset, empty or has a directive that is not valid.
const DEFAULT: &str = "info";
/// The levels of `RUST_LOG`.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// The crates of this program, whose names may stand without a level.
const CRATES: [&str; 8] = [
    "vmm_backends",
    "vmm_controlplane",
    "vmm_core",
    "vmm_host",
    "vmm_libvirt_wire",
    "vmm_proto",
    "vmm_service",
    "vmm_store",
];

/// Returns the filter that `text` asks for, and the error of each directive that was ignored.
/// If one was ignored, the default level applies unless another directive gives a level for all.
pub(super) fn read(text: &str) -> (EnvFilter, Vec<String>) {
    if text.trim().is_empty() {
        return (EnvFilter::new(DEFAULT), Vec::new());
    }
    // A directive with a span has a syntax of its own, which the filter checks.
    if text.contains('[') {
        return match EnvFilter::try_new(text) {
            Ok(filter) => (filter, Vec::new()),
            Err(error) => (EnvFilter::new(DEFAULT), vec![error.to_string()]),
        };
    }
    let (mut kept, mut errors) = (Vec::new(), Vec::new());
    for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        match check(word) {
            Ok(()) => kept.push(word),
            Err(error) => errors.push(error),
        }
    }
    if !errors.is_empty() && !kept.iter().any(|word| is_level(word)) {
        kept.push(DEFAULT);
    }
    (EnvFilter::new(kept.join(",")), errors)
}

/// Returns the error of a directive that cannot have been meant.
fn check(word: &str) -> Result<(), String> {
    let (target, level) = word.split_once('=').map_or((word, None), |(target, level)| (target, Some(level)));
    if target.contains('-') {
        return Err(format!(
            "\"{word}\": the name of a module has no hyphen; write {}",
            word.replace('-', "_")
        ));
    }
    let crate_name = target.split("::").next().unwrap_or(target);
    if level.is_none() && !is_level(word) && !CRATES.contains(&crate_name) {
        return Err(format!(
            "\"{word}\" is no level (one of {}); for a module of another crate write {word}=debug",
            LEVELS.join(", ")
        ));
    }
    word.parse::<Directive>().map(|_| ()).map_err(|error| format!("\"{word}\": {error}"))
}

fn is_level(word: &str) -> bool {
    LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the directives of the filter in the order of the alphabet, and the number of ignored
    /// directives.
    fn of(text: &str) -> (String, usize) {
        let (filter, errors) = read(text);
        let text = filter.to_string();
        let mut parts: Vec<&str> = text.split(',').collect();
        parts.sort_unstable();
        (parts.join(","), errors.len())
    }

    #[test]
    fn an_unknown_log_level_leaves_the_default_level() {
        for text in ["infoo", "warning", "3", "vmm-service=debug", "hyper", "vmm_service=loud"] {
            assert_eq!(of(text), ("info".to_owned(), 1), "{text}");
        }
        assert_eq!(of("infoo,vmm_service=debug"), ("info,vmm_service=debug".to_owned(), 1));
        assert_eq!(of("warn,vmm-service=debug"), ("warn".to_owned(), 1));
    }

    #[test]
    fn a_valid_filter_is_used_unchanged() {
        assert_eq!(of(""), ("info".to_owned(), 0));
        assert_eq!(of("WARN"), ("warn".to_owned(), 0));
        assert_eq!(of("info, vmm_service=debug,"), ("info,vmm_service=debug".to_owned(), 0));
        assert_eq!(of("vmm_service"), ("vmm_service=trace".to_owned(), 0));
        assert_eq!(of("hyper=debug"), ("hyper=debug".to_owned(), 0));
        assert_eq!(of("vmm_service[vm{vm_id=a}]=debug").1, 0);
    }

    #[test]
    fn the_error_for_a_target_with_a_hyphen_has_the_corrected_target() {
        let (_, errors) = read("info,vmm-service=debug");
        assert!(errors[0].ends_with("write vmm_service=debug"), "{errors:?}");
    }
}
