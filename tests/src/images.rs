//! The images that test pods run: made here, because no registry is reachable, and the same bytes every time.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::paths;
use crate::process::run;
use crate::tar::Archive;

/// The sandbox's image.
pub const PAUSE: &str = "skerry.test/pause:1";
/// A shell and the usual commands. busybox's shell drops variables whose names have dots: use `env`, not `sh -c env`.
pub const BUSYBOX: &str = "skerry.test/busybox:1";
/// The same under another name, to roll to.
pub const BUSYBOX_NEXT: &str = "skerry.test/busybox:2";
/// The HTTP and gRPC endpoint of tests/controlplane/testserver, at `/testserver`; there if scripts/controlplane has built it.
pub const SERVER: &str = "skerry.test/server:1";

/// The archive with all images, made if it is not in the cache yet.
pub fn archive() -> Result<PathBuf> {
    let inputs = Inputs::gather()?;
    let path = paths::cache().join(format!("images-{}.tar", &inputs.fingerprint()[..16]));
    if !path.exists() {
        fs::create_dir_all(paths::cache())?;
        let fresh = path.with_extension(format!("tar.{}", std::process::id()));
        fs::write(&fresh, build(&inputs)?).with_context(|| format!("cannot write {}", fresh.display()))?;
        fs::rename(&fresh, &path)?;
    }
    Ok(path)
}

struct Inputs {
    pause_source: Vec<u8>,
    busybox: Vec<u8>,
    applets: BTreeSet<String>,
    /// Only tests run it: the quickstart does without.
    server: Option<Vec<u8>>,
}

impl Inputs {
    fn gather() -> Result<Self> {
        let busybox = paths::tool("busybox", "busybox-static")?;
        let list = run(Command::new(&busybox).arg("--list"), 10)?;
        ensure!(list.success, "{} --list failed", busybox.display());
        let linked = run(Command::new("file").arg("-L").arg(&busybox), 10);
        if let Ok(answer) = linked {
            ensure!(
                !answer.stdout.contains("dynamically"),
                "{} needs libraries: apt-get install busybox-static",
                busybox.display()
            );
        }
        Ok(Self {
            pause_source: fs::read(paths::repository().join("tests/images/pause.c"))?,
            busybox: fs::read(&busybox)?,
            applets: list.stdout.lines().filter(|name| *name != "busybox").map(str::to_owned).collect(),
            server: paths::cached_binary("testserver").ok().map(fs::read).transpose()?,
        })
    }

    fn fingerprint(&self) -> String {
        let server = self.server.as_deref().unwrap_or_default();
        let parts = [&self.pause_source, &self.busybox, server].map(sha256).concat();
        sha256(parts.as_bytes())
    }
}

fn build(inputs: &Inputs) -> Result<Vec<u8>> {
    let mut layout = Layout::default();
    let pause = compile_pause()?;
    let mut files = Archive::default();
    files.file("pause", 0o755, &pause);
    layout.image(&[PAUSE], files, &["/pause"]);

    let mut files = base();
    files.file("bin/busybox", 0o755, &inputs.busybox);
    for applet in &inputs.applets {
        files.link(&format!("bin/{applet}"), "busybox");
    }
    layout.image(&[BUSYBOX, BUSYBOX_NEXT], files, &["/bin/sh"]);

    if let Some(server) = &inputs.server {
        let mut files = base();
        files.file("testserver", 0o755, server);
        layout.image(&[SERVER], files, &["/testserver"]);
    }
    Ok(layout.finish())
}

fn base() -> Archive {
    let mut files = Archive::default();
    files.directory("bin", 0o755);
    files.directory("etc", 0o755);
    files.directory("root", 0o700);
    files.directory("tmp", 0o1777);
    files.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n");
    files.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n");
    files
}

fn compile_pause() -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let program = dir.path().join("pause");
    let source = paths::repository().join("tests/images/pause.c");
    let output = run(Command::new("cc").args(["-Os", "-static", "-s", "-o"]).arg(&program).arg(source), 60)
        .context("a C compiler makes the pause image: apt-get install gcc libc6-dev")?;
    ensure!(output.success, "cc failed: {}", output.stderr);
    Ok(fs::read(program)?)
}

/// An OCI image layout.
#[derive(Default)]
struct Layout {
    blobs: Vec<(String, Vec<u8>)>,
    manifests: Vec<Value>,
}

impl Layout {
    fn image(&mut self, names: &[&str], files: Archive, entrypoint: &[&str]) {
        let layer = files.finish();
        let layer_digest = format!("sha256:{}", sha256(&layer));
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {"Entrypoint": entrypoint, "Env": ["PATH=/bin"], "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
            "history": [{"created_by": "skerry tests"}],
        });
        let layer = self.blob("application/vnd.oci.image.layer.v1.tar", layer);
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().into_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": [layer],
        });
        let manifest = self.blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().into_bytes());
        for name in names {
            let mut entry = manifest.clone();
            entry["platform"] = json!({"architecture": architecture(), "os": "linux"});
            let tag = name.rsplit(':').next().unwrap_or("latest");
            entry["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag});
            self.manifests.push(entry);
        }
    }

    fn blob(&mut self, kind: &str, content: Vec<u8>) -> Value {
        let hash = sha256(&content);
        let descriptor = json!({"mediaType": kind, "digest": format!("sha256:{hash}"), "size": content.len()});
        self.blobs.push((hash, content));
        descriptor
    }

    fn finish(self) -> Vec<u8> {
        let mut archive = Archive::default();
        archive.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#);
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        archive.file("index.json", 0o644, index.to_string().as_bytes());
        archive.directory("blobs", 0o755);
        archive.directory("blobs/sha256", 0o755);
        for (hash, content) in &self.blobs {
            archive.file(&format!("blobs/sha256/{hash}"), 0o644, content);
        }
        archive.finish()
    }
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn sha256(content: &[u8]) -> String {
    hex::encode(digest(&SHA256, content))
}

/// Where an image's archive would be loaded from by hand: `ctr -n k8s.io images import`.
pub fn import(ctr_address: &Path, archive: &Path) -> Result<()> {
    let ctr = paths::tool("ctr", "containerd")?;
    let output =
        run(Command::new(ctr).arg("-a").arg(ctr_address).args(["-n", "k8s.io", "images", "import"]).arg(archive), 120)?;
    ensure!(output.success, "ctr images import failed: {}", output.text());
    Ok(())
}
