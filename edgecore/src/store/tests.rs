//! The store against what the world does to it: killed processes, flipped bits, cut files.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;
use std::process::{Command, Stdio};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use skerry_proto::sync::{Collection, Object};

use super::*;

const NOW: Timestamp = Timestamp::UNIX_EPOCH;

fn object(collection: Collection, name: &str, content: &str) -> Object {
    let json = format!(r#"{{"metadata":{{"name":"{name}"}},"data":"{content}"}}"#);
    Object::new(collection, format!("default/{name}"), format!("uid-{name}"), json.as_bytes())
}

fn upsert(collection: Collection, name: &str, content: &str) -> Op {
    Op::Upsert(object(collection, name, content))
}

fn report(kind: ReportKind, name: &str, payload: &str) -> Report {
    Report {
        id: 0,
        kind,
        namespace: "default".to_owned(),
        name: name.to_owned(),
        uid: format!("uid-{name}"),
        payload: Bytes::from(payload.to_owned()),
    }
}

fn reopen(data_dir: &Path) -> Store {
    Store::open(data_dir, NOW).unwrap()
}

async fn confirm(store: &Store) -> Result<(), Error> {
    let damaged = *store.damaged().borrow();
    store.set_pods_known(damaged).await
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    match std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..default,
    }
}

#[tokio::test]
async fn rows_come_back_by_every_way_and_changes_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path());
    let mut changes = store.changes();
    let large = "x".repeat(100_000);
    store.apply(vec![upsert(Collection::Pods, "a", "1"), upsert(Collection::ConfigMaps, "a", &large)]).await.unwrap();
    assert_eq!(changes.recv().await.unwrap().collection, Collection::Pods);
    assert_eq!(changes.recv().await.unwrap().key, "default/a");
    let pods = store.list(Collection::Pods).await.unwrap();
    assert_eq!(pods.len(), 1);
    assert_eq!(pods[0].entry, object(Collection::Pods, "a", "1").entry);
    assert_eq!(store.named(Collection::Pods, "default/a").await.unwrap(), pods);
    assert_eq!(store.row(Collection::Pods, "uid-a").await.unwrap().as_ref(), Some(&pods[0]));
    assert!(store.row(Collection::ConfigMaps, "uid-a").await.unwrap().unwrap().json.len() > large.len());
    assert_eq!(store.index().await.unwrap().len(), 2);
    store
        .apply(vec![Op::Delete(Collection::Pods, "uid-a".to_owned()), Op::Delete(Collection::Pods, "none".to_owned())])
        .await
        .unwrap();
    assert_eq!(changes.recv().await.unwrap().uid, "uid-a");
    assert!(changes.try_recv().is_err(), "what was not there did not change");
    assert!(store.list(Collection::Pods).await.unwrap().is_empty());
}

#[tokio::test]
async fn how_new_the_objects_are_is_written_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path());
    assert_eq!(store.revisions().await.unwrap(), []);
    let revisions = vec![(Collection::Pods, 7), (Collection::ConfigMaps, u64::MAX)];
    store.apply_at(vec![upsert(Collection::Pods, "a", "1")], revisions.clone()).await.unwrap();
    store.apply(vec![upsert(Collection::Pods, "b", "1")]).await.unwrap();
    store.close().await;
    assert_eq!(reopen(dir.path()).revisions().await.unwrap(), revisions);
}

#[tokio::test]
async fn nothing_is_written_when_nothing_changes() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path());
    let ops = || vec![upsert(Collection::Pods, "a", "1"), upsert(Collection::Secrets, "s", "1")];
    let write = async || {
        store.apply(ops()).await.unwrap();
        store.remember("kind", "key", Bytes::from_static(b"value")).await.unwrap();
        store.set_epoch(7).await.unwrap();
        confirm(&store).await.unwrap();
        store.forget("kind", "none").await.unwrap();
    };
    write().await;
    let wal = || fs::metadata(dir.path().join("store.db-wal")).map(|wal| (wal.len(), wal.modified().unwrap())).unwrap();
    let before = wal();
    let mut changes = store.changes();
    write().await;
    assert_eq!(wal(), before);
    assert!(changes.try_recv().is_err());
}

#[tokio::test]
async fn the_outbox_coalesces_statuses_bounds_events_and_never_uses_an_id_twice() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path());
    for payload in ["1", "2"] {
        for name in ["a", "b"] {
            store.report(report(ReportKind::PodStatus, name, payload)).await.unwrap();
        }
    }
    let pending = store.all_reports(0, 1 << 20).await.unwrap();
    assert_eq!(
        pending.iter().map(|r| (r.name.as_str(), &r.payload[..])).collect::<Vec<_>>(),
        [("a", &b"2"[..]), ("b", b"2")]
    );
    assert_eq!(store.all_reports(pending[0].id, 1 << 20).await.unwrap(), pending[1..]);
    assert_eq!(store.all_reports(0, 1).await.unwrap(), pending[..1], "at least one");
    // What is said once more while the answer to it is on its way is not answered by that.
    store.report(report(ReportKind::PodStatus, "a", "2")).await.unwrap();
    store.report_done(pending[0].id, String::new()).await.unwrap();
    let again = store.all_reports(pending[1].id, 1 << 20).await.unwrap();
    assert_eq!(again.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["a"]);
    store.report_done(again[0].id, String::new()).await.unwrap();
    let last = pending[1].id;
    store.report_done(last, "no such pod".to_owned()).await.unwrap();
    store.report_done(last, "twice".to_owned()).await.unwrap();
    let stats = store.stats().await.unwrap();
    assert_eq!((stats.pending, stats.refused, stats.last_refusal.as_str()), (0, 1, "no such pod"));
    for event in 0..MAX_EVENTS + 20 {
        store.report(report(ReportKind::Event, &format!("e{event}"), "{}")).await.unwrap();
    }
    for count in 0..MAX_EVENTS {
        store.report(report(ReportKind::Event, "e30", &count.to_string())).await.unwrap();
    }
    let events = store.all_reports(0, 1 << 20).await.unwrap();
    assert_eq!((events.len(), events[0].name.as_str()), (MAX_EVENTS, "e20"));
    let last_event = &events[MAX_EVENTS - 1];
    assert_eq!((last_event.name.as_str(), &last_event.payload[..]), ("e30", (MAX_EVENTS - 1).to_string().as_bytes()));
    let of = last_event.uid.clone();
    assert_eq!(
        store.events(&of).await.unwrap(),
        events.iter().filter(|event| event.uid == of).cloned().collect::<Vec<_>>()
    );
    assert!(store.events("nobody").await.unwrap().is_empty());
    assert!(events[0].id > last);
    store.close().await;
    let again = reopen(dir.path());
    again.report(report(ReportKind::NodeStatus, "n", "{}")).await.unwrap();
    assert!(again.all_reports(events[MAX_EVENTS - 1].id, 1 << 20).await.unwrap().len() == 1);
}

#[tokio::test]
async fn many_writers_share_commits_and_all_are_durable() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path());
    let writes = (0..300).map(|n| {
        let store = store.clone();
        async move { store.apply(vec![upsert(Collection::ConfigMaps, &format!("c{n}"), &"y".repeat(3000))]).await }
    });
    for result in futures_util::future::join_all(writes).await {
        result.unwrap();
    }
    store.close().await;
    assert_eq!(reopen(dir.path()).list(Collection::ConfigMaps).await.unwrap().len(), 300);
}

#[tokio::test]
async fn secrets_are_sealed_on_the_disk_and_another_key_loses_only_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path());
    let ops = vec![
        upsert(Collection::Secrets, "s", "hunter2-hunter2"),
        upsert(Collection::Tokens, "t", "hunter2-hunter2"),
        upsert(Collection::Pods, "p", "open-text"),
    ];
    store.apply(ops).await.unwrap();
    confirm(&store).await.unwrap();
    assert_eq!(store.list(Collection::Secrets).await.unwrap().len(), 1);
    let disk: Vec<u8> = ["store.db", "store.db-wal"]
        .iter()
        .flat_map(|name| fs::read(dir.path().join(name)).unwrap_or_default())
        .collect();
    assert!(disk.windows(9).any(|bytes| bytes == b"open-text"));
    assert!(!disk.windows(7).any(|bytes| bytes == b"hunter2"));
    store.close().await;
    fs::write(dir.path().join("node.key"), [1; 32]).unwrap();
    let store = reopen(dir.path());
    let index = store.index().await.unwrap();
    assert_eq!(index.len(), 1);
    assert_eq!(index[0].0, Collection::Pods);
    assert_eq!(store.stats().await.unwrap().damaged, 2);
    assert!(*store.pods_known().borrow(), "no pod was lost");
    store.apply(vec![upsert(Collection::Secrets, "s", "hunter2-hunter2")]).await.unwrap();
    assert_eq!(store.list(Collection::Secrets).await.unwrap().len(), 1);
}

#[tokio::test]
async fn deltas_make_the_new_state_of_the_old_and_one_that_does_not_fit_changes_nothing() {
    for collection in [Collection::ConfigMaps, Collection::Secrets] {
        let dir = tempfile::tempdir().unwrap();
        let store = reopen(dir.path());
        let mut states: Vec<Object> = Vec::new();
        for n in 0..3 {
            let object = object(collection, "a", &format!("{n}{}", "x".repeat(2000)));
            states.push(match states.last() {
                Some(before) => object.succeeding(before),
                None => object,
            });
        }
        let patch = |object: &Object| Op::Patch(collection, object.entry.clone(), object.delta.clone().unwrap());
        let mut changes = store.changes();
        store.apply(vec![Op::Upsert(states[0].clone()), patch(&states[1])]).await.unwrap();
        assert_eq!(changes.recv().await.unwrap().key, "default/a");
        let row = store.row(collection, "uid-a").await.unwrap().unwrap();
        assert_eq!(row.entry, states[1].entry);
        assert!(row.json.ends_with(br#"xx"}"#) && row.json.windows(9).any(|window| window == br#""data":"1"#));

        let damaged = store.damaged();
        let before = *damaged.borrow();
        store.apply(vec![patch(&states[1])]).await.unwrap();
        let held = store.row(collection, "uid-a").await.unwrap().unwrap();
        assert_eq!((held.entry.version, &held.json), (0, &row.json), "it stands, under a version that no object has");
        assert!(*damaged.borrow() > before, "a new session is wanted");
        store.apply(vec![patch(&states[2])]).await.unwrap();
        assert_eq!(store.row(collection, "uid-a").await.unwrap().unwrap(), held, "its base is not there");
        store.apply(vec![Op::Upsert(states[2].clone())]).await.unwrap();
        assert_eq!(store.row(collection, "uid-a").await.unwrap().unwrap().entry, states[2].entry);
    }
}

#[tokio::test]
async fn a_damaged_row_is_dropped_and_counted_and_the_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path());
    store.apply(vec![upsert(Collection::Pods, "a", "1"), upsert(Collection::Pods, "b", "1")]).await.unwrap();
    store.remember("kind", "good", Bytes::from_static(b"1")).await.unwrap();
    store.remember("kind", "bad", Bytes::from_static(b"1")).await.unwrap();
    confirm(&store).await.unwrap();
    let mut damaged = store.damaged();
    let known = store.pods_known();
    let vandal = rusqlite::Connection::open(dir.path().join(FILE)).unwrap();
    vandal.execute("UPDATE objects SET version = version + 1 WHERE uid = 'uid-a'", []).unwrap();
    vandal.execute("UPDATE notes SET value = x'32' WHERE key = 'bad'", []).unwrap();
    let pods = store.list(Collection::Pods).await.unwrap();
    assert_eq!(pods.iter().map(|row| row.entry.uid.as_str()).collect::<Vec<_>>(), ["uid-b"]);
    damaged.changed().await.unwrap();
    assert!(!*known.borrow(), "a pod is missing now");
    assert_eq!(store.notes("kind").await.unwrap().len(), 1);
    assert_eq!(store.stats().await.unwrap().damaged, 2);
    confirm(&store).await.unwrap();
    assert!(*known.borrow());
    store.close().await;
    assert!(*reopen(dir.path()).pods_known().borrow());
}

#[tokio::test]
async fn a_file_deleted_or_cut_under_the_store_is_made_again() {
    for cut in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let store = reopen(dir.path());
        let ops = (0..50).map(|n| upsert(Collection::Pods, &format!("p{n}"), &"z".repeat(2000))).collect();
        store.apply(ops).await.unwrap();
        confirm(&store).await.unwrap();
        if cut {
            fs::File::options().write(true).open(dir.path().join(FILE)).unwrap().set_len(0).unwrap();
            fs::remove_file(dir.path().join("store.db-wal")).unwrap();
        } else {
            fs::remove_file(dir.path().join(FILE)).unwrap();
        }
        store.apply(vec![upsert(Collection::ConfigMaps, "later", "1")]).await.unwrap();
        assert_eq!(store.list(Collection::ConfigMaps).await.unwrap().len(), 1, "cut {cut}");
        store.close().await;
        let store = reopen(dir.path());
        store.apply(vec![upsert(Collection::ConfigMaps, "last", "1")]).await.unwrap();
        if !cut {
            assert_eq!(store.list(Collection::Pods).await.unwrap().len(), 50, "memory knew them");
            assert!(!*store.pods_known().borrow());
        }
    }
}

/// Cuts the file of a running store, so that most of its rows are lost.
async fn lose_rows(dir: &Path, store: &Store) {
    let ops = (0..80).map(|n| upsert(Collection::Pods, &format!("p{n}"), &format!("{n}").repeat(3000))).collect();
    store.apply(ops).await.unwrap();
    confirm(store).await.unwrap();
    let path = dir.join(FILE);
    let vandal = rusqlite::Connection::open(&path).unwrap();
    vandal.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    let length = fs::metadata(&path).unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().set_len(length / 2 + 100).unwrap();
}

#[tokio::test]
async fn who_does_not_know_what_a_running_store_lost_cannot_say_that_all_pods_are_known() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path());
    let before = *store.damaged().borrow();
    lose_rows(dir.path(), &store).await;
    // As the link does: what came last is written, and with it that all are there.
    store.apply(vec![upsert(Collection::Pods, "later", &"z".repeat(50_000))]).await.unwrap();
    store.set_pods_known(before).await.unwrap();
    let left = store.list(Collection::Pods).await.unwrap().len();
    assert!(left < 81, "nothing was lost: the test tests nothing");
    assert_ne!(*store.damaged().borrow(), before);
    assert!(!*store.pods_known().borrow(), "only {left} pods are left and said to be all");
    store.set_pods_known(before).await.unwrap();
    assert!(!*store.pods_known().borrow());
    confirm(&store).await.unwrap();
    assert!(*store.pods_known().borrow());
}

#[tokio::test]
async fn what_is_lost_is_told_before_the_answer_that_lacks_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path());
    store.apply((0..50).map(|n| upsert(Collection::Pods, &format!("p{n}"), "1")).collect()).await.unwrap();
    confirm(&store).await.unwrap();
    let vandal = rusqlite::Connection::open(dir.path().join(FILE)).unwrap();
    for n in 0..50 {
        let uid = format!("uid-p{n}");
        vandal.execute("UPDATE objects SET version = version + 1 WHERE uid = ?1", [&uid]).unwrap();
        assert_eq!(store.row(Collection::Pods, &uid).await.unwrap(), None);
        assert!(!*store.pods_known().borrow(), "{uid} passes for one that is gone");
        confirm(&store).await.unwrap();
    }
}

#[tokio::test]
async fn a_later_schema_is_refused_and_the_file_untouched() {
    let dir = tempfile::tempdir().unwrap();
    reopen(dir.path()).close().await;
    let path = dir.path().join(FILE);
    let later = rusqlite::Connection::open(&path).unwrap();
    later.busy_timeout(std::time::Duration::from_secs(5)).unwrap();
    migrate::set(&later, schema::meta::SCHEMA, "9").unwrap();
    later.pragma_update(None, "user_version", 9).unwrap();
    later.close().unwrap();
    let before = fs::read(&path).unwrap();
    let error = Store::open(dir.path(), NOW).unwrap_err();
    assert!(matches!(error, Error::Newer { found: 9, .. }), "{error}");
    assert!(error.to_string().contains("newer edgecore"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

/// A small file system of its own.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(mebibytes: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={mebibytes}m");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("none"), dir.path(), Some("tmpfs"), flags, Some(size.as_str())).unwrap();
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_full_disk_does_not_keep_the_store_closed() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let disk = SmallDisk::mount(16);
    let data = disk.0.path().join("data");
    let store = reopen(&data);
    drop(crate::app::lock(&data.join(crate::app::LOCK)).unwrap());
    store.apply(vec![upsert(Collection::Pods, "a", "1")]).await.unwrap();
    store.close().await;
    let hog = disk.0.path().join("hog");
    let mut file = fs::File::create(&hog).unwrap();
    let error = std::io::copy(&mut std::io::repeat(7), &mut file).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    drop(file);
    assert!(data.join(BALLAST).exists());

    drop(crate::app::lock(&data.join(crate::app::LOCK)).unwrap());
    let store = reopen(&data);
    assert_eq!(store.list(Collection::Pods).await.unwrap().len(), 1);
    store.apply(vec![upsert(Collection::Pods, "b", "1")]).await.unwrap();
    store.keep_ballast();
    assert!(!data.join(BALLAST).exists(), "it was made of room that others need");
    fs::remove_file(&hog).unwrap();
    store.keep_ballast();
    assert!(data.join(BALLAST).exists());
    store.close().await;
}

/// A file with known rows, and those rows.
async fn filled(dir: &Path) -> BTreeMap<String, Bytes> {
    let store = reopen(dir);
    let ops =
        (0..60).map(|n| upsert(Collection::Pods, &format!("p{n}"), &format!("{n}").repeat(200 + n * 20))).collect();
    store.apply(ops).await.unwrap();
    for n in 0..20 {
        store.report(report(ReportKind::PodStatus, &format!("p{n}"), &"s".repeat(300))).await.unwrap();
    }
    confirm(&store).await.unwrap();
    let rows = store.list(Collection::Pods).await.unwrap();
    store.close().await;
    rows.into_iter().map(|row| (row.entry.uid, row.json)).collect()
}

#[tokio::test]
async fn flipped_bits_and_cut_files_lose_what_they_hit_and_nothing_else() {
    let pristine = tempfile::tempdir().unwrap();
    let rows = filled(pristine.path()).await;
    // Into the database file, so that damage hits rows and not only the log.
    let connection = rusqlite::Connection::open(pristine.path().join(FILE)).unwrap();
    connection.busy_timeout(std::time::Duration::from_secs(5)).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    connection.close().unwrap();
    let good = fs::read(pristine.path().join(FILE)).unwrap();
    let key = fs::read(pristine.path().join("node.key")).unwrap();
    let mut kept = 0;
    let range = seeds(150);
    let runs = range.end - range.start;
    for seed in range {
        let mut random = StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        fs::write(dir.path().join("node.key"), &key).unwrap();
        fs::write(&path, &good).unwrap();
        let cut = random.random_bool(0.2);
        if cut {
            fs::File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(random.random_range(0..good.len() as u64))
                .unwrap();
        } else {
            let file = fs::File::options().read(true).write(true).open(&path).unwrap();
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(0..good.len());
                file.write_all_at(&[good[at] ^ (1 << random.random_range(0..8))], at as u64).unwrap();
            }
        }
        let store = Store::open(dir.path(), NOW).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        store.index().await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let found = store.list(Collection::Pods).await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        for row in &found {
            assert_eq!(rows.get(&row.entry.uid), Some(&row.json), "seed {seed}: a row came back changed");
        }
        if found.len() < rows.len() {
            assert!(!*store.pods_known().borrow(), "seed {seed}: pods are missing and said to be known");
        }
        if !cut {
            kept += found.len();
        } else {
            kept += rows.len();
        }
        store
            .apply(vec![upsert(Collection::Pods, "new", "1")])
            .await
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert!(store.row(Collection::Pods, "uid-new").await.unwrap().is_some(), "seed {seed}");
        store.all_reports(0, 1 << 20).await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
    let share = kept as f64 / (rows.len() as u64 * runs) as f64;
    assert!(share > 0.9, "only {share:.2} of the rows survived a few flipped bits");
}

#[tokio::test]
async fn at_most_two_damaged_files_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    for second in 0..4 {
        fs::write(dir.path().join(FILE), "this is not a database, however long one looks at it").unwrap();
        let store = Store::open(dir.path(), Timestamp::from_second(second).unwrap()).unwrap();
        assert!(store.opened().set_aside.as_ref().is_some_and(|path| path.exists()));
        store.close().await;
    }
    let kept = fs::read_dir(dir.path())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains("damaged"))
        .count();
    assert_eq!(kept, 2);
}

#[tokio::test]
async fn a_snapshot_reads_beside_the_store_and_without_it() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Snapshot::open(dir.path()).is_err());
    let store = reopen(dir.path());
    store.apply(vec![upsert(Collection::Pods, "a", "1"), upsert(Collection::Secrets, "s", "1")]).await.unwrap();
    for _ in 0..2 {
        let mut snapshot = Snapshot::open(dir.path()).unwrap();
        assert_eq!(snapshot.list(Collection::Pods).unwrap().len(), 1);
        assert!(snapshot.list(Collection::Secrets).unwrap().is_empty());
        assert_eq!(snapshot.stats().unwrap().rows, 2);
        store.close().await;
    }
}

/// Not a test: the process that [`a_killed_process_loses_nothing_it_acknowledged`] kills.
#[test]
fn child() {
    use std::io::Write as _;
    let Ok(dir) = std::env::var("SKERRY_TEST_STORE") else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Store::open(Path::new(&dir), NOW).unwrap();
        for n in 0_u64.. {
            let content = format!("{n}").repeat(1 + usize::try_from(n * 37 % 500).unwrap());
            let (applied, reported) = tokio::join!(
                store.apply(vec![upsert(Collection::Pods, &format!("p{}", n % 40), &content)]),
                store.report(report(ReportKind::PodStatus, &format!("p{}", n % 40), &content)),
            );
            applied.unwrap();
            reported.unwrap();
            writeln!(std::io::stdout(), "acknowledged {n}").unwrap();
        }
    });
}

#[tokio::test]
async fn a_killed_process_loses_nothing_it_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    for seed in seeds(6) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::child", "--nocapture"])
            .env("SKERRY_TEST_STORE", dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stop = random.random_range(1..150);
        let mut newest = BTreeMap::new();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut count = 0;
        for line in lines {
            let Ok(line) = line else { break };
            if let Some(n) = line.split("acknowledged ").nth(1).and_then(|n| n.parse::<u64>().ok()) {
                newest.insert(format!("uid-p{}", n % 40), n);
                count += 1;
                if count == stop {
                    // What it says after this was acknowledged too, and is read until the pipe ends.
                    child.kill().unwrap();
                }
            }
        }
        child.wait().unwrap();
        let store = Store::open(dir.path(), NOW).unwrap();
        assert_eq!(store.opened().set_aside, None, "seed {seed}");
        let rows: BTreeMap<String, Bytes> =
            store.list(Collection::Pods).await.unwrap().into_iter().map(|row| (row.entry.uid, row.json)).collect();
        let reports: BTreeMap<String, Bytes> =
            store.all_reports(0, 64 << 20).await.unwrap().into_iter().map(|r| (r.uid, r.payload)).collect();
        for (uid, n) in &newest {
            // A later, unacknowledged write of the same pod may be there as well.
            let may_be = [*n, *n + 40].map(|n| format!("{n}").repeat(1 + usize::try_from(n * 37 % 500).unwrap()));
            let json = String::from_utf8_lossy(rows.get(uid).unwrap_or_else(|| panic!("seed {seed}: {uid} is lost")))
                .into_owned();
            assert!(
                may_be.iter().any(|content| json.contains(&format!("\"{content}\""))),
                "seed {seed}: {uid} is not at {n}"
            );
            let payload = reports.get(uid).unwrap_or_else(|| panic!("seed {seed}: the report of {uid} is lost"));
            assert!(may_be.iter().any(|content| payload == content), "seed {seed}: the report of {uid} is not at {n}");
        }
        assert_eq!(store.stats().await.unwrap().damaged, 0, "seed {seed}");
        store.close().await;
    }
}
