use serde_json::Value as Json;

use super::*;

fn twin(properties: &[(&str, Option<&str>, Option<&str>)]) -> Twin {
    let property = |(name, desired, reported): &(&str, Option<&str>, Option<&str>)| Property {
        name: (*name).to_owned(),
        kind: "STRING".to_owned(),
        desired: desired.map(|value| Wanted { value: value.to_owned(), ..Wanted::default() }),
        reported: reported.map(|value| Value { value: value.to_owned(), ..Value::default() }),
        ..Property::default()
    };
    let properties = properties.iter().map(property).collect();
    Twin { namespace: "ns".to_owned(), name: "lamp".to_owned(), state: State::Online, properties, ..Twin::default() }
}

struct Bed {
    mirror: Mirror,
    key: Arc<str>,
    now: Duration,
}

impl Bed {
    fn new() -> Self {
        Self { mirror: Mirror::new(7), key: "ns/lamp".into(), now: Duration::from_secs(100) }
    }

    /// What is published, with what is in it that matters.
    fn look(&mut self, twin: Option<&Twin>) -> Vec<String> {
        let news = self.mirror.look(&self.key, twin, "n", self.now, 5);
        let retained = news.retained.iter().map(|event| {
            format!(
                "{}={}",
                event.topic.trim_start_matches("devices/ns/lamp/"),
                String::from_utf8_lossy(&event.payload)
            )
        });
        let events = news.events.iter().map(|event| {
            let json: Json = serde_json::from_slice(&event.payload).unwrap();
            let what = event.topic.rsplit('/').next().unwrap();
            let told = |key: &str| json[key].as_object().map(|of| of.keys().cloned().collect::<Vec<_>>().join(","));
            let told = told("delta").or_else(|| told("twin")).unwrap_or_default();
            format!("{what} {told}").trim().to_owned()
        });
        retained.chain(events).collect()
    }
}

#[test]
fn only_what_changed_is_published() {
    let mut bed = Bed::new();
    let first = twin(&[("a", Some("1"), None), ("b", None, Some("2")), ("c", None, None)]);
    assert_eq!(bed.look(Some(&first)), ["$state=online", "b=2", "updated", "document a,b", "delta a"]);
    assert_eq!(bed.look(Some(&first)), [""; 0]);
    let mut same = first.clone();
    same.properties[1].reported = Some(Value { value: "2".to_owned(), timestamp: 9, version: 4, ..Value::default() });
    assert_eq!(bed.look(Some(&same)), [""; 0], "the same value, read again");
    let second = twin(&[("a", Some("1"), Some("1")), ("b", None, Some("3"))]);
    assert_eq!(bed.look(Some(&second)), ["a=1", "b=3", "document a,b"]);
    let third = Twin { state: State::Offline, ..twin(&[("a", Some("1"), None)]) };
    assert_eq!(bed.look(Some(&third)), ["$state=offline", "a=", "b=", "document a", "delta a"]);
    let fourth = twin(&[("a", None, Some("x"))]);
    assert_eq!(bed.look(Some(&fourth)), ["$state=online", "a=x", "document a"]);
    assert_eq!(bed.look(None), ["$state=", "a=", "updated"]);
    assert_eq!(bed.look(None), [""; 0]);
}

#[test]
fn a_new_session_is_told_all_that_is_retained_once() {
    let mut bed = Bed::new();
    let twin = twin(&[("a", Some("1"), Some("2"))]);
    let key = Arc::clone(&bed.key);
    bed.mirror.all([Arc::clone(&key)], true, bed.now);
    assert_eq!(bed.mirror.take(bed.now), Some(key));
    assert_eq!(
        bed.look(Some(&twin)),
        ["$state=online", "a=2", "document a", "delta a"],
        "no membership: the list has it"
    );
    bed.mirror.all([Arc::clone(&bed.key)], false, bed.now);
    assert_eq!(bed.look(Some(&twin)), [""; 0], "changes were missed, and there were none");
    bed.mirror.all([Arc::clone(&bed.key)], true, bed.now);
    assert_eq!(bed.look(Some(&twin)), ["$state=online", "a=2", "delta a"]);
    // Gone while there was no session.
    bed.mirror.take(bed.now + PACE);
    bed.mirror.all([], true, bed.now);
    assert!(bed.mirror.take(bed.now + PACE).is_some());
    assert_eq!(bed.look(None), ["$state=", "a=", "updated"]);
}

#[test]
fn a_device_is_looked_at_at_once_and_then_once_a_second() {
    let mut bed = Bed::new();
    let (key, start) = (Arc::clone(&bed.key), bed.now);
    let mut looks = Vec::new();
    for millis in (0..3000).step_by(10) {
        bed.now = start + Duration::from_millis(millis);
        bed.mirror.touch(&key, bed.now);
        while bed.mirror.take(bed.now).is_some() {
            bed.look(Some(&twin(&[("a", None, Some(&millis.to_string()))])));
            looks.push(millis);
        }
    }
    assert_eq!(looks, [0, 1000, 2000]);
    assert_eq!(bed.mirror.next_due(), Some(start + Duration::from_secs(3)));
    // Others do not wait for it.
    let other: Arc<str> = "ns/other".into();
    bed.mirror.touch(&other, bed.now);
    bed.mirror.touch(&other, bed.now);
    assert_eq!((bed.mirror.take(bed.now), bed.mirror.take(bed.now)), (Some(other), None));
}

#[test]
fn a_long_value_is_not_kept_twice() {
    let mut bed = Bed::new();
    let long = "x".repeat(60_000);
    bed.look(Some(&twin(&[("a", None, Some(&long))])));
    let seen = &bed.mirror.known[&bed.key].properties["a"];
    assert_eq!(seen.reported.as_ref().unwrap().text, None);
    let news = bed.mirror.look(&bed.key, Some(&twin(&[("a", None, Some("y"))])), "n", bed.now, 5);
    let document: Json = serde_json::from_slice(&news.events[0].payload).unwrap();
    assert_eq!(
        (&document["twin"]["a"]["last"]["actual"], &document["twin"]["a"]["current"]["actual"]["value"]),
        (&Json::Null, &"y".into())
    );
    assert_ne!(document["event_id"], "");
}
