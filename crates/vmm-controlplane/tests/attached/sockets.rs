//! Endpoints that must not, or cannot, be used: each says why, and none stops the daemon.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::os::unix::net::UnixListener;

use vmm_testkit::by_hand::{ByHandProgram, ByHandVmm};
use vmm_testkit::guests::TinyGuest;

use crate::bench::{Bench, WAITING, able, endpoint};
use crate::harness::{pause, skipped};

/// Why the backend cannot serve, with the daemon running all the same.
fn reason(bench: &mut Bench) -> String {
    bench.world.start();
    let shown = bench.until_available(false);
    assert!(bench.vms().is_empty(), "nothing is imported");
    assert_eq!(bench.world.get("/_/health").status, 503);
    shown["reason"].as_str().unwrap().to_owned()
}

#[test]
fn the_hypervisor_behind_a_wrong_socket_is_named() {
    let kinds = able("the_hypervisor_behind_a_wrong_socket_is_named", &ByHandProgram::ALL);
    for there in &kinds {
        for expected in kinds.iter().filter(|kind| *kind != there) {
            let mut bench = Bench::new(*expected);
            let mut vmm = ByHandVmm::runs(*there, &bench.socket, &bench.guest(TinyGuest::Idle));
            let reason = reason(&mut bench);
            let (name, variable) = match there {
                ByHandProgram::CloudHypervisor => ("Cloud Hypervisor", "UNKEY_VMCP_CH_ENDPOINT"),
                ByHandProgram::Firecracker => ("Firecracker", "UNKEY_VMCP_FC_ENDPOINT"),
                ByHandProgram::Qemu => ("QEMU", "UNKEY_VMCP_QEMU_ENDPOINT"),
            };
            assert!(reason.contains(&format!("but {name}")) && reason.contains(variable), "{reason}");
            assert!(vmm.is_alive());
        }
    }
}

#[test]
fn an_endpoint_that_is_a_symbolic_link_is_refused() {
    for kind in able("an_endpoint_that_is_a_symbolic_link_is_refused", &[ByHandProgram::Firecracker]) {
        let mut bench = Bench::new(kind);
        let real = bench.world.dir.path().join("real.sock");
        let _vmm = ByHandVmm::waits(kind, &real);
        symlink(&real, &bench.socket).unwrap();
        let reason = reason(&mut bench);
        assert!(reason.contains("symbolic link"), "{reason}");
        // CreateVm reserves; BootVm says why not.
        bench.world.create("vm", &bench.world.tiny(TinyGuest::Idle));
        assert!(bench.op("BootVm", "vm").error("failed_precondition").contains("symbolic link"));
    }
}

#[test]
fn a_socket_of_another_user_is_refused_with_every_mode() {
    if !rustix::process::geteuid().is_root() {
        return skipped(
            "a_socket_of_another_user_is_refused_with_every_mode",
            "only root can give a file to another user",
        );
    }
    for kind in able("a_socket_of_another_user_is_refused_with_every_mode", &[ByHandProgram::CloudHypervisor])
    {
        let mut bench = Bench::new(kind);
        let vmm = bench.runs(TinyGuest::Idle);
        chown(&bench.socket, Some(12_345), None).unwrap();
        std::fs::set_permissions(&bench.socket, std::fs::Permissions::from_mode(0o700)).unwrap();
        let reason = reason(&mut bench);
        assert!(reason.contains("uid 12345") && reason.contains("daemon's user"), "{reason}");
        // What the message advises helps, without a restart.
        chown(&bench.socket, Some(0), None).unwrap();
        let vm = bench.the_vm();
        bench.op("PauseVm", &vm).ok();
        drop(vmm);
    }
}

/// Counts the descriptors of `daemon` that are pidfds of `vmm`.
fn pidfds(daemon: u32, vmm: u32) -> usize {
    let wanted = format!("Pid:\t{vmm}");
    let infos = std::fs::read_dir(format!("/proc/{daemon}/fdinfo")).unwrap().flatten();
    let infos = infos.filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    infos.filter(|info| info.lines().any(|line| line == wanted)).count()
}

#[test]
fn the_scanner_of_an_idle_vmm_leaks_no_descriptors() {
    for kind in able("the_scanner_of_an_idle_vmm_leaks_no_descriptors", &WAITING) {
        let mut bench = Bench::new(kind);
        let vmm = bench.waits();
        bench.world.start();
        bench.until_available(true);
        let folder = bench.socket.parent().unwrap().to_path_buf();
        // Twenty intervals of a second, and a thousand files that come and go beside the socket.
        for number in 0..1_000 {
            let file = folder.join(format!("neighbour-{number}"));
            std::fs::write(&file, "").unwrap();
            std::fs::remove_file(&file).unwrap();
            pause();
        }
        // One look may be under way.
        let held = pidfds(bench.world.pid(), vmm.pid());
        assert!(held <= 2, "{}: {held} descriptors", kind.backend());
    }
}

/// Answers every request with `body`, as an old VMM would the first one.
fn answers_with(socket: &std::path::Path, body: &'static str) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                while stream.read(&mut request).is_ok_and(|count| count > 0) {
                    let answer = format!("HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{body}", body.len());
                    if stream.write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

#[test]
fn a_too_old_vmm_is_reported_with_the_needed_version() {
    for (kind, body, needed) in [
        (ByHandProgram::CloudHypervisor, r#"{"version":"40.0.0","build_version":"v40.0","pid":1}"#, "51.0.0"),
        (
            ByHandProgram::Firecracker,
            r#"{"id":"x","state":"Not started","vmm_version":"1.2.0","app_name":"Firecracker"}"#,
            "1.14.0",
        ),
    ] {
        let mut bench = Bench::new(kind);
        answers_with(&bench.socket, body);
        let reason = reason(&mut bench);
        assert!(reason.contains(needed) && reason.contains("oldest that can be used"), "{reason}");
    }
}

#[test]
fn a_missing_path_and_a_path_that_is_no_socket_are_reported() {
    let mut bench = Bench::new(ByHandProgram::CloudHypervisor);
    std::fs::write(&bench.socket, "").unwrap();
    assert!(reason(&mut bench).contains("is not a socket"));
    let mut bench = Bench::new(ByHandProgram::CloudHypervisor);
    let said = reason(&mut bench);
    assert!(said.contains(&format!("no Cloud Hypervisor listens on {}", endpoint(&bench.socket))), "{said}");
    assert!(said.contains("cloud-hypervisor --api-socket path="), "{said}");
}

#[test]
fn endpoints_that_name_one_socket_stop_the_start() {
    for same_kind in [true, false] {
        let mut bench = Bench::new(ByHandProgram::CloudHypervisor);
        let folder = bench.world.dir.path().join("folder");
        symlink(bench.world.dir.path(), &folder).unwrap();
        let other = endpoint(&folder.join("vmm.sock"));
        if same_kind {
            let both = format!("{},{other}", endpoint(&bench.socket));
            bench.world.set_env(ByHandProgram::CloudHypervisor.variable(), Some(&both));
        } else {
            bench.world.set_env(ByHandProgram::Firecracker.variable(), Some(&other));
        }
        let log = bench.world.try_start().expect_err("one socket serves one VM").join("\n");
        assert!(log.contains("is the same socket as"), "{log}");
    }
}

#[test]
fn the_error_for_a_malformed_endpoint_is_the_documented_text() {
    for (kind, text, words) in [
        (ByHandProgram::CloudHypervisor, "tcp://127.0.0.1:1", "cloud hypervisor endpoint is required"),
        (ByHandProgram::Firecracker, "unix://relative", "firecracker endpoint is required"),
        (ByHandProgram::Qemu, "unix://", "qemu endpoint is required"),
    ] {
        let mut bench = Bench::new(kind);
        bench.world.set_env(kind.variable(), Some(text));
        let log = bench.world.try_start().expect_err("it is malformed").join("\n");
        assert!(log.contains(words) && log.contains(kind.variable()), "{log}");
    }
}

#[test]
fn one_failed_endpoint_of_two_is_reported() {
    for kind in able("one_failed_endpoint_of_two_is_reported", &[ByHandProgram::Firecracker]) {
        let mut bench = Bench::new(kind);
        let both = format!("{},unix:///nowhere/vmm.sock", endpoint(&bench.socket));
        bench.world.set_env(kind.variable(), Some(&both));
        let _vmm = bench.waits();
        bench.world.start();
        let shown = bench.backend();
        assert_eq!(shown["available"], true, "{shown}");
        assert!(shown["reason"].as_str().unwrap().contains("unix:///nowhere/vmm.sock"), "{shown}");
    }
}
