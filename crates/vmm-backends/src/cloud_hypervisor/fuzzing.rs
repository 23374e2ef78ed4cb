//! Cloud Hypervisor's words. The input is an answer (see [`Says::of`]), and what stands in the events' file. What it tells of
//! a VM that somebody else made becomes a configuration of ours.

use std::path::Path;

use vmm_core::backend::BackendError;

use super::client::Client;
use super::describe::configuration;
use super::events::{ChEvent, EVENTS, EventFile, parse};
use crate::fuzzing::{Says, check_description, check_error, check_words, run, with_vmm};
use crate::rest::client::RestApi;

/// How many of the calls of [`ask`] change nothing.
const QUESTIONS: usize = 4;

/// Takes one input.
///
/// # Panics
///
/// When a promise is broken: that is the finding.
pub fn cloud_hypervisor(input: &[u8]) {
    let all: Vec<usize> = (0..=QUESTIONS).collect();
    for says in Says::of(input) {
        match says {
            Says::Always(_) => run(calls(says, &all)),
            // Each on a connection of its own, and once more on what the answer has left of that.
            Says::Once(_) => all.iter().for_each(|call| run(calls(says.clone(), &[*call, *call]))),
        }
    }
    events(input);
}

async fn calls(says: Says, calls: &[usize]) {
    let talk = async |stream| {
        let client = Client::over(Path::new("/nobody"), stream, 0).await.expect("it is connected");
        for call in calls {
            if let Err(error) = ask(&client, *call).await {
                check_error(&error, *call < QUESTIONS);
            }
        }
    };
    with_vmm(says, talk).await;
}

async fn ask(client: &Client, call: usize) -> Result<(), BackendError> {
    match call {
        0 => client.version().await.map(|version| check_words(&version, 300)),
        1 => client.state().await.map(drop),
        2 => client.counters().await.map(|counters| {
            let _ = (counters.storage(), counters.network());
        }),
        3 => client.describe().await.map(|told| {
            let Some((_, native)) = told else { return };
            let (config, untold) = configuration(&native);
            check_description(&config, &untold);
        }),
        _ => client.pause().await,
    }
}

/// Whatever stands in the file is read once, to its end, and alike wherever a reading stops.
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
    let mut read: Vec<ChEvent> = Vec::new();
    for _ in 0..=whole.len() {
        read.extend(file.read(1).expect("no input is as long as too long an event"));
    }
    let kinds: Vec<ChEvent> = whole.into_iter().map(|(event, _)| event).collect();
    assert_eq!(read, kinds, "one by one");
}
