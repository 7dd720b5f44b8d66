//! Which credentials of a pod's pull secrets are meant for an image.
//!
//! A key of a docker configuration is a registry, with a path or without, with `*` in the parts of its host or without. The most
//! particular one comes first.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;
use skerry_proto::cri::AuthConfig;

use super::reference::repository;
use crate::order;

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    username: String,
    password: String,
    auth: String,
    identitytoken: String,
    registrytoken: String,
}

/// The credentials for an image, the one with the longest match first; equal ones once.
pub fn credentials<'a>(image: &str, secrets: impl IntoIterator<Item = &'a Secret>) -> Vec<AuthConfig> {
    let Some(image) = repository(image) else { return Vec::new() };
    let mut matching: Vec<(String, AuthConfig)> = Vec::new();
    for (key, entry) in secrets.into_iter().filter_map(entries).flatten() {
        let key = normal(&key);
        if matches(&key, &image)
            && let Some(auth) = auth(entry)
        {
            matching.push((key, auth));
        }
    }
    // Equally long ones stay in the order of the pod's secrets.
    order::sort_by_key(&mut matching, |(key, _)| Reverse((!key.contains('*'), key.len())));
    let mut ordered: Vec<AuthConfig> = Vec::new();
    for (_, auth) in matching {
        if !ordered.contains(&auth) {
            ordered.push(auth);
        }
    }
    ordered
}

/// The secret is of a type that can hold credentials, and can be read.
pub fn usable_secret(secret: &Secret) -> bool {
    entries(secret).is_some()
}

fn entries(secret: &Secret) -> Option<BTreeMap<String, Entry>> {
    let data = |key: &str| secret.data.as_ref()?.get(key).map(|value| value.0.as_slice());
    match secret.type_.as_deref() {
        Some("kubernetes.io/dockerconfigjson") => {
            serde_json::from_slice::<DockerConfig>(data(".dockerconfigjson")?).ok().map(|config| config.auths)
        }
        Some("kubernetes.io/dockercfg") => serde_json::from_slice(data(".dockercfg")?).ok(),
        _ => None,
    }
}

fn auth(entry: Entry) -> Option<AuthConfig> {
    let (mut username, mut password) = (entry.username, entry.password);
    if username.is_empty() && !entry.auth.is_empty() {
        let decoded = STANDARD.decode(entry.auth.trim()).ok()?;
        let decoded = String::from_utf8(decoded).ok()?;
        let (user, secret) = decoded.split_once(':')?;
        username = user.to_owned();
        password = secret.trim_end_matches('\0').to_owned();
    }
    let auth = AuthConfig {
        username,
        password,
        identity_token: entry.identitytoken,
        registry_token: entry.registrytoken,
        ..Default::default()
    };
    (auth != AuthConfig::default()).then_some(auth)
}

/// A key without scheme and API version, Docker Hub by one name.
fn normal(key: &str) -> String {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (host, path) = key.split_once('/').map_or((key, ""), |(host, path)| (host, path));
    let path = path.strip_prefix("v1/").or_else(|| path.strip_prefix("v2/")).unwrap_or(path);
    let path = if path == "v1" || path == "v2" { "" } else { path.trim_end_matches('/') };
    let host = match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    };
    if path.is_empty() { host.to_owned() } else { format!("{host}/{path}") }
}

/// Host part by part with `*`, port equal, path a prefix.
fn matches(key: &str, image: &str) -> bool {
    let split = |text: &'_ str| -> (String, String, String) {
        let (authority, path) = text.split_once('/').unwrap_or((text, ""));
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (host, port),
            _ => (authority, ""),
        };
        (host.to_owned(), port.to_owned(), path.to_owned())
    };
    let (key_host, key_port, key_path) = split(key);
    let (host, port, path) = split(image);
    key_port == port
        && path.starts_with(&key_path)
        && key_host.split('.').count() == host.split('.').count()
        && key_host.split('.').zip(host.split('.')).all(|(pattern, part)| glob(pattern.as_bytes(), part.as_bytes()))
}

/// `*` is any run of characters, `?` is one.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p, t));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == b'?' || pattern[p] == text[t]) {
            p += 1;
            t += 1;
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            p = at + 1;
            t = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn secret(auths: &serde_json::Value) -> Secret {
        let config = json!({ "auths": auths }).to_string().into_bytes();
        Secret {
            type_: Some("kubernetes.io/dockerconfigjson".into()),
            data: Some([(".dockerconfigjson".to_owned(), ByteString(config))].into()),
            ..Default::default()
        }
    }

    fn users(image: &str, auths: &serde_json::Value) -> Vec<String> {
        credentials(image, [&secret(auths)]).into_iter().map(|auth| auth.username).collect()
    }

    #[test]
    fn the_longest_match_comes_first() {
        let auths = json!({
            "quay.io": { "username": "host" },
            "https://quay.io/v2/team/app": { "username": "path" },
            "quay.io/other": { "username": "other" },
            "*.io": { "username": "glob" },
            "quay.io:5000": { "username": "port" },
            "https://index.docker.io/v1/": { "auth": STANDARD.encode("hub:pass:word") },
        });
        assert_eq!(users("quay.io/team/app:1", &auths), ["path", "host", "glob"]);
        assert_eq!(users("quay.io:5000/team/app", &auths), ["port"]);
        assert_eq!(users("busybox", &auths), ["hub", "glob"]);
        assert_eq!(users("gcr.example.com/a", &auths), Vec::<String>::new());
        assert_eq!(credentials("busybox", [&secret(&auths)])[0].password, "pass:word");
    }

    #[test]
    fn old_secrets_and_broken_ones() {
        let old = Secret {
            type_: Some("kubernetes.io/dockercfg".into()),
            data: Some(
                [(".dockercfg".to_owned(), ByteString(br#"{"r.io":{"username":"u","password":"p"}}"#.to_vec()))].into(),
            ),
            ..Default::default()
        };
        assert_eq!(credentials("r.io/a", [&old]).len(), 1);
        let broken =
            Secret { data: Some([(".dockercfg".to_owned(), ByteString(b"{".to_vec()))].into()), ..old.clone() };
        assert!(!usable_secret(&broken));
        assert_eq!(credentials("r.io/a", [&broken, &old, &old]).len(), 1);
    }

    proptest! {
        #[test]
        fn globs(pattern in "[ab*?]{0,8}", text in "[ab]{0,8}") {
            fn simple(pattern: &[u8], text: &[u8]) -> bool {
                match (pattern.split_first(), text.split_first()) {
                    (None, None) => true,
                    (Some((b'*', rest)), _) => simple(rest, text) || (!text.is_empty() && simple(pattern, &text[1..])),
                    (Some((p, rest)), Some((t, more))) if *p == b'?' || p == t => simple(rest, more),
                    _ => false,
                }
            }
            prop_assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), simple(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
