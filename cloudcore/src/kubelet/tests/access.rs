//! Who is let through.

use super::*;

#[tokio::test]
async fn who_is_not_known_gets_a_401() {
    let bed = Bed::start().await;
    let _edge = bed.connect("box-1", 1);
    let port = bed.port("box-1");
    bed.admin("box-1");
    let stranger = Ca::new("cluster").client("apiserver", "system:masters");
    let wrong = Shows { token: Some("wrong".to_owned()), ..Shows::default() };
    for shows in [Shows::default(), stranger, wrong] {
        assert_eq!(bed.get(port, &shows, "/metrics").await, (401, "Unauthorized".to_owned()));
    }
    assert_eq!(bed.script.access_reviews.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_certificate_of_the_clusters_ca_names_its_user() {
    let bed = Bed::start().await;
    let edge = bed.connect("box-1", 1);
    let port = bed.port("box-1");
    let admin = bed.admin("box-1");
    assert_eq!(bed.get(port, &admin, "/metrics").await, (200, "box-1".to_owned()));
    assert_eq!(bed.get(port, &admin, "/metrics/../exec").await.0, 400);
    let eve = bed.clients.client("eve", "devs");
    assert_eq!(
        bed.get(port, &eve, "/containerLogs/ns/pod/c").await,
        (403, "Forbidden (user=eve, verb=get, resource=nodes, subresource(s)=[proxy])\n".to_owned())
    );
    // What a kubelet may be asked for more finely is asked both ways.
    assert_eq!(bed.get(port, &eve, "/pods").await.0, 403);
    bed.allow("carol", "box-1", "get", "proxy");
    let carol = bed.clients.client("carol", "devs");
    assert_eq!(bed.get(port, &carol, "/pods").await.0, 200);
    assert_eq!(bed.get(port, &carol, "/metrics").await.0, 403, "proxy is not metrics");
    until("no stream is left", || edge.open() == 0).await;
}

#[tokio::test]
async fn who_may_call_methods_of_a_device_may_nothing_else() {
    let bed = Bed::start().await;
    let _edge = bed.connect("box-1", 1);
    let port = bed.port("box-1");
    bed.allow("button", "plant/press", "create", "methods");
    let button = bed.clients.client("button", "devs");
    let mut client = bed.client(port, &button).await;
    for (path, code) in [
        ("/devices/plant/press/methods/start", 200),
        ("/devices/plant/press/properties/level", 403),
        ("/devices/plant/saw/methods/start", 403),
        ("/devices/elsewhere/press/methods/start", 403),
        ("/devices/plant%2fpress/methods/start", 403),
        ("/exec/plant/press/c", 403),
    ] {
        let posted = client.send(Request::post(path).body(nothing()).unwrap()).await;
        assert_eq!(posted.status().as_u16(), code, "{path}");
        whole(posted).await.unwrap();
        if code != 200 {
            client = bed.client(port, &button).await;
        }
    }
    assert_eq!(bed.get(port, &button, "/devices/plant/press").await.0, 403);
    let panel = bed.clients.client("panel", "devs");
    bed.allow("panel", "plant/press", "get", "values");
    for of in ["", "/properties/level/history"] {
        assert_eq!(bed.get(port, &panel, &format!("/devices/plant/press{of}")).await.0, 200);
    }
    assert_eq!(bed.get(port, &panel, "/devices").await.0, 403, "all devices are not one");
}

#[tokio::test]
async fn a_client_ca_that_changes_is_the_one_that_counts() {
    let bed = Bed::start().await;
    let _edge = bed.connect("box-1", 1);
    let port = bed.port("box-1");
    let before = bed.admin("box-1");
    let mut kept = bed.client(port, &before).await;
    assert_eq!(whole(kept.get("/metrics").await).await.unwrap(), b"box-1");
    let next = Ca::new("next");
    bed.authorities.set(Some(&next.pem));
    assert_eq!(kept.get("/metrics").await.status(), 401, "also on a connection that stands");
    assert_eq!(bed.get(port, &next.client("apiserver", "x"), "/metrics").await.0, 200);
    bed.authorities.set(Some(&format!("{}{}", bed.clients.pem, next.pem)));
    assert_eq!(bed.get(port, &before, "/metrics").await.0, 200);
    bed.authorities.set(None);
    assert_eq!(bed.get(port, &before, "/metrics").await.0, 401);
}

#[tokio::test]
async fn a_token_is_reviewed_once_for_some_time() {
    let bed = Bed::start().await;
    let _edge = bed.connect("box-1", 1);
    let port = bed.port("box-1");
    bed.script.tokens.lock().unwrap().insert("t0ken".to_owned(), "prometheus".to_owned());
    bed.allow("prometheus", "box-1", "get", "metrics");
    let shows = Shows { token: Some("t0ken".to_owned()), ..Shows::default() };
    for _ in 0..3 {
        assert_eq!(bed.get(port, &shows, "/metrics/cadvisor").await.0, 200);
        assert_eq!(bed.get(port, &shows, "/stats/summary").await.0, 403);
    }
    let asked = |count: &AtomicUsize| count.load(Ordering::SeqCst);
    assert_eq!((asked(&bed.script.token_reviews), asked(&bed.script.access_reviews)), (1, 2));
    // A token that counts stands in for a certificate that does not.
    let both = Shows { token: shows.token.clone(), ..Ca::new("other").client("x", "y") };
    assert_eq!(bed.get(port, &both, "/metrics").await.0, 200);
}

#[tokio::test]
async fn what_the_apiserver_does_not_say_is_not_allowed() {
    let bed = Bed::start().await;
    let edge = bed.connect("box-1", 1);
    let port = bed.port("box-1");
    let admin = bed.admin("box-1");
    bed.script.away.store(true, Ordering::SeqCst);
    let token = Shows { token: Some("t0ken".to_owned()), ..Shows::default() };
    for shows in [&admin, &token] {
        let (code, said) = bed.get(port, shows, "/metrics").await;
        assert!(code == 503 && said.contains("cannot make sure") && said.contains("connection refused"), "{said}");
    }
    // kubectl logs shows what a 502 says, and of a 503 nothing.
    assert_eq!(bed.get(port, &admin, "/containerLogs/ns/pod/c").await.0, 502);
    bed.script.away.store(false, Ordering::SeqCst);
    assert_eq!(bed.get(port, &admin, "/metrics").await.0, 200, "nothing of it is remembered");
    assert_eq!(edge.open.load(Ordering::SeqCst), 0);

    let unknown = Arc::new(ClientAuthorities::default());
    let chain = [admin.certificate.clone().unwrap().0];
    let asked = authn::Authenticator::new(unknown, Arc::new(FakeReviews(Arc::default())));
    let error = asked.user(&chain, &hyper::HeaderMap::new()).await.unwrap_err();
    assert!(error.to_string().contains("not known yet"), "{error}");
}
