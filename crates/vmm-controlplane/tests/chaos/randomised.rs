//! The randomised run: clients call, the daemon is killed, and at the end everybody must agree.

use std::io::Write as _;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::history::{Life, Op, State};
use super::host::{Found, TapGuard, can_make_taps, ledger, left_for_good};
use super::load::{Addresses, Caller, Clock, Notes, Shared, rest};
use super::plan::{self, Kernels};
use super::report::{Figures, Report};
use super::stall::Stalls;
use super::verdict::{self, Evidence, Present};
use crate::harness::{WAIT_TIMEOUT, World, hypervisors};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Kills of a plain `cargo test`.
const SHORT: u64 = 15;

#[test]
fn the_history_agrees_with_the_host_under_repeated_kills_of_the_daemon() {
    const TEST: &str = "the_history_agrees_with_the_host_under_repeated_kills_of_the_daemon";
    let backends = hypervisors(TEST);
    if backends.is_empty() {
        return;
    }
    let taps = can_make_taps(TEST);
    let seed = plan::seed();
    let kills = plan::number("VMCP_CHAOS_KILLS").unwrap_or(SHORT);
    println!("VMCP_CHAOS_SEED={seed} VMCP_CHAOS_KILLS={kills}");
    let mut run = Run::start(plan::vms(&backends, taps), seed);
    let notes = run.under_fire(kills);
    run.restart();
    let (report, figures) = run.judge(notes);
    println!("{figures}");
    report.print(&run.world.dir.path().join("daemon.log"));
    run.clean_up();
    assert!(report.is_clean(), "{} violations, seed {seed}; they are told above", report.count());
}

struct Run {
    world: World,
    // Ends after the world, whose VMMs hold the TAPs.
    _taps: TapGuard,
    shared: Shared,
    random: fastrand::Rng,
    lives: Vec<Life>,
    instance: String,
    kernels: Kernels,
}

impl Run {
    fn start(vms: Vec<plan::Vm>, seed: u64) -> Self {
        let addresses = Addresses::new();
        let daemon = addresses.daemon();
        let mut world = World::new(&[
            ("UNKEY_VMCP_ADDRESS", &daemon.ip().to_string()),
            ("UNKEY_VMCP_PORT", &daemon.port().to_string()),
            ("RUST_LOG", "info"),
        ]);
        let kernels = Kernels::write_to(world.dir.path());
        let clock = Clock::new();
        world.start();
        let lives = vec![Life { serving: Some(clock.now()), killed: None }];
        let instance = ledger(&world).1["instance"].as_str().unwrap().to_owned();
        let shared = Shared { clock, addresses, vms, stop: false.into(), stalls: Stalls::default() };
        let random = fastrand::Rng::with_seed(seed);
        Self { world, _taps: TapGuard(Some(instance.clone())), shared, random, lives, instance, kernels }
    }

    /// Lets clients call while the daemon is killed so many times. It runs when they stop.
    fn under_fire(&mut self, kills: u64) -> Vec<Notes> {
        let shared = &self.shared;
        let kernels = &self.kernels;
        let (world, random, lives) = (&mut self.world, &mut self.random, &mut self.lives);
        thread::scope(|scope| {
            let _stop = StopGuard(shared);
            let clients: Vec<_> = (0..plan::CLIENTS)
                .map(|number| {
                    let random = fastrand::Rng::with_seed(random.u64(..));
                    scope.spawn(move || Caller::new(shared, kernels, number).run(random))
                })
                .collect();
            scope.spawn(|| shared.stalls.revive(shared));
            let mut killer = Killer { world, clock: shared.clock, lives };
            let mut done = 0;
            while done < kills {
                killer.keep_spares(random.u64(..=2));
                rest(Duration::from_millis(random.u64(200..1600)));
                killer.kill();
                done += 1;
                // Now and then the next one dies while it recovers, perhaps several in a row.
                while done < kills && random.u8(..100) < 20 {
                    killer.start_and_kill(Duration::from_millis(random.u64(..120)));
                    done += 1;
                }
                killer.start();
            }
            shared.stop.store(true, Ordering::Relaxed);
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        })
    }

    /// Kills and starts the daemon once more, with nobody calling, and lets everything come to rest.
    fn restart(&mut self) {
        let mut killer = Killer { world: &mut self.world, clock: self.shared.clock, lives: &mut self.lives };
        killer.kill();
        killer.keep_spares(0);
        killer.start();
        // Longer than anything that was under way may take to show.
        rest(Duration::from_secs(6));
        let at_rest = |vm: &Value| {
            !matches!(
                vm["status"]["phase"].as_str(),
                Some("restarting" | "starting" | "stopping" | "unreachable")
            )
        };
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            let vms = self.list();
            if vms.iter().all(at_rest) {
                return;
            }
            // What does not come to rest is judged as it is.
            if Instant::now() > deadline {
                return println!("VMs did not come to rest: {vms:#?}");
            }
            rest(Duration::from_millis(200));
        }
    }

    fn list(&self) -> Vec<Value> {
        let body = self.world.call("ListVms", &json!({"page_size": 1000})).ok();
        body["vms"].as_array().cloned().unwrap_or_default()
    }

    /// Every event, oldest first; of one VM, or of all.
    fn events(&self, vm_id: &str) -> Vec<Value> {
        let mut all = Vec::new();
        let mut token = String::new();
        loop {
            let request = json!({"vm_id": vm_id, "page_size": 1000, "page_token": token});
            let page = self.world.call("ListVmEvents", &request).ok();
            all.extend(page["events"].as_array().cloned().unwrap_or_default());
            match page["next_page_token"].as_str() {
                Some(next) if !next.is_empty() => next.clone_into(&mut token),
                Some(_) | None => return all,
            }
        }
    }

    /// Holds what was told against what is.
    fn judge(&self, mut notes: Vec<Notes>) -> (Report, Figures) {
        // The last word on every VM, by a client of its own.
        let mut last = Caller::new(&self.shared, &self.kernels, plan::CLIENTS);
        last.list();
        let mut now = Vec::new();
        for vm in 0..self.shared.vms.len() {
            now.push(last.call(vm, Op::Read).map(|info| present(&info)));
            last.read_console(vm, None);
        }
        notes.push(last.into_notes());
        let found = Found::look(&self.world, &self.instance);
        let (code, ledger) = ledger(&self.world);
        let per_vm = self.shared.vms.iter().map(|vm| self.events(&vm.name)).collect();
        let evidence = Evidence {
            vms: &self.shared.vms,
            stalls: &self.shared.stalls,
            addresses: self.shared.addresses,
            lives: &self.lives,
            now,
            events: per_vm,
            all_events: self.events(""),
            found,
            ledger: (code, ledger),
        };
        verdict::reach(evidence, notes)
    }

    /// Deletes everything. Fails unless the host is as it was.
    fn clean_up(&self) {
        for vm in self.list() {
            let unprotected = json!({"vm_id": vm["vm_id"], "fields": ["delete_protection"]});
            self.world.call("UpdateVm", &unprotected).ok();
            let deleted = self.world.call("DeleteVm", &json!({"vm_id": vm["vm_id"], "force": true})).ok();
            assert_eq!(left_for_good(&deleted), Vec::<String>::new());
        }
        Found::nothing(&self.world, &self.instance, "the run");
        let (code, ledger) = ledger(&self.world);
        assert_eq!((code, &ledger["items"]), (Some(0), &json!([])), "{ledger:#}");
    }
}

/// What GetVmInfo says at the end.
fn present(info: &Value) -> Present {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Present {
        uid: text(&info["uid"]),
        state: State::from_wire(&text(&info["state"])).expect("a state of the contract"),
        phase: text(&info["status"]["phase"]),
        pid: text(&info["backend_info"]["pid"]).parse().ok(),
    }
}

/// Tells the clients to stop, even where the run fails.
struct StopGuard<'a>(&'a Shared);

impl Drop for StopGuard<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

/// Kills the daemon and starts it again.
struct Killer<'a> {
    world: &'a mut World,
    clock: Clock,
    lives: &'a mut Vec<Life>,
}

impl Killer<'_> {
    /// From its next start on the daemon keeps so many spare VMMs. What those before it kept goes whatever it keeps.
    fn keep_spares(&mut self, count: u64) {
        self.world.set_env("UNKEY_VMCP_SPARE_VMMS", Some(&count.to_string()));
    }

    fn kill(&mut self) {
        let (_, log) = self.world.stop(Signal::KILL);
        self.lives.last_mut().unwrap().killed = Some(self.clock.now());
        let path = self.world.dir.path().join("daemon.log");
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path).unwrap();
        writeln!(file, "{}\n--- killed, life {}", log.join("\n"), self.lives.len()).unwrap();
    }

    fn start(&mut self) {
        self.world.start();
        self.lives.push(Life { serving: Some(self.clock.now()), killed: None });
    }

    /// Starts a daemon that lives for so long only.
    fn start_and_kill(&mut self, after: Duration) {
        let path = self.world.dir.path().join("daemon.log");
        let log = std::fs::OpenOptions::new().append(true).create(true).open(path).unwrap();
        let mut child = self.world.command().stdout(Stdio::null()).stderr(log).spawn().unwrap();
        rest(after);
        let _ = child.kill();
        let _ = child.wait();
        // It may have served for a moment.
        self.lives.push(Life { serving: None, killed: Some(self.clock.now()) });
    }
}
