//! Where things lie: the checkout, the cache, the binaries, and the throw-away directory of a run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};

use crate::{cleanup, procfs};

/// What the directories of test runs are called.
pub const RUN_PREFIX: &str = "skerry-test-";

/// The top of the checkout: `$SKERRY_SOURCE`, which the scripts set, or where this was compiled. Checkouts share a cache, and cargo takes what
/// one has compiled for what another one would.
pub fn repository() -> PathBuf {
    if let Some(source) = std::env::var_os("SKERRY_SOURCE") {
        return PathBuf::from(source);
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// `$SKERRY_CACHE`, or `~/.cache/skerry`: what outlives a run and may be thrown away.
pub fn cache() -> PathBuf {
    match std::env::var_os("SKERRY_CACHE") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/skerry"),
    }
}

/// A binary that scripts/controlplane builds: `kube`, `kubelet`, `testserver`.
pub fn cached_binary(name: &str) -> Result<PathBuf> {
    let path = cache().join("bin").join(name);
    if !path.exists() {
        bail!("{} is missing: run scripts/controlplane, which builds it", path.display());
    }
    Ok(path)
}

/// A binary of ours: `cloudcore` or `edgecore`, from `$SKERRY_BIN_DIR` or from the target directory this program runs in.
pub fn product(name: &str) -> Result<PathBuf> {
    let mut places: Vec<PathBuf> = Vec::new();
    if let Some(dir) = std::env::var_os("SKERRY_BIN_DIR") {
        places.push(PathBuf::from(dir));
    } else if let Ok(this) = std::env::current_exe() {
        places.extend(this.ancestors().skip(1).take(2).map(Path::to_owned));
    }
    for place in &places {
        let path = place.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!("found no {name} in {places:?}: run `cargo build`, or say where it is with SKERRY_BIN_DIR")
}

/// A tool of the machine, looked for in PATH and the sbin directories.
pub fn tool(name: &str, package: &str) -> Result<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"])
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not installed: apt-get install {package}, or run scripts/install-deps"))
}

/// The directory of one run. Dropping it removes everything that belongs to it; if the process dies before, its janitor does,
/// and if that one dies too, [`cleanup::stale`] of the next run.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    owned: bool,
}

impl RunDir {
    /// Makes `/tmp/skerry-test-<pid>-<n>`, after removing what killed runs left. `janitor` is a program that, called with
    /// `janitor DIR` and a pipe as standard input, waits for the pipe to close and calls [`cleanup::sweep`] (see `testbed`).
    pub fn temporary(janitor: &Path) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        cleanup::stale();
        let pid = std::process::id();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("{RUN_PREFIX}{pid}-{count}"));
        if path.exists() {
            cleanup::sweep(&path)?;
        }
        // Under another name until it says whose it is: without an owner it would be taken for left over.
        let new = std::env::temp_dir().join(format!("skerry-new-{pid}-{count}"));
        fs::create_dir_all(&new).with_context(|| format!("cannot make {}", new.display()))?;
        let born = procfs::start_time(i32::try_from(pid)?).unwrap_or(0);
        fs::write(new.join("owner"), format!("{pid} {born}\n"))?;
        fs::rename(&new, &path)?;
        start_janitor(janitor, &path)?;
        Ok(Self { path, owned: true })
    }

    /// Uses a directory that outlives this process.
    pub fn lasting(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path: path.to_owned(), owned: false })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = cleanup::sweep(&self.path)
        {
            eprintln!("could not remove {}: {error:#}", self.path.display());
        }
    }
}

fn start_janitor(program: &Path, dir: &Path) -> Result<()> {
    use std::os::unix::process::CommandExt as _;
    let mut child = Command::new(program)
        .arg("janitor")
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Its own group: Ctrl-C at the terminal ends the run, not the one who cleans up after it.
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {} janitor", program.display()))?;
    // The write end closes when this process is gone, however it goes.
    std::mem::forget(child.stdin.take());
    Ok(())
}
