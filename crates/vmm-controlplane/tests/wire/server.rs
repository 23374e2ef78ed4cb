//! The server under test, and a VmService that shows what reached it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::{ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures::{StreamExt as _, stream};
use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use vmm_controlplane::rpc::{self, Listener, RequestId, ServeError, ServeOptions};
use vmm_proto::v1 as pb;
use vmm_proto::v1::VmServiceExt as _;

/// A running server; it ends when this is dropped.
pub(crate) struct TestServer {
    pub(crate) addr: SocketAddr,
    pub(crate) options: ServeOptions,
    /// Told whenever a WaitVm call has reached its handler.
    pub(crate) waiting: Arc<Notify>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ServeError>>,
}

impl TestServer {
    pub(crate) async fn start() -> Self {
        Self::with(ServeOptions::default()).await
    }

    pub(crate) async fn with(options: ServeOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::on(vec![listener.into()], options).await
    }

    /// Serves on listeners of the test's own.
    pub(crate) async fn on(listeners: Vec<Listener>, options: ServeOptions) -> Self {
        let addr = listeners.iter().find_map(|listener| match listener {
            Listener::Tcp(listener) | Listener::Tls(listener, _) => listener.local_addr().ok(),
            Listener::Unix(_) => None,
        });
        let addr = addr.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)));
        let waiting = Arc::new(Notify::new());
        let router = Arc::new(Echo { waiting: Arc::clone(&waiting) }).register(connectrpc::Router::new());
        let pages = axum::Router::new()
            .route("/_/health", axum::routing::get(|| async { "{\"status\":\"healthy\"}" }))
            .route("/caller", axum::routing::get(caller))
            .route("/panic", axum::routing::get(page_that_panics));
        let (stop, stopped) = oneshot::channel::<()>();
        let served = options.clone();
        let task = tokio::spawn(async move {
            let shutdown = async {
                let _ = stopped.await;
            };
            rpc::serve(listeners, router, pages, served, shutdown).await
        });
        Self { addr, options, waiting, stop: Some(stop), task }
    }

    /// Gives the shutdown signal; the drain begins.
    pub(crate) fn begin_shutdown(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until the server has ended.
    pub(crate) async fn ended(mut self) {
        self.begin_shutdown();
        (&mut self.task).await.unwrap().unwrap();
    }

    pub(crate) fn uri(&self) -> http::Uri {
        format!("http://{}", self.addr).parse().unwrap()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Answers with the caller as events and the log name it.
async fn caller(request: axum::extract::Request) -> String {
    rpc::caller(request.extensions()).to_string()
}

async fn page_that_panics() -> &'static str {
    panic!("as the test wants it")
}

/// Answers with what it was sent. A vm_id of "panic", "invalid" or "many violations" gets what it says.
struct Echo {
    waiting: Arc<Notify>,
}

fn not_in_this_test<T>() -> ServiceResult<T> {
    Err(ConnectError::unimplemented("not part of this test"))
}

type Request<'a, T> = ServiceRequest<'a, T>;

#[allow(refining_impl_trait, reason = "the types of the answers are part of what is tested")]
impl pb::VmService for Echo {
    async fn create_vm(
        &self,
        ctx: RequestContext,
        request: Request<'_, pb::CreateVmRequest>,
    ) -> ServiceResult<pb::CreateVmResponse> {
        let request = request.to_owned_message();
        rpc::record_vm_id(&ctx, &request.vm_id);
        match request.vm_id.as_str() {
            "panic" => panic!("as the test wants it"),
            "many violations" => {
                return Err(rpc::error::invalid_argument((0..64).map(|n| {
                    (
                        format!("config.storage[{n}].path"),
                        format!("/srv/disks/disk-{n}.img does not exist on this host"),
                    )
                })));
            }
            "invalid" => {
                return Err(rpc::error::invalid_argument([
                    ("config.cpu.vcpu_count", "must be 1 or more"),
                    ("config.memory", "is required"),
                ]));
            }
            _ => {}
        }
        let report = |field: &str, message: String| pb::FieldReport {
            field: field.into(),
            message,
            ..Default::default()
        };
        let mut warnings = vec![
            report("size_bytes", request.config.memory.size_bytes.to_string()),
            report("kernel_path", request.config.boot.kernel_path.clone()),
            report("mode", request.config.restart_policy.mode.to_string()),
        ];
        warnings.extend(request.config.metadata.iter().map(|(key, value)| report(key, value.clone())));
        Response::ok(pb::CreateVmResponse {
            vm_id: request.vm_id,
            state: pb::VmState::Created.into(),
            uid: ctx.extensions().get::<RequestId>().unwrap().as_str().into(),
            warnings,
            ..Default::default()
        })
    }

    async fn get_vm_info(
        &self,
        _ctx: RequestContext,
        request: Request<'_, pb::GetVmInfoRequest>,
    ) -> ServiceResult<pb::GetVmInfoResponse> {
        Response::ok(pb::GetVmInfoResponse {
            vm_id: request.vm_id.into(),
            state: pb::VmState::Running.into(),
            config: pb::VmConfig {
                memory: pb::MemoryConfig { size_bytes: 1 << 31, ..Default::default() }.into(),
                ..Default::default()
            }
            .into(),
            backend_info: [("socket".to_owned(), "/run/x".to_owned())].into(),
            generation: 7,
            ..Default::default()
        })
    }

    async fn list_vms(
        &self,
        _ctx: RequestContext,
        request: Request<'_, pb::ListVmsRequest>,
    ) -> ServiceResult<pb::ListVmsResponse> {
        let request = request.to_owned_message();
        let filter = request.state_filter.iter().filter_map(buffa::EnumValue::as_known);
        let vms: Vec<_> = filter
            .map(|state| pb::VmInfo { vm_id: "vm-1".into(), state: state.into(), ..Default::default() })
            .collect();
        Response::ok(pb::ListVmsResponse {
            total_count: i32::try_from(vms.len()).unwrap(),
            next_page_token: request.page_token,
            vms,
            ..Default::default()
        })
    }

    async fn list_backends(
        &self,
        _ctx: RequestContext,
        _request: Request<'_, pb::ListBackendsRequest>,
    ) -> ServiceResult<pb::ListBackendsResponse> {
        let limits = [("vcpus".to_owned(), 32_i64)].into();
        let backend = pb::Backend { name: "firecracker".into(), limits, ..Default::default() };
        Response::ok(pb::ListBackendsResponse { backends: vec![backend], ..Default::default() })
    }

    async fn validate_vm(
        &self,
        _ctx: RequestContext,
        _request: Request<'_, pb::ValidateVmRequest>,
    ) -> ServiceResult<pb::ValidateVmResponse> {
        Response::ok(pb::ValidateVmResponse { ok: true, ..Default::default() })
    }

    /// Answers after `timeout_seconds`.
    async fn wait_vm(
        &self,
        _ctx: RequestContext,
        request: Request<'_, pb::WaitVmRequest>,
    ) -> ServiceResult<pb::WaitVmResponse> {
        self.waiting.notify_one();
        let seconds = u64::try_from(request.timeout_seconds).unwrap();
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        Response::ok(pb::WaitVmResponse { vm_id: request.vm_id.into(), ..Default::default() })
    }

    /// One event, then silence; or a panic.
    async fn watch_vms(
        &self,
        _ctx: RequestContext,
        request: Request<'_, pb::WatchVmsRequest>,
    ) -> ServiceResult<ServiceStream<pb::VmEvent>> {
        let panics = request.vm_id == "panic";
        let first = pb::VmEvent { token: "t1".into(), r#type: "synced".into(), ..Default::default() };
        let then =
            stream::poll_fn(
                move |_| if panics { panic!("as the test wants it") } else { std::task::Poll::Pending },
            );
        Response::stream_ok(stream::iter([Ok(first)]).chain(then))
    }

    async fn stream_console(
        &self,
        _ctx: RequestContext,
        request: Request<'_, pb::StreamConsoleRequest>,
    ) -> ServiceResult<ServiceStream<pb::StreamConsoleResponse>> {
        let offset = request.offset.unwrap_or(-1);
        let piece = pb::StreamConsoleResponse { offset, data: "boot\n".into(), ..Default::default() };
        Response::stream_ok(stream::iter([Ok(piece)]))
    }

    async fn delete_vm(
        &self,
        ctx: RequestContext,
        request: Request<'_, pb::DeleteVmRequest>,
    ) -> ServiceResult<pb::DeleteVmResponse> {
        rpc::require_force(&ctx, request.force)?;
        Response::ok(pb::DeleteVmResponse { success: true, ..Default::default() })
    }

    async fn boot_vm(
        &self,
        _ctx: RequestContext,
        _request: Request<'_, pb::BootVmRequest>,
    ) -> ServiceResult<pb::BootVmResponse> {
        not_in_this_test()
    }

    async fn shutdown_vm(
        &self,
        _ctx: RequestContext,
        _request: Request<'_, pb::ShutdownVmRequest>,
    ) -> ServiceResult<pb::ShutdownVmResponse> {
        not_in_this_test()
    }

    async fn pause_vm(
        &self,
        _ctx: RequestContext,
        _request: Request<'_, pb::PauseVmRequest>,
    ) -> ServiceResult<pb::PauseVmResponse> {
        not_in_this_test()
    }

    async fn resume_vm(
        &self,
        _ctx: RequestContext,
        _request: Request<'_, pb::ResumeVmRequest>,
    ) -> ServiceResult<pb::ResumeVmResponse> {
        not_in_this_test()
    }

    async fn update_vm(
        &self,
        _ctx: RequestContext,
        _request: Request<'_, pb::UpdateVmRequest>,
    ) -> ServiceResult<pb::UpdateVmResponse> {
        not_in_this_test()
    }

    async fn reboot_vm(
        &self,
        _ctx: RequestContext,
        _request: Request<'_, pb::RebootVmRequest>,
    ) -> ServiceResult<pb::RebootVmResponse> {
        not_in_this_test()
    }

    async fn list_vm_events(
        &self,
        _ctx: RequestContext,
        _request: Request<'_, pb::ListVmEventsRequest>,
    ) -> ServiceResult<pb::ListVmEventsResponse> {
        not_in_this_test()
    }

    async fn write_console(
        &self,
        _ctx: RequestContext,
        _request: Request<'_, pb::WriteConsoleRequest>,
    ) -> ServiceResult<pb::WriteConsoleResponse> {
        not_in_this_test()
    }
}
