//! Files of the box in a pod: nothing is mounted here, the path is checked and handed through.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path};

use k8s_openapi::api::core::v1::HostPathVolumeSource;

use super::Reason;
use crate::kubelet::dirs::{At, make_dirs};

/// Makes the path when its type says so, and checks that it is what its type says.
pub(super) fn check(source: &HostPathVolumeSource) -> Result<(), Reason> {
    let path = Path::new(&source.path);
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(Reason::HostPathUpward(source.path.clone()));
    }
    if !path.is_absolute() {
        return Err(Reason::HostPathRelative(source.path.clone()));
    }
    let kind = source.type_.as_deref().unwrap_or_default();
    let missing = matches!(fs::metadata(path), Err(error) if error.kind() == io::ErrorKind::NotFound);
    match kind {
        "DirectoryOrCreate" if missing => make_dirs(path, 0o755)?,
        "FileOrCreate" if missing => {
            match OpenOptions::new().write(true).create_new(true).mode(0o644).open(path) {
                // Another pod was quicker.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.map(drop).at("make", path)?,
            }
        }
        _ => {}
    }
    let is = |test: fn(&fs::FileType) -> bool| fs::metadata(path).is_ok_and(|data| test(&data.file_type()));
    let (is_right, wanted) = match kind {
        "" => return Ok(()),
        "Directory" | "DirectoryOrCreate" => (is(fs::FileType::is_dir), "a directory"),
        "File" | "FileOrCreate" => (is(fs::FileType::is_file), "a file"),
        "Socket" => (is(FileTypeExt::is_socket), "a socket file"),
        "CharDevice" => (is(FileTypeExt::is_char_device), "a character device"),
        "BlockDevice" => (is(FileTypeExt::is_block_device), "a block device"),
        other => return Err(Reason::HostPathKind(other.to_owned())),
    };
    if is_right { Ok(()) } else { Err(Reason::HostPathType { path: source.path.clone(), wanted }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_text(path: &Path, kind: &str) -> String {
        let source = HostPathVolumeSource { path: path.to_str().unwrap().to_owned(), type_: Some(kind.to_owned()) };
        check(&source).map_or_else(|error| error.to_string(), |()| "ok".to_owned())
    }

    #[test]
    fn types_are_checked_and_made() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::os::unix::net::UnixListener::bind(at("sock")).unwrap();
        std::os::unix::fs::symlink(dir.path(), at("link")).unwrap();
        assert_eq!(check_text(&at("a/b"), "DirectoryOrCreate"), "ok");
        assert_eq!(check_text(&at("file"), "FileOrCreate"), "ok");
        assert!(check_text(&at("none/file"), "FileOrCreate").starts_with("cannot make "));
        assert_eq!(check_text(&at("missing"), ""), "ok");
        assert_eq!(check_text(&at("link"), "Directory"), "ok");
        assert_eq!(check_text(&at("sock"), "Socket"), "ok");
        assert_eq!(check_text(Path::new("/dev/null"), "CharDevice"), "ok");
        let fails = |path: &Path, kind: &str, wanted: &str| {
            let want = format!("hostPath type check failed: {} is not {wanted}", path.display());
            assert_eq!(check_text(path, kind), want);
        };
        fails(&at("file"), "Directory", "a directory");
        fails(&at("file"), "DirectoryOrCreate", "a directory");
        fails(&at("missing"), "Directory", "a directory");
        fails(&at("a"), "File", "a file");
        fails(&at("a"), "FileOrCreate", "a file");
        fails(&at("a"), "Socket", "a socket file");
        fails(&at("a"), "CharDevice", "a character device");
        fails(&at("a"), "BlockDevice", "a block device");
        assert!(check_text(&at("a/../b"), "").contains("\"..\""));
    }
}
