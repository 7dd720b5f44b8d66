use serde_json::json;

use super::*;
use crate::kubelet::node::Disk;
use crate::stats::cgroup::{Cpu, Memory};
use crate::stats::disk::Volume;
use crate::stats::proc::Traffic;
use crate::stats::snapshot::Listed;

fn at() -> Timestamp {
    Timestamp::from_millisecond(1_633_253_812_999).unwrap()
}

fn usage(cpu: u64, memory: u64) -> Usage {
    Usage {
        at: at(),
        cpu: Some(Cpu { usage: cpu, rate: Some(5), ..Cpu::default() }),
        memory: Some(Memory { usage: memory, working_set: memory - 1, swap: Some(2), ..Memory::default() }),
        ..Usage::default()
    }
}

fn interface(name: &str, bytes: u64) -> Interface {
    let traffic = |bytes| Traffic { bytes, packets: 9, errors: 1, dropped: 9 };
    Interface { name: name.to_owned(), received: traffic(bytes), sent: traffic(bytes + 1) }
}

#[test]
fn fields_are_called_as_in_the_api() {
    let disk = Disk { capacity: 100, available: 40, inodes: 10, inodes_free: 4 };
    let memory = Some(Disk { capacity: 8, available: 6, inodes: 5, inodes_free: 3 });
    let pod = Pod {
        listed: Listed { uid: "u".to_owned(), name: "p".to_owned(), namespace: "n".to_owned(), ..Listed::default() },
        usage: usage(7, 70),
        interfaces: vec![interface("eth0", 10), interface("net1", 20)],
        volumes: vec![
            Volume { name: "disk".to_owned(), memory: None, used: Some(Used { bytes: 3, inodes: 2 }) },
            Volume { name: "memory".to_owned(), memory, used: memory.as_ref().map(used) },
            Volume { name: "vast".to_owned(), memory: None, used: None },
        ],
        ..Pod::default()
    };
    let node_memory = NodeMemory { total: 1000, used: usage(0, 600).memory.unwrap(), swap_total: 50 };
    let snapshot = Snapshot {
        node: usage(8, 600),
        memory: Some(node_memory),
        booted: Timestamp::from_second(1_633_000_000).ok(),
        pods: vec![pod],
        ..Snapshot::default()
    };
    let parts = NodeParts {
        load: Load { pods_disk: Some(disk), image_disk: Some(disk), pids: 3, pids_max: 9, ..Load::default() },
        interfaces: vec![interface("wlan0", 30)],
        default_link: Some("wlan0".to_owned()),
        images: Some(Used { bytes: 5, inodes: 6 }),
        layers: Some(Used { bytes: 1, inodes: 2 }),
    };
    let time = "2021-10-03T09:36:52Z";
    let cpu = |nanoseconds: u64| json!({"time": time, "usageNanoCores": 5, "usageCoreNanoSeconds": nanoseconds});
    let memory = |bytes: u64| json!({"time": time, "usageBytes": bytes, "workingSetBytes": bytes - 1});
    let fs = |used: u64, inodes: u64| {
        json!({"time": time, "capacityBytes": 100, "availableBytes": 40, "usedBytes": used,
            "inodes": 10, "inodesFree": 4, "inodesUsed": inodes})
    };
    let link = |name: &str, bytes: u64| json!({"name": name, "rxBytes": bytes, "rxErrors": 1, "txBytes": bytes + 1, "txErrors": 1});
    let with = |mut object: serde_json::Value, more: serde_json::Value| {
        let more = more.as_object().cloned().unwrap_or_default();
        object.as_object_mut().unwrap().extend(more);
        object
    };
    let expected_pod = json!({
        "podRef": {"name": "p", "namespace": "n", "uid": "u"},
        "startTime": null,
        "containers": [],
        "cpu": cpu(7),
        "memory": memory(70),
        "swap": {"time": time, "swapUsageBytes": 2},
        "network": with(link("eth0", 10), json!({"time": time, "interfaces": [link("eth0", 10), link("net1", 20)]})),
        "volume": [
            with(fs(3, 2), json!({"name": "disk"})),
            {"time": time, "capacityBytes": 8, "availableBytes": 6, "usedBytes": 2, "inodes": 5, "inodesFree": 3,
                "inodesUsed": 2, "name": "memory"},
            {"time": time, "capacityBytes": 100, "availableBytes": 40, "inodes": 10, "inodesFree": 4, "name": "vast"},
        ],
        "ephemeral-storage": fs(3, 2),
    });
    let full = serde_json::to_value(summary("box", &snapshot, Some(&parts))).unwrap();
    assert_eq!(full["pods"], json!([expected_pod]));
    let mut node = full["node"].clone();
    node.as_object_mut().unwrap().remove("systemContainers");
    assert_eq!(
        node,
        json!({
            "nodeName": "box",
            "startTime": "2021-09-30T11:06:40Z",
            "cpu": cpu(8),
            "memory": with(memory(600), json!({"availableBytes": 401})),
            "swap": {"time": time, "swapAvailableBytes": 48, "swapUsageBytes": 2},
            "network": with(link("wlan0", 30), json!({"time": time, "interfaces": [link("wlan0", 30)]})),
            "fs": fs(60, 6),
            "runtime": {"imageFs": fs(5, 6), "containerFs": fs(1, 2)},
            "rlimit": {"time": time, "maxpid": 9, "curproc": 3},
        })
    );
}

#[test]
fn a_namespace_without_the_default_interface_has_a_list() {
    let interfaces = [interface("net1", 1)];
    let stats = network(at(), &interfaces, Some("eth0")).unwrap();
    let json = serde_json::to_value(stats).unwrap();
    assert_eq!((&json["name"], &json["interfaces"][0]["name"]), (&json!(""), &json!("net1")));
    assert!(json["rxBytes"].is_null() && network(at(), &[], None).is_none());
}
