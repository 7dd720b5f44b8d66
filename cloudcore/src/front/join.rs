//! Joining and renewing: who may have a node's certificate.
//!
//! Order matters: nothing is written to the apiserver before the token, the key and the labels are good, and the token's use is
//! counted only when the certificate is signed.

use std::collections::BTreeMap;

use hyper::StatusCode;
use jiff::Timestamp;
use skerry_proto::EDGE_LABEL;
use skerry_proto::payload::{JoinRequest, JoinResponse};
use skerry_proto::token::JoinToken;
use tracing::{info, warn};

use super::http::No;
use super::{Front, shown};
use crate::backend::{Backend, BackendError, NodeCheck, RegisterError};
use crate::config::is_node_name;
use crate::nodes::labels;
use crate::pki::{CsrError, NodeCertificate, NodeKey, Standing};
use crate::retry::chain;
use crate::secrets::{SecretError, SecretStore, api_code};
use crate::token::{Joiner, TokenError};

const MAX_LABELS: usize = 64;
const MAX_MACHINE_ID: usize = 128;
/// A clock that is further off is worth a line in the log.
const CLOCK_OFF: i64 = 300;

impl<B: Backend, S: SecretStore> Front<B, S> {
    /// Registers a node for the bearer of a join token and signs its certificate.
    pub(super) async fn join(
        &self,
        bearer: &str,
        request: &JoinRequest,
        peer: &str,
        now: Timestamp,
    ) -> Result<JoinResponse, No> {
        let token: JoinToken =
            bearer.parse().map_err(|error| No::new(StatusCode::UNAUTHORIZED, "token_malformed", format!("{error}")))?;
        let Ok(_turn) = self.joins.try_acquire() else {
            return Err(No::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "busy",
                "too many boxes join at once; try again in some seconds",
            ));
        };
        let joiner = Joiner { node: &request.node, machine: &request.machine_id };
        self.tokens.verify(&token, joiner, now).await.map_err(|error| token_refused(&error))?;
        if !is_node_name(&request.node) {
            let message = format!(
                "{:?} is not a node name: lower case letters, digits, `-` and `.`, such as box-17; give another with --node-name",
                request.node
            );
            return Err(No::new(StatusCode::UNPROCESSABLE_ENTITY, "name_invalid", message));
        }
        if request.machine_id.is_empty() || request.machine_id.len() > MAX_MACHINE_ID {
            let message =
                format!("the machine id must have 1 to {MAX_MACHINE_ID} characters; see /etc/machine-id on the box");
            return Err(No::new(StatusCode::UNPROCESSABLE_ENTITY, "machine_id_invalid", message));
        }
        check_labels(&request.labels)?;
        let key = NodeKey::from_csr(&request.csr).map_err(|error| csr_refused(&error))?;
        let connected = self.sessions.has(&request.node) || self.is_leased_elsewhere(&request.node).await?;
        let node = self.backend.register(&request.node, &request.machine_id, &request.labels, connected).await;
        let node = node.map_err(|error| register_refused(&error))?;
        let certificate = self.authority.current().sign_node(&key, &node, now).map_err(|error| csr_refused(&error))?;
        self.tokens.consume(&token, joiner, now).await.map_err(|error| token_refused(&error))?;

        let off = request.time.saturating_sub(now.as_second());
        if off.abs() > CLOCK_OFF {
            warn!(node = shown(&node), seconds = off, "the box's clock is off");
        }
        info!(node = shown(&node), peer, token = token.id, "joined");
        Ok(self.response(certificate, now))
    }

    /// Whether another replica has a session of a node, by its lease.
    async fn is_leased_elsewhere(&self, name: &str) -> Result<bool, No> {
        let leased = self.backend.leased(name).await.map_err(|error| unavailable(&error))?;
        Ok(leased.is_some_and(|epoch| !self.sessions.is_own(epoch)))
    }

    /// Signs a new certificate for a node that has one, which may have expired, but not too long ago.
    pub(super) async fn renew(&self, old: &NodeCertificate, csr: &str, now: Timestamp) -> Result<JoinResponse, No> {
        let node = &old.node;
        let key = NodeKey::from_csr(csr).map_err(|error| csr_refused(&error))?;
        match self.backend.check(node).await {
            Ok(NodeCheck::Live { .. }) => {}
            Ok(NodeCheck::Deleted | NodeCheck::OtherUid) => {
                return Err(No::new(StatusCode::FORBIDDEN, "node_deleted", deleted_message(&node.name)));
            }
            Err(error) => return Err(unavailable(&error)),
        }
        let standing = old.standing(now);
        if standing == Standing::TooOld {
            return Err(No::new(StatusCode::FORBIDDEN, "certificate_too_old", too_old_message(old)));
        }
        let certificate = self.authority.current().sign_node(&key, node, now).map_err(|error| csr_refused(&error))?;
        info!(node = shown(node), had_expired = standing == Standing::Expired, "renewed its certificate");
        Ok(self.response(certificate, now))
    }

    fn response(&self, certificate: String, now: Timestamp) -> JoinResponse {
        JoinResponse { certificate, ca: self.authority.current().pem().to_owned(), time: now.as_second() }
    }
}

/// What a node hears whose Node object is gone.
pub(super) fn deleted_message(name: &str) -> String {
    format!(
        "the Node {name} that this box joined as was deleted from the cluster, so its pods are ended; to bring the box back, run \
         `edgecore reset` on it and join again with a new token"
    )
}

/// What a node hears whose certificate is good for a new one only.
pub(super) fn expired_message(certificate: &NodeCertificate) -> String {
    format!(
        "the certificate of the node {} expired at {}; edgecore renews it by itself and then connects",
        certificate.node.name, certificate.not_after
    )
}

/// What a node hears whose certificate is good for nothing any more.
pub(super) fn too_old_message(certificate: &NodeCertificate) -> String {
    format!(
        "the certificate of the node {} expired at {}, longer ago than twice the time it was good for, and is not renewed any \
         more; run `edgecore reset` on the box and join again with a new token",
        certificate.node.name, certificate.not_after
    )
}

/// A joiner hears of a label that the Node would not get, rather than doing without it unawares.
fn check_labels(wanted: &BTreeMap<String, String>) -> Result<(), No> {
    let refused = |message: String| Err(No::new(StatusCode::UNPROCESSABLE_ENTITY, "label_refused", message));
    if wanted.len() > MAX_LABELS {
        return refused(format!("more than {MAX_LABELS} labels"));
    }
    for (key, value) in wanted {
        if !labels::is_key(key) {
            return refused(format!("{key:?} is not a label key, such as `site` or `example.com/site`"));
        }
        if !labels::is_value(value) {
            return refused(format!(
                "{value:?} is not a label value: at most 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends"
            ));
        }
        if key != EDGE_LABEL && !labels::may_set(key) {
            return refused(format!("a node may not give itself the label {key}; set it with `kubectl label node`"));
        }
    }
    Ok(())
}

fn token_refused(error: &TokenError) -> No {
    let (status, reason) = match error {
        TokenError::Unknown => (StatusCode::UNAUTHORIZED, "token_unknown"),
        TokenError::Expired(_) => (StatusCode::FORBIDDEN, "token_expired"),
        TokenError::UsedUp => (StatusCode::FORBIDDEN, "token_used_up"),
        TokenError::OtherNode(_) => (StatusCode::FORBIDDEN, "token_other_node"),
        TokenError::Damaged(_) => (StatusCode::FORBIDDEN, "token_damaged"),
        TokenError::Store(source) => return secrets_refused(source),
    };
    No::new(status, reason, error.to_string())
}

fn secrets_refused(error: &SecretError) -> No {
    if error.is_transient() {
        return unavailable(error);
    }
    warn!("cannot look a join token up: {}", chain(error));
    let message = "cloudcore may not read or write its join tokens; its log says why";
    No::new(StatusCode::INTERNAL_SERVER_ERROR, "cloudcore_misconfigured", message)
}

fn register_refused(error: &RegisterError) -> No {
    let (status, reason) = match error {
        RegisterError::NameTaken(_) => (StatusCode::CONFLICT, "name_taken"),
        RegisterError::Connected(_) => (StatusCode::CONFLICT, "node_connected"),
        RegisterError::NotEdge(_) => (StatusCode::CONFLICT, "name_not_edge"),
        RegisterError::Api(source) => return api_refused(source),
    };
    No::new(status, reason, error.to_string())
}

fn api_refused(error: &BackendError) -> No {
    match api_code(&error.source) {
        Some(401 | 403) => {
            warn!("cannot register a node: {}", chain(error));
            let message = "cloudcore may not create Nodes; its log says why";
            No::new(StatusCode::INTERNAL_SERVER_ERROR, "cloudcore_misconfigured", message)
        }
        Some(400 | 422) => No::new(StatusCode::UNPROCESSABLE_ENTITY, "node_refused", chain(error)),
        _ => unavailable(error),
    }
}

fn unavailable(error: &(dyn std::error::Error + 'static)) -> No {
    let message = format!("{}; nothing is lost, try again in some seconds", chain(error));
    No::new(StatusCode::SERVICE_UNAVAILABLE, "apiserver_unavailable", message)
}

fn csr_refused(error: &CsrError) -> No {
    match error {
        CsrError::Crypto(_) | CsrError::Identity(_) => {
            warn!("cannot sign a node's certificate: {}", chain(error));
            No::new(StatusCode::INTERNAL_SERVER_ERROR, "cannot_sign", error.to_string())
        }
        CsrError::Malformed | CsrError::Signature | CsrError::Key => {
            No::new(StatusCode::UNPROCESSABLE_ENTITY, "csr_invalid", error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_refused_exactly_when_the_node_would_not_get_it() {
        for (key, value) in [
            ("site", "north-1"),
            ("example.com/site", ""),
            ("topology.kubernetes.io/zone", "z1"),
            (EDGE_LABEL, ""),
            ("node-role.kubernetes.io/control-plane", ""),
            ("skerry.dev/anything", "x"),
            ("", "x"),
            ("a/b/c", "x"),
            ("site", "-x"),
            ("site", "with space"),
            ("UPPER.com/x", "y"),
        ] {
            let wanted = BTreeMap::from([(key.to_owned(), value.to_owned())]);
            let given = labels::of_node("n", &wanted).get(key).is_some_and(|given| given == value);
            assert_eq!(check_labels(&wanted).is_ok(), given, "{key}={value}");
        }
        let many = (0..=MAX_LABELS).map(|n| (format!("l{n}"), String::new())).collect();
        assert!(check_labels(&many).is_err());
    }
}
