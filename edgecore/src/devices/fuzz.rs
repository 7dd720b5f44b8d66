//! Damaged input for all that says something of devices: reports and registrations of mappers, and models, devices, notes and values for
//! twins. Nothing panics, and what comes of it can be told.
//!
//! `SEED=n` replays one input; with `FUZZ=n` each goes on for so many seconds, as `scripts/soak fuzz` does.

use std::time::Duration;

use prost::Message as _;
use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};
use skerry_proto::device::{DeviceModelSpec, DeviceReport, DeviceSpec};
use skerry_proto::dmi::{
    self, MapperRegisterRequest, ReportDeviceStatesRequest, ReportDeviceStatusRequest,
    extensions::{PropertyReport, ReportRequest, Sample},
};

use super::convert;
use super::dmi::{info, key};
use super::twin::{Call, MapperId, MapperInfo, Note, Now, Outcome, ToTell, Twin, Twins};
use crate::dice::Dice;
use crate::fuzz::fuzz;
use crate::mutate;

const NOW: Now = Now { mono: Duration::from_secs(100), wall: 1_700_000_000_000 };
/// Calls that a mapper is told by at most: more than there is to tell.
const CALLS: usize = 100;

#[test]
fn reports() {
    fuzz(report, &reports_of_mappers(), mutate::message);
}

#[test]
fn registrations() {
    fuzz(registration, &registrations_of_mappers(), mutate::message);
}

#[test]
fn documents() {
    fuzz(document, &twins_in_json(), damaged_json);
}

/// What any mapper's process says, by each of the calls there are for it.
fn report(bytes: &[u8]) {
    let (mut twins, id) = heater();
    let said = ReportRequest::decode(bytes).map(|said| said.devices).unwrap_or_default();
    for of in said {
        let key = key(of.device_namespace, &of.device_name);
        let _ = twins.report_values(&key, &[id], &of.properties, NOW);
        let _ = twins.report_state(&key, &[id], &of.state, NOW);
    }
    if let Ok(said) = ReportDeviceStatusRequest::decode(bytes) {
        let key = key(said.device_namespace, &said.device_name);
        let _ = twins.report_values(&key, &[id], &said.reported_device.unwrap_or_default().twins, NOW);
    }
    if let Ok(said) = ReportDeviceStatesRequest::decode(bytes) {
        let _ = twins.report_state(&key(said.device_namespace, &said.device_name), &[id], &said.state, NOW);
    }
    can_be_told(&mut twins);
}

/// One that is taken can be called, and takes no room to speak of.
fn registration(bytes: &[u8]) {
    let Ok(said) = MapperRegisterRequest::decode(bytes) else { return };
    let (mut twins, _) = heater();
    if let Ok(info) = info(said.mapper.unwrap_or_default()) {
        assert!(info.address.starts_with('/') && !info.protocol.is_empty());
        assert!([&info.name, &info.version, &info.protocol, &info.address].iter().all(|text| text.len() <= 253));
        let id = twins.register(info, NOW);
        take_calls(&mut twins, id);
        can_be_told(&mut twins);
    }
}

/// A device with its model, what was kept of it, and what happens to it.
fn document(bytes: &[u8]) {
    let Ok(all) = serde_json::from_slice::<Json>(bytes) else { return };
    let mut twins = Twins::default();
    twins.watch(true);
    if let Some(note) = read::<Note>(&all["note"]) {
        twins.remember("u", note);
    }
    let id = twins.register(MapperInfo { protocol: "modbus".to_owned(), ..mapper() }, NOW);
    for (model, device) in [("model", "device"), ("otherModel", "device"), ("model", "otherDevice")] {
        if let Some(model) = read::<DeviceModelSpec>(&all[model]) {
            convert::model("n/m", &model).encoded_len();
            twins.model("n/m", "m", model);
        }
        twins.take_rereads();
        if let Some(device) = read::<DeviceSpec>(&all[device]) {
            twins.device("n/d", "u", device.clone(), NOW);
            if let Some(ToTell { model, wanted, .. }) = twins.to_tell("n/d") {
                convert::device("n/d", device, &model, &wanted).encoded_len();
            }
        }
        twins.loaded();
        take_calls(&mut twins, id);
        for said in all["values"].as_array().into_iter().flatten() {
            let text = |at: usize| said[at].as_str().unwrap_or_default();
            let reported = Sample { value: text(1).to_owned(), timestamp: said[2].as_i64() };
            let of = PropertyReport {
                property: text(0).to_owned(),
                reported: Some(reported.clone()),
                written: Some(reported),
            };
            let _ = twins.report_values("n/d", &[id], &[of], NOW);
            let _ = twins.write("n/d", text(0), text(1), "cli", NOW);
            let _ = twins.history("n/d", text(0));
        }
        let _ = twins.report_state("n/d", &[id], all["state"].as_str().unwrap_or_default(), NOW);
        take_calls(&mut twins, id);
        can_be_told(&mut twins);
        twins.take_changes();
    }
    twins.model_gone("n/m", "m");
    twins.device_gone("n/d", "u", NOW);
    assert_eq!(twins.len(), 0);
    can_be_told(&mut twins);
}

fn read<T: DeserializeOwned>(json: &Json) -> Option<T> {
    serde_json::from_value(json.clone()).ok()
}

/// A mapper takes what it is told, which ends.
fn take_calls(twins: &mut Twins, id: MapperId) {
    twins.answered(id);
    twins.connected(id, true, NOW);
    for _ in 0..CALLS {
        let Some(mut call) = twins.next_call(id, NOW) else { return };
        if let Call::Device { key, told, .. } = &mut call {
            *told = twins.to_tell(key).map(|of| of.mark).unwrap_or_default();
        }
        twins.called(id, &call, Outcome::Done, NOW);
    }
    panic!("a mapper is told without end");
}

/// All that goes to people, to the cloud and to the store is read back as it was, and values are what their types say.
fn can_be_told(twins: &mut Twins) {
    twins.tick(NOW);
    for _ in 0..CALLS {
        let Some(due) = twins.take_report(NOW) else { break };
        let text = serde_json::to_string(&due.report).unwrap();
        assert_eq!(serde_json::from_str::<DeviceReport>(&text).unwrap(), due.report);
    }
    for (key, _) in twins.names().0 {
        let twin = twins.twin(&key, NOW).unwrap();
        let text = serde_json::to_string(&twin).unwrap();
        assert_eq!(serde_json::from_str::<Twin>(&text).unwrap(), twin);
        for property in twin.properties {
            let Some(reported) = property.reported else { continue };
            match property.kind.as_str() {
                "INT" => assert!(reported.value.parse::<i64>().is_ok(), "{reported:?}"),
                "FLOAT" | "DOUBLE" => assert!(reported.value.parse::<f64>().is_ok_and(f64::is_finite), "{reported:?}"),
                "BOOLEAN" => assert!(reported.value == "true" || reported.value == "false", "{reported:?}"),
                _ => {}
            }
            assert!(reported.timestamp <= NOW.wall + 60_000, "{reported:?} is from the future");
        }
    }
    for (_, _, note) in twins.take_notes().0 {
        let text = serde_json::to_string(&note).unwrap();
        assert_eq!(serde_json::from_str::<Note>(&text).unwrap(), note);
    }
}

fn mapper() -> MapperInfo {
    MapperInfo { name: "m".to_owned(), version: "1".to_owned(), address: "/m.sock".to_owned(), ..MapperInfo::default() }
}

fn model_json() -> Json {
    json!({"protocol": "modbus", "protocolConfigData": {"timeout": 5}, "properties": [
        {"name": "t", "type": "FLOAT", "accessMode": "ReadWrite", "minimum": "-10", "maximum": "100.5", "unit": "°C"},
        {"name": "i", "type": "INT", "accessMode": "ReadWrite", "visitors": {"configData": {"offset": 3}}},
        {"name": "on", "type": "BOOLEAN", "accessMode": "ReadOnly"}, {"name": "note", "type": "STRING", "accessMode": "ReadWrite"},
        {"name": "raw", "type": "BYTES", "accessMode": "ReadOnly"}]})
}

fn device_json() -> Json {
    json!({
        "deviceModelRef": {"name": "m"}, "nodeName": "box", "stateReport": {"toCloud": true},
        "protocol": {"protocolName": "modbus", "configData": {"ip": "h", "port": 502, "scale": 0.1, "deep": {"a": [1, null]}}},
        "properties": [
            {"name": "t", "reportToCloud": true, "reportCycle": 1000, "desired": {"value": "20", "metadata": {"timestamp": "1699999999999"}},
             "visitors": {"protocolName": "modbus", "configData": {"reportDeadBand": 0.5, "offset": 7}},
             "pushMethod": {"mqtt": {"address": "tcp://h:1883", "topic": "t", "qos": 1}, "http": {"hostName": "h", "port": 80}}},
            {"name": "i", "reportToCloud": true, "collectCycle": 10_000_000_000_u64, "desired": {"value": "7"}},
            {"name": "on"}, {"name": "note"}, {"name": "raw"}],
        "methods": [{"name": "heat", "propertyNames": ["t"]}],
    })
}

/// Twins of one device, and the mapper that has it.
fn heater() -> (Twins, MapperId) {
    let mut twins = Twins::default();
    twins.model("n/m", "m", read(&model_json()).unwrap());
    twins.device("n/d", "u", read(&device_json()).unwrap(), NOW);
    let id = twins.register(MapperInfo { protocol: "modbus".to_owned(), ..mapper() }, NOW);
    take_calls(&mut twins, id);
    (twins, id)
}

fn reports_of_mappers() -> Vec<Vec<u8>> {
    let values = [("t", "19.5"), ("i", "-3"), ("on", "true"), ("note", "so"), ("raw", "AA=="), ("none", "1")];
    let sample = |value: &str, timestamp| Some(Sample { value: value.to_owned(), timestamp });
    let properties = values.iter().map(|(name, value)| PropertyReport {
        property: (*name).to_owned(),
        reported: sample(value, Some(NOW.wall - 5)),
        written: sample(value, None),
    });
    let device = dmi::extensions::DeviceReport {
        device_namespace: "n".to_owned(),
        device_name: "d".to_owned(),
        properties: properties.collect(),
        state: "online".to_owned(),
    };
    let strange = dmi::extensions::DeviceReport { device_name: "x".to_owned(), ..device.clone() };
    let twins = values.iter().map(|(name, value)| {
        let metadata = [("timestamp", "1699999999000"), ("type", "int"), ("quality", "good")];
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let value = Some(dmi::TwinProperty { value: (*value).to_owned(), metadata });
        dmi::Twin { property_name: (*name).to_owned(), reported: value.clone(), observed_desired: value }
    });
    let status = ReportDeviceStatusRequest {
        device_name: "d".to_owned(),
        device_namespace: "n".to_owned(),
        reported_device: Some(dmi::DeviceStatus { twins: twins.collect(), ..Default::default() }),
    };
    let states = ReportDeviceStatesRequest {
        device_name: "d".to_owned(),
        device_namespace: "n".to_owned(),
        state: "offline".to_owned(),
    };
    vec![
        ReportRequest { devices: vec![device, strange] }.encode_to_vec(),
        status.encode_to_vec(),
        states.encode_to_vec(),
    ]
}

fn registrations_of_mappers() -> Vec<Vec<u8>> {
    let addresses = ["/etc/kubeedge/m.sock", "unix:///m.sock", "unix:/m.sock"];
    let request = |address: &&str| MapperRegisterRequest {
        with_data: true,
        mapper: Some(dmi::MapperInfo {
            name: "modbus-mapper".to_owned(),
            version: "v1.13.0".to_owned(),
            api_version: "v1beta1".to_owned(),
            protocol: "modbus".to_owned(),
            address: address.as_bytes().to_vec(),
            state: "ok".to_owned(),
        }),
    };
    addresses.iter().map(|address| request(address).encode_to_vec()).collect()
}

fn twins_in_json() -> Vec<Vec<u8>> {
    let mut other = model_json();
    other["properties"][0]["type"] = "STRING".into();
    let mut bare = device_json();
    bare["properties"][0]["desired"] = Json::Null;
    let note = json!({"t": {"seen": {"value": "20"}, "local": {"value": "25", "origin": "cli"}, "at": NOW.wall, "version": 3}});
    let values = json!([
        ["t", "21.5", NOW.wall],
        ["i", "4", null],
        ["on", "false", 0],
        ["note", "é\u{0}", -1],
        ["raw", "AA==", NOW.wall + 5]
    ]);
    let whole = json!({
        "model": model_json(), "otherModel": other, "device": device_json(), "otherDevice": bare, "note": note, "values": values, "state": "ok",
    });
    vec![whole.to_string().into_bytes()]
}

/// A document whose values and keys are others in some places; sometimes no document at all.
fn damaged_json(dice: &mut Dice, seeds: &[Vec<u8>]) -> Vec<u8> {
    if dice.one_in(8) {
        return mutate::bytes(dice, seeds);
    }
    let mut json: Json = serde_json::from_slice(&seeds[dice.roll(seeds.len())]).unwrap();
    for _ in 0..=dice.roll(4) {
        change(dice, &mut json);
    }
    json.to_string().into_bytes()
}

fn change(dice: &mut Dice, json: &mut Json) {
    // Deeper, most of the time.
    if !dice.one_in(6) {
        match json {
            Json::Object(of) if !of.is_empty() => {
                let key = of.keys().nth(dice.roll(of.len())).unwrap().clone();
                if dice.one_in(12) {
                    let value = of.remove(&key).unwrap();
                    if dice.one_in(2) {
                        of.insert(dice.letters(3).to_owned(), value);
                    }
                    return;
                }
                return change(dice, &mut of[&key]);
            }
            Json::Array(of) if !of.is_empty() => {
                let at = dice.roll(of.len());
                if dice.one_in(8) {
                    let copy = of[at].clone();
                    return of.insert(dice.roll(of.len() + 1), copy);
                }
                return change(dice, &mut of[at]);
            }
            _ => {}
        }
    }
    *json = match dice.roll(12) {
        0 => Json::Null,
        1 => json!([]),
        2 => json!({}),
        3 => json!(dice.one_in(2)),
        4 => json!(dice.pick(&[0, -1, 1, i64::MAX, i64::MIN, 1_000_000_000_000])),
        5 => json!(dice.pick(&[0.5, -0.0, 1e300, f64::MIN_POSITIVE])),
        6 => json!(dice.letters(2)),
        7 => json!(dice.letters(70).repeat(dice.pick(&[1, 10, 1000]))),
        8 => json!(dice.pick(&[
            "",
            "\u{0}",
            "NaN",
            "-0",
            "1e999",
            "99999999999999999999",
            "t",
            "ReadOnly",
            "INT",
            "../..",
            "é"
        ])),
        9 => {
            json!({"value": dice.pick(&["", "1", "-1", "true", "x"]), "metadata": {"timestamp": dice.pick(&["", "-1", "1", "9223372036854775807"])}})
        }
        10 => json!([json.clone(), json.clone()]),
        _ => json!({"name": json.clone()}),
    };
}
