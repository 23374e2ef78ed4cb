//! Finds the helper's program, and explains its failures.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use vmm_core::backend::BackendErrorKind;
use vmm_host::path::find_program;
use vmm_libvirt_wire::{CallFailure, CallFailureKind};

use super::link::LinkDown;
use crate::sanitize;

/// The program's name.
pub const PROGRAM: &str = "vmm-libvirt-helper";
/// The folder into which packages install the helper, relative to the daemon's folder.
const LIBEXEC: &str = "../libexec/vmm-controlplane";

/// Finds the helper: at `wanted` if it is an absolute path, or else beside the daemon, in the
/// packages' folder, or on PATH.
pub(super) fn find(wanted: &Path) -> Result<PathBuf, LinkDown> {
    let path = std::env::var_os("PATH");
    let found = if wanted.is_absolute() {
        find_program(wanted, None)
    } else {
        let own = std::env::current_exe().ok();
        let own = own.as_deref().and_then(Path::parent);
        helper_beside(wanted, own).map_or_else(|| find_program(wanted, path.as_deref()), Ok)
    };
    found.map_err(|problem| LinkDown {
        kind: BackendErrorKind::NotInstalled,
        message: format!(
            "the libvirt helper is missing: {problem}. The helper belongs beside vmm-controlplane; \
             `make libvirt-helper` builds it, with the Debian packages libvirt-dev and pkg-config"
        ),
    })
}

fn helper_beside(wanted: &Path, own: Option<&Path>) -> Option<PathBuf> {
    let own = own?;
    [own.to_path_buf(), own.join(LIBEXEC)]
        .iter()
        .find_map(|folder| find_program(folder.join(wanted), None).ok())
}

/// Explains the end of a helper that wrote no reason to its stdout. `exit` is its exit status, and
/// `said` the end of its stderr.
pub(super) fn helper_exit_error(exit: &str, said: &str) -> LinkDown {
    let said = sanitize::sentence(said.trim());
    if said.contains("libvirt") && said.contains("shared librar") {
        return LinkDown {
            kind: BackendErrorKind::NotInstalled,
            message: format!(
                "the library libvirt is missing: install it (Debian and Ubuntu: the package libvirt0); {PROGRAM} says: {said}"
            ),
        };
    }
    let said = if said.is_empty() { String::new() } else { format!("; it says: {said}") };
    LinkDown { kind: BackendErrorKind::Unreachable, message: format!("{PROGRAM} ended ({exit}){said}") }
}

/// Returns an error if the user of the daemon can have no libvirtd at `uri`.
pub(super) fn missing_libvirtd(uri: &str, is_root: bool) -> Option<LinkDown> {
    // A libvirtd that root starts is the system's, and another user's libvirtd runs QEMU as that
    // user.
    (is_root && is_session(uri)).then(|| LinkDown {
        kind: BackendErrorKind::Host,
        message: format!(
            "{uri} is the libvirtd of one user, and root has none of that kind: set UNKEY_VMCP_QEMU_ENDPOINT to qemu:///system, or \
             run the daemon as the user whose libvirtd is meant"
        ),
    })
}

/// Explains the failure to reach libvirt at `uri`.
pub(super) fn unreachable(uri: &str, failure: &CallFailure) -> LinkDown {
    let said = sanitize::sentence(&failure.message);
    let lower = said.to_lowercase();
    // libvirt reports these causes by text only. The advice depends on them, but the error's kind
    // stays usable if a later version changes the text.
    let is_missing =
        lower.contains("no such file") || lower.contains("refused") || lower.contains("unable to fork");
    let (kind, advice) = if is_session(uri) && lower.contains("directory '") {
        (
            BackendErrorKind::Host,
            "set XDG_RUNTIME_DIR, or HOME, in the daemon's environment to a folder of its user",
        )
    } else if is_session(uri) && is_missing {
        (
            BackendErrorKind::Unreachable,
            "is libvirtd installed (Debian and Ubuntu: the packages libvirt-daemon and libvirt-daemon-driver-qemu)? libvirt starts it \
             for the daemon's user, unless LIBVIRT_AUTOSTART=0 forbids that",
        )
    } else if failure.kind == CallFailureKind::Denied || lower.contains("permission denied") {
        (
            BackendErrorKind::Host,
            "let the daemon's user use libvirt: add it to the group libvirt (usermod -aG libvirt USER), and start the daemon again",
        )
    } else if lower.contains("no connection driver") {
        (
            BackendErrorKind::NotInstalled,
            "install libvirt's QEMU driver (Debian and Ubuntu: the package libvirt-daemon-driver-qemu) and restart libvirtd",
        )
    } else if is_missing {
        (
            BackendErrorKind::Unreachable,
            "is libvirtd installed (Debian and Ubuntu: the package libvirt-daemon-system) and running (systemctl start libvirtd), \
             and does UNKEY_VMCP_QEMU_ENDPOINT name its socket?",
        )
    } else if lower.contains("emulator") || lower.contains("qemu-system") {
        (BackendErrorKind::NotInstalled, "install QEMU (Debian and Ubuntu: the package qemu-system-x86)")
    } else {
        (BackendErrorKind::Unreachable, "look at libvirtd's log, and at UNKEY_VMCP_QEMU_ENDPOINT")
    };
    LinkDown { kind, message: format!("libvirt cannot be used at {uri}: {said}; {advice}") }
}

/// Returns the socket behind a URI, for people. libvirt finds it itself, from the same variables.
pub(super) fn socket_of(uri: &str, variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let query = uri.split_once('?').map(|(_, query)| query).unwrap_or_default();
    let named = query.split('&').find_map(|pair| pair.strip_prefix("socket="));
    if let Some(named) = named {
        return PathBuf::from(named);
    }
    let folder = |name: &str| variable(name).filter(|text| !text.is_empty()).map(PathBuf::from);
    let run = if is_session(uri) {
        let cache = || folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
        folder("XDG_RUNTIME_DIR").or_else(cache).unwrap_or_default()
    } else {
        PathBuf::from("/run")
    };
    run.join("libvirt/libvirt-sock")
}

/// Returns true if a URI names a user's own libvirtd, whose QEMUs always run as that user.
pub(super) fn is_session(uri: &str) -> bool {
    uri.split('?').next().is_some_and(|address| address.ends_with("/session"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_part_of_libvirt_is_named_with_its_package() {
        let refused = |kind, message: &str| {
            let failure = CallFailure { kind, message: message.to_owned() };
            unreachable("qemu:///system", &failure).message
        };
        let absent = "Failed to connect socket to '/var/run/libvirt/libvirt-sock': No such file or directory";
        let table = [
            (CallFailureKind::NoConnection, absent, "libvirt-daemon-system"),
            (
                CallFailureKind::NoConnection,
                "no connection driver available for qemu:///system",
                "libvirt-daemon-driver-qemu",
            ),
            (
                CallFailureKind::NoConnection,
                "Failed to connect socket to '/x': Permission denied",
                "group libvirt",
            ),
            (CallFailureKind::Denied, "authentication unavailable: no polkit agent", "group libvirt"),
            (CallFailureKind::Other, "could not find any emulator", "qemu-system-x86"),
        ];
        for (kind, message, advice) in table {
            let reported = refused(kind, message);
            assert!(reported.contains(advice) && reported.contains(message), "{reported}");
        }
        let failure =
            |message: &str| CallFailure { kind: CallFailureKind::NoConnection, message: message.to_owned() };
        for (message, advice) in [
            (
                "Cannot create user runtime directory '/nonexistent/.cache/libvirt': Permission denied",
                "XDG_RUNTIME_DIR",
            ),
            (absent, "libvirt-daemon-driver-qemu"),
        ] {
            let reported = unreachable("qemu:///session", &failure(message)).message;
            assert!(reported.contains(advice) && !reported.contains("group libvirt"), "{reported}");
        }
        let reported = missing_libvirtd("qemu:///session", true).unwrap().message;
        assert!(reported.contains("qemu:///system"), "{reported}");
        assert!(missing_libvirtd("qemu:///session", false).is_none());
        assert!(missing_libvirtd("qemu:///system", true).is_none());
        let loader = "error while loading shared libraries: libvirt.so.0: cannot open shared object file";
        let reported = helper_exit_error("exit status 127", loader);
        assert!(reported.message.contains("libvirt0"), "{}", reported.message);
        assert_eq!(reported.kind, BackendErrorKind::NotInstalled);
        assert!(helper_exit_error("exit status 1", "").message.ends_with("(exit status 1)"));
        let reported = find(Path::new("vmm-no-such-helper")).unwrap_err();
        assert!(reported.message.contains("make libvirt-helper"), "{}", reported.message);
        assert_eq!(reported.kind, BackendErrorKind::NotInstalled);
    }

    #[test]
    fn the_helper_is_searched_beside_the_daemon_and_in_package_paths() {
        use std::os::unix::fs::PermissionsExt as _;
        let root = tempfile::tempdir().unwrap();
        let (bin, libexec) = (root.path().join("bin"), root.path().join("libexec/vmm-controlplane"));
        let mut found = vec![helper_beside(Path::new(PROGRAM), Some(&bin))];
        for folder in [&libexec, &bin] {
            std::fs::create_dir_all(folder).unwrap();
            std::fs::create_dir_all(&bin).unwrap();
            let program = folder.join(PROGRAM);
            std::fs::write(&program, "").unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
            found.push(helper_beside(Path::new(PROGRAM), Some(&bin)));
        }
        let shown: Vec<_> = found.iter().map(|path| Some(path.as_ref()?.canonicalize().unwrap())).collect();
        let there = |folder: &Path| Some(folder.join(PROGRAM).canonicalize().unwrap());
        assert_eq!(shown, [None, there(&libexec), there(&bin)], "its own folder comes first");
    }

    #[test]
    fn libvirt_sockets_are_derived_from_uris() {
        let of = |uri, set: &[(&str, &str)]| {
            let variable = |name: &str| set.iter().find(|(set, _)| *set == name).map(|(_, text)| text.into());
            socket_of(uri, variable).display().to_string()
        };
        let socket = |uri| of(uri, &[("HOME", "/home/me"), ("XDG_RUNTIME_DIR", "/run/user/7")]);
        assert_eq!(socket("qemu:///system"), "/run/libvirt/libvirt-sock");
        assert_eq!(socket("qemu:///session"), "/run/user/7/libvirt/libvirt-sock");
        let home = ("HOME", "/home/me");
        let without = |set: &[(&str, &str)]| of("qemu:///session", set);
        assert_eq!(without(&[home, ("XDG_RUNTIME_DIR", "")]), "/home/me/.cache/libvirt/libvirt-sock");
        assert_eq!(without(&[home, ("XDG_CACHE_HOME", "/c")]), "/c/libvirt/libvirt-sock");
        assert_eq!(without(&[]), "libvirt/libvirt-sock");
        assert_eq!(socket("qemu+unix:///system?socket=/x/y"), "/x/y");
        assert_eq!(socket("qemu+unix:///session?a=b&socket=/x"), "/x");
        assert!(is_session("qemu:///session") && is_session("qemu+unix:///session?socket=/system"));
        assert!(!is_session("qemu+unix:///system?socket=/session"));
    }
}
