use proptest::prelude::*;

use super::*;

fn now() -> Timestamp {
    "2026-01-02T15:04:05Z".parse().unwrap()
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn plan_keeps_the_newest_and_clears_leftovers() {
    let others = strings(&[
        "0.log",
        "0.log.20260101-000000",
        "0.log.20260101-000001.gz",
        "0.log.20260101-000002",
        "0.log.20260101-000002.gz",
        "0.log.20260101-000003.tmp",
        "0.log.20260101-000004",
        "0.log.notes",
        "10.log.20200101-000000",
    ]);
    let plan = plan_rotation("0.log", &others, 5, now());
    assert_eq!(plan.rename_to, "0.log.20260102-150405");
    assert_eq!(plan.remove, ["0.log.20260101-000002", "0.log.20260101-000003.tmp", "0.log.20260101-000000"]);
}

#[test]
fn names_keep_their_order_when_the_clock_does_not() {
    let epoch = Timestamp::from_second(5).unwrap();
    let plan = plan_rotation("0.log", &strings(&["0.log.20260102-235959"]), 5, epoch);
    assert_eq!(plan.rename_to, "0.log.20260103-000000");
    let plan = plan_rotation("0.log", &strings(&["0.log.20260102-150405.gz"]), 5, now());
    assert_eq!(plan.rename_to, "0.log.20260102-150406");
}

#[test]
fn rotation_keeps_the_count_and_can_be_undone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("0.log");
    let rotate = || start_rotation(&file, 10, 3, now()).unwrap();
    assert_eq!(rotate(), Rotation::Missing);
    fs::write(&file, "").unwrap();
    assert_eq!(rotate(), Rotation::NotDue);
    for n in 0..6 {
        fs::write(&file, format!("round number {n}")).unwrap();
        assert!(matches!(rotate(), Rotation::Renamed(_)));
        fs::write(&file, "").unwrap();
    }
    let mut names = names_in(dir.path()).unwrap();
    names.sort();
    assert_eq!(names, ["0.log", "0.log.20260102-150409", "0.log.20260102-150410"]);
    assert_eq!(fs::read_to_string(dir.path().join(&names[2])).unwrap(), "round number 5");

    let renamed = || match rotate() {
        Rotation::Renamed(renamed) => renamed,
        other => panic!("{other:?}"),
    };
    fs::write(&file, "this one is not lost").unwrap();
    put_back(&file, &renamed()).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "this one is not lost");
    // The runtime made a new file and failed after that: both stay.
    let renamed = renamed();
    fs::write(&file, "new").unwrap();
    put_back(&file, &renamed).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "new");
    assert_eq!(names_in(dir.path()).unwrap().len(), 3);
}

#[test]
fn links_for_collectors() {
    let dir = tempfile::tempdir().unwrap();
    let (links, pods) = (dir.path().join("containers"), dir.path().join("pods"));
    let id = "a".repeat(64);
    let name = link_name("ns", "web-0", "app", &id);
    assert_eq!(name, format!("web-0_ns_app-{id}.log"));
    let long = link_name(&"n".repeat(63), &"p".repeat(253), &"c".repeat(63), &id);
    assert!(long.len() == 255 && long.ends_with(&format!("-{id}.log")) && long.starts_with("ppp"));

    let pod = pod_dir(&pods, "ns", "web-0", "uid-1");
    let container = make_container_dir(&pod, "app").unwrap();
    assert_eq!(pod_dirs(&pods).unwrap(), [("uid-1".to_owned(), pod.clone())]);
    for file in ["0.log", "0.log.20260102-150405", "1.log", "10.log"] {
        fs::write(container.join(file), "x").unwrap();
    }
    link(&links, &name, Path::new("/wrong")).unwrap();
    link(&links, &name, &container.join("0.log")).unwrap();
    link(&links, &name, &container.join("0.log")).unwrap();
    assert!(links.join(&name).exists());
    remove_container(&container.join("0.log"), &links.join(&name)).unwrap();
    let mut left = names_in(&container).unwrap();
    left.sort();
    assert_eq!(left, ["1.log", "10.log"]);
    assert!(names_in(&links).unwrap().is_empty());
    remove_container(&container.join("0.log"), &links.join(&name)).unwrap();

    link(&links, &link_name("ns", "a", "c", "dead"), &container.join("5.log")).unwrap();
    link(&links, &link_name("ns", "b", "c", "alive"), &container.join("6.log")).unwrap();
    link(&links, &link_name("ns", "c", "c", "fine"), &container.join("1.log")).unwrap();
    fs::write(links.join("foreign-file.log"), "").unwrap();
    assert_eq!(remove_dangling(&links, |id| id != "alive").unwrap(), 1);
    assert_eq!(names_in(&links).unwrap().len(), 3);

    // A file in the links' place is not ours to replace.
    assert!(link(&links, "foreign-file.log", &container.join("1.log")).is_err());

    let outside = dir.path().join("outside");
    fs::write(&outside, "x").unwrap();
    symlink(&outside, container.join("planted")).unwrap();
    remove_pod(&pod).unwrap();
    assert!(!pod.exists() && outside.exists());
    remove_pod(&pod).unwrap();
    assert!(pod_dirs(&dir.path().join("none")).unwrap().is_empty());
}

#[test]
fn disk_usage_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("d")).unwrap();
    fs::write(dir.path().join("d/f"), vec![1; 100_000]).unwrap();
    symlink("/", dir.path().join("d/root")).unwrap();
    let (bytes, is_whole) = disk_usage(dir.path(), 100);
    assert!(is_whole && (100_000..200_000).contains(&bytes), "{bytes}");
    assert!(!disk_usage(dir.path(), 1).1);
    assert_eq!(disk_usage(&dir.path().join("none"), 10), (0, true));
}

proptest! {
    #[test]
    fn planning_never_panics_nor_touches_others(
        others in proptest::collection::vec("(0\\.log)?[.0-9a-z-]{0,24}", 0..20), second in -1_000_000_000_i64..250_000_000_000,
    ) {
        let plan = plan_rotation("0.log", &others, 5, Timestamp::from_second(second).unwrap());
        for name in &plan.remove {
            prop_assert!(name.starts_with("0.log.") && others.contains(name));
        }
        prop_assert!(!others.contains(&plan.rename_to));
    }
}
