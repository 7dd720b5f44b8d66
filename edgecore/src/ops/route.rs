//! Which path asks for what: those of the upstream kubelet.

use hyper::{Method, StatusCode};

use super::answer::Refusal;
use super::query::segments;

/// A pod, and perhaps which one of that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodPath {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: Option<String>,
}

/// A container of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ContainerPath {
    pub(super) pod: PodPath,
    pub(super) container: String,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Route {
    ContainerLogs(ContainerPath),
    Exec(ContainerPath),
    Attach(ContainerPath),
    Run(ContainerPath),
    PortForward(PodPath),
    Pods,
    RunningPods,
    /// Of everything that is looked at, or of what only says that somebody is there.
    Healthz {
        syncloop: bool,
    },
    Configz,
    /// A path below `/var/log`, in its parts; whether it ended in a slash.
    HostLogs(Vec<String>, bool),
    Checkpoint,
    /// Statistics and metrics, by path.
    Metrics(String),
}

impl Route {
    /// Of a request. A path that is none is 404, a method that does not fit 405.
    pub(super) fn of(method: &Method, path: &str) -> Result<Self, Refusal> {
        let nothing = || Refusal::missing("404: Page Not Found");
        let parts = segments(path).ok_or_else(nothing)?;
        let ends_in_slash = parts.len() > 1 && parts.last().is_some_and(String::is_empty);
        let parts: Vec<&str> = parts.iter().map(String::as_str).filter(|part| !part.is_empty()).collect();
        let pod = |namespace: &str, name: &str, uid: Option<&str>| PodPath {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: uid.map(str::to_owned),
        };
        let container = |rest: &[&str]| match *rest {
            [namespace, name, container] => {
                Ok(ContainerPath { pod: pod(namespace, name, None), container: container.to_owned() })
            }
            [namespace, name, uid, container] => {
                Ok(ContainerPath { pod: pod(namespace, name, Some(uid)), container: container.to_owned() })
            }
            _ => Err(nothing()),
        };
        let get: &[Method] = &[Method::GET, Method::HEAD];
        let streams: &[Method] = &[Method::GET, Method::POST];
        let (route, methods) = match *parts.as_slice() {
            ["containerLogs", namespace, name, of] => {
                (Self::ContainerLogs(ContainerPath { pod: pod(namespace, name, None), container: of.to_owned() }), get)
            }
            ["exec", ref rest @ ..] => (Self::Exec(container(rest)?), streams),
            ["attach", ref rest @ ..] => (Self::Attach(container(rest)?), streams),
            ["run", ref rest @ ..] => (Self::Run(container(rest)?), &[Method::POST][..]),
            ["portForward", namespace, name] => (Self::PortForward(pod(namespace, name, None)), streams),
            ["portForward", namespace, name, uid] => (Self::PortForward(pod(namespace, name, Some(uid))), streams),
            ["pods"] => (Self::Pods, get),
            ["runningpods"] => (Self::RunningPods, get),
            ["healthz"] | ["healthz", "syncloop"] => (Self::Healthz { syncloop: true }, get),
            ["healthz", "ping" | "log"] => (Self::Healthz { syncloop: false }, get),
            ["configz"] => (Self::Configz, get),
            ["logs", ref rest @ ..] => {
                (Self::HostLogs(rest.iter().map(|part| (*part).to_owned()).collect(), ends_in_slash), get)
            }
            ["checkpoint", ..] => (Self::Checkpoint, &[Method::POST][..]),
            ["stats", ..] | ["metrics", ..] => (Self::Metrics(format!("/{}", parts.join("/"))), get),
            _ => return Err(nothing()),
        };
        if methods.contains(method) {
            Ok(route)
        } else {
            Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_upstreams() {
        let get = |path: &str| Route::of(&Method::GET, path);
        let pod = |uid: Option<&str>| PodPath { namespace: "ns".into(), name: "p".into(), uid: uid.map(str::to_owned) };
        let container = |uid| ContainerPath { pod: pod(uid), container: "c".into() };
        assert_eq!(get("/containerLogs/ns/p/c"), Ok(Route::ContainerLogs(container(None))));
        assert_eq!(get("/exec/ns/p/c"), Ok(Route::Exec(container(None))));
        assert_eq!(get("/exec/ns/p/u/c"), Ok(Route::Exec(container(Some("u")))));
        assert_eq!(Route::of(&Method::POST, "/attach/ns/p/u/c"), Ok(Route::Attach(container(Some("u")))));
        assert_eq!(Route::of(&Method::POST, "/run/ns/p/c"), Ok(Route::Run(container(None))));
        assert_eq!(get("/portForward/ns/p/u"), Ok(Route::PortForward(pod(Some("u")))));
        assert_eq!(
            (get("/pods"), get("/pods/"), get("/runningpods/")),
            (Ok(Route::Pods), Ok(Route::Pods), Ok(Route::RunningPods))
        );
        assert_eq!(get("/logs/"), Ok(Route::HostLogs(vec![], true)));
        assert_eq!(get("/logs/pods/a%20b"), Ok(Route::HostLogs(vec!["pods".into(), "a b".into()], false)));
        assert_eq!(get("/metrics/cadvisor"), Ok(Route::Metrics("/metrics/cadvisor".into())));
        assert_eq!(get("/healthz/syncloop"), Ok(Route::Healthz { syncloop: true }));
        assert_eq!(get("/healthz/ping"), Ok(Route::Healthz { syncloop: false }));
        for (method, path, status) in [
            (Method::GET, "/", 404),
            (Method::GET, "/exec/ns/p", 404),
            (Method::GET, "/containerLogs/ns/p/u/c", 404),
            (Method::GET, "/healthz/other", 404),
            (Method::GET, "/run/ns/p/c", 405),
            (Method::DELETE, "/exec/ns/p/c", 405),
            (Method::POST, "/pods", 405),
            (Method::GET, "/%zz", 404),
        ] {
            assert_eq!(Route::of(&method, path).unwrap_err().status, status, "{method} {path}");
        }
    }
}
