//! Seals what is secret: AES-256-GCM under a key that never leaves the node, bound to the row it belongs to.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom as _, SystemRandom};
use tracing::warn;

use super::Error;

/// Name of the key's file in the data directory.
pub(super) const FILE: &str = "node.key";
const KEY_LEN: usize = 32;

/// The node key, ready to use.
pub(super) struct Sealer {
    key: LessSafeKey,
    random: SystemRandom,
}

impl Sealer {
    /// Reads the key, or makes one. A key file of the wrong size is moved aside: what it sealed is lost and comes again from the
    /// cloud.
    pub(super) fn open(data_dir: &Path) -> Result<Self, Error> {
        let path = data_dir.join(FILE);
        match fs::read(&path) {
            Ok(bytes) if bytes.len() == KEY_LEN => {
                let permissions = fs::Permissions::from_mode(0o600);
                // Best effort: on a read-only disk the key still serves.
                if let Err(error) = fs::set_permissions(&path, permissions) {
                    warn!(%error, "cannot restrict the node key to its owner");
                }
                return Self::new(&bytes).map_err(Error::io("use", &path));
            }
            Ok(_) => {
                let aside = data_dir.join("node.key.damaged");
                warn!(kept = %aside.display(), "the node key is damaged, a new one is made; secrets come again from the cloud");
                fs::rename(&path, aside).map_err(Error::io("move aside", &path))?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("read", &path)(error)),
        }
        let mut bytes = [0; KEY_LEN];
        SystemRandom::new()
            .fill(&mut bytes)
            .map_err(|_| Error::io("make", &path)(std::io::Error::other("the system gives no random bytes")))?;
        write_new(data_dir, &path, &bytes).map_err(Error::io("make", &path))?;
        Self::new(&bytes).map_err(Error::io("use", &path))
    }

    fn new(bytes: &[u8]) -> std::io::Result<Self> {
        let key = UnboundKey::new(&AES_256_GCM, bytes).map_err(|_| std::io::Error::other("not a key"))?;
        Ok(Self { key: LessSafeKey::new(key), random: SystemRandom::new() })
    }

    /// Nonce, ciphertext, tag. `None` when the system gives no random bytes.
    pub(super) fn seal(&self, row: &str, plain: &[u8]) -> Option<Vec<u8>> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).ok()?;
        let mut sealed = Vec::with_capacity(NONCE_LEN + plain.len() + AES_256_GCM.tag_len());
        sealed.extend_from_slice(plain);
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(row.as_bytes()), &mut sealed)
            .ok()?;
        sealed.splice(0..0, nonce);
        Some(sealed)
    }

    /// Undoes [`Sealer::seal`]; `None` for another key, another row, or damage.
    pub(super) fn unseal(&self, row: &str, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, rest) = sealed.split_at_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut rest = rest.to_vec();
        let length = self.key.open_in_place(nonce, Aad::from(row.as_bytes()), &mut rest).ok()?.len();
        rest.truncate(length);
        Some(rest)
    }
}

fn write_new(dir: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("key.new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_only_with_the_same_key_and_row() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Sealer::open(dir.path()).unwrap();
        let sealed = sealer.seal("5|uid|1", b"password").unwrap();
        assert!(!sealed.windows(8).any(|window| window == b"password"));
        let again = Sealer::open(dir.path()).unwrap();
        assert_eq!(again.unseal("5|uid|1", &sealed).as_deref(), Some(&b"password"[..]));
        assert_eq!(again.unseal("5|uid|2", &sealed), None);
        assert_eq!(again.unseal("5|uid|1", &sealed[..10]), None);
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(dir.path().join(FILE), b"short").unwrap();
        let other = Sealer::open(dir.path()).unwrap();
        assert_eq!(other.unseal("5|uid|1", &sealed), None);
        assert!(dir.path().join("node.key.damaged").exists());
    }
}
