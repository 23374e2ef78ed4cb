use std::path::Path;
use std::process::Command;

use rustix::thread::CapabilitySet;
use uuid::Uuid;
use vmm_testkit::skip::skipped;

use super::*;

fn owner() -> TapOwner {
    TapOwner { instance: InstanceId::new(Uuid::now_v7()), uid: VmUid::new(Uuid::now_v7()) }
}

/// An interface name for one test. Dropping it removes an interface with this name.
struct Name(String);

impl Name {
    /// Returns `None` and prints the reason where this process may not make interfaces.
    fn new() -> Option<Self> {
        let random = Uuid::now_v7().as_u64_pair().1;
        let name = Self(format!("vmh{:x}", random & 0xfff_ffff_ffff));
        if ip(&["tuntap", "add", &name.0, "mode", "tap"]) && ip(&["link", "delete", &name.0]) {
            return Some(name);
        }
        skipped("TAPs of the host", "making them takes CAP_NET_ADMIN, /dev/net/tun and ip");
        None
    }

    fn exists(&self) -> bool {
        Path::new("/sys/class/net").join(&self.0).exists()
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(Path::new("/sys/class/net").join(&self.0).join(file)).unwrap()
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if self.exists() {
            ip(&["link", "delete", &self.0]);
        }
    }
}

fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).output().is_ok_and(|done| done.status.success())
}

#[test]
fn only_labels_of_this_program_are_read_back() {
    let owner = owner();
    let label = owner.to_string();
    assert!(label.len() < 256, "the kernel takes no longer alias");
    assert_eq!(label.parse(), Ok(owner));
    for foreign in ["", "uplink", LABEL, &label[1..], &format!("{label} "), &label.replace("vm ", "vm x")] {
        assert_eq!(foreign.parse::<TapOwner>(), Err(ForeignLabel), "{foreign:?}");
    }
}

#[tokio::test]
async fn a_tap_is_created_labelled_brought_up_and_removed() {
    let Some(name) = Name::new() else { return };
    let owner = owner();
    assert_eq!(HostTaps.provide(&name.0, TapNameOrigin::Program, owner).await.unwrap(), TapOrigin::Made);
    assert!(is_tap(&name.0) && !is_multi_queue(&name.0));
    assert_eq!(name.read("ifalias").trim(), owner.to_string());
    assert!(is_up(&name));
    // The kernel reports the end of the attachment some time after the descriptor is closed.
    for _ in 0..1000 {
        let [tap] = &HostTaps.of_instance(owner.instance).await.unwrap()[..] else {
            panic!("one TAP belongs to the instance")
        };
        assert_eq!((&tap.name, tap.owner), (&name.0, owner));
        if !tap.attached {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let idle = OwnedTap { name: name.0.clone(), owner, attached: false };
    assert_eq!(HostTaps.of_instance(owner.instance).await.unwrap(), [idle]);
    assert_eq!(HostTaps.provide(&name.0, TapNameOrigin::Program, owner).await.unwrap(), TapOrigin::Found);

    assert!(HostTaps.remove(&name.0, owner).await.unwrap());
    assert!(!name.exists());
    assert!(!HostTaps.remove(&name.0, owner).await.unwrap(), "harmless when repeated");
    assert_eq!(HostTaps.of_instance(owner.instance).await.unwrap(), []);
}

#[tokio::test]
async fn a_crash_leaves_no_tap_or_a_labelled_tap() {
    let Some(name) = Name::new() else { return };
    let tap = Tap::create_named(Interface::new(&name.0).unwrap()).unwrap();
    assert!(name.exists());
    drop(tap);
    assert!(!name.exists(), "a TAP that was not kept goes with its maker");
}

#[tokio::test]
async fn an_existing_tap_is_used_and_kept() {
    let Some(name) = Name::new() else { return };
    assert!(ip(&["tuntap", "add", &name.0, "mode", "tap"]));
    for alias in ["", "uplink of the database", &owner().to_string()] {
        assert!(ip(&["link", "set", &name.0, "alias", alias]));
        let owner = owner();
        assert_eq!(HostTaps.provide(&name.0, TapNameOrigin::Client, owner).await.unwrap(), TapOrigin::Found);
        assert_eq!(name.read("ifalias").trim(), alias, "no foreign label is changed");
        assert!(!HostTaps.remove(&name.0, owner).await.unwrap());
        assert!(name.exists());
        let error = HostTaps.provide(&name.0, TapNameOrigin::Program, owner).await.unwrap_err();
        assert!(matches!(error, TapError::NotOurs(_)), "{error}");
    }
}

fn is_up(name: &Name) -> bool {
    let flags = u32::from_str_radix(name.read("flags").trim().trim_start_matches("0x"), 16).unwrap();
    flags & 1 == 1
}

#[tokio::test]
async fn a_tap_that_is_down_is_brought_up() {
    let Some(name) = Name::new() else { return };
    assert!(ip(&["tuntap", "add", &name.0, "mode", "tap"]));
    assert!(!is_up(&name));
    assert_eq!(HostTaps.provide(&name.0, TapNameOrigin::Client, owner()).await.unwrap(), TapOrigin::Found);
    assert!(is_up(&name));
}

#[tokio::test]
async fn a_tap_is_removed_with_the_last_vm_that_used_it() {
    let Some(name) = Name::new() else { return };
    let first = owner();
    let second = TapOwner { uid: VmUid::new(Uuid::now_v7()), ..first };
    HostTaps.provide(&name.0, TapNameOrigin::Client, first).await.unwrap();
    assert_eq!(HostTaps.provide(&name.0, TapNameOrigin::Client, second).await.unwrap(), TapOrigin::Found);
    assert!(!HostTaps.remove(&name.0, first).await.unwrap());
    assert!(name.exists());
    assert!(HostTaps.remove(&name.0, second).await.unwrap());
}

#[tokio::test]
async fn a_tap_that_no_vmm_can_open_is_refused() {
    let Some(name) = Name::new() else { return };
    let refusal = async |name: &str| {
        let error = HostTaps.provide(name, TapNameOrigin::Client, owner()).await.unwrap_err().to_string();
        // What CreateVm warns of is what BootVm would meet.
        if HostTaps.exists(name) {
            assert_eq!(HostTaps.may_use(name).unwrap_err().to_string(), error);
        }
        error
    };
    assert!(refusal("lo").await.contains("lo exists and is not a TAP"));
    assert!(ip(&["tuntap", "add", &name.0, "mode", "tun"]));
    assert!(refusal(&name.0).await.contains("is not a TAP"));
    assert!(ip(&["link", "delete", &name.0]));
    assert!(ip(&["tuntap", "add", &name.0, "mode", "tap", "multi_queue"]));
    assert!(refusal(&name.0).await.contains("several queues"));
    assert!(name.exists());
    for bad in ["vmh%d", "..", "a/b", ""] {
        assert!(refusal(bad).await.contains("not a name"), "{bad}");
    }
}

#[test]
fn a_tap_error_says_what_to_do() {
    let error = |code| io::Error::from_raw_os_error(code);
    for code in [nix::libc::EPERM, nix::libc::EACCES] {
        let denied = explain("tap0", error(code), Ok(())).to_string();
        assert!(denied.contains("CAP_NET_ADMIN") && denied.contains("beforehand"), "{denied}");
    }
    // The device decides where it cannot be opened, whatever the error is.
    let fault = DeviceFault { finding: "/dev/net/tun is shut".to_owned(), remedy: "open it".to_owned() };
    for code in [nix::libc::ENOENT, nix::libc::EACCES] {
        let text = explain("tap0", error(code), Err(fault.clone())).to_string();
        assert!(text.ends_with("because /dev/net/tun is shut; open it"), "{text}");
    }
    assert!(explain("tap0", error(nix::libc::EINVAL), Ok(())).to_string().contains("could not be made"));
}

/// Runs `work` on a thread that may not change the network. Threads that it starts may not either.
fn without_net_admin<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        let mut mine = rustix::thread::capabilities(None).unwrap();
        for set in [&mut mine.effective, &mut mine.permitted, &mut mine.inheritable] {
            set.remove(CapabilitySet::NET_ADMIN);
        }
        rustix::thread::set_capabilities(None, mine).unwrap();
        work()
    });
    thread.join().unwrap()
}

#[test]
fn existing_taps_work_without_cap_net_admin() {
    let Some(name) = Name::new() else { return };
    let wanted = name.0.clone();
    let provide = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(HostTaps.provide(&wanted, TapNameOrigin::Client, owner()))
    };
    let error = without_net_admin(provide.clone()).unwrap_err();
    assert!(matches!(error, TapError::Denied(_)), "{error}");
    assert!(!name.exists());
    // What CreateVm warns of is what BootVm would meet.
    let wanted = name.0.clone();
    let reported = without_net_admin(move || HostTaps.may_make(&wanted)).unwrap_err();
    assert_eq!(reported.to_string(), error.to_string());
    assert!(HostTaps.may_make(&name.0).is_ok());
    assert!(ip(&["tuntap", "add", &name.0, "mode", "tap"]));
    assert_eq!(without_net_admin(provide.clone()).unwrap(), TapOrigin::FoundDown);
    assert!(ip(&["link", "set", &name.0, "up"]));
    assert_eq!(without_net_admin(provide).unwrap(), TapOrigin::Found);
}
