//! Fuzz target for the answers and the event file of Cloud Hypervisor. The input is an answer (see
//! [`PeerOutput::of`]) and also the content of the event file.

use std::path::Path;

use vmm_core::backend::BackendError;

use super::client::CloudHypervisorClient;
use super::describe::configuration;
use super::events::{CloudHypervisorEvent, EVENTS, EventFile, parse};
use crate::fuzzing::{PeerOutput, check_description, check_error, check_words, run, with_vmm};
use crate::rest::client::RestApi;

/// The calls of [`ask`] that change nothing.
const QUESTIONS: usize = 4;

/// Runs one input.
///
/// # Panics
///
/// If a guarantee is broken, which is the finding.
pub fn cloud_hypervisor(input: &[u8]) {
    let all: Vec<usize> = (0..=QUESTIONS).collect();
    for says in PeerOutput::of(input) {
        match says {
            PeerOutput::Always(_) => run(calls(says, &all)),
            // Each call gets its own connection, and is repeated on the rest of that connection.
            PeerOutput::Once(_) => all.iter().for_each(|call| run(calls(says.clone(), &[*call, *call]))),
        }
    }
    events(input);
}

async fn calls(says: PeerOutput, calls: &[usize]) {
    let talk = async |stream| {
        let client =
            CloudHypervisorClient::over(Path::new("/nobody"), stream, 0).await.expect("it is connected");
        for call in calls {
            if let Err(error) = ask(&client, *call).await {
                check_error(&error, *call < QUESTIONS);
            }
        }
    };
    with_vmm(says, talk).await;
}

async fn ask(client: &CloudHypervisorClient, call: usize) -> Result<(), BackendError> {
    match call {
        0 => client.version().await.map(|version| check_words(&version, 300)),
        1 => client.state().await.map(drop),
        2 => client.counters().await.map(|counters| {
            let _ = (counters.storage(), counters.network());
        }),
        3 => client.describe().await.map(|received| {
            let Some((_, native)) = received else { return };
            let (config, unrepresented) = configuration(&native);
            check_description(&config, &unrepresented);
        }),
        _ => client.pause().await,
    }
}

/// Checks that any content of the file is read once, to its end, and equally from every stop.
fn events(input: &[u8]) {
    let (whole, used) = parse(input, usize::MAX);
    assert!(used <= input.len());
    let step = input.len() / 64 + 1;
    for cut in (0..input.len()).step_by(step) {
        let (mut events, used) = parse(&input[..cut], usize::MAX);
        assert!(used <= cut);
        events.extend(parse(&input[used..], usize::MAX).0);
        assert_eq!(events, whole, "cut at {cut}");
    }
    let dir = tempfile::tempdir().expect("a folder can be made");
    std::fs::write(dir.path().join(EVENTS), input).expect("a file can be written");
    let mut file = EventFile::from_start(dir.path());
    let mut read: Vec<CloudHypervisorEvent> = Vec::new();
    for _ in 0..=whole.len() {
        read.extend(file.read(1).expect("no input is as long as too long an event"));
    }
    let kinds: Vec<CloudHypervisorEvent> = whole.into_iter().map(|(event, _)| event).collect();
    assert_eq!(read, kinds, "one by one");
}
