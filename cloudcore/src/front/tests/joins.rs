//! Who becomes a node, and who hears why not.

use super::*;

#[tokio::test]
async fn a_box_joins_again_and_renews() {
    let cloud = Cloud::start().await;
    let (status, ca) = cloud.exchange(None, "GET /v1/ca HTTP/1.1", b"").await;
    assert_eq!((status, ca), (200, cloud.authority().pem().as_bytes().to_vec()));

    let token = cloud.token(TokenSpec { ttl: Duration::from_secs(60), uses: Some(1), node: None }).await.to_string();
    let mut identity = Identity::new();
    let first = cloud.join(&token, &request("box-1", &identity)).await.unwrap();
    let node = |pem: &str| node_of(&CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap().node;
    assert_eq!(node(&first.certificate), NodeIdentity { name: "box-1".to_owned(), uid: "uid-of-box-1".to_owned() });
    assert_eq!(first.ca, cloud.authority().pem());
    cloud.join(&token, &request("box-1", &identity)).await.expect("the same box, interrupted, joins again");

    identity.certificate = Some(first.certificate.clone());
    let body = serde_json::json!({ "csr": Identity::new().csr() }).to_string();
    let renew = "POST /v1/renew HTTP/1.1";
    let renewed: JoinResponse = cloud.post(Some(&identity), renew, body.as_bytes()).await.unwrap();
    assert_eq!(node(&renewed.certificate), node(&first.certificate));

    let refused =
        |answer: Result<JoinResponse, (u16, Refusal)>| answer.map_err(|(status, no)| (status, no.reason)).unwrap_err();
    assert_eq!(refused(cloud.post(None, renew, body.as_bytes()).await), (401, "certificate_required".to_owned()));
    cloud.script().away = true;
    assert_eq!(
        refused(cloud.post(Some(&identity), renew, body.as_bytes()).await),
        (503, "apiserver_unavailable".to_owned())
    );
    cloud.script().away = false;
    cloud.script().nodes.clear();
    assert_eq!(refused(cloud.post(Some(&identity), renew, body.as_bytes()).await), (403, "node_deleted".to_owned()));
}

#[tokio::test]
async fn every_refusal_of_a_join_says_what_and_what_to_do() {
    let cloud = Cloud::start().await;
    let identity = Identity::new();
    let good = cloud.any_token().await;
    let ttl = Duration::from_secs(3600);
    let used = cloud.token(TokenSpec { ttl, uses: Some(1), node: None }).await;
    cloud.join(&used.to_string(), &request("box-1", &identity)).await.unwrap();
    let bound = cloud.token(TokenSpec { ttl, uses: None, node: Some("box-7".to_owned()) }).await;
    let expired = {
        let past = clock::wall().checked_sub(Duration::from_secs(7200)).unwrap();
        let spec = TokenSpec { ttl, uses: None, node: None };
        cloud.front.tokens.create(&spec, [0; 32], past).await.unwrap().0
    };
    let revoked = cloud.any_token().await;
    cloud.front.tokens.revoke(&revoked.id).await.unwrap();
    let forged = JoinToken { secret: "0".repeat(32), ..good.clone() };
    cloud.script().foreign.push("master".to_owned());

    let on = |name: &str| request(name, &identity);
    let labelled = |key: &str| {
        let mut request = on("box-2");
        request.labels.insert(key.to_owned(), String::new());
        request
    };
    let good = good.to_string();
    let cases = [
        (401, "token_malformed", "skerry.x".to_owned(), on("box-2"), "copy the whole token"),
        (401, "token_unknown", forged.to_string(), on("box-2"), "token create"),
        (401, "token_unknown", revoked.to_string(), on("box-2"), "token create"),
        (403, "token_expired", expired.to_string(), on("box-2"), "token create"),
        (403, "token_used_up", used.to_string(), on("box-2"), "token create"),
        (403, "token_other_node", bound.to_string(), on("box-2"), "--node-name box-7"),
        (422, "name_invalid", good.clone(), on("Box_2"), "--node-name"),
        (
            409,
            "name_taken",
            good.clone(),
            JoinRequest { machine_id: "other".to_owned(), ..on("box-1") },
            "kubectl delete node",
        ),
        (409, "name_not_edge", good.clone(), on("master"), "another name"),
        (
            422,
            "machine_id_invalid",
            good.clone(),
            JoinRequest { machine_id: String::new(), ..on("box-2") },
            "/etc/machine-id",
        ),
        (422, "label_refused", good.clone(), labelled("node-role.kubernetes.io/control-plane"), "kubectl label"),
        (422, "csr_invalid", good.clone(), JoinRequest { csr: "x".to_owned(), ..on("box-2") }, "PEM"),
    ];
    for (status, reason, token, request, says) in cases {
        let (found, no) = cloud.join(&token, &request).await.unwrap_err();
        assert_eq!((found, no.reason.as_str()), (status, reason), "{}", no.message);
        assert!(no.message.contains(says), "{reason}: {}", no.message);
    }
    assert!(!cloud.script().nodes.contains_key("box-2"), "no refused join has left a Node");

    cloud.secrets.fail(1);
    let (status, no) = cloud.join(&good, &on("box-2")).await.unwrap_err();
    assert_eq!((status, no.reason.as_str()), (503, "apiserver_unavailable"));
    cloud.script().away = true;
    let (status, no) = cloud.join(&good, &on("box-2")).await.unwrap_err();
    assert_eq!((status, no.reason.as_str()), (503, "apiserver_unavailable"));
    assert!(no.message.contains("try again"), "{}", no.message);
}

#[tokio::test]
async fn another_box_of_the_same_image_does_not_join_while_the_first_is_connected() {
    let mut cloud = Cloud::start().await;
    let token = cloud.any_token().await.to_string();
    let node = cloud.node("box-1").await;
    let clone = request("box-1", &Identity::new());
    let (edge, _opened, welcome) = cloud.session(&node, "box-1", 0).await;
    let (status, no) = cloud.join(&token, &clone).await.unwrap_err();
    assert_eq!((status, no.reason.as_str()), (409, "node_connected"));
    let stranger = JoinRequest { machine_id: "another".to_owned(), ..request("box-1", &Identity::new()) };
    assert_eq!(cloud.join(&token, &stranger).await.unwrap_err().1.reason, "name_taken");
    assert!(no.message.contains("machine-id") && no.message.contains("--node-name"), "{}", no.message);
    drop(edge);
    until("the first box's session ends", || !cloud.front.sessions.has("box-1")).await;
    // Its lease lasts a little longer.
    cloud.script().leased.insert("box-1".to_owned(), welcome.epoch);
    cloud.join(&token, &clone).await.unwrap();
    cloud.script().leased.insert("box-1".to_owned(), welcome.epoch + 1);
    assert_eq!(cloud.join(&token, &clone).await.unwrap_err().1.reason, "node_connected", "at another replica");
}
