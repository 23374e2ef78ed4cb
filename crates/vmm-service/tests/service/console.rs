//! The console of a VM on the scripted hypervisor: reads of its file, and input beside the operations.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, Effect};
use vmm_core::config::{ConsoleConfig, VmConfig};
use vmm_core::state::{Phase, VmState};
use vmm_service::{ConfigUpdate, ConsoleChunk, ConsoleQuery, ConsoleStream, ServiceError};
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};

use crate::common::{Bed, Vms, refused, violations};

fn query(vm_id: &str) -> ConsoleQuery {
    ConsoleQuery { vm_id: vm_id.to_owned(), ..ConsoleQuery::default() }
}

fn follow(vm_id: &str) -> ConsoleQuery {
    ConsoleQuery { follow: true, ..query(vm_id) }
}

/// The kept console of a VM.
fn file(bed: &Bed, vms: &Vms, vm_id: &str) -> PathBuf {
    bed.run_dir(&vms.record(vm_id)).join("console.log")
}

fn print(path: &PathBuf, bytes: &[u8]) {
    std::fs::OpenOptions::new().append(true).open(path).unwrap().write_all(bytes).unwrap();
}

/// Calls StreamConsole and reads everything.
async fn all(vms: &Vms, query: ConsoleQuery) -> Result<Vec<ConsoleChunk>, ServiceError> {
    let mut stream = vms.service.stream_console(query).await?;
    let mut pieces = Vec::new();
    while let Some(piece) = stream.next().await? {
        pieces.push(piece);
    }
    Ok(pieces)
}

/// The next piece, as its position and text.
async fn next(stream: &mut ConsoleStream) -> Option<(u64, String)> {
    let piece = stream.next().await.unwrap()?;
    Some((piece.offset, String::from_utf8(piece.data).unwrap()))
}

#[test]
fn a_console_is_read_from_the_clients_position() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("vm", bed.config()).await;
        print(&file(&bed, &vms, "vm"), b"0123456789");
        let from = |offset| ConsoleQuery { offset: Some(offset), ..query("vm") };
        let tail = |tail_bytes| ConsoleQuery { tail_bytes, ..query("vm") };
        for (query, position, text) in [
            (query("vm"), 0, "0123456789"),
            (from(0), 0, "0123456789"),
            (from(9), 9, "9"),
            (tail(3), 7, "789"),
            (tail(100), 0, "0123456789"),
            (ConsoleQuery { tail_bytes: 3, ..from(8) }, 8, "89"),
        ] {
            let pieces = all(&vms, query.clone()).await.unwrap();
            assert_eq!(pieces, [ConsoleChunk { offset: position, data: text.into() }], "{query:?}");
        }
        assert_eq!(all(&vms, from(10)).await.unwrap(), []);
        refused(all(&vms, from(11)).await, "out-of-range");
        assert_eq!(violations(all(&vms, from(-1)).await)[0].0, "offset");
        assert_eq!(violations(all(&vms, tail(-1)).await)[0].0, "tail_bytes");
    });
}

#[test]
fn a_long_console_comes_in_bounded_pieces_without_a_gap() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("vm", bed.config()).await;
        let whole: Vec<u8> = (0..1_000_000_u32).map(|number| (number % 251) as u8).collect();
        print(&file(&bed, &vms, "vm"), &whole);
        let pieces = all(&vms, query("vm")).await.unwrap();
        assert!(pieces.iter().all(|piece| piece.data.len() <= 64 << 10));
        let mut position = 0;
        for piece in &pieces {
            assert_eq!(piece.offset, position);
            position += piece.data.len() as u64;
        }
        assert_eq!(pieces.concat_data(), whole);
    });
}

#[test]
fn a_stream_that_is_not_read_is_overtaken_and_goes_on_with_what_is_kept() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("vm", bed.config()).await;
        let path = file(&bed, &vms, "vm");
        let whole: Vec<u8> = (0..8_000_000_u32).map(|number| (number % 251) as u8).collect();
        print(&path, &whole[..1_000_000]);
        let mut stream = vms.service.stream_console(follow("vm")).await.unwrap();
        let mut pieces = vec![stream.next().await.unwrap().unwrap()];
        // The client stops reading here, while the guest prints more than is kept.
        print(&path, &whole[1_000_000..]);
        vmm_host::tail::trim(&path, 1 << 20).unwrap();
        while pieces.last().is_none_or(|piece| piece.offset + (piece.data.len() as u64) < 8_000_000) {
            pieces.push(stream.next().await.unwrap().unwrap());
        }
        for piece in &pieces {
            let place = usize::try_from(piece.offset).unwrap();
            assert_eq!(piece.data, whole[place..place + piece.data.len()], "at {place}");
        }
        let ends = pieces.iter().map(|piece| piece.offset + piece.data.len() as u64);
        let gaps = ends.zip(pieces.iter().skip(1)).filter(|(end, next)| *end != next.offset);
        let gaps: Vec<_> = gaps.map(|(end, next)| (end, next.offset)).collect();
        assert_eq!(gaps.len(), 1, "{gaps:?}");
        // The stream held at most one round, of four pieces, beside the piece that was taken.
        assert!(gaps[0].0 <= 4 * (64 << 10) && gaps[0].1 >= 6_000_000, "{gaps:?}");
    });
}

trait ConcatData {
    fn concat_data(&self) -> Vec<u8>;
}

impl ConcatData for Vec<ConsoleChunk> {
    fn concat_data(&self) -> Vec<u8> {
        self.iter().flat_map(|piece| &piece.data).copied().collect()
    }
}

#[test]
fn a_follower_waits_for_the_first_output_and_ends_with_the_vm() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.create("vm", bed.config()).await;
        assert_eq!(all(&vms, query("vm")).await.unwrap(), [], "a VM that never ran has printed nothing");
        let mut stream = vms.service.stream_console(follow("vm")).await.unwrap();
        let early = tokio::spawn(async move { (next(&mut stream).await, stream) });
        tokio::task::yield_now().await;
        vms.boot("vm").await.unwrap();
        let path = file(&bed, &vms, "vm");
        print(&path, b"first boot\n");
        let (piece, mut stream) = early.await.unwrap();
        assert_eq!(piece, Some((0, "first boot\n".to_owned())));
        // Neither a pause nor a shutdown nor a boot ends the stream.
        for (operation, text) in [(VmState::Paused, "paused\n"), (VmState::Shutdown, "down\n")] {
            match operation {
                VmState::Paused => drop(vms.pause("vm").await.unwrap()),
                _ => drop(vms.force_shutdown("vm").await.unwrap()),
            }
            print(&path, text.as_bytes());
            assert_eq!(next(&mut stream).await.unwrap().1, text);
        }
        vms.boot("vm").await.unwrap();
        print(&path, b"second boot\n");
        assert_eq!(next(&mut stream).await, Some((23, "second boot\n".to_owned())));
        let late = tokio::spawn(async move { next(&mut stream).await });
        tokio::task::yield_now().await;
        vms.force_delete("vm").await.unwrap();
        assert_eq!(late.await.unwrap(), None, "the deletion ends the stream without an error");
        refused(vms.service.stream_console(follow("vm")).await.map(drop), "not-found");
    });
}

#[test]
fn a_guest_that_prints_without_end_is_streamed_in_few_pieces_and_a_quiet_guest_at_once() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("vm", bed.config()).await;
        let path = file(&bed, &vms, "vm");
        let mut stream = vms.service.stream_console(follow("vm")).await.unwrap();
        let reading = tokio::spawn(async move {
            let (mut pieces, mut end) = (0, 0);
            while end < 1000 {
                let piece = stream.next().await.unwrap().unwrap();
                (pieces, end) = (pieces + 1, piece.offset + piece.data.len() as u64);
            }
            (pieces, stream)
        });
        // One byte each millisecond. The clock is the test's own.
        for _ in 0..1000 {
            print(&path, b"x");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let (pieces, mut stream) = reading.await.unwrap();
        assert!((2..200).contains(&pieces), "{pieces}");
        tokio::time::sleep(Duration::from_secs(1)).await;
        for key in ["a", "b", "c"] {
            print(&path, key.as_bytes());
            assert_eq!(next(&mut stream).await.unwrap().1, key);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
}

/// The change of a console to the file `output`, or to none.
fn moved_to(output: Option<&str>) -> ConfigUpdate {
    let console = ConsoleConfig {
        enabled: output.is_some(),
        output: output.unwrap_or_default().to_owned(),
        ..ConsoleConfig::default()
    };
    let config = VmConfig { console: Some(console), ..VmConfig::default() };
    ConfigUpdate { config, fields: vec!["console".to_owned()], ..ConfigUpdate::default() }
}

#[test]
fn a_follower_goes_over_to_the_file_that_an_update_names() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("vm", bed.config()).await;
        let kept = file(&bed, &vms, "vm");
        print(&kept, b"kept 1;");
        let mut stream = vms.service.stream_console(follow("vm")).await.unwrap();
        assert_eq!(next(&mut stream).await, Some((0, "kept 1;".to_owned())));
        vms.force_shutdown("vm").await.unwrap();
        print(&kept, b"last words;");
        let own = bed.path("own.log");
        vms.update("vm", moved_to(Some(&own))).await.unwrap();
        // A change of another part leaves the stream where it is.
        vms.label("vm", "blue").await.unwrap();
        assert_eq!(next(&mut stream).await, Some((7, "last words;".to_owned())), "the old file first");
        let waiting = tokio::spawn(async move { (next(&mut stream).await, stream) });
        tokio::task::yield_now().await;
        vms.boot("vm").await.unwrap();
        print(&PathBuf::from(&own), b"own 1;");
        let (piece, mut stream) = waiting.await.unwrap();
        assert_eq!(piece, Some((0, "own 1;".to_owned())), "offsets count in the new file");
        vms.force_shutdown("vm").await.unwrap();
        vms.update("vm", moved_to(Some(""))).await.unwrap();
        let all_kept = (0, "kept 1;last words;".to_owned());
        assert_eq!(next(&mut stream).await, Some(all_kept), "everything that the file keeps");
        vms.boot("vm").await.unwrap();
        print(&kept, b"kept 2;");
        assert_eq!(next(&mut stream).await, Some((18, "kept 2;".to_owned())));
        vms.force_delete("vm").await.unwrap();
        assert_eq!(next(&mut stream).await, None);
    });
}

#[test]
fn a_stream_without_follow_ends_in_the_file_in_which_it_began() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("vm", bed.config()).await;
        print(&file(&bed, &vms, "vm"), b"history");
        let mut stream = vms.service.stream_console(query("vm")).await.unwrap();
        vms.force_shutdown("vm").await.unwrap();
        vms.update("vm", moved_to(Some(&bed.path("own.log")))).await.unwrap();
        assert_eq!(next(&mut stream).await, Some((0, "history".to_owned())));
        assert_eq!(next(&mut stream).await, None);
    });
}

#[test]
fn a_follower_ends_with_an_error_when_an_update_takes_the_console_away() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("vm", bed.config()).await;
        let kept = file(&bed, &vms, "vm");
        let mut stream = vms.service.stream_console(follow("vm")).await.unwrap();
        vms.force_shutdown("vm").await.unwrap();
        print(&kept, b"last words");
        vms.update("vm", moved_to(None)).await.unwrap();
        assert_eq!(next(&mut stream).await, Some((0, "last words".to_owned())));
        let text = refused(stream.next().await, "precondition");
        assert!(text.contains("config.console.enabled is false"), "{text}");
    });
}

#[test]
fn a_follower_does_not_go_on_with_a_new_vm_of_the_same_name() {
    let bed = Bed::new();
    bed.life(async |vms| {
        let output = bed.path("own.log");
        let console = ConsoleConfig { enabled: true, output: output.clone(), ..ConsoleConfig::default() };
        let config = VmConfig { console: Some(console), ..bed.config() };
        vms.run("vm", config.clone()).await;
        print(&PathBuf::from(&output), b"first vm");
        let mut stream = vms.service.stream_console(follow("vm")).await.unwrap();
        assert_eq!(next(&mut stream).await, Some((0, "first vm".to_owned())));
        vms.force_delete("vm").await.unwrap();
        std::fs::remove_file(&output).unwrap();
        vms.run("vm", config).await;
        print(&PathBuf::from(&output), b"second vm");
        assert_eq!(next(&mut stream).await, None);
        let anew = all(&vms, query("vm")).await.unwrap();
        assert_eq!(anew.concat_data(), b"second vm");
    });
}

#[test]
fn a_file_that_another_program_replaces_is_read_anew() {
    let bed = Bed::new();
    bed.life(async |vms| {
        let output = bed.path("own.log");
        let console = ConsoleConfig { enabled: true, output: output.clone(), ..ConsoleConfig::default() };
        vms.run("vm", VmConfig { console: Some(console), ..bed.config() }).await;
        let path = PathBuf::from(&output);
        print(&path, b"before");
        let mut stream = vms.service.stream_console(follow("vm")).await.unwrap();
        assert_eq!(next(&mut stream).await, Some((0, "before".to_owned())));
        std::fs::rename(&path, bed.path("rotated.log")).unwrap();
        std::fs::write(&path, "after").unwrap();
        assert_eq!(next(&mut stream).await, Some((0, "after".to_owned())));
        // A link, a FIFO and a folder in its place are refused, and nothing waits for them.
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(bed.path("rotated.log"), &path).unwrap();
        refused(all(&vms, query("vm")).await, "unavailable");
        std::fs::remove_file(&path).unwrap();
        vmm_host::console_input::make_fifo(&path).unwrap();
        refused(all(&vms, query("vm")).await, "unavailable");
    });
}

#[test]
fn a_vm_without_a_console_names_the_setting() {
    let bed = Bed::new();
    bed.life(async |vms| {
        let off = VmConfig { console: Some(ConsoleConfig::default()), ..bed.config() };
        vms.run("vm", off).await;
        let text = refused(all(&vms, query("vm")).await, "precondition");
        assert!(text.contains("config.console.enabled is false"), "{text}");
        let text = refused(vms.service.write_console("vm", b"x").await, "precondition");
        assert!(text.contains("config.console.enabled is false"), "{text}");
    });
}

#[test]
fn input_reaches_a_vm_that_runs_or_is_paused() {
    let bed = Bed::new();
    bed.life(async |vms| {
        for (state, legal) in [
            (VmState::Created, false),
            (VmState::Running, true),
            (VmState::Paused, true),
            (VmState::Shutdown, false),
        ] {
            let name = state.name().to_lowercase();
            vms.bring_to(&name, bed.config(), state).await;
            let written = vms.service.write_console(&name, b"typed").await;
            if legal {
                written.unwrap();
                assert_eq!(vms.machine(&name).typed(), b"typed");
            } else {
                let text = refused(written, "precondition");
                let said = format!("WriteConsole is not legal for VM \"{name}\" in state {}", state.name());
                assert!(text.starts_with(&said), "{text}");
            }
        }
        refused(vms.service.write_console("none", b"x").await, "not-found");
        let much = vec![0; (64 << 10) + 1];
        assert_eq!(violations(vms.service.write_console("running", &much).await)[0].0, "data");
        vms.service.write_console("running", b"").await.unwrap();
    });
}

#[test]
fn input_does_not_wait_for_an_operation_of_the_same_vm() {
    let bed = Bed::new();
    bed.life(async |vms| {
        let machine = vms.run("vm", bed.config()).await;
        vms.world.next(ScriptedMethod::Shutdown, ScriptedResult::hang());
        let waiting = vms.clone();
        let down = vms.begin(async move { waiting.shutdown("vm").await }).await;
        vms.until_phase("vm", Phase::Stopping).await;
        vms.service.write_console("vm", b"meanwhile").await.unwrap();
        assert_eq!(machine.typed(), b"meanwhile");
        assert!(!down.is_finished());
        vms.force_delete("vm").await.unwrap();
        refused(down.await.unwrap(), "aborted");
    });
}

#[test]
fn unread_input_times_out_and_delays_nothing() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("vm", bed.config()).await;
        vms.world.next(ScriptedMethod::WriteConsole, ScriptedResult::hang());
        let text = refused(vms.service.write_console("vm", b"12345").await, "deadline");
        assert!(text.contains("0 of 5 bytes were taken within 2 s"), "{text}");
        let gone = ScriptedResult::Fail(BackendErrorKind::Gone, Effect::NotApplied);
        vms.world.next(ScriptedMethod::WriteConsole, gone);
        refused(vms.service.write_console("vm", b"x").await, "unavailable");
        vms.world.next(ScriptedMethod::WriteConsole, ScriptedResult::hang());
        let waiting = vms.clone();
        let typing = vms.begin(async move { waiting.service.write_console("vm", b"x").await }).await;
        vms.pause("vm").await.unwrap();
        vms.force_shutdown("vm").await.unwrap();
        refused(typing.await.unwrap(), "deadline");
    });
}

#[test]
fn input_to_an_unreachable_vm_is_refused() {
    let bed = Bed::new();
    bed.life(async |vms| {
        let machine = vms.run("vm", bed.config()).await;
        machine.stop();
        vms.until_phase("vm", Phase::Unreachable).await;
        let text = refused(vms.service.write_console("vm", b"x").await, "unavailable");
        assert!(text.contains("is unreachable"), "{text}");
        // What is on record can be read all the same.
        print(&file(&bed, &vms, "vm"), b"last words");
        assert_eq!(all(&vms, query("vm")).await.unwrap().concat_data(), b"last words");
        vms.force_delete("vm").await.unwrap();
    });
}
