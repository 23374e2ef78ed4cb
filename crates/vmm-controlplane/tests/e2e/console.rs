//! StreamConsole and WriteConsole: what the guest prints, and what is typed, on each hypervisor and across every kind of end.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::sync::mpsc::Sender;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{WAIT_TIMEOUT, World, call, eventually, hypervisors, skipped};
use crate::shutdown::{NO_LINUX, linux_config};
use crate::stream::Stream;

/// A console that is streamed.
pub(crate) struct Console {
    stream: Stream,
    /// The position and the bytes so far.
    pub(crate) pieces: Vec<(u64, Vec<u8>)>,
    /// The last message of the stream.
    pub(crate) end: Option<Value>,
}

impl Console {
    /// Calls StreamConsole with `more` beside the name.
    pub(crate) fn stream(world: &World, vm_id: &str, more: &Value) -> Self {
        let (read, console) = Self::unread(world, vm_id, more);
        read.send(()).unwrap();
        console
    }

    /// Begins a stream like [`Console::stream`], and reads nothing of the answer until the sender is used.
    pub(crate) fn unread(world: &World, vm_id: &str, more: &Value) -> (Sender<()>, Self) {
        let mut request = json!({"vm_id": vm_id});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (read, stream) = world.unread_stream("StreamConsole", &request);
        (read, Self { stream, pieces: Vec::new(), end: None })
    }

    /// Returns the position behind the last byte.
    pub(crate) fn position(&self) -> u64 {
        self.pieces.last().map_or(0, |(offset, bytes)| offset + bytes.len() as u64)
    }

    /// Takes the next message, or returns false after `WAIT_TIMEOUT`.
    pub(crate) fn take(&mut self) -> bool {
        let Ok(message) = self.stream.messages.recv_timeout(WAIT_TIMEOUT) else { return false };
        if let Some(end) = message.get("end") {
            self.end = Some(end.clone());
            return true;
        }
        let offset = message["offset"].as_str().map_or(0, |text| text.parse().unwrap());
        let data = STANDARD.decode(message["data"].as_str().unwrap_or_default()).unwrap();
        if let Some((before, bytes)) = self.pieces.last() {
            assert!(offset >= before + bytes.len() as u64, "no byte comes twice");
        }
        if !data.is_empty() {
            self.pieces.push((offset, data));
        }
        true
    }

    pub(crate) fn text(&self) -> String {
        let bytes: Vec<u8> = self.pieces.iter().flat_map(|(_, bytes)| bytes).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Reads until the text so far has `text` `times` times.
    #[track_caller]
    pub(crate) fn until(&mut self, text: &str, times: usize) {
        while self.text().matches(text).count() < times {
            assert!(self.take() && self.end.is_none(), "{text:?} x {times}, {:?}: {}", self.end, self.text());
        }
    }

    /// Reads to the end of the stream, and returns its error's code, or nothing.
    #[track_caller]
    pub(crate) fn read_to_end(&mut self) -> String {
        while self.end.is_none() {
            assert!(self.take(), "the stream never ends: {}", self.text());
        }
        self.end.as_ref().unwrap()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// The whole kept console, without following.
fn kept(world: &World, vm_id: &str) -> String {
    let mut console = Console::stream(world, vm_id, &json!({}));
    assert_eq!(console.read_to_end(), "", "{:?}", console.end);
    console.text()
}

#[test]
fn a_console_is_followed_and_takes_input_across_every_end() {
    const TEST: &str = "a_console_is_followed_and_takes_input_across_every_end";
    for backend in hypervisors(TEST) {
        let mut world = World::started(&[]);
        let banner = TinyGuest::Obey.banner();
        let config = json!({"cpu": {"vcpu_count": 1}, "memory": {"size_bytes": "67108864"},
            "boot": {"kernel_path": TinyGuest::Obey.write_to(world.dir.path()).unwrap()},
            "restart_policy": {"mode": "RESTART_MODE_GUEST_REBOOT"}});
        world.call("CreateVm", &json!({"vm_id": "vm", "backend": backend, "config": config})).ok();
        // A stream of a VM that was never booted waits for the first output.
        let mut first = Console::stream(&world, "vm", &json!({"follow": true}));
        world.boot("vm");
        first.until(&banner, 1);
        assert_eq!(first.pieces[0].0, 0, "{backend}: the history begins with the first byte");
        let mut boots = 1;
        let type_and_see = |world: &World, console: &mut Console, word: &str, boots: usize| {
            console.until(&banner, boots);
            // A guest in a new process can print before the daemon has recorded its start.
            world.wait_for_state("vm", "VM_STATE_RUNNING");
            world.type_at_console("vm", word.as_bytes());
            console.until(word, 1);
        };
        type_and_see(&world, &mut first, "one;", boots);
        // The guest resets itself: in place, or with a new process.
        world.type_at_console("vm", b"R");
        boots += 1;
        type_and_see(&world, &mut first, "two;", boots);
        // The daemon is killed. Another client goes on where the first one was.
        let (last, bytes) = first.pieces.last().unwrap();
        let position = last + bytes.len() as u64;
        world.stop(Signal::KILL);
        world.start();
        let mut second = Console::stream(&world, "vm", &json!({"offset": position, "follow": true}));
        world.type_at_console("vm", b"three;");
        second.until("three;", 1);
        assert!(second.pieces[0].0 >= position, "{backend}: {}", second.pieces[0].0);
        let seen = second.text().matches(&banner).count();
        // A reboot by the client, a shutdown and a boot. The stream stays.
        world.call("RebootVm", &json!({"vm_id": "vm", "force": true})).ok();
        type_and_see(&world, &mut second, "four;", seen + 1);
        world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
        let text =
            world.call("WriteConsole", &json!({"vm_id": "vm", "data": "eA=="})).error("failed_precondition");
        assert!(text.contains("WriteConsole is not legal for VM \"vm\" in state SHUTDOWN"), "{text}");
        world.boot("vm");
        type_and_see(&world, &mut second, "five;", seen + 2);
        // A guest that is paused reads when it is resumed.
        world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
        world.type_at_console("vm", b"six;");
        world.call("ResumeVm", &json!({"vm_id": "vm"})).ok();
        second.until("six;", 1);
        let whole = kept(&world, "vm");
        for word in ["one;", "two;", "three;", "four;", "five;", "six;"] {
            assert_eq!(whole.matches(word).count(), 1, "{backend}: {word} in {whole:?}");
        }
        let mut tail = Console::stream(&world, "vm", &json!({"tail_bytes": 4}));
        assert_eq!((tail.read_to_end(), tail.text()), (String::new(), "six;".to_owned()), "{backend}");
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        assert_eq!(second.read_to_end(), "", "{backend}: the deletion ends the stream properly");
        world.assert_nothing_left();
    }
}

#[test]
fn a_flooded_console_stays_bounded_and_a_slow_reader_skips_output() {
    const TEST: &str = "a_flooded_console_stays_bounded_and_a_slow_reader_skips_output";
    const HISTORY: u64 = 4096;
    for backend in hypervisors(TEST) {
        let world = World::started(&[("UNKEY_VMCP_CONSOLE_HISTORY", "4K")]);
        let uid = world.create_on(backend, "vm", TinyGuest::Echo)["uid"].as_str().unwrap().replace('-', "");
        world.boot("vm");
        world.wait_for_console("vm", &TinyGuest::Echo.banner(), 1);
        let path = world.dir.path().join("run/vms").join(uid).join("console.log");
        let facts = || std::fs::metadata(&path).unwrap();
        // A client that connects and does not read holds up nothing.
        let idle = Console::stream(&world, "vm", &json!({"follow": true}));
        let typed = 9 << 10;
        world.type_at_console("vm", &vec![b'x'; typed]);
        // An emulated guest on a busy host takes minutes, so that only a standstill is a failure.
        while facts().len() <= typed as u64 {
            let before = facts().len();
            eventually("the guest sends more back", || facts().len() > before);
        }
        eventually("the console is trimmed", || facts().blocks() * 512 <= 2 * HISTORY);
        let mut late = Console::stream(&world, "vm", &json!({"offset": 0}));
        assert_eq!(late.read_to_end(), "");
        let first = late.pieces[0].0;
        assert!((1..=facts().len() - HISTORY).contains(&first), "{backend}: {first}");
        assert!(!late.text().contains('\0'), "{backend}: no hole is taken for output");
        assert!(late.text().ends_with('x'));
        let past = Console::stream(&world, "vm", &json!({"offset": facts().len() + 1})).read_to_end();
        assert_eq!(past, "out_of_range", "{backend}");
        world.type_at_console("vm", b"still here");
        world.wait_for_console("vm", "still here", 1);
        drop(idle);
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}

#[test]
fn unread_input_is_reported_and_delays_nothing() {
    const TEST: &str = "unread_input_is_reported_and_delays_nothing";
    for backend in hypervisors(TEST) {
        let world = World::started(&[]);
        world.create_on(backend, "vm", TinyGuest::Idle);
        let unborn = world.call("WriteConsole", &json!({"vm_id": "vm", "data": "eA=="}));
        assert!(unborn.error("failed_precondition").contains("in state CREATED"));
        world.boot("vm");
        world.wait_for_console("vm", &TinyGuest::Idle.banner(), 1);
        let full = STANDARD.encode(vec![b'x'; 64 << 10]);
        let fills = || world.call("WriteConsole", &json!({"vm_id": "vm", "data": full}));
        // What the VMM and the kernel hold for a guest is bounded, so that one of the calls fails.
        let refusal = (0..8).map(|_| fills()).find(|answer| answer.status != 200).unwrap();
        let text = refusal.error("deadline_exceeded");
        assert!(text.contains("does not read its console"), "{backend}: {text}");
        let text = fills().error("deadline_exceeded");
        assert!(text.contains("0 of 65536 bytes were taken within 2 s"), "{backend}: {text}");
        // A VMM that was given more than it can hold would be gone by now.
        let before = world.info("vm")["backend_info"]["pid"].clone();
        world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
        world.call("ResumeVm", &json!({"vm_id": "vm"})).ok();
        assert_eq!(world.info("vm")["backend_info"]["pid"], before, "{backend}");
        let too_much = STANDARD.encode(vec![b'x'; (64 << 10) + 1]);
        let text =
            world.call("WriteConsole", &json!({"vm_id": "vm", "data": too_much})).error("invalid_argument");
        assert!(text.contains("data: has 65537 bytes"), "{text}");
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}

#[test]
fn two_writers_do_not_mix_their_bytes() {
    const TEST: &str = "two_writers_do_not_mix_their_bytes";
    const WORDS: usize = 20;
    for backend in hypervisors(TEST) {
        let world = World::started(&[]);
        world.create_on(backend, "vm", TinyGuest::Echo);
        world.boot("vm");
        let banner = TinyGuest::Echo.banner();
        world.wait_for_console("vm", &banner, 1);
        std::thread::scope(|scope| {
            for word in ["(aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa)", "(bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb)"] {
                let (url, request) = (world.url(), json!({"vm_id": "vm", "data": STANDARD.encode(word)}));
                scope.spawn(move || {
                    (0..WORDS).for_each(|_| drop(call(url, "WriteConsole", &request).ok()));
                });
            }
        });
        let whole = world.wait_for_console("vm", ")", 2 * WORDS);
        let echoed = whole[whole.find('(').unwrap()..].trim_end_matches(')');
        let mut counts = BTreeMap::new();
        for word in echoed.trim_start_matches('(').split(")(") {
            *counts.entry(word).or_insert(0) += 1;
        }
        let expected = [("a".repeat(32), WORDS), ("b".repeat(32), WORDS)];
        let counts: Vec<_> = counts.into_iter().map(|(word, count)| (word.to_owned(), count)).collect();
        assert_eq!(counts, expected, "{backend}");
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}

#[test]
fn a_linux_guest_shows_its_first_message_and_obeys_console_input() {
    const TEST: &str = "a_linux_guest_shows_its_first_message_and_obeys_console_input";
    for backend in hypervisors(TEST) {
        let Some(config) = linux_config(backend, "") else {
            skipped(&format!("{TEST} on {backend}"), NO_LINUX);
            continue;
        };
        let world = World::started(&[]);
        world.call("CreateVm", &json!({"vm_id": "vm", "backend": backend, "config": config})).ok();
        world.boot("vm");
        let mut console = Console::stream(&world, "vm", &json!({"follow": true}));
        console.until("vmcp-guest: ready", 1);
        assert!(
            console.text().contains("Linux version "),
            "{backend}: the first message of the kernel is kept"
        );
        world.type_at_console("vm", b"run echo $((6 * 7))-from-the-guest\n");
        console.until("42-from-the-guest", 1);
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        assert_eq!(console.read_to_end(), "");
        world.assert_nothing_left();
    }
}

#[test]
fn a_console_of_the_clients_own_is_streamed_and_never_trimmed() {
    const TEST: &str = "a_console_of_the_clients_own_is_streamed_and_never_trimmed";
    for backend in hypervisors(TEST) {
        let world = World::started(&[("UNKEY_VMCP_CONSOLE_HISTORY", "4K")]);
        let output = world.dir.path().join("own.log");
        let mut config = world.tiny(TinyGuest::Echo);
        config["console"] = json!({"enabled": true, "output": output});
        world.call("CreateVm", &json!({"vm_id": "vm", "backend": backend, "config": config})).ok();
        world.boot("vm");
        let mut console = Console::stream(&world, "vm", &json!({"follow": true}));
        console.until(&TinyGuest::Echo.banner(), 1);
        world.type_at_console("vm", &vec![b'x'; 12 << 10]);
        world.type_at_console("vm", b"end.");
        console.until("end.", 1);
        let facts = std::fs::metadata(&output).unwrap();
        assert!(facts.blocks() * 512 >= 12 << 10, "{backend}: {} bytes", facts.blocks() * 512);
        // The client turns its console off: nothing is streamed and nothing is typed.
        config["console"] = json!({"enabled": false});
        world.call("CreateVm", &json!({"vm_id": "mute", "backend": backend, "config": config})).ok();
        assert_eq!(Console::stream(&world, "mute", &json!({})).read_to_end(), "failed_precondition");
        let text = world
            .call("WriteConsole", &json!({"vm_id": "mute", "data": "eA=="}))
            .error("failed_precondition");
        assert!(text.contains("config.console.enabled is false"), "{text}");
        for vm_id in ["vm", "mute"] {
            world.call("DeleteVm", &json!({"vm_id": vm_id, "force": true})).ok();
        }
        assert!(output.exists(), "{backend}: DeleteVm removes no file that the client named");
        world.assert_nothing_left();
    }
}

#[test]
fn console_calls_for_an_unknown_vm_are_refused() {
    let world = World::started(&[]);
    assert_eq!(Console::stream(&world, "none", &json!({"follow": true})).read_to_end(), "not_found");
    world.call("WriteConsole", &json!({"vm_id": "none", "data": "eA=="})).error("not_found");
    let empty = Console::stream(&world, "", &json!({})).read_to_end();
    assert_eq!(empty, "invalid_argument");
    world.create("vm", &world.tiny(TinyGuest::Idle));
    for wrong in [json!({"offset": -1}), json!({"tail_bytes": -1})] {
        assert_eq!(Console::stream(&world, "vm", &wrong).read_to_end(), "invalid_argument", "{wrong}");
    }
    assert_eq!(kept(&world, "vm"), "", "a VM that never ran has printed nothing");
    assert_eq!(Console::stream(&world, "vm", &json!({"offset": 1})).read_to_end(), "out_of_range");
}

#[test]
fn input_is_accepted_while_the_guest_shuts_down() {
    const TEST: &str = "input_is_accepted_while_the_guest_shuts_down";
    for backend in hypervisors(TEST) {
        let world = World::started(&[]);
        world.create_on(backend, "vm", TinyGuest::Echo);
        world.boot("vm");
        world.wait_for_console("vm", &TinyGuest::Echo.banner(), 1);
        std::thread::scope(|scope| {
            // The guest ignores the request, so that the operation lasts until its guest's time is over.
            let (url, request) = (world.url(), json!({"vm_id": "vm", "timeout_seconds": 600}));
            let down = scope.spawn(move || call(url, "ShutdownVm", &request));
            world.wait_for("vm", "shutting down", |info| info["status"]["phase"] == "stopping");
            world.type_at_console("vm", b"typed meanwhile");
            world.wait_for_console("vm", "typed meanwhile", 1);
            assert!(!down.is_finished(), "{backend}: the operation goes on beside the input");
            world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
            down.join().unwrap().error("aborted");
        });
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}
