//! The broker: one that is there, or a mosquitto that edgecore starts.
//!
//! edgecore's own listens on 127.0.0.1 for everybody and on a unix socket for edgecore, to which the access list does not apply. It keeps
//! nothing on disk: what is retained is published again by those whose it is. It ends with edgecore; one that an edgecore left that was
//! killed is ended by the next. The access list is also kept in the data directory, for whoever has another broker to be given it.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, chown, geteuid};
use skerry_proto::sync::Collection;
use tokio::net::{TcpStream, UnixStream};
use tokio::process::{Child, Command};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use super::access::{self, WRITERS, Writers};
use super::session::Stream;
use super::{ACCESS, PASSWORDS};
use crate::store::{self, Change, Store};
use crate::{clock, files};

/// Where clients look for a broker.
const LOCAL: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1883));
/// Where packages put mosquitto.
const BINARIES: [&str; 3] = ["/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto", "/usr/bin/mosquitto"];
/// How long a broker of somebody else's that was there, or that systemd is to start, is waited for before one is started in its place: it would
/// find its port taken.
const PATIENCE: Duration = Duration::from_secs(60);
/// There where systemd runs.
const SYSTEMD: &str = "/run/systemd/system";
/// There where it starts mosquitto with the box.
const UNIT: &str = "/etc/systemd/system/multi-user.target.wants/mosquitto.service";
/// How long a connection may take to be there.
const CONNECT: Duration = Duration::from_secs(2);
/// How long mosquitto may take to listen, and to end.
const START: Duration = Duration::from_secs(3);
/// Between looks at the passwords.
const LOOK: Duration = Duration::from_secs(5);
/// Devices that are read at once.
const PAGE: usize = 256;
/// No more of the passwords is read, in bytes.
const MAX_PASSWORDS: u64 = 1 << 20;

/// Which broker is to be used, and the one that was started.
pub(super) struct Broker {
    /// None: whichever is there.
    at: Option<String>,
    /// Where clients look for a broker.
    pub(super) local: SocketAddr,
    /// Where mosquitto is looked for.
    pub(super) binaries: &'static [&'static str],
    store: Store,
    passwords: PathBuf,
    access: PathBuf,
    rules: Rules,
    /// Made anew each time; only edgecore and mosquitto can enter it.
    pub(super) dir: PathBuf,
    own: Option<Child>,
    /// The one that is used is somebody else's.
    is_theirs: bool,
    /// Somebody else's was there, or is to be.
    pub(super) is_expected: bool,
    /// Since when there is none.
    missing: Option<Duration>,
}

/// The access list as it was made last, and what it is made of.
struct Rules {
    list: String,
    passwords: Vec<u8>,
    writers: Writers,
    changes: broadcast::Receiver<Change>,
    /// Devices may have changed that were not seen.
    is_unread: bool,
    /// The list is of other writers.
    is_old: bool,
    /// It was said that they are not in force.
    is_told: bool,
    /// The broker that was started here has the list.
    is_given: bool,
    /// The data directory has it.
    is_copied: bool,
    /// It was said that the data directory cannot have it.
    is_copy_missed: bool,
}

impl Broker {
    pub(super) fn new(at: Option<String>, store: Store, data_dir: &Path) -> Self {
        let (passwords, access) = (data_dir.join(PASSWORDS), data_dir.join(ACCESS));
        let is_expected = Path::new(SYSTEMD).exists() && Path::new(UNIT).exists();
        let rules = Rules {
            list: String::new(),
            passwords: Vec::new(),
            writers: Writers::default(),
            changes: store.changes(),
            is_unread: true,
            is_old: true,
            is_told: false,
            is_given: false,
            is_copied: false,
            is_copy_missed: false,
        };
        Self {
            at,
            local: LOCAL,
            binaries: &BINARIES,
            store,
            passwords,
            access,
            rules,
            dir: directory(data_dir),
            own: None,
            is_theirs: false,
            is_expected,
            missing: None,
        }
    }

    /// Whether the configuration says which.
    pub(super) fn is_named(&self) -> bool {
        self.at.is_some()
    }

    /// Whether the one that is used was started here, and has the access list.
    pub(super) fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// A connection, and words for where to. Otherwise why there is none, and what to do about it.
    ///
    /// One is started only where it `has_devices`.
    pub(super) async fn connect(&mut self, has_devices: bool) -> Result<(Box<dyn Stream>, String), String> {
        let connected = match &self.at {
            None => self.connect_auto(has_devices).await,
            Some(address) => match dial(address).await {
                Ok(stream) => Ok((stream, address.clone())),
                Err(error) => {
                    Err(format!("no broker at {address} ({error}); start it, or correct mqtt_broker in config.toml"))
                }
            },
        };
        self.is_theirs = connected.is_ok() && self.own.is_none();
        // Whether it has the rules is to be looked at.
        self.rules.is_old |= self.is_theirs;
        connected
    }

    async fn connect_auto(&mut self, has_devices: bool) -> Result<(Box<dyn Stream>, String), String> {
        if let Some(own) = &mut self.own
            && let Ok(Some(status)) = own.try_wait()
        {
            warn!(%status, "mosquitto ended");
            self.own = None;
        }
        if self.own.is_none() {
            end_orphan(&self.dir).await;
            let local = self.local.to_string();
            if let Ok(stream) = dial(&local).await {
                (self.is_expected, self.missing) = (true, None);
                return Ok((stream, local));
            }
            let now = clock::monotonic();
            let missing = now.saturating_sub(*self.missing.get_or_insert(now));
            if self.is_expected && missing < PATIENCE {
                return Err(format!(
                    "no broker: nothing listens on {local}, where the box's own was or is to be; `systemctl start mosquitto`, or wait a minute for one of edgecore's"
                ));
            }
            if !has_devices {
                return Err("no broker, and no device that would need one".to_owned());
            }
            let Some(binary) = self.binaries.iter().map(Path::new).find(|binary| binary.exists()) else {
                return Err(format!(
                    "no broker: nothing listens on {local} and mosquitto is not installed; `apt install mosquitto` brings it"
                ));
            };
            self.start(binary).await.map_err(|error| format!("mosquitto cannot be started: {error}"))?;
        }
        let socket = format!("unix://{}", self.socket().display());
        let stream = dial(&socket)
            .await
            .map_err(|error| format!("the mosquitto that edgecore started does not answer: {error}"))?;
        Ok((stream, format!("{}, started by edgecore", self.local)))
    }

    async fn start(&mut self, binary: &Path) -> io::Result<()> {
        let user = user();
        // Whatever is left in it is an old one's.
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => std::fs::DirBuilder::new().mode(0o700).create(&self.dir)?,
        }
        self.make().await?;
        self.copy();
        self.write_rules(user.as_ref())?;
        self.rules.is_given = true;
        self.write("mosquitto.conf", self.config(user.as_ref()).as_bytes(), user.as_ref())?;
        if let Some(user) = &user {
            chown(&self.dir, Some(user.uid), Some(user.gid))?;
        }
        let child = Command::new(binary).arg("-c").arg(self.dir.join("mosquitto.conf")).kill_on_drop(true).spawn()?;
        if let Some(pid) = child.id() {
            std::fs::write(self.dir.join("pid"), pid.to_string())?;
        }
        let own = self.own.insert(child);
        self.rules.is_told = false;
        let socket = self.dir.join("socket");
        let until = clock::monotonic() + START;
        while UnixStream::connect(&socket).await.is_err() {
            if let Some(status) = own.try_wait()? {
                self.own = None;
                return Err(io::Error::other(format!(
                    "it ended at once ({status}); see its message in edgecore's log"
                )));
            }
            if clock::monotonic() > until {
                return Err(io::Error::other("it does not listen"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        info!(binary = %binary.display(), listens = %self.local, "mosquitto runs");
        Ok(())
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("socket")
    }

    fn config(&self, user: Option<&User>) -> String {
        // Of no meaning unless root starts it.
        let user = user.map_or("nobody", |user| &user.name);
        let (dir, port) = (self.dir.display(), self.local.port());
        // mosquitto's own limits are none. A message is bounded by the list of all devices; whatever else is above 256 KiB edgecore refuses.
        format!(
            "# Made by edgecore; changes are lost.\n\
             user {user}\n\
             per_listener_settings true\n\
             persistence false\n\
             log_dest stderr\n\
             log_type error\n\
             max_packet_size 8388608\n\
             memory_limit 134217728\n\
             max_queued_bytes 4194304\n\
             listener 0 {dir}/socket\n\
             allow_anonymous true\n\
             listener {port} 127.0.0.1\n\
             allow_anonymous true\n\
             acl_file {dir}/access\n\
             password_file {dir}/passwords\n"
        )
    }

    /// What the own broker reads again when it is told to.
    fn write_rules(&self, user: Option<&User>) -> io::Result<()> {
        self.write("access", self.rules.list.as_bytes(), user)?;
        self.write("passwords", &self.rules.passwords, user)
    }

    fn write(&self, name: &str, content: &[u8], user: Option<&User>) -> io::Result<()> {
        let path = self.dir.join(name);
        files::write(&path, content, 0o600)?;
        if let Some(user) = user {
            chown(&path, Some(user.uid), Some(user.gid))?;
        }
        Ok(())
    }

    /// Follows the devices and the passwords, keeps the access list, and has mosquitto read it again. Can be dropped at any point; never ends.
    pub(super) async fn follow(&mut self) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Passwords are only its own broker's.
            let is_due = self.own.is_some() || self.rules.is_unread || self.rules.is_old || !self.rules.is_copied;
            tokio::select! {
                change = self.rules.changes.recv() => match change {
                    Ok(change) if change.collection == Collection::Devices => {
                        // Unless the row is read, and this comes to its end.
                        let was_unread = std::mem::replace(&mut self.rules.is_unread, true);
                        if let Ok(row) = self.store.row(Collection::Devices, &change.uid).await {
                            let json = row.as_ref().map(|row| &row.json[..]);
                            self.rules.is_old |= self.rules.writers.device(&change.key, json);
                            self.rules.is_unread = was_unread;
                        }
                    }
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => self.rules.is_unread = true,
                    Err(RecvError::Closed) => return std::future::pending().await,
                },
                // Many changes come together: they are written together.
                _ = look.tick(), if is_due => {
                    if let Err(error) = self.refresh().await {
                        warn!(%error, "the MQTT access list cannot be made anew; it stays as it was");
                    }
                }
            }
        }
    }

    async fn refresh(&mut self) -> io::Result<()> {
        self.make().await?;
        self.copy();
        if let Some(own) = self.own.as_ref().filter(|_| !self.rules.is_given) {
            self.write_rules(user().as_ref())?;
            if let Some(pid) = own.id().and_then(|pid| i32::try_from(pid).ok()) {
                kill(Pid::from_raw(pid), Signal::SIGHUP)?;
            }
            self.rules.is_given = true;
        }
        let lacks = self.is_theirs && !self.rules.writers.is_empty();
        if lacks && !std::mem::replace(&mut self.rules.is_told, true) {
            warn!(
                list = %self.access.display(),
                "the annotation {WRITERS} is not in force here by itself: the MQTT broker is not edgecore's; give it the access list, as docs/mqtt.md says"
            );
        }
        Ok(())
    }

    /// Keeps the list in the data directory, for whoever has another broker. The own one does without it.
    fn copy(&mut self) {
        if self.rules.is_copied {
            return;
        }
        // There is no secret in it, and somebody else is to read it.
        match files::write(&self.access, self.rules.list.as_bytes(), 0o644) {
            Ok(()) => (self.rules.is_copied, self.rules.is_copy_missed) = (true, false),
            Err(error) => {
                if !std::mem::replace(&mut self.rules.is_copy_missed, true) {
                    warn!(%error, list = %self.access.display(), "the MQTT access list cannot be kept for other brokers");
                }
            }
        }
    }

    /// Makes the list of what there is now.
    async fn make(&mut self) -> io::Result<()> {
        let passwords = read_passwords(&self.passwords)?;
        let rules = &mut self.rules;
        if rules.is_unread {
            rules.writers.clear();
            rules.is_old = true;
            read_all(&self.store, &mut rules.writers).await.map_err(io::Error::other)?;
            rules.is_unread = false;
        }
        if !rules.is_old && rules.passwords == passwords {
            return Ok(());
        }
        let list = rules.writers.list(&access::users(&String::from_utf8_lossy(&passwords)));
        rules.is_copied &= rules.list == list;
        rules.is_given &= rules.list == list && rules.passwords == passwords;
        (rules.list, rules.passwords, rules.is_old) = (list, passwords, false);
        Ok(())
    }

    /// Ends what was started.
    pub(super) async fn end(mut self) {
        let Some(mut own) = self.own.take() else { return };
        if let Some(pid) = own.id().and_then(|pid| i32::try_from(pid).ok()) {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        if tokio::time::timeout(START, own.wait()).await.is_err() {
            // Ended with what holds it.
            warn!("mosquitto did not end when it was told to");
        }
        // Made anew when it is started again.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Whom mosquitto becomes when root starts it.
fn user() -> Option<User> {
    let named = |name| User::from_name(name).ok().flatten();
    if geteuid().is_root() { named("mosquitto").or_else(|| named("nobody")) } else { None }
}

/// Takes what all devices say, some at a time.
async fn read_all(store: &Store, writers: &mut Writers) -> Result<(), store::Error> {
    let mut after = String::new();
    loop {
        let rows = store.page(Collection::Devices, &after, PAGE).await?;
        let Some(last) = rows.last() else { return Ok(()) };
        after.clone_from(&last.entry.uid);
        for row in &rows {
            writers.device(&row.entry.key, Some(&row.json));
        }
    }
}

fn read_passwords(path: &Path) -> io::Result<Vec<u8>> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
        Ok(found) if found.len() > MAX_PASSWORDS => {
            Err(io::Error::other(format!("{} has more than {MAX_PASSWORDS} bytes", path.display())))
        }
        Ok(found) => {
            if found.permissions().mode() & 0o077 != 0 {
                // It is hashes, but of whatever people choose.
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            }
            std::fs::read(path)
        }
    }
}

/// Where what mosquitto reads is made: under /run, for its user cannot enter the data directory, and named after that, for there may be
/// several.
fn directory(data_dir: &Path) -> PathBuf {
    let name = xxhash_rust::xxh3::xxh3_64(data_dir.as_os_str().as_encoded_bytes());
    PathBuf::from(format!("/run/skerry-mqtt-{name:016x}"))
}

/// Ends the mosquitto that an edgecore of this data directory left when it was killed, and removes what it read.
pub async fn end_left(data_dir: &Path) -> io::Result<()> {
    let dir = directory(data_dir);
    end_orphan(&dir).await;
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// One that an edgecore started which could not end it.
async fn end_orphan(dir: &Path) {
    let Some(pid) = std::fs::read_to_string(dir.join("pid")).ok().and_then(|text| text.trim().parse::<i32>().ok())
    else {
        return;
    };
    let is_ours = || {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        memchr::memmem::find(&line, dir.as_os_str().as_encoded_bytes()).is_some()
    };
    let until = clock::monotonic() + START;
    while is_ours() && clock::monotonic() < until {
        // Gone meanwhile is what is wanted.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn dial(address: &str) -> io::Result<Box<dyn Stream>> {
    let connecting = async {
        Ok(match address.strip_prefix("unix://") {
            Some(path) => Box::new(UnixStream::connect(path).await?) as Box<dyn Stream>,
            None => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
        })
    };
    tokio::time::timeout(CONNECT, connecting).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}
