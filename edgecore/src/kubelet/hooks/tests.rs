use k8s_openapi::api::core::v1::Container;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::runtime::connect;
use crate::runtime::fake::{ExecScript, FakeRuntime};
use crate::supervise;

type Outcome = Result<(), Box<dyn std::error::Error>>;

#[tokio::test]
async fn commands_and_their_failures() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (endpoint, fake) = FakeRuntime::start(dir.path())?;
    let cri = Cri::new(connect::channel(&endpoint)?);
    let container = Container::default();
    let target = Target { container_id: "id", container: &container, pod_ip: None };
    let handler: LifecycleHandler = serde_json::from_value(serde_json::json!({ "exec": { "command": ["a", "b"] } }))?;
    fake.execs([ExecScript::Ends("", 0), ExecScript::Ends("no", 3)]);
    assert_eq!(run(&cri, &target, &handler).await?, Ran::AsAsked);
    let Err(error) = run(&cri, &target, &handler).await else { return Err("it ran".into()) };
    assert_eq!(error.to_string(), "command \"a b\" exited with 3: no");
    let nothing = run(&cri, &target, &LifecycleHandler::default()).await;
    assert!(matches!(nothing, Err(Error::Invalid(_))));
    let sleep: LifecycleHandler = serde_json::from_value(serde_json::json!({ "sleep": { "seconds": 0 } }))?;
    assert_eq!(run(&cri, &target, &sleep).await?, Ran::AsAsked);
    Ok(())
}

#[tokio::test]
async fn any_answer_will_do_and_plain_http_is_tried_where_https_is_not_spoken() -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let _server = supervise::spawn("test-http", async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 2048];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await;
        }
    });
    let cri = Cri::new(connect::channel("unix:///nowhere.sock")?);
    let container = Container::default();
    let target = Target { container_id: "id", container: &container, pod_ip: Some([127, 0, 0, 1].into()) };
    for (scheme, ran) in [("HTTP", Ran::AsAsked), ("HTTPS", Ran::OverHttp)] {
        let handler = serde_json::from_value(serde_json::json!({ "httpGet": { "port": port, "scheme": scheme } }))?;
        assert_eq!(run(&cri, &target, &handler).await?, ran);
    }
    Ok(())
}
