//! The life of the daemon, from its configuration to its end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::Instrument as _;
use vmm_host::descriptors;
use vmm_host::lock::StateLock;
use vmm_proto::v1::VmServiceExt as _;
use vmm_service::{DefaultBoot, Settings, VmService};
use vmm_store::SqliteStore;

use crate::api::VmHandlers;
use crate::backends::backends;
use crate::config::{DaemonConfig, LoadedConfig, is_loopback};
use crate::health;
use crate::metrics::{self, Metrics};
use crate::notify::ServiceManager;
use crate::operator;
use crate::rpc::{self, HostPolicy, Listener, ServeOptions, TlsServer, UnixSocket};
use crate::runtime_dir;
use crate::service_unit;

/// The longest time after the signal in which operations whose clients have left may end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves until SIGTERM or SIGINT. The VMs go on running after that.
///
/// # Errors
///
/// Another daemon holds the state directory, the state directory is unusable, or the address cannot
/// be bound.
pub async fn run(loaded: LoadedConfig) -> anyhow::Result<()> {
    for warning in &loaded.warnings {
        tracing::warn!(detail = %warning, "the configuration has a problem");
    }
    // The limit on open files is raised before anything is opened and before any VMM is started,
    // because VMMs inherit it. The signal handlers come next, so that a signal during the start
    // stops the daemon in the regular way: it is kept until `stop` is awaited.
    let connections = connections();
    let stop = stop_signal()?;
    let manager = Arc::new(ServiceManager::of_this_process());
    // The lock keeps a second daemon from this state directory, so it is taken before anything
    // there is read. It is declared before the store and is therefore released after it. The
    // address is bound before the service starts, so that an address in use ends the program before
    // any VM is touched. Clients that connect meanwhile wait in the backlog of the socket.
    let _lock = StateLock::acquire(&loaded.config.state_dir)?;
    let listeners = bind(&loaded.config).await?;
    let (metrics_listener, no_metrics) = metrics::bind(&loaded).await?;
    let metrics = Metrics::new();
    let config = loaded.config;
    let store = SqliteStore::open(&config.state_dir)
        .with_context(|| format!("the state in {} cannot be opened", config.state_dir.display()))?;
    // The runtime directory is signed before the service starts, because the service makes run
    // folders there. `VmService::start` then takes over the VMs that are on record.
    runtime_dir::sign(&config, store.instance());
    let store = Arc::new(store);
    let backends = backends(&config, &metrics.decorate_backends());
    let service =
        VmService::start(metrics.measured_store(Arc::clone(&store) as _), backends, settings(&config))
            .await?;

    let address = tcp_address(&listeners)?;
    let commit = (!crate::COMMIT.is_empty()).then_some(crate::COMMIT);
    tracing::info!(
        address = address.map(tracing::field::display),
        socket = config.socket.as_ref().map(|socket| tracing::field::display(socket.path.display())),
        version = crate::VERSION,
        commit,
        backend = config.default_backend.as_str(),
        "serving"
    );
    let router = Arc::new(VmHandlers::new(service.clone())).register(connectrpc::Router::new());
    let exposed = address.and_then(|address| exposure(address, &config));
    let pages = health::pages(service.clone(), exposed.into_iter().chain(no_metrics).collect());
    // Looking for leftovers reads the whole host and takes time, so it runs beside the daemon. It
    // only writes to the log.
    let healthy = service.clone();
    tokio::spawn(operator::report_leftovers(config.clone()).instrument(tracing::info_span!("leftovers")));
    tokio::spawn(service_unit::report_dangers());
    let options = ServeOptions {
        host_policy: HostPolicy::Known(config.allowed_hosts.clone()),
        call_meter: Some(metrics.call_meter()),
        is_healthy: Some(Arc::new(move || health::problem(&healthy).is_none())),
        ..connections
    };
    let page = metrics.page(service.clone(), config.otel.prometheus_vms);
    let page = metrics_listener.map(|listener| tokio::spawn(page.serve(listener)));
    // The service manager gets "ready" when the socket is bound and the VMs are known. A call that
    // arrives from now on is answered.
    manager.ready();
    let alive = tokio::spawn({
        let manager = Arc::clone(&manager);
        async move { manager.stay_alive().await }
    });
    let stop = async {
        stop.await;
        manager.stopping();
    };
    // `serve` returns when the calls are answered or cut. An operation runs in a task of its own
    // and outlives its call, so the service is drained afterwards. The watchdog is served until
    // that drain is over, because the drain may last longer than the watchdog's interval.
    rpc::serve(listeners, router, pages, options, stop).await?;

    match service.drain(DRAIN_TIMEOUT).await {
        0 => tracing::info!("the daemon has stopped; the VMs go on running"),
        left => tracing::warn!(
            left,
            "the daemon has stopped with operations in progress; the next start finishes them"
        ),
    }
    alive.abort();
    if let Some(page) = page {
        page.abort();
    }
    // Closing the database writes the changes that are still queued. The next daemon then finds an
    // empty log and no lock.
    if let Err(error) = store.close().await {
        tracing::warn!(%error, "the database was not closed; the next start takes up its log");
    }
    Ok(())
}

fn settings(config: &DaemonConfig) -> Settings {
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
    };
    Settings {
        runtime_dir: config.runtime_dir.clone(),
        default_boot: DefaultBoot {
            kernel: path(&config.defaults.kernel),
            initrd: path(&config.defaults.initrd),
            kernel_args: config.defaults.kernel_args.clone().unwrap_or_default(),
        },
        metrics_interval: config.metrics_interval,
        event_retention: config.event_retention,
        console_history: config.console_history,
        spare_vmms: config.spare_vmms,
    }
}

/// Raises the limit on descriptors, and derives the number of connections from it.
///
/// VMMs inherit the raised limit. A VMM with many vCPUs, disks and queues needs it too. High
/// descriptor numbers are a danger only for `select`, which none of the three hypervisors uses.
fn connections() -> ServeOptions {
    let limit = match descriptors::raise_limit() {
        Ok((before, now)) => {
            tracing::debug!(before, now, "the soft limit on open files was raised to the hard limit");
            now
        }
        Err(error) => {
            tracing::warn!(%error, "the limit on open files cannot be raised");
            descriptors::limit()
        }
    };
    let max_connections = usize::try_from(descriptors::for_clients(limit)).unwrap_or(usize::MAX);
    ServeOptions {
        max_connections,
        max_connections_per_peer: max_connections.div_ceil(4),
        ..ServeOptions::default()
    }
}

/// Opens every listener of the configuration.
async fn bind(config: &DaemonConfig) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    if let Some(listen) = &config.listen {
        let listener = TcpListener::bind((listen.host.as_str(), listen.port)).await.with_context(|| {
            format!("cannot listen on {listen}; set UNKEY_VMCP_ADDRESS and UNKEY_VMCP_PORT to an address of this host and a free port")
        })?;
        listeners.push(match &config.tls {
            Some(files) => Listener::Tls(listener, TlsServer::load(files.clone())?),
            None => Listener::Tcp(listener),
        });
    }
    if let Some(socket) = &config.socket {
        listeners.push(Listener::Unix(UnixSocket::bind(socket)?));
    }
    Ok(listeners)
}

/// Returns the address of the listener on TCP, if there is one.
fn tcp_address(listeners: &[Listener]) -> std::io::Result<Option<SocketAddr>> {
    let address = listeners.iter().find_map(|listener| match listener {
        Listener::Tcp(listener) | Listener::Tls(listener, _) => Some(listener.local_addr()),
        Listener::Unix(_) => None,
    });
    address.transpose()
}

/// Returns the warning of the health page for an address that other hosts can reach without a client
/// certificate.
fn exposure(address: SocketAddr, config: &DaemonConfig) -> Option<String> {
    warning_of_exposure(address).filter(|_| !config.demands_certificates())
}

fn warning_of_exposure(address: SocketAddr) -> Option<String> {
    (!is_loopback(address.ip()))
        .then(|| format!("{address} is reachable from other hosts, and no caller is authenticated"))
}

/// Returns a future that ends at the first SIGTERM or SIGINT. A second signal ends the process at
/// once.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be watched")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be watched")?;
    Ok(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(
            signal = name,
            "the daemon stops: new calls are refused, and calls in progress may end"
        );
        tokio::spawn(async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            tracing::warn!("the daemon stops at once, because a second signal came");
            std::process::exit(130);
        });
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_ipv4_loopback_address_is_not_exposed() {
        for (address, is_exposed) in [
            ("127.0.0.1:1", false),
            ("[::1]:1", false),
            ("[::ffff:127.0.0.1]:1", false),
            ("0.0.0.0:1", true),
            ("[::ffff:192.0.2.1]:1", true),
        ] {
            assert_eq!(warning_of_exposure(address.parse().unwrap()).is_some(), is_exposed, "{address}");
        }
    }
}
