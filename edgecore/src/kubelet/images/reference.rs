//! The names of images: `[domain[:port]/]path[:tag][@digest]`.

/// Not the name of an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("couldn't parse image name {0:?}: {1}")]
pub struct Invalid(pub String, pub &'static str);

const FORMAT: &str = "invalid reference format";

/// The parts of a name, as it was written.
struct Parts<'a> {
    /// Domain and path.
    name: &'a str,
    tag: Option<&'a str>,
    digest: Option<&'a str>,
}

/// The name as it was written, checked, with `:latest` when it has neither tag nor digest.
pub fn normalize(reference: &str) -> Result<String, Invalid> {
    let parts = parse(reference).map_err(|why| Invalid(reference.to_owned(), why))?;
    let defaulted = parts.tag.is_none() && parts.digest.is_none();
    Ok(if defaulted { format!("{reference}:latest") } else { reference.to_owned() })
}

/// The repository in full (`docker.io/library/busybox`), without tag and digest; `None` for what is no name.
pub fn repository(reference: &str) -> Option<String> {
    parse(reference).ok().map(|parts| full(parts.name))
}

/// The name in full with its tag and digest, for comparing.
pub(crate) fn canonical(reference: &str) -> Option<String> {
    let parts = parse(reference).ok()?;
    let mut name = full(parts.name);
    match (parts.tag, parts.digest) {
        // The runtime lists a tagged digest by its digest.
        (_, Some(digest)) => name.extend(["@", digest]),
        (tag, None) => name.extend([":", tag.unwrap_or("latest")]),
    }
    Some(name)
}

fn full(name: &str) -> String {
    let (domain, path) = split_domain(name);
    match domain {
        None | Some("docker.io" | "index.docker.io") if path.contains('/') => format!("docker.io/{path}"),
        None | Some("docker.io" | "index.docker.io") => format!("docker.io/library/{path}"),
        Some(domain) => format!("{domain}/{path}"),
    }
}

/// The first component is a domain if it could not be a path.
fn split_domain(name: &str) -> (Option<&str>, &str) {
    match name.split_once('/') {
        Some((first, path))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.chars().any(|character| character.is_ascii_uppercase()) =>
        {
            (Some(first), path)
        }
        _ => (None, name),
    }
}

fn parse(reference: &str) -> Result<Parts<'_>, &'static str> {
    if reference.len() == 64 && reference.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return Err("a name cannot be 64 hexadecimal characters");
    }
    let (rest, digest) = match reference.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (reference, None),
    };
    if digest.is_some_and(|digest| !is_digest(digest)) {
        return Err(FORMAT);
    }
    // A colon before the last slash is a port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(FORMAT);
    }
    let (domain, path) = split_domain(name);
    if domain.is_some_and(|domain| !is_domain(domain)) {
        return Err(FORMAT);
    }
    if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err("repository name must be lowercase");
    }
    if !path.split('/').all(is_component) {
        return Err(FORMAT);
    }
    if full(name).len() > 255 {
        return Err("repository name must not be more than 255 characters");
    }
    Ok(Parts { name, tag, digest })
}

fn is_tag(tag: &str) -> bool {
    tag.len() <= 128
        && tag.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '_')
        && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

fn is_digest(digest: &str) -> bool {
    let Some((algorithm, hash)) = digest.split_once(':') else { return false };
    let is_hash = hash.len() >= 32 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    let length = match algorithm {
        "sha256" => Some(64),
        "sha384" => Some(96),
        "sha512" => Some(128),
        _ => None,
    };
    is_hash
        && length.is_none_or(|length| hash.len() == length)
        && algorithm.split(['+', '.', '-', '_']).all(|part| {
            part.starts_with(|first: char| first.is_ascii_alphabetic())
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric())
        })
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = if let Some(inner) = domain.strip_prefix('[') {
        let Some((address, port)) = inner.split_once(']') else { return false };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        // What follows the bracket is nothing, or a colon and a port.
        if !port.is_empty() && !port.starts_with(':') {
            return false;
        }
        (None, port.strip_prefix(':'))
    } else {
        match domain.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(domain), None),
        }
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    host.is_none_or(|host| host.split('.').all(is_label))
        && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Lower case letters and digits, joined by `.`, `_`, `__` or any number of `-`.
fn is_component(component: &str) -> bool {
    let bytes = component.as_bytes();
    let is_plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if !bytes.first().is_some_and(is_plain) || !bytes.last().is_some_and(is_plain) {
        return false;
    }
    bytes
        .split(is_plain)
        .all(|joint| matches!(joint, b"" | b"." | b"_" | b"__") || joint.iter().all(|byte| *byte == b'-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names() {
        for (given, normal, full) in [
            ("busybox", "busybox:latest", "docker.io/library/busybox"),
            ("a/b:1", "a/b:1", "docker.io/a/b"),
            ("docker.io/busybox", "docker.io/busybox:latest", "docker.io/library/busybox"),
            ("localhost:5000/a_b/c--d", "localhost:5000/a_b/c--d:latest", "localhost:5000/a_b/c--d"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10", "registry.k8s.io/pause"),
            ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x"),
        ] {
            assert_eq!(normalize(given).as_deref(), Ok(normal));
            assert_eq!(repository(given).as_deref(), Some(full), "{given}");
        }
        let digest = format!("busybox@sha256:{}", "ab".repeat(32));
        assert_eq!(normalize(&digest).as_deref(), Ok(digest.as_str()));
        assert_eq!(canonical(&digest), Some(format!("docker.io/library/{digest}")));
        assert_eq!(canonical("busybox").as_deref(), Some("docker.io/library/busybox:latest"));
    }

    #[test]
    fn no_names() {
        let long = format!("{}/a", "a".repeat(255));
        let hex = "ab".repeat(32);
        for wrong in [
            "",
            ":",
            "a:",
            "/a",
            "a/",
            "a//b",
            "A",
            "a/B",
            "a b",
            "-a",
            "a_",
            "a..b",
            "a@sha256:12",
            "a:b:c",
            "a.b:x/c",
            &long,
            &hex,
        ] {
            assert!(normalize(wrong).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic_and_what_passes_passes_again(text in "[a-zA-Z0-9._:/@\\[\\]-]{0,80}|.{0,40}") {
            if let Ok(normal) = normalize(&text) {
                prop_assert!(normalize(&normal).is_ok_and(|again| again == normal));
                let full = canonical(&text);
                prop_assert!(full.is_some());
                prop_assert_eq!(full.as_deref().and_then(canonical), full);
            }
        }
    }
}
