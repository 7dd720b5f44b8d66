use super::*;

fn now(second: i64) -> Timestamp {
    Timestamp::from_second(1_767_366_245 + second).unwrap()
}

fn payload(files: &[(&str, &str)]) -> Payload<'static> {
    files
        .iter()
        .map(|(path, text)| {
            let file = File { bytes: Cow::Owned(text.as_bytes().to_vec()), mode: 0o640, owner: None };
            ((*path).to_owned(), file)
        })
        .collect()
}

/// What a container sees: every file below a name that is not hidden, through the links.
fn seen(dir: &Path) -> BTreeMap<String, String> {
    fn walk(dir: &Path, prefix: &str, out: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.starts_with("..") {
                continue;
            }
            let path = dir.join(&name);
            match fs::metadata(&path) {
                Ok(data) if data.is_dir() => walk(&path, &format!("{prefix}{name}/"), out),
                Ok(_) => drop(out.insert(format!("{prefix}{name}"), fs::read_to_string(&path).unwrap())),
                // A link whose file is not in the current set: for a reader it is not there.
                Err(_) => {}
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(dir, "", &mut out);
    out
}

fn texts(payload: &Payload<'_>) -> BTreeMap<String, String> {
    payload.iter().map(|(path, file)| (path.clone(), String::from_utf8(file.bytes.to_vec()).unwrap())).collect()
}

fn hidden(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("..")).collect();
    names.sort();
    names
}

#[test]
fn layout_and_modes_are_those_people_know() {
    let dir = tempfile::tempdir().unwrap();
    let writer = AtomicWriter { dir: dir.path(), fs_group: None };
    let mut files = payload(&[("key", "1"), ("sub/./dir//file", "2")]);
    files.get_mut("key").unwrap().mode = 0o6444;
    assert!(writer.write(&files, now(0)).unwrap());
    let data = fs::read_link(dir.path().join("..data")).unwrap().into_os_string().into_string().unwrap();
    assert!(data.starts_with("..2026_01_02_15_04_05."), "{data}");
    assert_eq!(fs::read_link(dir.path().join("key")).unwrap(), Path::new("..data/key"));
    assert_eq!(fs::read_link(dir.path().join("sub")).unwrap(), Path::new("..data/sub"));
    let mode = |path: &str| fs::metadata(dir.path().join(path)).unwrap().mode() & 0o7777;
    assert_eq!((mode("key"), mode("sub/dir/file"), mode("sub/dir"), mode("..data/")), (0o6444, 0o640, 0o755, 0o755));
    assert_eq!(
        hidden(dir.path()),
        ["..data".to_owned(), data].into_iter().rev().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
    );
}

#[test]
fn nothing_is_written_when_nothing_changed() {
    let dir = tempfile::tempdir().unwrap();
    let writer = AtomicWriter { dir: dir.path(), fs_group: None };
    let files = payload(&[("a", "1"), ("d/b", "2")]);
    assert!(writer.write(&files, now(0)).unwrap());
    let before = hidden(dir.path());
    assert!(!writer.write(&files, now(9)).unwrap());
    assert_eq!(hidden(dir.path()), before);

    // What was lost or tampered with is put right: a file cut short, a mode, a link, a file too many.
    fs::write(dir.path().join("..data/a"), "").unwrap();
    assert!(writer.write(&files, now(10)).unwrap());
    fs::set_permissions(dir.path().join("..data/a"), Permissions::from_mode(0o777)).unwrap();
    assert!(writer.write(&files, now(11)).unwrap());
    fs::write(dir.path().join("..data/extra"), "").unwrap();
    assert!(writer.write(&files, now(12)).unwrap());
    fs::remove_file(dir.path().join("a")).unwrap();
    symlink("/etc/passwd", dir.path().join("a")).unwrap();
    assert!(!writer.write(&files, now(13)).unwrap());
    assert_eq!(seen(dir.path()), texts(&files));
    assert_eq!(hidden(dir.path()).len(), 2);
}

#[test]
fn names_come_and_go_and_foreign_directories_stay() {
    let dir = tempfile::tempdir().unwrap();
    let writer = AtomicWriter { dir: dir.path(), fs_group: None };
    writer.write(&payload(&[("a", "1"), ("d/b", "2")]), now(0)).unwrap();
    fs::create_dir_all(dir.path().join("nested/mount")).unwrap();
    fs::create_dir(dir.path().join("late")).unwrap();
    let second = payload(&[("a", "3"), ("c", "4"), ("late", "5")]);
    writer.write(&second, now(1)).unwrap();
    assert_eq!(seen(dir.path()), texts(&second));
    assert!(dir.path().join("nested/mount").is_dir());
    assert!(fs::symlink_metadata(dir.path().join("d")).is_err());
    writer.write(&payload(&[]), now(2)).unwrap();
    assert!(seen(dir.path()).is_empty());
    assert!(dir.path().join("..data").is_dir());

    fs::create_dir_all(dir.path().join("full/x")).unwrap();
    let error = writer.write(&payload(&[("full", "1")]), now(3)).unwrap_err().to_string();
    assert!(error.contains("something else has its name"), "{error}");
}

#[test]
fn paths_that_could_leave_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let writer = AtomicWriter { dir: dir.path(), fs_group: None };
    let long = "x".repeat(256);
    let deep = "d/".repeat(2048) + "f";
    for path in ["", "/etc/passwd", "..", "a/../../b", "..data", "..x/y", "a/..", ".", "a\0b", "./..data", &long, &deep]
    {
        let error = writer.write(&payload(&[(path, "x")]), now(0));
        assert!(matches!(error, Err(WriteError::Path { .. })), "{path:?}");
    }
    assert!(matches!(writer.write(&payload(&[("a", "1"), ("a/b", "2")]), now(0)), Err(WriteError::Path { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    writer.write(&payload(&[("a..b", "1"), ("x/..y", "2"), (".hidden", "3")]), now(0)).unwrap();
}

#[test]
fn a_data_link_that_leads_elsewhere_is_not_believed() {
    for target in ["/etc", "../..", "..", "plain", "..missing"] {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("plain")).unwrap();
        symlink(target, dir.path().join("..data")).unwrap();
        let files = payload(&[("a", "1")]);
        AtomicWriter { dir: dir.path(), fs_group: None }.write(&files, now(0)).unwrap();
        assert_eq!(seen(dir.path()), texts(&files), "{target}");
    }
}

/// Stops after every single step, the way a crash does, and looks: what is there is all old or all new (names that are only in one
/// of them may be missing or dangle for a moment). Then the next write heals everything.
#[test]
fn a_crash_at_any_step_leaves_one_complete_set() {
    let old = payload(&[("keep", "old"), ("both/x", "old"), ("gone", "old"), ("gone-dir/y", "old")]);
    let new =
        payload(&[("keep", "new"), ("both/x", "new"), ("both/z", "new"), ("fresh", "new"), ("fresh-dir/y", "new")]);
    let third = payload(&[("keep", "third"), ("fresh", "third")]);
    for (before, after) in [(payload(&[]), old.clone()), (old.clone(), new.clone()), (new, old)] {
        let mut stop_at = 0;
        loop {
            let dir = tempfile::tempdir().unwrap();
            let writer = AtomicWriter { dir: dir.path(), fs_group: None };
            writer.write(&before, now(0)).unwrap();
            let mut steps = 0;
            let result = writer.write_in_steps(&after, now(1), &mut |_| {
                steps += 1;
                if steps > stop_at { Err(io::Error::other("crash")) } else { Ok(()) }
            });
            let there = seen(dir.path());
            let (old, new) = (texts(&before), texts(&after));
            let is_part_of =
                |set: &BTreeMap<String, String>| there.iter().all(|(path, text)| set.get(path) == Some(text));
            assert!(is_part_of(&old) || is_part_of(&new), "after {stop_at} steps: {there:?}");
            for path in old.keys().filter(|path| new.contains_key(*path)) {
                assert!(there.contains_key(path), "after {stop_at} steps {path} is missing");
            }
            if result.is_ok() {
                assert!(stop_at > 10, "only {stop_at} steps were seen");
                break;
            }
            // The next writer may want the same, the old again, or something else.
            for wanted in [&after, &before, &third] {
                writer.write(wanted, now(2)).unwrap();
                assert_eq!(seen(dir.path()), texts(wanted), "healing after {stop_at} steps");
                assert_eq!(hidden(dir.path()).len(), 2, "left over after {stop_at} steps: {:?}", hidden(dir.path()));
                let links = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
                assert!(links.into_iter().all(|path| path.exists()), "a link dangles after {stop_at} steps");
            }
            stop_at += 1;
        }
    }
}

#[test]
fn readers_never_see_a_mixture() {
    let dir = tempfile::tempdir().unwrap();
    let writer = AtomicWriter { dir: dir.path(), fs_group: None };
    let set = |n: u32| payload(&[("a", &n.to_string()), ("b", &n.to_string())]);
    writer.write(&set(0), now(0)).unwrap();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut looks = 0;
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) || looks == 0 {
                // One resolution of ..data, as a program that opens the directory does.
                let Ok(data) = fs::canonicalize(dir.path().join("..data")) else { continue };
                if let (Ok(a), Ok(b)) = (fs::read_to_string(data.join("a")), fs::read_to_string(data.join("b"))) {
                    assert_eq!(a, b);
                    looks += 1;
                }
            }
        });
        for n in 1..200 {
            writer.write(&set(n), now(i64::from(n))).unwrap();
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.join().unwrap();
    });
}

#[test]
fn groups_and_owners() {
    if !crate::kubelet::volumes::tests::is_root("groups_and_owners") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let writer = AtomicWriter { dir: dir.path(), fs_group: Some(2000) };
    let mut files = payload(&[("sub/token", "t")]);
    files.insert("sub/token".to_owned(), File { bytes: Cow::Borrowed(b"t"), mode: 0o600, owner: Some(1000) });
    assert!(writer.write(&files, now(0)).unwrap());
    assert!(!writer.write(&files, now(1)).unwrap());
    let data = fs::metadata(dir.path().join("sub/token")).unwrap();
    assert_eq!((data.uid(), data.gid(), data.mode() & 0o7777), (1000, 2000, 0o640));
    let data = fs::metadata(dir.path().join("sub")).unwrap();
    assert_eq!((data.gid(), data.mode() & 0o7777), (2000, 0o2755));
}
