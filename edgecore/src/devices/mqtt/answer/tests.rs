use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use serde_json::{Value as Json, json};
use skerry_proto::sync::Collection;

use super::*;
use crate::devices::tests::Bed;
use crate::devices::twin::MapperInfo;

const BOILER: &str = "$hw/events/device/ns/boiler";

async fn ask(devices: &Devices, topic: &str, payload: &Json) -> (String, Json) {
    let payload = payload.to_string().into_bytes();
    let (event, _) = answer(devices, "n", topic, Ok(&payload), 1_000_000).await.unwrap();
    (event.topic, serde_json::from_slice(&event.payload).unwrap())
}

async fn bed() -> Bed {
    let bed = Bed::new().await;
    bed.heater().await;
    for _ in 0..500 {
        if bed.devices.twin("ns/boiler").is_some_and(|twin| !twin.properties.is_empty()) {
            return bed;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("the device did not come");
}

#[tokio::test]
async fn a_device_reports_and_clients_wish() {
    let bed = bed().await;
    let property =
        bed.devices.twin("ns/boiler").unwrap().properties.into_iter().find(|of| of.desired.is_some()).unwrap();
    let name = property.name.as_str();
    let twin = json!({ name: { "expected": { "value": "21" }, "actual": { "value": "20", "metadata": { "timestamp": 999_000 } } } });
    let (topic, result) =
        ask(&bed.devices, &format!("{BOILER}/twin/update"), &json!({ "event_id": "e1", "timestamp": 1, "twin": twin }))
            .await;
    assert_eq!(
        (topic, &result["event_id"], &result["timestamp"]),
        (format!("{BOILER}/twin/update/result"), &json!("e1"), &json!(1_000_000))
    );
    let said = &result["twin"][name];
    assert_eq!((&said["expected"]["value"], &said["actual"]["value"]), (&json!("21"), &json!("20")), "{result}");
    assert_eq!(said["actual"]["metadata"]["timestamp"], 999_000);
    let now = bed.devices.twin("ns/boiler").unwrap();
    let now = now.properties.iter().find(|of| of.name == name).unwrap();
    assert_eq!(
        now.desired.as_ref().map(|wanted| (wanted.value.as_str(), wanted.origin.as_str())),
        Some(("21", ORIGIN))
    );
    // By its name alone, as in older releases.
    let (topic, got) = ask(&bed.devices, "$hw/events/device/boiler/twin/get", &json!({ "event_id": "e2" })).await;
    assert_eq!(
        (topic.as_str(), &got["twin"][name]["actual"]["value"]),
        ("$hw/events/device/boiler/twin/get/result", &json!("20"))
    );
    let (topic, got) =
        ask(&bed.devices, &format!("{BOILER}/state/update"), &json!({ "event_id": "e3", "state": "online" })).await;
    assert_eq!((topic, &got["device"]["name"]), (format!("{BOILER}/state/update/result"), &json!("boiler")));
    let (topic, got) = ask(&bed.devices, "$hw/events/node/n/membership/get", &json!({})).await;
    assert_eq!(
        (topic.as_str(), &got["devices"][0]["id"]),
        ("$hw/events/node/n/membership/get/result", &json!("ns/boiler"))
    );
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_a_reason_and_nothing_is_done() {
    let bed = bed().await;
    let before = bed.devices.twin("ns/boiler").unwrap();
    let name = before.properties.iter().find(|of| of.desired.is_some()).unwrap().name.clone();
    let long = "9".repeat(70_000);
    for (payload, code, word) in [
        (json!({ "event_id": "e" }), 400, "`twin`"),
        (json!({ "twin": { "none": {} } }), 400, "none"),
        (json!({ "twin": { "none": { "actual": { "value": "1" } } } }), 400, "none"),
        (json!({ "twin": { &name: null } }), 400, "deleted"),
        (json!({ "twin": { &name: { "expected": {} } } }), 400, "`value`"),
        (json!({ "twin": { &name: { "expected": { "value": "hot" } } } }), 400, "hot"),
        (json!({ "twin": { &name: { "actual": { "value": "19" }, "expected": { "value": "hot" } } } }), 400, "hot"),
        (
            json!({ "twin": { &name: { "actual": { "value": "19" } }, "zzz": { "actual": { "value": "1" } } } }),
            400,
            "zzz",
        ),
        (json!({ "twin": { &name: { "actual": { "value": long } } } }), 400, "70000"),
        (json!("x"), 400, "object"),
    ] {
        let (topic, result) = ask(&bed.devices, &format!("{BOILER}/twin/update"), &payload).await;
        assert_eq!(
            (topic, &result["code"]),
            (format!("{BOILER}/twin/update/result"), &json!(code)),
            "{payload} {result}"
        );
        assert!(result["reason"].as_str().unwrap().contains(word), "{payload} {result}");
        let now = bed.devices.twin("ns/boiler").unwrap();
        assert_eq!(now.properties, before.properties, "{payload}");
    }
    let (_, result) = ask(&bed.devices, "$hw/events/device/ns/none/twin/get", &json!({})).await;
    assert_eq!(result["code"], 404);
    let (_, result) = ask(&bed.devices, &format!("{BOILER}/state/update"), &json!({ "state": "dancing" })).await;
    assert_eq!(result["code"], 400);
    let (event, is_refused) =
        answer(&bed.devices, "n", &format!("{BOILER}/twin/update"), Err(10 << 20), 1).await.unwrap();
    assert!(is_refused && String::from_utf8(event.payload).unwrap().contains("10485760 bytes"));
    assert!(answer(&bed.devices, "n", "$hw/events/device/ns/boiler/updated", Ok(b"{}"), 1).await.is_none());
    // Two of a name: which one?
    let other = json!({ "metadata": { "name": "boiler", "namespace": "other", "uid": "u9" }, "spec": {} }).to_string();
    let object = skerry_proto::sync::Object::new(
        Collection::Devices,
        "other/boiler".to_owned(),
        "u9".to_owned(),
        other.as_bytes(),
    );
    bed.store.apply(vec![skerry_proto::sync::Op::Upsert(object)]).await.unwrap();
    for _ in 0..500 {
        if bed.devices.twin("other/boiler").is_some() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let (_, result) = ask(&bed.devices, "$hw/events/device/boiler/twin/get", &json!({})).await;
    assert_eq!(result["code"], 409, "{result}");
}

#[tokio::test]
async fn any_payload_is_answered_and_no_worker_dies() {
    let bed = bed().await;
    let mut runner = TestRunner::deterministic();
    for _ in 0..1000 {
        let payload = json_text().new_tree(&mut runner).unwrap().current();
        for topic in ["twin/update", "twin/get", "state/update"] {
            let answered = answer(&bed.devices, "n", &format!("{BOILER}/{topic}"), Ok(payload.as_bytes()), 1).await;
            assert!(serde_json::from_slice::<Json>(&answered.unwrap().0.payload).is_ok(), "{payload}");
        }
    }
}

/// Something like a request.
fn json_text() -> impl Strategy<Value = String> {
    let value = prop_oneof![
        Just("null".to_owned()),
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| number.to_string()),
        ".{0,20}".prop_map(|text| Json::from(text).to_string()),
        Just("{\"value\":\"1\"}".to_owned()),
        Just("{\"value\":\"1\",\"metadata\":{\"timestamp\":-9223372036854775808}}".to_owned()),
        Just("{\"value\":null,\"metadata\":[]}".to_owned()),
    ];
    let key = prop_oneof![Just("expected"), Just("actual"), Just("optional"), Just("metadata")];
    let twin = proptest::collection::vec(("(temp|on|[a-z]{0,3})", key, value.clone()), 0..4);
    (twin, value, "\\PC{0,3}").prop_map(|(twin, event_id, tail)| {
        let twin: Vec<_> = twin.iter().map(|(name, key, value)| format!("\"{name}\":{{\"{key}\":{value}}}")).collect();
        format!("{{\"event_id\":{event_id},\"state\":{event_id},\"twin\":{{{}}}}}{tail}", twin.join(","))
    })
}

#[tokio::test]
async fn what_a_device_is_its_mapper_says_while_it_is_connected() {
    let bed = bed().await;
    let mapper = bed.devices.with(|twins, now| {
        let info =
            MapperInfo { protocol: "modbus".to_owned(), address: "/nowhere".to_owned(), ..MapperInfo::default() };
        let id = twins.register(info, now);
        twins.connected(id, true, now);
        id
    });
    let both = json!({ "twin": { "temp": { "expected": { "value": "30" }, "actual": { "value": "20" } } } });
    let state = json!({ "state": "offline" });
    for (what, payload) in [("twin/update", &both), ("state/update", &state)] {
        let (_, got) = ask(&bed.devices, &format!("{BOILER}/{what}"), payload).await;
        assert_eq!(got["code"], 400, "{got}");
        assert!(got["reason"].as_str().unwrap().contains("its mapper says"), "{got}");
    }
    let twin = bed.devices.twin("ns/boiler").unwrap();
    assert_eq!((twin.refused, twin.properties[0].desired.as_ref().unwrap().value.as_str()), (2, "20"));
    let wish = json!({ "twin": { "temp": { "expected": { "value": "30" } } } });
    let (_, got) = ask(&bed.devices, &format!("{BOILER}/twin/update"), &wish).await;
    assert_eq!(got["twin"]["temp"]["expected"]["value"], "30");
    // It is away: the device may speak for itself.
    bed.devices.with(|twins, now| twins.connected(mapper, false, now));
    let (_, got) = ask(&bed.devices, &format!("{BOILER}/twin/update"), &both).await;
    assert_eq!(got["twin"]["temp"]["actual"]["value"], "20");
}
