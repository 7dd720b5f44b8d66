//! Twins among mappers, a store and a cloud, by seeded schedules: devices and models come, change and go, mappers start, stop, lose their
//! connection and take calls or do not, edgecore restarts. When the weather clears, every mapper knows exactly its devices as they are wanted.
//!
//! `SEED=n` replays one schedule, `SCHEDULES=n` sets how many run.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;
use skerry_proto::dmi;

use super::*;

const PROTOCOLS: [&str; 2] = ["modbus", "opcua"];

/// A mapper's process.
#[derive(Debug, Default)]
struct Process {
    protocol: &'static str,
    running: bool,
    connected: Option<MapperId>,
    models: BTreeSet<String>,
    /// What it holds: the mark of the spec, and what is desired.
    holds: BTreeMap<String, (String, BTreeMap<String, String>)>,
}

struct World {
    dice: StdRng,
    now: Now,
    twins: Twins,
    rows: BTreeMap<String, (String, DeviceSpec)>,
    models: BTreeMap<String, (String, DeviceModelSpec)>,
    notes: BTreeMap<String, Note>,
    registered: BTreeMap<String, MapperInfo>,
    mappers: BTreeMap<String, Process>,
    uids: u32,
}

fn model(unit: &str) -> DeviceModelSpec {
    serde_json::from_value(json!({ "protocol": "modbus", "properties": [
        { "name": "t", "type": "FLOAT", "accessMode": "ReadWrite", "minimum": "0", "maximum": "100", "unit": unit },
        { "name": "on", "type": "BOOLEAN", "accessMode": "ReadOnly" }, { "name": "note", "accessMode": "ReadWrite" }] }))
    .unwrap()
}

fn spec(protocol: &str, desired: Option<&str>) -> DeviceSpec {
    let desired = desired.map(|value| json!({ "value": value }));
    serde_json::from_value(json!({ "deviceModelRef": { "name": "m" }, "protocol": { "protocolName": protocol }, "properties": [
        { "name": "t", "desired": desired, "reportToCloud": true, "visitors": { "configData": { "reportDeadBand": 0.5 } } },
        { "name": "on", "reportToCloud": true, "reportCycle": 5000 }, { "name": "note" }] }))
    .unwrap()
}

fn values(values: &[(&str, &str)]) -> Vec<dmi::Twin> {
    let twin = |(name, value): &(&str, &str)| dmi::Twin {
        property_name: (*name).to_owned(),
        reported: Some(dmi::TwinProperty { value: (*value).to_owned(), ..Default::default() }),
        observed_desired: None,
    };
    values.iter().map(twin).collect()
}

const START: Now = Now { mono: Duration::from_secs(100), wall: 1_000_000 };

impl Now {
    fn after(self, seconds: u64) -> Self {
        Self { mono: self.mono + Duration::from_secs(seconds), wall: self.wall + 1000 * seconds.cast_signed() }
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut mappers = BTreeMap::new();
        for (protocol, count) in PROTOCOLS.into_iter().zip([3, 1]) {
            for n in 0..count {
                mappers.insert(format!("/run/{protocol}{n}"), Process { protocol, ..Process::default() });
            }
        }
        Self {
            dice: StdRng::seed_from_u64(seed),
            now: START,
            twins: Twins::default(),
            rows: BTreeMap::new(),
            models: BTreeMap::new(),
            notes: BTreeMap::new(),
            registered: BTreeMap::new(),
            mappers,
            uids: 0,
        }
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.dice.random_ratio(1, n)
    }

    fn key(&mut self) -> String {
        format!("ns/d{}", self.dice.random_range(0..8))
    }

    fn address(&mut self) -> String {
        let at = self.dice.random_range(0..self.mappers.len());
        self.mappers.keys().nth(at).unwrap().clone()
    }

    fn chaos(&mut self) {
        self.now = self.now.after(u64::from(self.one_in(3)) * self.dice.random_range(0..4));
        match self.dice.random_range(0..14) {
            0 | 1 => {
                let (key, fresh) = (self.key(), self.one_in(3));
                let protocol = PROTOCOLS[usize::from(self.one_in(4))];
                let desired = ["1", "2", "200", "x"][self.dice.random_range(0..4)];
                let desired = Some(desired).filter(|_| !self.one_in(4));
                self.uids += 1;
                let uid = match self.rows.get(&key) {
                    Some((uid, _)) if !fresh => uid.clone(),
                    _ => format!("u{}", self.uids),
                };
                let spec = spec(protocol, desired);
                self.rows.insert(key.clone(), (uid.clone(), spec.clone()));
                self.twins.device(&key, &uid, spec, self.now);
            }
            2 => {
                let key = self.key();
                if let Some((uid, _)) = self.rows.remove(&key) {
                    self.twins.device_gone(&key, &uid, self.now);
                }
            }
            3 => {
                let spec = model(["K", "C"][self.dice.random_range(0..2)]);
                self.models.insert("ns/m".to_owned(), ("m1".to_owned(), spec.clone()));
                self.twins.model("ns/m", "m1", spec);
            }
            4 | 5 => {
                let (key, value) = (self.key(), ["3", "4", "1"][self.dice.random_range(0..3)]);
                let _ = self.twins.write(&key, "t", value, "cli", self.now);
            }
            6 => self.stop_mapper(),
            7 | 8 => self.start_mapper(),
            9 => self.drop_connection(),
            10 if self.one_in(4) => self.restart(),
            11 => {
                let key = self.key();
                let _ = self.twins.report_values(&key, &[], &values(&[("t", "20"), ("on", "true")]), self.now);
                self.twins.tick(self.now);
            }
            _ => self.calls(true),
        }
        self.reread();
        self.keep();
    }

    fn reread(&mut self) {
        for (key, uid) in self.twins.take_rereads() {
            if let Some((of, spec)) = self.rows.get(&*key).filter(|(of, _)| **of == *uid) {
                self.twins.device(&key, of, spec.clone(), self.now);
            }
        }
    }

    fn keep(&mut self) {
        let (written, forgotten) = self.twins.take_notes();
        for uid in forgotten {
            self.notes.remove(&*uid);
        }
        for (_, uid, note) in written {
            if note.is_empty() {
                self.notes.remove(&*uid)
            } else {
                self.notes.insert(uid.to_string(), note)
            };
        }
    }

    fn stop_mapper(&mut self) {
        let address = self.address();
        self.drop_one(&address);
        let process = self.mappers.get_mut(&address).unwrap();
        process.running = false;
        process.holds.clear();
        process.models.clear();
    }

    fn drop_connection(&mut self) {
        let address = self.address();
        self.drop_one(&address);
    }

    fn drop_one(&mut self, address: &str) {
        if let Some(id) = self.mappers.get_mut(address).unwrap().connected.take() {
            self.twins.connected(id, false, self.now);
        }
    }

    fn start_mapper(&mut self) {
        let address = self.address();
        let process = self.mappers.get_mut(&address).unwrap();
        if process.running {
            return;
        }
        process.running = true;
        let info = MapperInfo {
            name: "m".to_owned(),
            protocol: process.protocol.to_owned(),
            address: address.clone(),
            ..MapperInfo::default()
        };
        self.registered.insert(address.clone(), info.clone());
        let id = self.twins.register(info, self.now);
        if self.one_in(2) {
            for (slot, key, _) in self.twins.for_answer(id) {
                let ToTell { model_key: model, wanted, mark, .. } = self.twins.to_tell(&key).unwrap();
                self.take(&address, &key, &wanted);
                self.mappers.get_mut(&address).unwrap().models.insert(model.to_string());
                self.twins.told_in_answer(id, slot, mark);
            }
        }
        self.twins.answered(id);
    }

    /// A mapper learns of a device.
    fn take(&mut self, address: &str, key: &str, wanted: &[crate::devices::convert::Wanted]) {
        let Some((_, spec)) = self.rows.get(key) else { return };
        let spec = super::super::convert::with_model(spec.clone(), &self.models["ns/m"].1);
        let mut spec = serde_json::to_value(spec).unwrap();
        spec["properties"][0]["desired"] = serde_json::Value::Null;
        let wanted = wanted.iter().map(|of| (of.property.clone(), of.value.clone())).collect();
        self.mappers.get_mut(address).unwrap().holds.insert(key.to_owned(), (spec.to_string(), wanted));
    }

    fn connect(&mut self) {
        let known: BTreeMap<String, MapperId> =
            self.twins.mappers().map(|(id, info)| (info.address.clone(), id)).collect();
        for (address, process) in &mut self.mappers {
            if process.running
                && process.connected.is_none()
                && let Some(id) = known.get(address)
            {
                process.connected = Some(*id);
                self.twins.connected(*id, true, self.now);
            }
        }
    }

    fn calls(&mut self, is_rough: bool) {
        self.connect();
        let connected: Vec<(String, MapperId)> =
            self.mappers.iter().filter_map(|(address, of)| Some((address.clone(), of.connected?))).collect();
        for (address, id) in connected {
            while let Some(mut call) = self.twins.next_call(id, self.now) {
                let lost = is_rough && self.one_in(4);
                // Lost on its way, or the answer.
                let arrives = !lost || self.one_in(2);
                let outcome = if arrives { self.perform(&address, &mut call) } else { Outcome::Lost };
                let outcome = if lost { Outcome::Lost } else { outcome };
                if is_rough && self.one_in(8) {
                    self.drop_one(&address);
                    break;
                }
                self.twins.called(id, &call, outcome, self.now);
            }
        }
    }

    /// As a mapper of KubeEdge's framework takes it.
    fn perform(&mut self, address: &str, call: &mut Call) -> Outcome {
        match call {
            Call::Model { key, .. } => {
                self.mappers.get_mut(address).unwrap().models.insert(key.to_string());
            }
            Call::DropModel { key } => {
                self.mappers.get_mut(address).unwrap().models.remove(&**key);
            }
            Call::Remove { key } => {
                if self.mappers.get_mut(address).unwrap().holds.remove(&**key).is_none() {
                    return Outcome::Refused;
                }
            }
            Call::Device { key, told, update, .. } => {
                let Some(ToTell { wanted, mark, .. }) = self.twins.to_tell(key) else { return Outcome::Lost };
                *told = mark;
                let process = &self.mappers[address];
                assert!(process.models.contains("ns/m"), "a device comes after its model");
                match (process.holds.contains_key(&**key), *update) {
                    (false, true) => return Outcome::Refused,
                    // It takes no notice of what is new.
                    (true, false) => return Outcome::Done,
                    _ => self.take(address, &call_key(call), &wanted),
                }
            }
        }
        Outcome::Done
    }

    fn restart(&mut self) {
        let before: Vec<_> = self.rows.keys().map(|key| self.desired(key)).collect();
        let had_model = self.models.contains_key("ns/m");
        self.twins = Twins::default();
        self.mappers.values_mut().for_each(|process| process.connected = None);
        for (uid, note) in &self.notes {
            self.twins.remember(uid, serde_json::from_str(&serde_json::to_string(note).unwrap()).unwrap());
        }
        for (key, (uid, spec)) in &self.models {
            self.twins.model(key, uid, spec.clone());
        }
        for (key, (uid, spec)) in &self.rows {
            self.twins.device(key, uid, spec.clone(), self.now);
        }
        self.twins.loaded();
        for info in self.registered.values() {
            self.twins.found(info.clone(), self.now);
        }
        let after: Vec<_> = self.rows.keys().map(|key| self.desired(key)).collect();
        assert!(!had_model || before == after, "a restart changes nothing: {before:?} {after:?}");
    }

    fn desired(&self, key: &str) -> Vec<(String, String)> {
        let twin = self.twins.twin(key, self.now).unwrap();
        let of = twin.properties.into_iter().filter_map(|of| Some((of.name, of.desired?.value)));
        of.collect()
    }

    fn settle(&mut self) {
        self.models.entry("ns/m".to_owned()).or_insert_with(|| ("m1".to_owned(), model("K")));
        let (uid, spec) = self.models["ns/m"].clone();
        self.twins.model("ns/m", &uid, spec);
        for _ in 0..150 {
            self.now = self.now.after(1);
            self.twins.tick(self.now);
            self.reread();
            self.keep();
            self.calls(false);
            // Mappers go on about what they hold.
            for process in self.mappers.values() {
                for key in process.holds.keys() {
                    let said =
                        self.twins.report_values(key, process.connected.as_slice(), &values(&[("t", "20")]), self.now);
                    if said == Err(Refused::NoDevice) {
                        self.twins.stranger(key, self.now);
                    }
                }
            }
        }
    }

    fn assert_converged(&mut self) {
        let mut held: BTreeMap<String, u32> = BTreeMap::new();
        for (address, process) in &self.mappers {
            for (key, (spec, desired)) in &process.holds {
                *held.entry(key.clone()).or_default() += 1;
                let (_, row) = self.rows.get(key).unwrap_or_else(|| panic!("{address} holds {key}, which is gone"));
                assert_eq!(row.protocol.as_ref().unwrap().protocol_name, process.protocol);
                let mut row =
                    serde_json::to_value(super::super::convert::with_model(row.clone(), &self.models["ns/m"].1))
                        .unwrap();
                row["properties"][0]["desired"] = serde_json::Value::Null;
                assert_eq!(*spec, row.to_string(), "{address} {key}");
                let wanted =
                    self.desired(key).into_iter().filter(|(_, value)| value.parse::<f64>().is_ok_and(|of| of <= 100.0));
                assert_eq!(desired.clone(), wanted.collect(), "{address} {key}");
            }
        }
        for (key, (_, spec)) in &self.rows {
            let protocol = &spec.protocol.as_ref().unwrap().protocol_name;
            let there = self.mappers.values().any(|of| of.running && of.protocol == protocol);
            assert_eq!(held.get(key).copied().unwrap_or(0), u32::from(there), "{key}");
        }
        let calls = self.twins.counters.calls;
        self.calls(false);
        assert_eq!(calls, self.twins.counters.calls, "nothing is told that is known");
    }
}

fn call_key(call: &Call) -> String {
    match call {
        Call::Device { key, .. } | Call::Remove { key } | Call::Model { key, .. } | Call::DropModel { key } => {
            key.to_string()
        }
    }
}

#[test]
fn any_schedule_converges() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let (first, count) = match number("SEED") {
        Some(seed) => (seed, 1),
        None => (u64::from(rand::random::<u32>()), number("SCHEDULES").unwrap_or(100)),
    };
    for seed in first..first + count {
        let result = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..world.dice.random_range(20..200) {
                world.chaos();
            }
            world.settle();
            world.assert_converged();
        });
        if let Err(panic) = result {
            eprintln!("replay with SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// One device, `ns/d`, of the model, without mappers.
fn one() -> Twins {
    let mut twins = Twins::default();
    twins.model("ns/m", "m1", model("K"));
    twins.device("ns/d", "u1", spec("modbus", Some("20")), START);
    twins.watch(true);
    twins
}

#[test]
fn values_that_cannot_be_are_refused_and_the_rest_is_taken() {
    let mut twins = one();
    let long = "x".repeat(skerry_proto::device::MAX_VALUE + 1);
    let said = values(&[
        ("t", "21.5"),
        ("t", "warm"),
        ("t", "101"),
        ("on", "yes"),
        ("none", "1"),
        ("note", &long),
        ("on", "true"),
    ]);
    let refused = twins.report_values("ns/d", &[], &said, START).unwrap_err();
    assert_eq!(refused.to_string(), "t is \"warm\", which is not a number");
    let twin = twins.twin("ns/d", START).unwrap();
    let value = |at: usize| twin.properties[at].reported.as_ref().map(|of| of.value.as_str());
    assert_eq!((value(0), value(1), value(2)), (Some("21.5"), Some("true"), None));
    assert_eq!((twin.refused, twins.counters.values), (5, 2));
    assert!(twins.report_state("ns/d", &[], "asleep", START).is_err());
    assert_eq!(twins.report_values("ns/x", &[], &said, START), Err(Refused::NoDevice));
    for (property, value) in [("on", "true"), ("t", "-1"), ("t", "NaN"), ("none", "1")] {
        assert!(twins.write("ns/d", property, value, "cli", START).is_err(), "{property} {value}");
    }
    assert_eq!(twins.history("ns/d", "t").unwrap(), [(START.wall, "21.5".to_owned())]);
}

#[test]
fn times_that_cannot_be_are_put_right_and_counted() {
    let mut twins = one();
    let mut say = |at: Option<i64>, now: Now| {
        let mut said = values(&[("t", "21")]);
        let reported = said[0].reported.as_mut().unwrap();
        reported.metadata = at.map(|at| ("timestamp".to_owned(), at.to_string())).into_iter().collect();
        twins.report_values("ns/d", &[], &said, now).unwrap();
        let twin = twins.twin("ns/d", now).unwrap();
        let at = twin.properties[0].reported.as_ref().unwrap().timestamp;
        (at - START.wall, twins.counters.corrected, twin.message.is_some())
    };
    assert_eq!(say(Some(START.wall - 5000), START), (-5000, 0, false));
    assert_eq!(say(Some(i64::MAX), START), (0, 1, true));
    // The source's clock was set back, then this node's.
    assert_eq!(say(Some(START.wall - 1), START), (0, 2, true));
    let back = Now { wall: START.wall - 3_600_000, ..START };
    assert_eq!(say(None, back), (-3_600_000, 3, true));
    assert_eq!(say(Some(i64::MIN), back), (-3_600_000, 4, true));
}

#[test]
fn what_a_mapper_reports_changes_nothing_that_mappers_are_told() {
    let mut twins = one();
    let info = MapperInfo { protocol: "modbus".to_owned(), address: "/a".to_owned(), ..MapperInfo::default() };
    let id = twins.register(info, START);
    twins.answered(id);
    twins.connected(id, true, START);
    while let Some(call) = twins.next_call(id, START) {
        twins.called(id, &call, Outcome::Done, START);
    }
    let calls = twins.counters.calls;
    assert_eq!(calls, [1, 0, 0, 1]);
    for n in 0..1000 {
        let value = format!("{}", n % 50);
        twins.report_values("ns/d", &[id], &values(&[("t", &value)]), START.after(n)).unwrap();
        assert!(twins.next_call(id, START.after(n)).is_none());
    }
    // Several changes, while it is busy, are one call with what is wanted last.
    for value in ["1", "2", "3"] {
        twins.write("ns/d", "t", value, "mqtt", START.after(1000)).unwrap();
    }
    let call = twins.next_call(id, START.after(1000)).unwrap();
    assert!(matches!(call, Call::Device { update: true, .. }));
    assert_eq!(twins.to_tell("ns/d").unwrap().wanted[0].value, "3");
    assert!(twins.next_call(id, START.after(1000)).is_none());
    twins.called(id, &call, Outcome::Done, START.after(1000));
    assert!(twins.next_call(id, START.after(1000)).is_none());
    // It is what the cloud is told, too.
    twins.report_values("ns/d", &[id], &values(&[("t", "2.9")]), START.after(1001)).unwrap();
    let due = twins.take_report(START.after(1001)).unwrap();
    let observed = due.report.status.twins[0].observed_desired.clone().unwrap();
    assert_eq!((observed.value.as_str(), observed.metadata["origin"].as_str()), ("3", "mqtt"));
    // Another process does not speak for it.
    let other = MapperInfo { protocol: "opcua".to_owned(), address: "/b".to_owned(), ..MapperInfo::default() };
    let other = twins.register(other, START);
    assert_eq!(twins.report_values("ns/d", &[other], &values(&[("t", "1")]), START), Err(Refused::NotYours));
    // One process may be two mappers.
    let third = MapperInfo { protocol: "http".to_owned(), address: "/c".to_owned(), ..MapperInfo::default() };
    let third = twins.register(third, START);
    let both = twins.report_values("ns/d", &[other, third], &values(&[("t", "1")]), START);
    assert_eq!(both, Err(Refused::NotYours));
    twins.report_values("ns/d", &[other, id], &values(&[("t", "1")]), START).unwrap();
}

#[test]
fn the_cloud_is_told_first_values_at_once_then_news_by_the_cycle_and_the_pace() {
    let mut twins = one();
    let say =
        |twins: &mut Twins, value: &str, now| twins.report_values("ns/d", &[], &values(&[("t", value)]), now).unwrap();
    let told = |twins: &mut Twins, now| {
        let due = twins.take_report(now)?;
        Some(due.report.status.twins[0].reported.clone().unwrap().value)
    };
    say(&mut twins, "20", START);
    assert!(twins.is_urgent());
    assert_eq!(told(&mut twins, START).as_deref(), Some("20"));
    // Within the dead band there is no news; within the cycle of the fastest property it waits.
    say(&mut twins, "20.5", START.after(2));
    assert_eq!(told(&mut twins, START.after(20)), None);
    say(&mut twins, "20.6", START.after(21));
    say(&mut twins, "30", START.after(22));
    assert_eq!(told(&mut twins, START.after(22)).as_deref(), Some("30"));
    say(&mut twins, "40", START.after(23));
    assert_eq!(told(&mut twins, START.after(23)), None);
    assert_eq!(told(&mut twins, START.after(27)).as_deref(), Some("40"));
    twins.report_again("u1");
    assert_eq!(told(&mut twins, START.after(28)).as_deref(), Some("40"));
    // Many devices: five a second, each in its turn.
    let now = START.after(100);
    for n in 0..12 {
        twins.device(&format!("ns/e{n:02}"), &format!("e{n:02}"), spec("modbus", None), now);
        twins.report_values(&format!("ns/e{n:02}"), &[], &values(&[("t", "1")]), now).unwrap();
    }
    let mut names = Vec::new();
    for second in 0..4 {
        let now = now.after(second);
        let before = names.len();
        while let Some(due) = twins.take_report(now) {
            names.push(due.key);
        }
        assert!(names.len() - before <= 5);
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 12);
}

#[test]
fn a_state_is_shown_at_once_and_one_that_flaps_when_it_stays() {
    let mut twins = one();
    let info = MapperInfo { protocol: "modbus".to_owned(), address: "/a".to_owned(), ..MapperInfo::default() };
    let id = twins.register(info, START);
    twins.connected(id, true, START);
    let state = |twins: &mut Twins, now| {
        twins.tick(now);
        twins.twin("ns/d", now).unwrap().state
    };
    assert_eq!(state(&mut twins, START), State::Unknown);
    twins.report_values("ns/d", &[id], &values(&[("t", "1")]), START).unwrap();
    assert_eq!(state(&mut twins, START), State::Online);
    for second in 1..9 {
        let word = if second % 2 == 0 { "online" } else { "OFFLINE" };
        twins.report_state("ns/d", &[id], word, START.after(second)).unwrap();
        assert_eq!(state(&mut twins, START.after(second)), State::Online);
    }
    twins.report_state("ns/d", &[id], "offline", START.after(9)).unwrap();
    assert_eq!(state(&mut twins, START.after(9)), State::Online);
    assert_eq!(state(&mut twins, START.after(10)), State::Offline);
    // Its mapper goes, or says nothing: nobody knows.
    twins.report_state("ns/d", &[id], "online", START.after(30)).unwrap();
    twins.connected(id, false, START.after(31));
    assert_eq!(state(&mut twins, START.after(32)), State::Online);
    assert_eq!(state(&mut twins, START.after(40)), State::Unknown);
    twins.connected(id, true, START.after(41));
    twins.report_state("ns/d", &[id], "ok", START.after(60)).unwrap();
    // What has not changed is said again once in a report cycle of a minute.
    assert_eq!(state(&mut twins, START.after(179)), State::Ok);
    assert_eq!(state(&mut twins, START.after(181)), State::Unknown);
    assert_eq!(twins.twin("ns/d", START).unwrap().last_seen, Some(START.after(60).wall));
    // A value shows that it is as it was said to be.
    twins.report_values("ns/d", &[id], &values(&[("t", "1")]), START.after(200)).unwrap();
    assert_eq!(state(&mut twins, START.after(200)), State::Ok);
}

/// As [`one`], with a mapper that has been told all there is.
fn with_mapper() -> (Twins, MapperId) {
    let mut twins = one();
    let info = MapperInfo { protocol: "modbus".to_owned(), address: "/a".to_owned(), ..MapperInfo::default() };
    let id = twins.register(info, START);
    twins.answered(id);
    twins.connected(id, true, START);
    calls(&mut twins, id, START);
    (twins, id)
}

/// Makes all calls there are; how many of them were of devices.
fn calls(twins: &mut Twins, id: MapperId, now: Now) -> usize {
    let mut of_devices = 0;
    while let Some(mut call) = twins.next_call(id, now) {
        if let Call::Device { key, told, .. } = &mut call {
            (*told, of_devices) = (twins.to_tell(key).unwrap().mark, of_devices + 1);
        }
        twins.called(id, &call, Outcome::Done, now);
    }
    of_devices
}

#[test]
fn what_is_wanted_again_is_told_again_and_a_word_of_the_cloud_that_loses_is_said() {
    let (mut twins, id) = with_mapper();
    let cloud = |twins: &mut Twins, value: &str, at: i64, now| {
        let mut spec = spec("modbus", Some(value));
        let metadata = &mut spec.properties[0].desired.as_mut().unwrap().metadata;
        metadata.insert("timestamp".to_owned(), at.to_string());
        twins.device("ns/d", "u1", spec, now);
        let twin = twins.twin("ns/d", now).unwrap();
        (calls(twins, id, now), twin.properties[0].desired.clone().unwrap().value, twins.counters.lost, twin.message)
    };
    let stamp = START.wall - 5000;
    assert_eq!(cloud(&mut twins, "20", stamp, START), (1, "20".to_owned(), 0, None));
    assert_eq!(cloud(&mut twins, "20", stamp, START), (0, "20".to_owned(), 0, None));
    assert_eq!(cloud(&mut twins, "20", stamp + 1, START), (1, "20".to_owned(), 0, None));
    for second in 1..4 {
        twins.write("ns/d", "t", "20", "cli", START.after(second)).unwrap();
        assert_eq!(calls(&mut twins, id, START.after(second)), 1);
    }
    twins.report_values("ns/d", &[id], &values(&[("t", "20")]), START.after(4)).unwrap();
    while twins.take_report(START.after(70)).is_some() {}
    // The second time it is said, and no new word.
    for _ in 0..2 {
        let (told, value, lost, message) = cloud(&mut twins, "30", START.wall, START.after(140));
        assert_eq!((told, value.as_str(), lost), (0, "20", 1));
        assert!(message.unwrap().starts_with("t is not \"30\" as the cloud wants since 1000000"));
    }
    let told = twins.take_report(START.after(141)).unwrap().report.status.extensions.unwrap();
    assert!(told["message"].as_str().unwrap().contains("written at the box by cli"));
    assert_eq!(cloud(&mut twins, "31", START.wall, START.after(150)), (1, "31".to_owned(), 1, None));
}

#[test]
fn a_device_that_is_back_soon_is_shown_at_once() {
    let (mut twins, id) = with_mapper();
    let state = |twins: &mut Twins, said: &str, second| {
        twins.report_state("ns/d", &[id], said, START.after(second)).unwrap();
        twins.tick(START.after(second));
        twins.twin("ns/d", START).unwrap().state
    };
    assert_eq!(state(&mut twins, "ok", 0), State::Ok);
    assert_eq!(state(&mut twins, "offline", 20), State::Offline);
    assert_eq!(state(&mut twins, "ok", 23), State::Ok);
    assert_eq!(state(&mut twins, "offline", 24), State::Ok);
    assert_eq!(state(&mut twins, "offline", 33), State::Offline);
    assert_eq!(state(&mut twins, "unhealthy", 34), State::Unhealthy);
    // A value before its state says less than that.
    let mut twins = one();
    twins.report_values("ns/d", &[], &values(&[("t", "1")]), START).unwrap();
    twins.report_state("ns/d", &[], "ok", START).unwrap();
    assert_eq!(twins.twin("ns/d", START).unwrap().state, State::Ok);
}

#[test]
fn nobody_else_reports_of_a_device_while_its_mapper_is_there() {
    let (mut twins, id) = with_mapper();
    let said = values(&[("t", "1")]);
    let refused = twins.counters.refused;
    assert_eq!(twins.report_values("ns/d", &[], &said, START), Err(Refused::NotYours));
    assert_eq!(twins.report_state("ns/d", &[], "offline", START), Err(Refused::NotYours));
    assert_eq!((twins.counters.refused - refused, twins.twin("ns/d", START).unwrap().refused), (2, 2));
    twins.connected(id, false, START.after(1));
    twins.report_values("ns/d", &[], &said, START.after(1)).unwrap();
    twins.connected(id, true, START.after(2));
    assert_eq!(twins.report_values("ns/d", &[], &said, START.after(2)), Err(Refused::NotYours));
    // What speaks for itself has no mapper.
    twins.device("ns/e", "u2", spec("none", None), START);
    twins.report_values("ns/e", &[], &said, START).unwrap();
}

#[test]
fn a_mapper_that_does_not_answer_to_a_model_is_asked_less_and_less_often() {
    let mut twins = one();
    let info = MapperInfo { protocol: "modbus".to_owned(), address: "/a".to_owned(), ..MapperInfo::default() };
    let id = twins.register(info, START);
    twins.answered(id);
    twins.connected(id, true, START);
    let mut asked = 0;
    for second in 0..120 {
        let now = START.after(second);
        while let Some(call) = twins.next_call(id, now) {
            assert!(matches!(call, Call::Model { .. }));
            asked += 1;
            assert!(asked < 20, "at {second} s");
            twins.called(id, &call, Outcome::Lost, now);
        }
        assert!(twins.next_due(id).is_some_and(|due| due > now.mono));
    }
    assert!(asked > 5);
    // What is back is told at once.
    twins.connected(id, false, START.after(120));
    twins.connected(id, true, START.after(120));
    assert_eq!(calls(&mut twins, id, START.after(120)), 1);
    assert_eq!(twins.next_due(id), None);
}

#[test]
fn what_mappers_add_to_values_counts_too() {
    let mut twins = one();
    let mut said = values(&[("t", "21")]);
    let metadata = &mut said[0].reported.as_mut().unwrap().metadata;
    metadata.insert("timestamp".to_owned(), START.wall.to_string());
    metadata.insert("quality".to_owned(), "x".repeat(500));
    for _ in 0..3 {
        twins.report_values("ns/d", &[], &said, START).unwrap();
        assert_eq!(twins.bytes, 2 + size_of::<values::Extra>() + 507);
    }
    twins.report_values("ns/d", &[], &values(&[("t", "21")]), START).unwrap();
    assert_eq!(twins.bytes, 2);
}

#[test]
fn a_device_without_news_is_reported_now_and_then_and_one_that_is_silent_is_not() {
    for (report, renewal) in [(json!(null), 600), (json!({ "reportToCloud": true, "reportCycle": 120_000 }), 120)] {
        let mut twins = one();
        let mut spec = spec("modbus", Some("20"));
        spec.state_report = serde_json::from_value(report).unwrap();
        twins.device("ns/d", "u1", spec, START);
        let mut told = Vec::new();
        for second in 0..2000 {
            let now = START.after(second);
            if second < 1500 {
                twins.report_values("ns/d", &[], &values(&[("t", "20")]), now).unwrap();
            }
            while let Some(due) = twins.take_report(now) {
                told.push((second, due.report.status.last_online_time));
            }
        }
        let renewed: Vec<u64> = (0..).map(|n| n * renewal).take_while(|at| *at < 1500 + renewal).collect();
        assert_eq!(told.iter().map(|(second, _)| *second).collect::<Vec<_>>(), renewed);
        assert!(told.windows(2).all(|pair| pair[0].1 < pair[1].1), "{told:?}");
    }
}

#[test]
fn a_dead_band_may_be_text_and_one_that_is_no_number_is_said() {
    let mut twins = one();
    for (said, band, is_wrong) in [(json!("0.5"), 0.5, false), (json!("wide"), 0.0, true), (json!(-1), 0.0, true)] {
        let mut spec = spec("modbus", None);
        let visitors = spec.properties[0].visitors.as_mut().unwrap();
        visitors.config_data = serde_json::from_value(json!({ "reportDeadBand": said })).unwrap();
        twins.device("ns/d", "u1", spec, START);
        let device = twins.get(twins.by_key["ns/d"]).unwrap();
        assert_eq!(device.shape.as_ref().unwrap().properties[0].dead_band.to_string(), f64::to_string(&band));
        assert_eq!(device.trouble.is_some(), is_wrong, "{said}");
    }
}

#[test]
fn a_device_that_cannot_be_told_holds_up_no_other_and_comes_round() {
    let mut twins = one();
    twins.device("ns/e", "u2", spec("modbus", None), START);
    let info = MapperInfo { protocol: "modbus".to_owned(), address: "/a".to_owned(), ..MapperInfo::default() };
    let id = twins.register(info, START);
    twins.answered(id);
    twins.connected(id, true, START);
    let (mut told, mut refused, mut now) = (Vec::new(), 0, START);
    for second in 0..300 {
        now = START.after(second);
        while let Some(call) = twins.next_call(id, now) {
            let is_bad = matches!(&call, Call::Device { key, .. } if &**key == "ns/d") && refused < 4;
            refused += u32::from(is_bad);
            if matches!(call, Call::Device { .. }) && !is_bad {
                told.push((second, call_key(&call)));
            }
            twins.called(id, &call, if is_bad { Outcome::Refused } else { Outcome::Done }, now);
        }
    }
    assert_eq!(told.len(), 2, "{told:?}");
    assert_eq!(told[0], (0, "ns/e".to_owned()));
    assert!(twins.twin("ns/d", now).unwrap().ready);
}

/// Resident memory of this process, in bytes.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// `cargo test -p edgecore --release devices_weigh -- --ignored --nocapture --test-threads=1`
#[test]
#[ignore = "a measurement"]
#[expect(clippy::print_stdout, reason = "what it is for")]
fn devices_weigh() {
    let properties: Vec<_> = (0..10).map(|n| json!({ "name": format!("p{n}"), "type": "DOUBLE" })).collect();
    let model: DeviceModelSpec =
        serde_json::from_value(json!({ "protocol": "modbus", "properties": properties })).unwrap();
    let named: Vec<_> =
        (0..10).map(|n| json!({ "name": format!("p{n}"), "reportToCloud": true, "desired": null })).collect();
    let spec: DeviceSpec =
        serde_json::from_value(json!({ "deviceModelRef": { "name": "m" }, "properties": named })).unwrap();
    let mut twins = Twins::default();
    twins.model("factory/m", "m1", model);
    let before = resident();
    for n in 0..50_000 {
        let uid = format!("{n:08}-1111-2222-3333-444444444444");
        twins.device(&format!("factory/sensor-{n:06}"), &uid, spec.clone(), START);
    }
    let idle = (resident() - before) / 50_000;
    let before = resident();
    let mut said: Vec<Vec<dmi::Twin>> = Vec::new();
    for round in 0..100 {
        said.push(
            (0..10)
                .map(|n| dmi::Twin {
                    property_name: format!("p{n}"),
                    reported: Some(dmi::TwinProperty {
                        value: format!("{}.{round}", n * 7),
                        metadata: [
                            ("timestamp".to_owned(), "1700000000000".to_owned()),
                            ("type".to_owned(), "double".to_owned()),
                        ]
                        .into(),
                    }),
                    observed_desired: None,
                })
                .collect(),
        );
    }
    let keys: Vec<String> = (0..1000).map(|n| format!("factory/sensor-{n:06}")).collect();
    use nix::sys::time::TimeValLike as _;
    let cpu = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().num_nanoseconds();
    let begin = cpu();
    for said in &said {
        for key in &keys {
            twins.report_values(key, &[], said, START).unwrap();
        }
    }
    let each = (cpu() - begin) / 1_000_000;
    let active = resident() - before;
    println!("idle device {idle} B; 1000 devices of 10 properties {active} B; value {each} ns of CPU");
    assert!(idle <= 1024 && active <= 10 << 20);
}
