//! A Kubernetes control plane: etcd, apiserver, controller-manager and scheduler on loopback, or the one `$KUBECONFIG` names.

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::kubectl::{Kubectl, linked};
use crate::pki::{self, Authority, Pair};
use crate::process::{self, Process};
use crate::wait::until;
use crate::{paths, ports};

/// A running control plane. Dropping it kills it.
#[derive(Debug)]
pub struct ControlPlane {
    dir: PathBuf,
    admin: PathBuf,
    kubectl: Kubectl,
    own: Option<Own>,
}

/// The processes, when the control plane is ours.
#[derive(Debug)]
struct Own {
    authority: Authority,
    port: u16,
    etcd_port: u16,
    apiserver: Option<Process>,
    others: Vec<Process>,
    daemon: bool,
}

impl ControlPlane {
    /// Starts one in `dir`, or uses the cluster of `$KUBECONFIG`.
    pub fn start(dir: &Path) -> Result<Self> {
        Self::launch(dir, false)
    }

    /// As [`Self::start`]; its processes live on after [`Self::detach`].
    pub fn start_daemon(dir: &Path) -> Result<Self> {
        Self::launch(dir, true)
    }

    /// kubectl with all rights.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// The kubeconfig with all rights.
    pub fn admin_kubeconfig(&self) -> &Path {
        &self.admin
    }

    /// Whether the control plane is the harness's own, so that it may be broken.
    pub fn is_ours(&self) -> bool {
        self.own.is_some()
    }

    /// The address of the apiserver.
    pub fn server(&self) -> Result<String> {
        let view = self.kubectl.json(&["config", "view", "--raw", "--minify"])?;
        view["clusters"][0]["cluster"]["server"].as_str().map(str::to_owned).context("the kubeconfig names no server")
    }

    /// The certificate authority of the cluster, for making clients and impostors.
    pub fn authority(&self) -> Result<&Authority> {
        Ok(&self.own.as_ref().context("the cluster of $KUBECONFIG keeps its CA key")?.authority)
    }

    /// PEM of the cluster's CA.
    pub fn ca_pem(&self) -> Result<String> {
        let view = self.kubectl.json(&["config", "view", "--raw", "--minify", "--flatten"])?;
        let data = view["clusters"][0]["cluster"]["certificate-authority-data"].as_str();
        Ok(String::from_utf8(STANDARD.decode(data.context("the kubeconfig has no CA")?)?)?)
    }

    /// A kubeconfig that authenticates as a ServiceAccount, nothing more. `server` and `ca` may name a proxy in front.
    pub fn service_account_kubeconfig(
        &self,
        namespace: &str,
        account: &str,
        front: Option<(&str, &str)>,
    ) -> Result<PathBuf> {
        let token = self.kubectl.in_namespace(namespace).run(&["create", "token", account, "--duration=8760h"])?;
        let (server, ca) = match front {
            Some((server, ca)) => (server.to_owned(), ca.to_owned()),
            None => (self.server()?, self.ca_pem()?),
        };
        let suffix = if front.is_some() { "-front" } else { "" };
        let path = self.dir.join(format!("{account}{suffix}.kubeconfig"));
        write_kubeconfig(&path, &server, &ca, &json!({"token": token.trim()}))?;
        Ok(path)
    }

    /// A kubeconfig for a client certificate.
    pub fn certificate_kubeconfig(&self, name: &str, user: &str, groups: &[&str]) -> Result<PathBuf> {
        let pair = self.authority()?.client(&self.dir, name, user, groups)?;
        let path = self.dir.join(format!("{name}.kubeconfig"));
        write_kubeconfig(&path, &self.server()?, &self.ca_pem()?, &client_files(&pair))?;
        Ok(path)
    }

    /// The apiserver stops answering, its sockets stay open.
    pub fn freeze_apiserver(&self) -> Result<()> {
        self.apiserver()?.signal(Signal::SIGSTOP)
    }

    /// It goes on.
    pub fn thaw_apiserver(&self) -> Result<()> {
        self.apiserver()?.signal(Signal::SIGCONT)
    }

    /// The apiserver is gone, its port refuses.
    pub fn kill_apiserver(&mut self) -> Result<()> {
        let own = self.own.as_mut().context("the cluster of $KUBECONFIG is not ours to break")?;
        if let Some(apiserver) = own.apiserver.take() {
            apiserver.kill();
        }
        Ok(())
    }

    /// Starts it again on the same port, and waits for it.
    pub fn start_apiserver(&mut self) -> Result<()> {
        let dir = self.dir.clone();
        let own = self.own.as_mut().context("the cluster of $KUBECONFIG is not ours to start")?;
        own.apiserver = Some(spawn_apiserver(&dir, own)?);
        self.wait_ready()
    }

    /// Ends the controller-manager and the scheduler: etcd and the apiserver go on alone.
    pub fn stop_controllers(&mut self) -> Result<()> {
        let own = self.own.as_mut().context("the cluster of $KUBECONFIG is not ours to stop")?;
        for process in own.others.drain(1..) {
            process.stop(Duration::from_secs(2));
        }
        Ok(())
    }

    /// Starts the controller-manager and the scheduler anew. Of themselves they take up to a minute to look for an apiserver that was away.
    pub fn restart_controllers(&mut self) -> Result<()> {
        self.stop_controllers()?;
        self.start_controllers()
    }

    /// Process ids of the apiserver and of etcd, while they run.
    pub fn pids(&self) -> Option<(i32, i32)> {
        let own = self.own.as_ref()?;
        Some((own.apiserver.as_ref()?.pid(), own.others.first()?.pid()))
    }

    /// Lets the processes live on.
    pub fn detach(mut self) {
        if let Some(mut own) = self.own.take() {
            for process in own.others.drain(..).chain(own.apiserver.take()) {
                process.detach();
            }
        }
    }

    /// Stops everything, politely where that is quick.
    pub fn stop(mut self) {
        let Some(mut own) = self.own.take() else { return };
        for process in own.others.drain(1..) {
            process.stop(Duration::from_secs(2));
        }
        // It drains watches for up to a minute; nobody waits for those.
        if let Some(apiserver) = own.apiserver.take() {
            apiserver.stop(Duration::from_secs(5));
        }
    }

    fn apiserver(&self) -> Result<&Process> {
        let own = self.own.as_ref().context("the cluster of $KUBECONFIG is not ours to break")?;
        own.apiserver.as_ref().context("the apiserver is down")
    }

    fn launch(dir: &Path, daemon: bool) -> Result<Self> {
        fs::create_dir_all(dir)?;
        if let Some(theirs) = theirs() {
            return Self::enter(dir, &theirs);
        }
        let authority = Authority::new(dir, "ca")?;
        let mut own = Own {
            authority,
            port: ports::free()?,
            etcd_port: ports::free()?,
            apiserver: None,
            others: Vec::new(),
            daemon,
        };
        make_certificates(dir, &own)?;
        let admin = dir.join("admin.kubeconfig");
        let pair = own.authority.client(dir, "admin", "admin", &["system:masters"])?;
        let ca = fs::read_to_string(&own.authority.certificate)?;
        write_kubeconfig(&admin, &format!("https://127.0.0.1:{}", own.port), &ca, &client_files(&pair))?;
        let kubectl = Kubectl::new(&admin, dir)?;

        let etcd = spawn_etcd(dir, &own)?;
        own.others.push(etcd);
        own.apiserver = Some(spawn_apiserver(dir, &own)?);
        let mut this = Self { dir: dir.to_owned(), admin, kubectl, own: Some(own) };
        this.wait_ready()?;
        this.start_controllers()?;
        until("the default service account", 30, || Ok(this.kubectl.find("serviceaccount", "default")?.is_some()))?;
        Ok(this)
    }

    /// Uses the current context of `$KUBECONFIG`, which may be a list of files that refer to others: kubectl makes one of them.
    fn enter(dir: &Path, theirs: &OsStr) -> Result<Self> {
        let view = ["config", "view", "--raw", "--flatten", "--minify", "-o", "json"];
        let seen = process::run(Command::new(linked(dir, "kubectl")?).args(view), 30)?;
        ensure!(
            seen.success,
            "KUBECONFIG={} names no cluster: {}; let it name kubeconfig files that are there and have a current-context, or unset it to \
             get a cluster here",
            theirs.display(),
            seen.stderr.trim()
        );
        let admin = dir.join("admin.kubeconfig");
        // What is in it opens somebody's cluster.
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&admin);
        file.and_then(|mut file| file.write_all(seen.stdout.as_bytes()))
            .with_context(|| format!("cannot write {}", admin.display()))?;
        let kubectl = Kubectl::new(&admin, dir)?;
        kubectl.run(&["version"]).context("the cluster of $KUBECONFIG does not answer; unset it to get one here")?;
        Ok(Self { dir: dir.to_owned(), admin, kubectl, own: None })
    }

    fn wait_ready(&mut self) -> Result<()> {
        let kubectl = self.kubectl.clone();
        let own = self.own.as_mut().context("no apiserver of ours")?;
        let Some(apiserver) = &mut own.apiserver else { bail!("the apiserver is down") };
        let address = format!("127.0.0.1:{}", own.port);
        apiserver.wait_ready(60, || {
            std::net::TcpStream::connect(&address).is_ok()
                && kubectl.output(&["get", "--raw", "/readyz"]).is_ok_and(|output| output.success)
        })
    }

    fn start_controllers(&mut self) -> Result<()> {
        let Some(own) = &mut self.own else { return Ok(()) };
        let dir = &self.dir;
        let mut controllers = Command::new(linked(dir, "kube-controller-manager")?);
        controllers.arg("--kubeconfig").arg(&self.admin).args([
            "--leader-elect=false",
            "--use-service-account-credentials",
            "--secure-port=0",
            "--bind-address=127.0.0.1",
            // A node that stops reporting is noticed within a test's patience.
            "--node-monitor-grace-period=24s",
            "--node-monitor-period=2s",
            "--pvclaimbinder-sync-period=60s",
        ]);
        flag(&mut controllers, "service-account-private-key-file", &dir.join("accounts.key"));
        flag(&mut controllers, "root-ca-file", &own.authority.certificate);
        flag(&mut controllers, "cluster-signing-cert-file", &own.authority.certificate);
        flag(&mut controllers, "cluster-signing-key-file", &own.authority.key);
        let mut scheduler = Command::new(linked(dir, "kube-scheduler")?);
        scheduler.arg("--kubeconfig").arg(&self.admin).args([
            "--leader-elect=false",
            "--secure-port=0",
            "--bind-address=127.0.0.1",
        ]);
        for (name, command) in [("kube-controller-manager", controllers), ("kube-scheduler", scheduler)] {
            let process = spawn(dir, own.daemon, name, command)?;
            own.others.push(process);
        }
        Ok(())
    }
}

/// `$KUBECONFIG`, if it is set: the cluster is somebody else's, and tests are guests there.
pub fn theirs() -> Option<OsString> {
    std::env::var_os("KUBECONFIG").filter(|value| !value.is_empty())
}

fn make_certificates(dir: &Path, own: &Own) -> Result<()> {
    own.authority.server(
        dir,
        "apiserver",
        &["127.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "10.96.0.1"],
    )?;
    own.authority.client(dir, "apiserver-kubelet", "kube-apiserver-kubelet-client", &["system:masters"])?;
    // Aggregation trusts headers of whoever this CA signed: it must not be the CA of ordinary clients.
    let front = Authority::new(dir, "front-proxy-ca")?;
    front.client(dir, "front-proxy", "front-proxy-client", &[])?;
    pki::signing_key(dir, "accounts")?;
    Ok(())
}

fn spawn_etcd(dir: &Path, own: &Own) -> Result<Process> {
    let mut command = Command::new(paths::tool("etcd", "etcd-server")?);
    let client = format!("http://127.0.0.1:{}", own.etcd_port);
    let peer = format!("http://127.0.0.1:{}", ports::free()?);
    flag(&mut command, "data-dir", &dir.join("etcd"));
    command.args(["--unsafe-no-fsync", "--log-level=warn"]);
    for (name, value) in [
        ("listen-client-urls", &client),
        ("advertise-client-urls", &client),
        ("listen-peer-urls", &peer),
        ("initial-advertise-peer-urls", &peer),
    ] {
        command.arg(format!("--{name}={value}"));
    }
    command.arg(format!("--initial-cluster=default={peer}"));
    spawn(dir, own.daemon, "etcd", command)
}

fn spawn_apiserver(dir: &Path, own: &Own) -> Result<Process> {
    let mut command = Command::new(linked(dir, "kube-apiserver")?);
    command.args([
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--enable-aggregator-routing",
        "--allow-privileged",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--kubelet-preferred-address-types=InternalIP,Hostname",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
    ]);
    command.arg(format!("--secure-port={}", own.port));
    command.arg(format!("--etcd-servers=http://127.0.0.1:{}", own.etcd_port));
    for (name, file) in [
        ("client-ca-file", "ca.crt"),
        ("tls-cert-file", "apiserver.crt"),
        ("tls-private-key-file", "apiserver.key"),
        ("service-account-key-file", "accounts.pub"),
        ("service-account-signing-key-file", "accounts.key"),
        ("kubelet-client-certificate", "apiserver-kubelet.crt"),
        ("kubelet-client-key", "apiserver-kubelet.key"),
        ("requestheader-client-ca-file", "front-proxy-ca.crt"),
        ("proxy-client-cert-file", "front-proxy.crt"),
        ("proxy-client-key-file", "front-proxy.key"),
    ] {
        flag(&mut command, name, &dir.join(file));
    }
    spawn(dir, own.daemon, "kube-apiserver", command)
}

fn spawn(dir: &Path, daemon: bool, name: &str, mut command: Command) -> Result<Process> {
    let log = dir.join("logs").join(format!("{name}.log"));
    if daemon { Process::spawn_daemon(name, &command, &log) } else { Process::spawn(name, &mut command, &log) }
}

fn flag(command: &mut Command, name: &str, path: &Path) {
    command.arg(format!("--{name}={}", path.display()));
}

fn client_files(pair: &Pair) -> Value {
    json!({"client-certificate": pair.certificate, "client-key": pair.key})
}

/// Writes a kubeconfig, which may as well be JSON.
pub fn write_kubeconfig(path: &Path, server: &str, ca_pem: &str, user: &Value) -> Result<()> {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority-data": STANDARD.encode(ca_pem)}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    });
    fs::write(path, serde_json::to_vec_pretty(&config)?).with_context(|| format!("cannot write {}", path.display()))
}
