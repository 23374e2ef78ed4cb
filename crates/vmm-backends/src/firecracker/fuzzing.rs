//! Fuzz target for the answers and the metrics file of Firecracker. The input is an answer (see
//! [`PeerOutput::of`]) and also the content of the metrics file.

use std::io;
use std::path::Path;

use vmm_core::backend::BackendError;

use super::client::FirecrackerClient;
use super::describe::configuration;
use super::metrics::{METRICS, MetricsSums, fold};
use crate::fuzzing::{PeerOutput, check_description, check_error, check_words, run, with_vmm};
use crate::rest::client::RestApi;

/// The calls of [`ask`] that change nothing.
const QUESTIONS: usize = 2;

/// Runs one input.
///
/// # Panics
///
/// If a guarantee is broken, which is the finding.
pub fn firecracker(input: &[u8]) {
    let all: Vec<usize> = (0..=QUESTIONS).collect();
    for says in PeerOutput::of(input) {
        match says {
            PeerOutput::Always(_) => run(calls(says, &all)),
            // Each call gets its own connection, and is repeated on the rest of that connection.
            PeerOutput::Once(_) => all.iter().for_each(|call| run(calls(says.clone(), &[*call, *call]))),
        }
    }
    metrics(input);
}

async fn calls(says: PeerOutput, calls: &[usize]) {
    let talk = async |stream| {
        let client = FirecrackerClient::over(Path::new("/nobody"), stream, 0).await.expect("it is connected");
        for call in calls {
            if let Err(error) = ask(&client, *call).await {
                check_error(&error, *call < QUESTIONS);
            }
        }
    };
    with_vmm(says, talk).await;
}

async fn ask(client: &FirecrackerClient, call: usize) -> Result<(), BackendError> {
    match call {
        0 => client.instance().await.map(|(_, version)| check_words(&version, 300)),
        1 => client.describe().await.map(|native| {
            let (config, unrepresented) = configuration(&native);
            check_description(&config, &unrepresented);
        }),
        _ => client.pause().await,
    }
}

/// Checks that any content of the file is summed once, and equally from every stop.
fn metrics(input: &[u8]) {
    let whole = summed(&[input]);
    let (begin, end) = input.split_at(input.len() / 2);
    let pieces = summed(&[begin, end]);
    match (whole, pieces) {
        (Ok(whole), Ok(pieces)) => assert_eq!(whole, pieces),
        (whole, pieces) => unreachable!("{whole:?} at once, {pieces:?} in two pieces"),
    }
}

/// Writes the pieces one after the other, and reads after each as another daemon would.
fn summed(pieces: &[&[u8]]) -> io::Result<MetricsSums> {
    let dir = tempfile::tempdir()?;
    let mut written = Vec::new();
    let mut sums = Ok(MetricsSums::default());
    for piece in pieces {
        written.extend_from_slice(piece);
        std::fs::write(dir.path().join(METRICS), &written)?;
        sums = fold(dir.path(), None);
    }
    if let Ok(sums) = &sums {
        assert_eq!(fold(dir.path(), None).ok().as_ref(), Some(sums), "read again, nothing is counted twice");
    }
    sums
}
