//! `vmm-libvirt-helper URI`: speaks with libvirt for a daemon that does not link libvirt.
//!
//! ```text
//!   stdin ──► requests ──► desk ──┬─► quick ones: the main connection ──────────┐
//!                                 └─► those that wait for a QEMU: lanes of four ─┤──► libvirtd
//!   stdout ◄── answers, in any order ◄── one thread a call ◄────────────┘
//!          ◄── events ◄── the event loop's thread ◄── the main connection
//! ```
//!
//! One helper serves one connection to libvirt. When the connection is lost, the helper reports
//! that and ends, and the daemon starts another helper, because a new process needs no repair of
//! libvirt's state. The helper also ends when its stdin ends, so it never outlives the daemon. The
//! lines are those of [`vmm_libvirt_wire`]; stderr is for people.

mod call_queue;
mod calls;
mod connections;
mod ffi;
mod output;

use std::io::{self, BufReader};
use std::process::ExitCode;
use std::sync::mpsc::{SyncSender, sync_channel};

use virt::connect::Connect;
use virt::error::Error;
use vmm_libvirt_wire::{CallFailure, CallRequest, CallResult, HelperMessage};

use call_queue::CallQueue;
use connections::Connections;

/// The most requests that wait while the helper connects to libvirt.
const WAITING: usize = 64;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (Some(uri), None) = (args.next(), args.next()) else {
        eprintln!("usage: vmm-libvirt-helper URI; vmm-controlplane starts it, see UNKEY_VMCP_QEMU_ENDPOINT");
        return ExitCode::from(2);
    };
    // libvirt prints each error to stdout by default, and stdout carries only messages to the
    // daemon.
    virt::error::clear_error_callback();
    match serve(&uri) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::write_message(&HelperMessage::Unreachable { failure: calls::failure(&error) });
            ExitCode::FAILURE
        }
    }
}

fn serve(uri: &str) -> Result<(), Error> {
    // Requests are read on a thread of their own, because libvirt may block the main thread without
    // end, and the helper must end when the daemon closes stdin.
    let (requests, incoming) = sync_channel(WAITING);
    std::thread::spawn(move || match read_requests(&requests) {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            eprintln!("vmm-libvirt-helper: a request cannot be read: {error}");
            std::process::exit(2);
        }
    });
    ffi::start_event_loop()?;
    let main = Connect::open(Some(uri))?;
    connections::keep_alive(&main)?;
    ffi::watch(&main)?;
    // libvirt examines its QEMU at the first question about it, which can take half a minute. The
    // question is asked here, because otherwise the first start of a VM would wait for it.
    let hypervisor = connections::version(main.get_hyp_version()?);
    output::write_message(&HelperMessage::Ready {
        libvirt: connections::version(main.get_lib_version()?),
        hypervisor,
    });
    let lanes = Connections::new(uri.to_owned(), main);
    let desk = CallQueue::new(move |call| lanes.make(call), answer);
    for request in incoming {
        desk.take(request);
    }
    Ok(())
}

fn answer(id: u64, got: Result<CallResult, CallFailure>) {
    let (ok, failed) = match got {
        Ok(got) => (Some(got), None),
        Err(failure) => (None, Some(failure)),
    };
    output::write_message(&HelperMessage::Answer { id, ok, failed });
}

fn read_requests(requests: &SyncSender<CallRequest>) -> io::Result<()> {
    let mut stdin = BufReader::new(io::stdin());
    let mut line = Vec::new();
    while vmm_libvirt_wire::read_line(&mut stdin, &mut line)?.is_some() {
        let request = serde_json::from_slice(&line)?;
        if requests.send(request).is_err() {
            break;
        }
    }
    Ok(())
}
