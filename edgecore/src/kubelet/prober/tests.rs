use std::sync::Mutex;

use skerry_proto::health::HealthCheckResponse;
use skerry_proto::health::health_server::{Health, HealthServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::runtime::connect;
use crate::runtime::fake::{ExecScript, FakeRuntime};
use crate::supervise;

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn here() -> Option<IpAddr> {
    Some(IpAddr::from([127, 0, 0, 1]))
}

fn container(port: u16) -> Container {
    serde_json::from_value(serde_json::json!({
        "name": "c",
        "env": [{ "name": "A", "value": "1" }, { "name": "B", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } }],
        "ports": [{ "name": "web", "containerPort": port }],
    }))
    .unwrap_or_default()
}

fn target(container: &Container) -> Target<'_> {
    Target { container_id: "id", container, pod_ip: here() }
}

fn probe(action: &serde_json::Value) -> Result<Probe, serde_json::Error> {
    serde_json::from_value(action.clone())
}

/// Answers one request per connection, and keeps what was asked.
async fn serve(answers: Vec<String>) -> io::Result<(u16, Arc<Mutex<Vec<String>>>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    let _server = supervise::spawn("test-http", async move {
        for answer in answers {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if stream.read_exact(&mut byte).await.is_err() {
                    break;
                }
                request.push(byte[0]);
            }
            if let Ok(mut seen) = seen.lock() {
                seen.push(String::from_utf8_lossy(&request).into_owned());
            }
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    Ok((port, asked))
}

fn answer(head: &str, body: &str) -> String {
    format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

fn nowhere() -> Result<Cri, connect::Error> {
    Ok(Cri::new(connect::channel("unix:///nowhere.sock")?))
}

#[tokio::test]
async fn http_follows_on_the_same_host_and_judges_by_the_last_status() -> Outcome {
    let cri = nowhere()?;
    let (port, asked) = serve(vec![
        answer("302 Found\r\nLocation: /b?c=d", ""),
        answer("204 No Content", ""),
        answer("500 Oops", "sorry"),
        answer("302 Found\r\nLocation: http://elsewhere.example/", "moved"),
    ])
    .await?;
    let container = container(port);
    let get = probe(&serde_json::json!({ "httpGet": { "port": "web", "path": "a b", "httpHeaders": [
        { "name": "Host", "value": "me.example" }, { "name": "X-A", "value": "1" }, { "name": "X-A", "value": "2" },
        { "name": "Accept", "value": "" },
    ] } }))?;
    assert_eq!(run(&cri, &target(&container), &get).await, Attempt::Success);
    let failure = Attempt::Failure("HTTP probe failed with statuscode: 500".into());
    assert_eq!(run(&cri, &target(&container), &get).await, failure);
    let warning = Attempt::Warning("Probe terminated redirects, Response body: moved".into());
    assert_eq!(run(&cri, &target(&container), &get).await, warning);

    let asked = asked.lock().map(|asked| asked.clone()).unwrap_or_default();
    assert!(asked[0].starts_with("GET /a%20b HTTP/1.1\r\n") && asked[1].starts_with("GET /b?c=d HTTP/1.1\r\n"));
    let first = asked[0].to_lowercase();
    for line in ["host: me.example", "x-a: 1", "x-a: 2", "user-agent: kube-probe/1.36", "connection: close"] {
        assert!(first.contains(&format!("{line}\r\n")), "{line} in {first}");
    }
    assert!(!first.contains("accept:"));
    Ok(())
}

#[tokio::test]
async fn nobody_there_is_a_failure_and_an_unknown_port_an_error() -> Outcome {
    let cri = nowhere()?;
    let port = TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port();
    let container = container(port);
    let tcp = probe(&serde_json::json!({ "tcpSocket": { "port": port } }))?;
    let text = format!("dial tcp 127.0.0.1:{port}: connect: connection refused");
    assert_eq!(run(&cri, &target(&container), &tcp).await, Attempt::Failure(text.clone()));
    let http = probe(&serde_json::json!({ "httpGet": { "port": "web" } }))?;
    let http_text = format!("Get \"http://127.0.0.1:{port}/\": {text}");
    assert_eq!(run(&cri, &target(&container), &http).await, Attempt::Failure(http_text));
    let other = probe(&serde_json::json!({ "tcpSocket": { "port": "db" } }))?;
    assert!(matches!(run(&cri, &target(&container), &other).await, Attempt::Error(_)));
    let homeless = Target { pod_ip: None, ..target(&container) };
    assert!(matches!(run(&cri, &homeless, &tcp).await, Attempt::Error(_)));

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let tcp = probe(&serde_json::json!({ "tcpSocket": { "port": listener.local_addr()?.port() } }))?;
    assert_eq!(run(&cri, &target(&container), &tcp).await, Attempt::Success);
    Ok(())
}

#[tokio::test]
async fn exec_by_exit_code_timeout_and_error() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (endpoint, fake) = FakeRuntime::start(dir.path())?;
    let cri = Cri::new(connect::channel(&endpoint)?);
    let container = container(1);
    let exec =
        probe(&serde_json::json!({ "exec": { "command": ["test", "$(A)", "$(B)", "$$(A)"] }, "timeoutSeconds": 2 }))?;
    fake.execs([
        ExecScript::Ends("", 0),
        ExecScript::Ends("not yet", 1),
        ExecScript::TimesOut,
        ExecScript::Fails("container is gone"),
    ]);
    assert_eq!(run(&cri, &target(&container), &exec).await, Attempt::Success);
    assert!(fake.calls().contains(&"ExecSync test 1 $(B) $(A)".to_owned()));
    assert_eq!(run(&cri, &target(&container), &exec).await, Attempt::Failure("not yet".into()));
    let text = "command timed out: \"test 1 $(B) $(A)\" timed out after 2s";
    assert_eq!(run(&cri, &target(&container), &exec).await, Attempt::Failure(text.into()));
    assert_eq!(run(&cri, &target(&container), &exec).await, Attempt::Error("container is gone".into()));
    Ok(())
}

struct Service;

#[tonic::async_trait]
impl Health for Service {
    async fn check(
        &self,
        request: tonic::Request<HealthCheckRequest>,
    ) -> Result<tonic::Response<HealthCheckResponse>, tonic::Status> {
        let status =
            if request.into_inner().service == "good" { ServingStatus::Serving } else { ServingStatus::NotServing };
        Ok(tonic::Response::new(HealthCheckResponse { status: status.into() }))
    }
}

#[tokio::test]
async fn grpc_health() -> Outcome {
    let cri = nowhere()?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let incoming = futures_util::stream::unfold(listener, |listener| async move {
        Some((listener.accept().await.map(|(stream, _)| stream), listener))
    });
    let _server = supervise::spawn("test-grpc", async move {
        let server = tonic::transport::Server::builder().add_service(HealthServer::new(Service));
        let _ = server.serve_with_incoming(incoming).await;
    });
    let container = container(port);
    let good = probe(&serde_json::json!({ "grpc": { "port": port, "service": "good" } }))?;
    assert_eq!(run(&cri, &target(&container), &good).await, Attempt::Success);
    let bad = probe(&serde_json::json!({ "grpc": { "port": port } }))?;
    let text = "service unhealthy (responded with \"NOT_SERVING\")";
    assert_eq!(run(&cri, &target(&container), &bad).await, Attempt::Failure(text.into()));
    Ok(())
}

#[tokio::test]
async fn https_trusts_anyone_and_tells_a_plain_server() -> Outcome {
    let cri = nowhere()?;
    let key = rcgen::generate_simple_self_signed(vec!["other.example".to_owned()])?;
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![key.cert.der().clone()],
            rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der())?,
        )?;
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let _server = supervise::spawn("test-https", async move {
        let Ok((stream, _)) = listener.accept().await else { return };
        let Ok(mut stream) = acceptor.accept(stream).await else { return };
        let mut request = [0; 1024];
        let _ = stream.read(&mut request).await;
        let _ = stream.write_all(answer("200 OK", "hi").as_bytes()).await;
        let _ = stream.shutdown().await;
    });
    let secure = container(port);
    let get = probe(&serde_json::json!({ "httpGet": { "port": "web", "scheme": "HTTPS" } }))?;
    assert_eq!(run(&cri, &target(&secure), &get).await, Attempt::Success);

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url: Uri = format!("https://{}/", listener.local_addr()?).parse()?;
    let _server = supervise::spawn("test-plain", async move {
        let Ok((mut stream, _)) = listener.accept().await else { return };
        // As a server does that is greeted in TLS.
        let _ = stream.read(&mut [0; 64]).await;
        let _ = stream.write_all(answer("400 Bad Request", "").as_bytes()).await;
        let _ = stream.shutdown().await;
    });
    assert!(matches!(fetch(&url, &HeaderMap::new()).await, Err(Failed::PlainHttp(_))));
    Ok(())
}

#[test]
fn redirects_resolve_like_links() -> Outcome {
    let from: Uri = "http://h:1/a/b?q".parse()?;
    for (location, to) in [
        ("/x", "http://h:1/x"),
        ("x", "http://h:1/a/x"),
        ("?y", "http://h:1/a/b?y"),
        ("//other/z", "http://other/z"),
        ("https://h:2/#f", "https://h:2/"),
    ] {
        assert_eq!(resolve(&from, location).map(|uri| uri.to_string()).as_deref(), Some(to));
    }
    assert_eq!(resolve(&from, "ftp://h/"), None);
    Ok(())
}
