//! Health and metrics for operators, on an address of their own, plain HTTP.
//!
//! It answers from the first second on, so that a cloudcore that waits for its apiserver is not taken for a dead one.

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::supervise::Tasks;

const MAX_CONNECTIONS: usize = 32;
const PATIENCE: Duration = Duration::from_secs(10);

/// What there is to tell.
#[derive(Default)]
pub struct Status {
    running: OnceLock<Running>,
}

struct Running {
    registry: Registry,
    ready: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Status {
    /// Starting is over.
    pub fn running(&self, registry: Registry, ready: impl Fn() -> bool + Send + Sync + 'static) {
        // Only the first call counts; there is one.
        drop(self.running.set(Running { registry, ready: Box::new(ready) }));
    }

    fn answer(&self, method: &Method, path: &str) -> (StatusCode, &'static str, String) {
        const TEXT: &str = "text/plain; charset=utf-8";
        if method != Method::GET && method != Method::HEAD {
            return (StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET is answered here\n".to_owned());
        }
        match (path, self.running.get()) {
            ("/healthz", _) => (StatusCode::OK, TEXT, "ok\n".to_owned()),
            ("/readyz" | "/metrics", None) => {
                (StatusCode::SERVICE_UNAVAILABLE, TEXT, "starting: waiting for the apiserver\n".to_owned())
            }
            ("/readyz", Some(running)) if (running.ready)() => (StatusCode::OK, TEXT, "ok\n".to_owned()),
            ("/readyz", Some(_)) => {
                (StatusCode::SERVICE_UNAVAILABLE, TEXT, "the caches are not complete yet\n".to_owned())
            }
            ("/metrics", Some(running)) => {
                let mut text = String::new();
                match prometheus_client::encoding::text::encode(&mut text, &running.registry) {
                    Ok(()) => (StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", text),
                    Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, TEXT, "the metrics cannot be written\n".to_owned()),
                }
            }
            _ => (StatusCode::NOT_FOUND, TEXT, "cloudcore: /healthz, /readyz and /metrics are here; those of a node at the port that its Node names, and of its devices there at /metrics/devices\n".to_owned()),
        }
    }
}

/// Serves until told to stop.
pub async fn serve(listener: TcpListener, status: Arc<Status>, stop: CancellationToken) {
    let mut connections = Tasks::new("admin connection");
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            () = connections.reap() => continue,
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    debug!("cannot accept on the admin address: {error}");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            },
        };
        let status = Arc::clone(&status);
        connections.spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let (code, kind, body) = status.answer(request.method(), request.uri().path());
                let mut response = Response::new(Full::new(Bytes::from(body)));
                *response.status_mut() = code;
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
                std::future::ready(Ok::<_, Infallible>(response))
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .max_buf_size(16 << 10)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            let _ = tokio::time::timeout(PATIENCE, connection).await;
        });
    }
    connections.drain(Duration::from_millis(500)).await;
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use skerry_proto::mux::Class;

    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn health_readiness_and_metrics() {
        let status = Status::default();
        let code = |path: &str| status.answer(&Method::GET, path).0.as_u16();
        assert_eq!((code("/healthz"), code("/readyz"), code("/metrics"), code("/x")), (200, 503, 503, 404));

        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        metrics.session_start("ok");
        skerry_proto::transport::Meter::received(&metrics, Some(Class::Ops), 7);
        crate::apiserver::Metrics::new(&mut registry).report("pod", "taken");
        let ready = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&ready);
        status.running(registry, move || asked.load(Ordering::SeqCst));
        assert_eq!(code("/readyz"), 503);
        ready.store(true, Ordering::SeqCst);
        assert_eq!(code("/readyz"), 200);
        let text = status.answer(&Method::GET, "/metrics").2;
        for line in [
            "skerry_sessions 0",
            "skerry_session_starts_total{result=\"ok\"} 1",
            "skerry_bytes_total{direction=\"in\",class=\"ops\"} 7",
            "skerry_bytes_total{direction=\"out\",class=\"control\"} 0",
            "skerry_reports_total{kind=\"pod\",result=\"taken\"} 1",
            "process_resident_memory_bytes ",
        ] {
            assert!(text.contains(line), "{line} is not in:\n{text}");
        }
        let mut families: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let all = families.len();
        families.sort_unstable();
        families.dedup();
        assert_eq!(families.len(), all, "two parts registered a metric of one name");
        assert_eq!(status.answer(&Method::POST, "/metrics").0, StatusCode::METHOD_NOT_ALLOWED);
    }
}
