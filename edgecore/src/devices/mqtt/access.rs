//! Who may say what to the broker that edgecore starts, or to another that is given this: mosquitto's access list, made from the devices.
//!
//! Whoever is on the box may use the broker as before, without a password, but for two things. The plain topics are edgecore's: others
//! read them. And of a device whose annotation `skerry.dev/mqtt-writers` names users only these users write any topic, be it an update or what
//! the device would take for edgecore's word; the others may ask for its twin, and read. Users log in with
//! the passwords of the file `mqtt-passwd` in the data directory, made with `mosquitto_passwd`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::order;

/// The annotation of a Device: names of users, with commas between.
pub(super) const WRITERS: &str = "skerry.dev/mqtt-writers";
/// What only its writers write of a device: all but `twin/get`. One by one: a device can be called like a namespace, or `twin`, and then
/// whatever is under one device's topics is not its own.
const GUARDED: [&str; 7] = [
    "twin/update",
    "twin/update/result",
    "twin/update/document",
    "twin/update/delta",
    "twin/get/result",
    "state/update",
    "state/update/result",
];

/// Users that may write to a device, by key; devices that anybody may write to are not in it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Writers(BTreeMap<String, Vec<String>>);

impl Writers {
    /// Takes a Device as it is in the store, or that it is not there. Answers whether anything changed.
    pub(super) fn device(&mut self, key: &str, json: Option<&[u8]>) -> bool {
        match json.and_then(writers) {
            Some(writers) if self.0.get(key) == Some(&writers) => false,
            Some(writers) => {
                self.0.insert(key.to_owned(), writers);
                true
            }
            None => self.0.remove(key).is_some(),
        }
    }

    /// Whether nobody's topics are guarded.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// The access list, for the users that there are, and those that devices name: another broker has users of its own.
    ///
    /// mosquitto looks at what is said of the user first, then at the patterns, and in each at what denies before what allows: so what a
    /// user may read, or write, is allowed before the patterns deny the rest.
    pub(super) fn list(&self, users: &[String]) -> String {
        let mut text = "# Made by edgecore; changes are lost.\n".to_owned();
        self.section(&mut text, None);
        let users: BTreeSet<&String> = users.iter().chain(self.0.values().flatten()).collect();
        for user in users {
            // Writing into a text does not fail.
            let _ = write!(text, "\nuser {user}\n");
            self.section(&mut text, Some(user));
        }
        text.push_str("\npattern deny devices/#\n");
        for topic in self.0.keys().flat_map(|key| guarded(key)) {
            let _ = writeln!(text, "pattern deny {topic}");
        }
        text + "pattern readwrite #\npattern readwrite $hw/#\npattern read $SYS/#\n"
    }

    fn section(&self, text: &mut String, user: Option<&String>) {
        let _ = writeln!(text, "topic read devices/#\ntopic read {}#", super::topic::DEVICE);
        for (key, _) in self.0.iter().filter(|(_, writers)| user.is_some_and(|user| writers.contains(user))) {
            for topic in guarded(key) {
                let _ = writeln!(text, "topic readwrite {topic}");
            }
        }
    }
}

/// The topics of a device that its writers alone write, by either of its names.
fn guarded(key: &str) -> impl Iterator<Item = String> {
    ids(key).into_iter().flat_map(|id| GUARDED.map(|what| super::topic::device(id, what)))
}

/// What a device is called in topics: by its key, and by its name alone.
fn ids(key: &str) -> [&str; 2] {
    [key, key.split_once('/').map_or(key, |(_, name)| name)]
}

/// Of a Device in JSON.
fn writers(json: &[u8]) -> Option<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Device {
        metadata: Metadata,
    }
    #[derive(serde::Deserialize)]
    struct Metadata {
        annotations: BTreeMap<String, String>,
    }
    // Few have it, and all are looked at.
    memchr::memmem::find(json, WRITERS.as_bytes())?;
    let device: Device = serde_json::from_slice(json).ok()?;
    let users = device.metadata.annotations.get(WRITERS)?.split(',').map(str::trim);
    Some(users.filter(|user| is_user(user)).map(str::to_owned).collect())
}

/// The users of mosquitto's password file.
pub(super) fn users(passwords: &str) -> Vec<String> {
    let mut users: Vec<String> = passwords
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0))
        .filter(|user| is_user(user))
        .map(str::to_owned)
        .collect();
    order::sort(&mut users);
    users.dedup();
    users
}

/// Whether a name can stand in the list without being taken for something else.
fn is_user(name: &str) -> bool {
    !name.is_empty() && name.len() <= 256 && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn device(annotation: &str) -> Vec<u8> {
        serde_json::json!({ "kind": "Device", "metadata": { "annotations": { "x": "y", WRITERS: annotation } }, "spec": {} })
            .to_string()
            .into_bytes()
    }

    #[test]
    fn only_what_is_declared_is_denied() {
        let mut writers = Writers::default();
        assert!(!writers.device("default/open", Some(b"{\"metadata\":{\"name\":\"open\"}}")));
        assert!(writers.device("default/press", Some(&device("app1, app2,,bad user\n"))));
        assert!(!writers.device("default/press", Some(&device("app1,app2"))));
        let users = users("app1:$7$101$x==\napp3:y\n\nnot a user:z\napp1:again\n");
        assert_eq!(users, ["app1", "app3"]);
        let list = writers.list(&users);
        let of = |user: &str| list.split("\n\n").find(|part| part.contains(user)).unwrap();
        let write = "\ntopic readwrite $hw/events/device/";
        for user in ["Made by", "user app1", "user app3"] {
            assert!(of(user).contains("\ntopic read devices/#\ntopic read $hw/events/device/#"), "{list}");
            for topic in ["twin/update", "twin/update/delta", "twin/get/result", "state/update"] {
                for id in ["default/press", "press"] {
                    let may = of(user).lines().any(|line| *line == format!("{write}{id}/{topic}")[1..]);
                    assert_eq!(may, user == "user app1", "{user} {topic} {list}");
                    assert!(list.contains(&format!("\npattern deny $hw/events/device/{id}/{topic}\n")), "{list}");
                }
            }
        }
        assert!(list.contains("\n\npattern deny devices/#\n") && !list.contains("twin/get\n"), "{list}");
        assert!(
            !list.contains("open") && list.ends_with("readwrite #\npattern readwrite $hw/#\npattern read $SYS/#\n")
        );
        // Of nobody: nobody may.
        assert!(writers.device("default/press", Some(&device(""))));
        assert!(!writers.list(&users).contains("readwrite $hw/events"));
        assert!(writers.device("default/press", None) && !writers.device("default/press", None));
        assert_eq!(writers, Writers::default());
    }

    #[test]
    fn a_device_that_is_called_like_a_namespace_opens_nothing_of_it() {
        let mut writers = Writers::default();
        for (key, users) in
            [("shop/plant", "app1"), ("plant/press", "app2"), ("plant/twin", "app3"), ("shop/twin", "app1")]
        {
            writers.device(key, Some(&device(users)));
        }
        let users = ["app1", "app2", "app3"].map(str::to_owned);
        let list = writers.list(&users);
        let may = |user: &str, topic: &str| {
            let section = list.split("\n\n").find(|part| part.contains(&format!("user {user}\n"))).unwrap();
            let rules = section.lines().filter_map(|line| line.strip_prefix("topic readwrite "));
            let matches = |rule: &str| rule == topic || rule.contains(['#', '+']);
            rules.into_iter().any(matches)
        };
        let topic = |id: &str, what: &str| super::super::topic::device(id, what);
        for what in GUARDED {
            assert!(may("app1", &topic("plant", what)) && may("app1", &topic("shop/plant", what)));
            assert!(!may("app1", &topic("plant/press", what)) && may("app2", &topic("plant/press", what)));
            assert!(!may("app1", &topic("plant/twin", what)) && may("app3", &topic("plant/twin", what)));
            assert!(!may("app3", &topic("plant", what)) && !may("app2", &topic("plant", what)));
        }
    }

    proptest! {
        #[test]
        fn no_annotation_breaks_out_of_its_line(annotation in any::<String>(), passwords in any::<String>()) {
            let mut writers = Writers::default();
            writers.device("a/b", Some(&device(&annotation)));
            let of: Vec<String> = writers.0.values().flatten().cloned().collect();
            let known = ["#", "topic read ", "topic readwrite ", "user ", "pattern ", ""];
            for line in writers.list(&users(&passwords)).lines().chain(writers.list(&of).lines()) {
                prop_assert!(known.iter().any(|begin| line.starts_with(begin) && (line.is_empty() || !begin.is_empty())), "{line:?}");
                prop_assert!(line.split(' ').count() <= 3 || line.starts_with('#'));
            }
        }
    }
}
