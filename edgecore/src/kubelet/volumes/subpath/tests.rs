use std::os::unix::fs::{MetadataExt, symlink};

use super::*;
use crate::kubelet::volumes::tests::{Unmount, is_root};

struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    /// `volume` beside `outside/secret`.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("volume")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/secret"), "secret").unwrap();
        Self { dir }
    }

    fn volume(&self) -> PathBuf {
        self.dir.path().join("volume")
    }

    fn open(&self, path: &str) -> Result<PathBuf, SubPathError> {
        let found = open(&self.volume(), path)?;
        Ok(fs::read_link(tree::path_of(&found.file)).unwrap())
    }
}

#[test]
fn plain_paths_are_found_and_made() {
    let test = Scene::new();
    fs::set_permissions(test.volume(), Permissions::from_mode(0o2775)).unwrap();
    let real = fs::canonicalize(test.volume()).unwrap();
    assert_eq!(test.open("a/b/./c/").unwrap(), real.join("a/b/c"));
    assert_eq!(fs::metadata(real.join("a/b")).unwrap().mode() & 0o7777, 0o2775);
    assert_eq!(test.open(".").unwrap(), real);
    fs::write(real.join("a/file"), "x").unwrap();
    assert_eq!(test.open("a/file").unwrap(), real.join("a/file"));
    assert!(matches!(test.open("a/file/more"), Err(SubPathError::NotDirectory { .. })));
    assert!(matches!(test.open("/etc"), Err(SubPathError::Absolute)));
    assert!(matches!(test.open("../outside"), Err(SubPathError::Upward)));
    assert!(matches!(test.open("a/../../outside"), Err(SubPathError::Upward)));
}

#[test]
fn links_inside_the_volume_work() {
    let test = Scene::new();
    let real = fs::canonicalize(test.volume()).unwrap();
    fs::create_dir_all(real.join("..2026/sub")).unwrap();
    fs::write(real.join("..2026/key"), "x").unwrap();
    symlink("..2026", real.join("..data")).unwrap();
    symlink("..data/key", real.join("key")).unwrap();
    symlink("../../..data/./key", real.join("..2026/sub/up")).unwrap();
    symlink(real.join("..2026/sub"), real.join("absolute")).unwrap();
    symlink("../volume/key", real.join("around")).unwrap();
    assert_eq!(test.open("key").unwrap(), real.join("..2026/key"));
    assert_eq!(test.open("absolute/up").unwrap(), real.join("..2026/key"));
    assert_eq!(test.open("absolute/new").unwrap(), real.join("..2026/sub/new"));
    // Out and in again is out.
    assert!(matches!(test.open("around"), Err(SubPathError::Escape { .. })));
}

#[test]
fn links_that_leave_are_refused() {
    let test = Scene::new();
    let volume = test.volume();
    let outside = test.dir.path().join("outside");
    fs::create_dir_all(volume.join("d/e")).unwrap();
    symlink("/etc", volume.join("etc")).unwrap();
    symlink("/", volume.join("root")).unwrap();
    symlink(&outside, volume.join("abs")).unwrap();
    symlink("../outside", volume.join("rel")).unwrap();
    symlink("../../../outside/secret", volume.join("d/e/deep")).unwrap();
    symlink("abs", volume.join("indirect")).unwrap();
    symlink(format!("{}/../outside", volume.display()), volume.join("sly")).unwrap();
    symlink(format!("{}-other", volume.display()), volume.join("prefix")).unwrap();
    symlink("/proc/self/root/etc", volume.join("proc")).unwrap();
    for path in [
        "etc",
        "etc/passwd",
        "root/etc",
        "abs/secret",
        "rel",
        "rel/new",
        "d/e/deep",
        "indirect",
        "sly",
        "prefix",
        "proc",
    ] {
        let result = test.open(path);
        assert!(matches!(result, Err(SubPathError::Escape { .. })), "{path}: {result:?}");
    }
    assert!(!outside.join("new").exists());
    symlink("loop-b", volume.join("loop-a")).unwrap();
    symlink("loop-a", volume.join("loop-b")).unwrap();
    assert!(matches!(test.open("loop-a"), Err(SubPathError::Loop)));
    symlink("nowhere/at/all", volume.join("dangling")).unwrap();
    assert!(matches!(test.open("dangling"), Err(SubPathError::Dangling { .. })));
    assert!(!volume.join("nowhere").exists());
}

/// One thread keeps exchanging a directory for a link to the outside while another resolves through it: what is found is always inside.
#[test]
fn swapping_while_it_is_walked_gains_nothing() {
    let test = Scene::new();
    let volume = test.volume();
    let outside = fs::canonicalize(test.dir.path().join("outside")).unwrap();
    fs::create_dir_all(volume.join("real/sub")).unwrap();
    fs::create_dir(outside.join("sub")).unwrap();
    symlink(&outside, volume.join("evil")).unwrap();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = fs::rename(volume.join("real"), volume.join("x"));
                let _ = fs::rename(volume.join("evil"), volume.join("real"));
                let _ = fs::rename(volume.join("real"), volume.join("evil"));
                let _ = fs::rename(volume.join("x"), volume.join("real"));
            }
        });
        for _ in 0..3000 {
            if let Ok(found) = test.open("real/sub/new") {
                assert!(!found.starts_with(&outside), "{}", found.display());
            }
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(!outside.join("sub/new").exists() && !outside.join("new").exists());
}

#[test]
fn what_was_opened_is_what_is_bound() {
    if !is_root("what_was_opened_is_what_is_bound") {
        return;
    }
    let test = Scene::new();
    let _unmount = Unmount(test.dir.path().to_owned());
    let volume = test.volume();
    let target = test.dir.path().join("targets/v/c/0");
    fs::create_dir(volume.join("d")).unwrap();
    fs::write(volume.join("d/inside"), "").unwrap();
    let found = open(&volume, "d").unwrap();
    // Between the check and the mount the directory becomes a link.
    fs::rename(volume.join("d"), volume.join("moved")).unwrap();
    symlink(test.dir.path().join("outside"), volume.join("d")).unwrap();
    bind(&found, &target).unwrap();
    assert!(target.join("inside").exists() && !target.join("secret").exists());
    // Binding again changes nothing.
    bind(&found, &target).unwrap();
    let real = real_path(&target).unwrap();
    assert_eq!(mountinfo::at_or_below(&real).unwrap().len(), 1);
    // A file that was replaced since, or is of another type, is bound anew.
    fs::write(volume.join("f"), "one").unwrap();
    bind(&open(&volume, "f").unwrap(), &target).unwrap();
    assert_eq!(fs::read_to_string(&target).unwrap(), "one");
    fs::write(volume.join("g"), "two").unwrap();
    fs::rename(volume.join("g"), volume.join("f")).unwrap();
    bind(&open(&volume, "f").unwrap(), &target).unwrap();
    assert_eq!(fs::read_to_string(&target).unwrap(), "two");
    assert_eq!(mountinfo::at_or_below(&real).unwrap().len(), 1);
}
