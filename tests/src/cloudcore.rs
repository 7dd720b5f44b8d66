//! cloudcore, run under exactly the rights of deploy/rbac.yaml.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::controlplane::ControlPlane;
use crate::kubectl::Kubectl;
use crate::process::{self, Output, Process};
use crate::{guest, machine, paths, ports};

/// Where cloudcore lives in the cluster.
pub const NAMESPACE: &str = "skerry-system";
/// The CRDs of deploy/devices.yaml, which it installs where they are not there.
pub const CRDS: [&str; 3] =
    ["devicemodels.devices.kubeedge.io", "devices.devices.kubeedge.io", "devicestatuses.devices.kubeedge.io"];

/// A cloudcore. Dropping it kills it.
#[derive(Debug)]
pub struct Cloudcore {
    dir: PathBuf,
    kubeconfig: PathBuf,
    port: u16,
    admin: SocketAddr,
    process: Option<Process>,
    daemon: bool,
    in_cluster: bool,
}

/// Has what a pod is given in its files, and runs a command there.
const IN_CLUSTER: &str = r#"mount -t tmpfs none /var/run
mkdir -p /var/run/secrets/kubernetes.io/serviceaccount
mount --bind "$0" /var/run/secrets/kubernetes.io/serviceaccount
exec "$@""#;

/// What `cloudcore token create` prints, taken apart.
#[derive(Clone, Debug)]
pub struct JoinLine {
    /// `HOST:PORT` to join.
    pub address: String,
    /// The token.
    pub token: String,
}

impl Cloudcore {
    /// Applies deploy/rbac.yaml and starts cloudcore as its ServiceAccount. `front` is a proxy to use instead of the apiserver:
    /// its URL and the PEM of its CA.
    pub fn start(control: &ControlPlane, dir: &Path, front: Option<(&str, &str)>) -> Result<Self> {
        Self::launch(control, dir, front, false)
    }

    /// As [`Self::start`]; it lives on after [`Self::detach`].
    pub fn start_daemon(control: &ControlPlane, dir: &Path) -> Result<Self> {
        Self::launch(control, dir, None, true)
    }

    /// Where edges join and hold their sessions.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(Process::pid)
    }

    /// Starts it on the same ports; waits until it is ready.
    pub fn boot(&mut self) -> Result<()> {
        self.spawn()?;
        let admin = self.admin;
        let process = self.process.as_mut().context("it was just started")?;
        process.wait_ready(60, || get(admin, "/readyz").is_ok_and(|(status, _)| status == 200))
    }

    /// Starts it without waiting.
    pub fn spawn(&mut self) -> Result<()> {
        let mut command = Command::new(paths::product("cloudcore")?);
        command
            .args(["run", "--advertise-address", "127.0.0.1", "--advertise-address", machine::HOST])
            .args(["--namespace", NAMESPACE, "--kubelet-csr"])
            .arg("--port")
            .arg(self.port.to_string())
            .arg("--admin-address")
            .arg(self.admin.to_string());
        if !self.daemon {
            // What a quickstart leaves running stays on loopback.
            command.arg("--kubelet-address").arg(kubelet_address().to_string());
        }
        if self.in_cluster {
            command = self.as_a_pod(command)?;
        } else {
            command.arg("--kubeconfig").arg(&self.kubeconfig);
        }
        let log = self.dir.join("cloudcore.log");
        let process = if self.daemon {
            Process::spawn_daemon("cloudcore", &command, &log)?
        } else {
            Process::spawn("cloudcore", &mut command, &log)?
        };
        self.process = Some(process);
        Ok(())
    }

    /// When it is started next, it finds the apiserver as a pod does: by its environment, and the files of its service account.
    pub fn move_into_cluster(&mut self) {
        self.in_cluster = true;
    }

    fn as_a_pod(&self, mut command: Command) -> Result<Command> {
        let config: Value = serde_json::from_slice(&fs::read(&self.kubeconfig)?)?;
        let cluster = &config["clusters"][0]["cluster"];
        let text = |value: &Value| value.as_str().map(str::to_owned).context("its kubeconfig lacks something");
        let account = self.dir.join("serviceaccount");
        fs::create_dir_all(&account)?;
        fs::write(account.join("ca.crt"), STANDARD.decode(text(&cluster["certificate-authority-data"])?)?)?;
        fs::write(account.join("token"), text(&config["users"][0]["user"]["token"])?)?;
        fs::write(account.join("namespace"), NAMESPACE)?;
        let server = text(&cluster["server"])?;
        let (host, port) =
            server.trim_start_matches("https://").rsplit_once(':').context("its apiserver has no port")?;
        command.env("KUBERNETES_SERVICE_HOST", host).env("KUBERNETES_SERVICE_PORT", port);
        // A path of this run among its arguments.
        command.arg("--data-dir").arg(self.dir.join("data"));
        let account = account.display().to_string();
        Ok(process::under(&["unshare", "--mount", "sh", "-ec", IN_CLUSTER, &account], &command))
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }

    /// SIGTERM, by which it must end well.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        process.signal(Signal::SIGTERM)?;
        let status = process.wait_exit(15)?;
        ensure!(status.success(), "cloudcore ended with {status}: {}", process.log_tail(5));
        Ok(())
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_running)
    }

    /// An answer of its admin endpoint: status and body.
    pub fn admin(&self, path: &str) -> Result<(u16, String)> {
        get(self.admin, path)
    }

    /// The metric of this name, which has no labels.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let (_, text) = self.admin("/metrics")?;
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(found.with_context(|| format!("cloudcore tells no {name}"))?.parse()?)
    }

    /// All that it logged so far.
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("cloudcore.log")).unwrap_or_default()).into_owned()
    }

    /// Runs `cloudcore token …`.
    pub fn token(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(paths::product("cloudcore")?);
        command.arg("token").args(arguments).arg("--kubeconfig").arg(&self.kubeconfig).args(["--namespace", NAMESPACE]);
        process::run(&mut command, 30)
    }

    /// A new token; `options` are those of `token create`.
    pub fn new_token(&self, options: &[&str]) -> Result<JoinLine> {
        let output = self.token(&[&["create"], options].concat())?;
        ensure!(output.success, "cloudcore token create failed: {}", output.text());
        parse_join_line(&output.stdout)
    }

    /// Lets it live on.
    pub fn detach(mut self) {
        if let Some(process) = self.process.take() {
            process.detach();
        }
    }

    fn launch(control: &ControlPlane, dir: &Path, front: Option<(&str, &str)>, daemon: bool) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let account = install_rights(control, daemon)?;
        let kubeconfig = control.service_account_kubeconfig(NAMESPACE, &account, front)?;
        let admin = SocketAddr::from(([127, 0, 0, 1], ports::free()?));
        let mut this = Self {
            dir: dir.to_owned(),
            kubeconfig,
            port: ports::free()?,
            admin,
            process: None,
            daemon,
            in_cluster: false,
        };
        this.boot()?;
        Ok(this)
    }
}

/// Applies deploy/rbac.yaml; the name of the ServiceAccount it brings. What is to live on marks nothing: whoever started it keeps account.
fn install_rights(control: &ControlPlane, daemon: bool) -> Result<String> {
    let kubectl = control.kubectl();
    let manifest = paths::repository().join("deploy/rbac.yaml");
    let text = fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    if kubectl.find("namespace", NAMESPACE)?.is_none() {
        let mut namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        if !daemon && !control.is_ours() {
            namespace["metadata"]["labels"] = guest::marks_of_skerry(brings_crds(kubectl)?);
        }
        kubectl.create(&namespace)?;
    }
    kubectl.apply(&text)?;
    let accounts = kubectl.in_namespace(NAMESPACE).list("serviceaccounts", "")?;
    let names = accounts.iter().filter_map(|account| account["metadata"]["name"].as_str());
    let name =
        names.into_iter().find(|name| *name != "default").context("deploy/rbac.yaml brings no ServiceAccount")?;
    Ok(name.to_owned())
}

/// Removes what [`Cloudcore::start`] applied, and what cloudcore keeps in its namespace.
pub fn remove_rights(kubectl: &Kubectl) -> Result<()> {
    let manifest = paths::repository().join("deploy/rbac.yaml");
    kubectl.run(&["delete", "-f", &manifest.display().to_string(), "--ignore-not-found", "--wait=false"]).map(drop)
}

/// Whether cloudcore is who brings the CRDs of devices to a cluster: none of them is there.
pub fn brings_crds(kubectl: &Kubectl) -> Result<bool> {
    for crd in CRDS {
        if kubectl.find("crd", crd)?.is_some() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes the CRDs of devices, with the devices of this namespace; whether it did. As long as there are others they stay: whatever went wrong,
/// nothing of anybody's is deleted.
pub fn remove_crds(kubectl: &Kubectl, namespace: &str) -> Result<bool> {
    let manifest = paths::repository().join("deploy/devices.yaml").display().to_string();
    for crd in CRDS {
        if kubectl.find("crd", crd)?.is_none() {
            continue;
        }
        let namespaces = kubectl.run(&["get", crd, "-A", "-o", "jsonpath={.items[*].metadata.namespace}"])?;
        if namespaces.split_whitespace().any(|other| other != namespace) {
            eprintln!(
                "there are devices in other namespaces: their CRDs stay; kubectl delete -f {manifest} removes all"
            );
            return Ok(false);
        }
    }
    kubectl.run(&["delete", "-f", &manifest, "--ignore-not-found", "--wait=false"])?;
    Ok(true)
}

fn parse_join_line(text: &str) -> Result<JoinLine> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let after = |word: &str| words.iter().position(|other| *other == word).and_then(|at| words.get(at + 1));
    let address = after("join").with_context(|| format!("no `edgecore join HOST:PORT` in: {text}"))?;
    let token = after("--token").with_context(|| format!("no `--token` in: {text}"))?;
    Ok(JoinLine { address: (*address).to_owned(), token: (*token).to_owned() })
}

/// Where the cluster reaches this machine's nodes: an address that is not loopback, for the apiserver proxies to no such one; loopback on
/// a machine that has no other.
pub fn kubelet_address() -> IpAddr {
    // The address that it would send from: nothing is sent.
    let own = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.connect((Ipv4Addr::new(198, 51, 100, 1), 9))?;
        socket.local_addr()
    });
    own.map_or_else(|_| Ipv4Addr::LOCALHOST.into(), |own| own.ip())
}

/// A plain HTTP GET: status and body.
pub fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|word| word.parse().ok()).context("no HTTP status in the answer")?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((status, body.to_owned()))
}
