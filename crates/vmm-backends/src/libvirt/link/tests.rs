use super::*;

const WITHIN: Duration = Duration::from_secs(2);

#[tokio::test(start_paused = true)]
async fn a_call_that_the_helper_does_not_take_in_time_says_nothing_about_the_vm() {
    let link = LibvirtLink::new("test:///full".to_owned(), PathBuf::new());
    let (sender, mut queue) = mpsc::channel::<Vec<u8>>(1);
    sender.try_send(Vec::new()).unwrap();
    link.inner.connected("libvirt".to_owned(), "QEMU".to_owned(), sender);
    // No helper is started, because the task of the link is there already.
    link.task.set(tokio::spawn(std::future::pending::<()>()).abort_handle()).unwrap();
    let error = link.call(Call::List, WITHIN).await.unwrap_err();
    assert!(matches!(error, CallError::Full { timeout: WITHIN, .. }), "{error:?}");
    assert!(lock(&link.inner.pending).is_empty(), "the call waits for no answer");
    assert!(!link.inner.hangs.load(Ordering::Relaxed), "a full queue is no helper that hangs");
    let error = BackendError::from(error);
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Host, Effect::NotApplied));
    assert_eq!(error.kind.contact(), vmm_core::backend::ContactProof::None);
    assert!(error.to_string().contains("too many calls wait for it"), "{error}");
    // The next call has its turn when the helper reads again.
    queue.recv().await.unwrap();
    let calling = link.call(Call::List, WITHIN);
    let answering = async {
        let line = queue.recv().await.unwrap();
        let CallRequest { id, .. } = serde_json::from_slice(&line).unwrap();
        link.inner.answered(id, Some(CallResult::Domains { domains: Vec::new() }), None);
    };
    assert!(tokio::join!(calling, answering).0.is_ok());
}

#[test]
fn a_call_that_the_helper_refuses_because_it_is_busy_says_nothing_about_the_vm() {
    let failure = CallFailure { kind: CallFailureKind::Busy, message: "64 calls wait".to_owned() };
    let error = BackendError::from(CallError::Failed(failure));
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Host, Effect::NotApplied));
}
