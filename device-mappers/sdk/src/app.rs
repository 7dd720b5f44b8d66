//! The process: arguments, sockets, tasks, and their end.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use skerry_proto::authority::Legal;
use skerry_proto::dmi;
use skerry_proto::dmi::device_mapper_service_server::DeviceMapperServiceServer;
use skerry_proto::dmi::extensions::device_method_service_server::DeviceMethodServiceServer;
use skerry_proto::footprint;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

use crate::counters::COUNTERS;
use crate::directory::Directory;
use crate::driver::Driver;
use crate::report::Reports;
use crate::service::Service;
use crate::sink::Sinks;
use crate::{session, task};

/// A device and its model, as edgecore sends them.
const LARGEST_REQUEST: usize = 4 << 20;

#[derive(Debug, Parser)]
#[command(about = "A device mapper: runs the devices that edgecore has for its protocol.")]
struct Arguments {
    /// edgecore's socket.
    #[arg(long, default_value = "/etc/kubeedge/dmi.sock")]
    dmi_socket: PathBuf,
    /// This mapper's own socket; edgecore has to see it at the same path. Default: beside edgecore's, NAME.sock.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// What it registers as; two mappers of one protocol need two names. Default: skerry-mapper-PROTOCOL.
    #[arg(long)]
    name: Option<String>,
    /// The protocol whose devices it runs, if manifests call it something else.
    #[arg(long)]
    protocol: Option<String>,
    /// Where values wait for sinks that are away. Default: /var/lib/skerry/mappers/NAME.
    #[arg(long)]
    store: Option<PathBuf>,
    /// The most that waits there for one sink, MiB; then the oldest is dropped.
    #[arg(long, default_value_t = 64)]
    store_mib: u32,
    /// Serves /healthz and Prometheus /metrics on this address and port.
    #[arg(long)]
    metrics: Option<std::net::SocketAddr>,
}

/// The whole of a mapper's `main`.
pub fn run<D: Driver>(driver: D) -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_max_level(tracing::Level::INFO).init();
    let _ = rustls::crypto::ring::default_provider().install_default();
    // One thread for everything that waits, and few that come and go for files.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .thread_keep_alive(Duration::from_secs(2))
        .build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(serve(driver, arguments)),
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve<D: Driver>(driver: D, arguments: Arguments) -> anyhow::Result<()> {
    let protocol = arguments.protocol.unwrap_or_else(|| driver.protocol().to_owned());
    let name = arguments.name.unwrap_or_else(|| format!("skerry-mapper-{}", driver.protocol()));
    let socket = match arguments.socket {
        Some(socket) => socket,
        None => arguments.dmi_socket.with_file_name(format!("{name}.sock")),
    };
    let store = arguments.store.unwrap_or_else(|| Path::new("/var/lib/skerry/mappers").join(&name));
    let listener = listen(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;

    let reports = Arc::new(Reports::new());
    let sinks = Sinks::new(store, u64::from(arguments.store_mib) << 20);
    let directory = Arc::new(Directory::new(driver, Arc::clone(&reports), Arc::clone(&sinks)));
    let info = dmi::MapperInfo {
        name,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        api_version: "v1beta1".to_owned(),
        protocol,
        address: socket.as_os_str().as_encoded_bytes().to_vec(),
        state: "ok".to_owned(),
    };
    if let Some(address) = arguments.metrics {
        let metrics = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        task::spawn("metrics", serve_metrics(metrics));
    }
    let sending = Arc::clone(&reports);
    task::spawn("reports", async move { sending.run().await });
    let service = Arc::clone(&directory);
    task::spawn("dmi", serve_dmi(listener, service));
    let (registered, dmi_socket) = (Arc::clone(&directory), arguments.dmi_socket);
    task::spawn("session", async move { session::run(&dmi_socket, info, registered, reports).await });

    task::spawn("footprint", footprint::settle());

    let (mut terminated, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminated.recv() => {}
        _ = interrupted.recv() => {}
    }
    info!("ending");
    directory.clear();
    sinks.close().await;
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

/// A socket for this user only. One that was left behind is replaced, one that answers is not.
fn listen(socket: &Path) -> anyhow::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        anyhow::bail!("another process listens there: give this one another --name or --socket");
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn serve_dmi<D: Driver>(listener: UnixListener, directory: Arc<Directory<D>>) {
    let connections = futures_util::stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await.map(|(stream, _)| Legal::new(stream));
        if accepted.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Some((accepted, listener))
    });
    let mapper = DeviceMapperServiceServer::new(Service(Arc::clone(&directory)));
    let methods = DeviceMethodServiceServer::new(Service(directory));
    let served = tonic::transport::Server::builder()
        .add_service(mapper.max_decoding_message_size(LARGEST_REQUEST))
        .add_service(methods.max_decoding_message_size(LARGEST_REQUEST))
        .serve_with_incoming(connections)
        .await;
    if let Err(error) = served {
        tracing::error!(error = session::chain(&error), "the socket is not served any more");
    }
}

/// Two paths and no more: not worth a server.
async fn serve_metrics(listener: TcpListener) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let mut request = [0; 1024];
        let read = tokio::time::timeout(Duration::from_secs(1), stream.read(&mut request)).await;
        let request = read.ok().and_then(Result::ok).and_then(|length| request.get(..length)).unwrap_or_default();
        let (status, body) = if request.starts_with(b"GET /metrics ") {
            ("200 OK", COUNTERS.render())
        } else if request.starts_with(b"GET /healthz ") {
            match COUNTERS.registered.value() {
                1 => ("200 OK", "registered\n".to_owned()),
                _ => ("503 Service Unavailable", "not registered with edgecore\n".to_owned()),
            }
        } else {
            ("404 Not Found", "there are /healthz and /metrics\n".to_owned())
        };
        let length = body.len();
        let answer = format!(
            "HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        );
        let _ = tokio::time::timeout(Duration::from_secs(1), stream.write_all(answer.as_bytes())).await;
    }
}
