use std::process::{Child, Command};

use super::*;
use crate::kubelet::volumes::tests::is_root;

fn limits(path: &str) -> PodCgroup {
    PodCgroup {
        path: path.to_owned(),
        cpu_shares: Some(512),
        cpu_quota: Some(50_000),
        cpu_period: 100_000,
        memory_limit: Some(64 << 20),
        pids_limit: Some(100),
    }
}

fn entry(fs_type: &str, mount_point: &str, super_options: &str) -> mountinfo::Entry {
    mountinfo::Entry {
        mount_point: PathBuf::from(mount_point),
        fs_type: fs_type.to_owned(),
        super_options: super_options.to_owned(),
        is_shared: false,
    }
}

#[test]
fn hierarchies_are_told_apart() {
    let v2 = entry("cgroup2", "/sys/fs/cgroup", "rw,nsdelegate");
    assert!(matches!(hierarchies(std::slice::from_ref(&v2)), Some(Hierarchies::V2(_))));
    assert!(hierarchies(&[]).is_none());
    let named = entry("cgroup", "/sys/fs/cgroup/systemd", "rw,xattr,name=systemd");
    assert!(matches!(hierarchies(&[v2.clone(), named.clone()]), Some(Hierarchies::V2(_))));
    let cpu = entry("cgroup", "/sys/fs/cgroup/cpu,cpuacct", "rw,cpu,cpuacct");
    let Some(Hierarchies::V1(mounts)) = hierarchies(&[named, cpu, v2]) else { panic!("not v1") };
    assert_eq!(mounts.keys().collect::<Vec<_>>(), ["cpu", "cpuacct", "name=systemd", "unified"]);
}

#[test]
fn paths_and_slices() {
    let path = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda_b.slice";
    assert_eq!(slice_path("kubepods-burstable-poda_b.slice").as_deref(), Some(path));
    for bad in ["-a.slice", "a--b.slice", ".slice", "a/b.slice", "a"] {
        assert_eq!(slice_path(bad), None, "{bad}");
    }
    assert_eq!((weight(2), weight(1024), weight(262_144), weight(0)), (1, 39, 10_000, 1));

    let by_hand = |systemd| Cgroups::new(Hierarchies::V2(PathBuf::from("/none")), systemd);
    let cgroupfs = by_hand(false);
    assert_eq!(cgroupfs.uid_of("/kubepods/podx-1").as_deref(), Some("x-1"));
    assert_eq!(cgroupfs.uid_of("/kubepods/burstable"), None);
    for bad in ["/", "/kubepods", "/kubepods/burstable", "/system.slice/podx", "/kubepods/../podx", "/kubepodsx/podx"] {
        assert!(matches!(cgroupfs.destroy(bad), Err(CgroupError::Path(_))), "{bad}");
    }
    let systemd = by_hand(true);
    assert_eq!(systemd.relative("kubepods-burstable-poda_b.slice"), Some(PathBuf::from(path)));
    assert_eq!(systemd.relative("/system.slice/x"), None);
    assert_eq!(systemd.uid_of(path).as_deref(), Some("a-b"));
    // Not a slice of ours: systemd is told nothing.
    assert_eq!(systemd.apply(&limits("/kubepods/poda")).len(), 1);
    assert_eq!(systemd.apply(&limits("/system.slice")).len(), 1);
}

#[test]
fn slices_have_the_limits_as_properties() {
    let arguments = |limits: &PodCgroup, version| set_property("kubepods-poda_b.slice", limits, version)[2..].join(" ");
    let limits = limits("/kubepods.slice/kubepods-poda_b.slice");
    assert_eq!(set_property("x.slice", &limits, 2)[..3], ["set-property", "--runtime", "x.slice"]);
    assert_eq!(slice_of(Path::new("kubepods.slice/kubepods-poda_b.slice")), "kubepods-poda_b.slice");
    assert_eq!(
        arguments(&limits, 2),
        "kubepods-poda_b.slice CPUWeight=20 CPUQuota=50% MemoryMax=67108864 TasksMax=100"
    );
    assert_eq!(
        arguments(&limits, 1),
        "kubepods-poda_b.slice CPUShares=512 CPUQuota=50% MemoryLimit=67108864 TasksMax=100"
    );
    // What was limited and no longer is gets free.
    let free = PodCgroup { cpu_quota: Some(-1), memory_limit: Some(0), ..PodCgroup::default() };
    assert_eq!(arguments(&free, 2), "kubepods-poda_b.slice CPUQuota= MemoryMax=infinity TasksMax=infinity");
    for (quota, period, percent) in
        [(1000, 100_000, 1), (12_300, 100_000, 13), (400_000, 0, 400), (5000, 10_000, 50), (1, 100_000, 1)]
    {
        let limits = PodCgroup { cpu_quota: Some(quota), cpu_period: period, ..PodCgroup::default() };
        assert!(arguments(&limits, 2).contains(&format!(" CPUQuota={percent}% ")), "{quota} of {period}");
    }
}

#[test]
fn systemd_is_told_of_changes_only() {
    let cgroups = Cgroups::new(Hierarchies::V2(PathBuf::from("/none")), true);
    let refuse = |_: &[String]| Err(io::ErrorKind::TimedOut.into());
    let tell = |slice: &str, value: u64, call: fn(&[String]) -> io::Result<()>| {
        let limits = PodCgroup { cpu_shares: Some(value), ..PodCgroup::default() };
        cgroups.tell(slice, set_property(slice, &limits, 1), call).is_ok()
    };
    assert!(tell("a.slice", 2, |_| Ok(())));
    assert!(tell("a.slice", 2, refuse), "it is told the same again");
    assert!(!tell("b.slice", 2, refuse) && !tell("b.slice", 2, refuse), "what failed is tried again");
    assert!(!tell("a.slice", 3, refuse) && !tell("a.slice", 2, refuse), "what held before may hold no more");
    assert!(tell("a.slice", 2, |_| Ok(())) && tell("a.slice", 3, |_| Ok(())) && !tell("a.slice", 2, refuse));
    assert!(tell("b.slice", 2, |_| Ok(())));
    cgroups.forget("b.slice");
    assert!(!tell("b.slice", 2, refuse), "of a slice that is gone nothing is known");
    for n in 0..=MOST_SLICES {
        assert!(tell(&format!("{n}.slice"), 2, |_| Ok(())));
    }
    assert_eq!(cgroups.told.lock().unwrap().len(), MOST_SLICES);
}

/// A directory that looks like a v2 hierarchy with these controllers; the files of a cgroup appear in `made`.
fn v2(controllers: &str, made: &[&str]) -> (tempfile::TempDir, Cgroups) {
    let root = tempfile::tempdir().unwrap();
    for dir in ["", "kubepods", "kubepods/burstable", "kubepods/burstable/poda"] {
        let dir = root.path().join(dir);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("cgroup.controllers"), controllers).unwrap();
        fs::write(dir.join("cgroup.subtree_control"), "").unwrap();
        for file in made {
            fs::write(dir.join(file), "").unwrap();
        }
    }
    let hierarchies = Hierarchies::V2(root.path().to_owned());
    (root, Cgroups::new(hierarchies, false))
}

#[test]
fn v2_files() {
    let (root, cgroups) = v2("pids\n", &["cpu.weight", "cpu.max", "memory.max", "pids.max"]);
    let path = "/kubepods/burstable/poda";
    assert_eq!(cgroups.apply(&limits(path)), []);
    let read = |path: &str| fs::read_to_string(root.path().join(path)).unwrap();
    let pod = |file: &str| read(&format!("kubepods/burstable/poda/{file}"));
    assert_eq!((pod("cpu.weight"), pod("cpu.max")), ("20".to_owned(), "50000 100000".to_owned()));
    assert_eq!((pod("memory.max"), pod("pids.max")), ("67108864".to_owned(), "100".to_owned()));
    assert_eq!(
        (read("cgroup.subtree_control"), read("kubepods/cgroup.subtree_control")),
        ("+pids".into(), "+pids".into())
    );
    assert_eq!(read("kubepods/burstable/cgroup.subtree_control"), "+pids");
    assert_eq!(pod("cgroup.subtree_control"), "");
    assert_eq!(cgroups.apply(&PodCgroup { path: path.to_owned(), ..PodCgroup::default() }), []);
    assert_eq!((pod("cpu.max"), pod("memory.max")), ("max 100000".to_owned(), "max".to_owned()));
    assert_eq!(cgroups.pods(), BTreeMap::from([("a".to_owned(), path.to_owned())]));
}

#[test]
fn what_the_kernel_lacks_costs_a_warning() {
    let (_root, cgroups) = v2("", &["cpu.weight"]);
    let warnings = cgroups.apply(&limits("/kubepods/burstable/poda"));
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert_eq!(cgroups.apply(&PodCgroup { path: "/kubepods/burstable/poda".to_owned(), ..PodCgroup::default() }), []);
    let none = Cgroups::new(Hierarchies::V1(BTreeMap::new()), false);
    assert_eq!(none.apply(&limits("/kubepods/poda")).len(), 3);
    assert_eq!(none.apply(&limits("/elsewhere/poda")).len(), 1);
}

struct Cleanup(Cgroups, Option<Child>);

impl Drop for Cleanup {
    fn drop(&mut self) {
        if let Some(child) = &mut self.1 {
            let _ = child.kill();
            let _ = child.wait();
        }
        for root in self.0.roots() {
            let _ = remove(&root.join(&self.0.base), 0);
        }
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "a test that is skipped says so")]
fn on_the_real_hierarchies() {
    if !is_root("on_the_real_hierarchies") {
        return;
    }
    let mut cgroups = Cgroups::discover(false).unwrap();
    cgroups.base = format!("skerry-test-{}", std::process::id());
    let writable = cgroups.roots().all(|root| {
        let probe = root.join(&cgroups.base);
        fs::create_dir(&probe).and_then(|()| fs::remove_dir(&probe)).is_ok()
    });
    if !writable {
        println!("skipped, as cgroups cannot be made here: on_the_real_hierarchies");
        return;
    }
    let mut cleanup = Cleanup(cgroups.clone(), None);
    let base = cgroups.base.clone();
    let tier = |qos: &str, shares| PodCgroup { cpu_shares: Some(shares), ..limits(&format!("/{base}{qos}")) };
    assert_eq!(cgroups.set_tiers(&[tier("", 2048), tier("/burstable", 2), tier("/besteffort", 2)]), []);
    let path = format!("/{base}/burstable/pod0b7a-1");
    assert_eq!(cgroups.apply(&limits(&path)), []);
    assert_eq!(cgroups.apply(&limits(&path)), []);
    assert_eq!(cgroups.set_tiers(&[tier("", 2048), tier("/burstable", 1024), tier("/besteffort", 2)]), []);
    if let Hierarchies::V1(mounts) = &cgroups.hierarchies {
        let read = |controller: &str, file: &str| {
            let path = mounts[controller].join(path.trim_start_matches('/')).join(file);
            fs::read_to_string(path).unwrap().trim().to_owned()
        };
        assert_eq!((read("cpu", "cpu.shares"), read("cpu", "cpu.cfs_quota_us")), ("512".into(), "50000".into()));
        assert_eq!(
            (read("memory", "memory.limit_in_bytes"), read("pids", "pids.max")),
            ("67108864".into(), "100".into())
        );
        assert_eq!(cgroups.apply(&PodCgroup { path: path.clone(), ..PodCgroup::default() }), []);
        assert_eq!((read("cpu", "cpu.cfs_quota_us"), read("pids", "pids.max")), ("-1".into(), "max".into()));
        let besteffort = mounts["cpu"].join(&base).join("besteffort/cpu.shares");
        assert_eq!(fs::read_to_string(besteffort).unwrap().trim(), "2");
    }
    assert_eq!(cgroups.pods(), BTreeMap::from([("0b7a-1".to_owned(), path.clone())]));

    // A container's cgroup with a stray process, frozen where that is possible.
    let child = cleanup.1.insert(Command::new("sleep").arg("600").spawn().unwrap());
    let relative = path.trim_start_matches('/');
    for root in cgroups.roots() {
        let dir = root.join(relative).join("container");
        fs::create_dir_all(&dir).unwrap();
        if dir.join("cpuset.cpus").exists() {
            // A v1 cpuset takes no process before it has processors; this one stays empty.
            continue;
        }
        fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
        let _ = fs::write(dir.join("freezer.state"), "FROZEN");
    }
    cgroups.destroy(&path).unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(cgroups.roots().all(|root| !root.join(relative).exists()));
    assert!(cgroups.pods().is_empty());
    cgroups.destroy(&path).unwrap();
}
